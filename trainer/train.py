"""One run, from its plan to its last checkpoint.

    plan = make_plan(configure(preset="tiny", sets=["max_steps=40"], shards="shards/"))
    train(plan, Path("runs/tiny"))            # summer-train --shards shards/ --preset tiny

What happens to a step's tokens:

1.  `mixture.py` says which rows the step's sample numbers mean; nothing of that is stored.
2.  `batches.py` reads this rank's rows, proves and stacks them; `loader.py` reads ahead.
3.  The model returns the sum of the losses. Backward divides it by the targets that a full step
    has, so that micro-batches and ranks just add up.
4.  Ranks add up their gradients (in the last backward pass) and their counts (one reduction).
5.  `optimizer.py` corrects by the true number of targets, clips, and updates, unless `guard.py`
    finds the gradient harmful; then the device skips the update by itself.
6.  The numbers of the step are on their way to the host, where `logbook.py` reads them a step
    later: the processor never waits for the device.
7.  When a checkpoint is due, `checkpoint.py` writes all of this down, proven, and the run can be
    killed: the same command goes on from there, bit for bit.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

from shards.errors import ShardError
from trainer.checkpoint.retention import invalidate_after, mirror_of
from trainer.checkpoint.runs import checkpoints, newest_checkpoint
from trainer.checkpoint.storage import read_record
from trainer.config.plan import TrainPlan
from trainer.data.loader import Loader
from trainer.distributed.allocator import keep_freed_memory
from trainer.distributed.world import join_world, restarted_by_torchrun
from trainer.errors import TrainingError
from trainer.faults.faults import named_faults
from trainer.faults.guard import REFUSED, ROLLBACK, Guard
from trainer.faults.heartbeat import Heart, beating
from trainer.faults.inject import Faults, ordered_faults, refuse_unmet
from trainer.faults.signals import listen_for_stop
from trainer.metrics import goodput
from trainer.metrics.display import Screen, Silent
from trainer.metrics.profiling import StepProfiler, parse_steps
from trainer.metrics.step_metrics import Late, Reading, Tally, Wishes, refusal_wished
from trainer.optimizer.optimizer import finish_gradients, set_lr, update
from trainer.optimizer.schedule import lr_at
from trainer.session.budget import Budget, heed
from trainer.session.logbook import Arrived, Logbook, spent_line
from trainer.session.network import (
    autocast,
    exposed_exchange_s,
    no_sync_unless_last,
    reseed_attention_dropout,
)
from trainer.session.resume import begin
from trainer.session.save import CheckpointSaver, open_saver
from trainer.session.session import Session, claim, open_held_out, open_loader
from trainer.session.state import State

STOPPED: Final = "stopped"
"""The event of a run that was asked to stop and has saved."""


class Job(NamedTuple):
    """What the loop of one rank works with."""

    session: Session
    state: State
    loader: Loader
    saver: CheckpointSaver
    heart: Heart
    faults: Faults
    asked_to_stop: Callable[[], bool]


class RolledBackError(Exception):
    """The run is to go on from an earlier checkpoint, without the samples from there to here."""


class Outcome(NamedTuple):
    """How a run ended: its last step and checkpoint, and whether it was asked to stop."""

    step: int
    stopped: bool
    checkpoint: Path


def train(
    plan: TrainPlan, run: Path, *, resume: str = "auto", screen: Screen | None = None
) -> Outcome:
    """How the run ended. It is saved then; `train` with the same plan goes on from there."""
    screen = screen or Silent()
    orders, restarted = ordered_faults(), restarted_by_torchrun()
    refuse_unmet(orders, plan.shape.world_size, plan.config.max_steps)
    with (
        listen_for_stop() as asked_to_stop,
        join_world(plan.config.device) as world,
        named_faults(world),
        claim(run, world),
        beating(run, world, plan.config.guard.hang_timeout_s) as heart,
    ):
        if world.device.type == "cpu":
            keep_freed_memory()
        faults = Faults(orders, run, world.rank)
        while True:
            try:
                with (
                    begin(plan, run, resume, world, screen, restarted=restarted) as found,
                    open_loader(*found, faults) as loader,
                    open_saver(*found) as saver,
                ):
                    return _go_on(Job(*found, loader, saver, heart, faults, asked_to_stop))
            except RolledBackError:
                restarted = True
            gc.collect()  # the model that is left behind, before another is made


def _go_on(job: Job) -> Outcome:
    """Train from the state that was found to the end, or until some rank is asked to stop."""
    session, state, loader, saver, heart, faults, _ = job
    plan, world, optimizer = session.plan, session.world, session.optimizer
    config, shape, model = plan.config, plan.shape, session.network.model
    guard = Guard(config.guard, state.norms, world.device)
    logbook = Logbook(plan, session.journal, session.screen, state)
    watch = goodput.Stopwatch(state.spent_s)
    budget = Budget(config, state, watch, world.is_main)
    held_out = open_held_out(plan, world)
    profiler = StepProfiler(parse_steps(config.profile_steps if world.is_main else ""), session.run)
    loss_scale = world.world_size / plan.step_tokens  # W / (G T)
    stop = checkpoint = False
    while state.step < state.last_step(config.max_steps) and not stop:
        profiler.before(state.step + 1)
        lr = set_lr(optimizer, lr_at(state.step, config.optim, config.max_steps, state.anneal))
        scale = loss_scale * faults.strike(state.step + 1, loader)
        tally = Tally(world.device)
        for micro_step in range(shape.grad_accum_steps):
            heart.mark(state.step + 1, "data")
            tokens, targets, dropout_key = loader.next()  # [B, T], [B, T], [B, 2]
            heart.mark(state.step + 1, "gradient")
            reseed_attention_dropout(config, state.step, micro_step, world.rank)
            with (
                no_sync_unless_last(model, micro_step, shape.grad_accum_steps),
                autocast(config, world.device),
            ):
                loss_sum = model(tokens, targets, dropout_key)
            (loss_sum * scale).backward()  # the true count enters finish_gradients
            tally.add(loss_sum, targets)
        with watch.within("communication"):
            sums = tally.reduce(world, _wishes(job, budget))
        grad_norm = finish_gradients(optimizer, plan.step_tokens, sums[1], config.optim)
        refused = guard.refuse(grad_norm, refusal_wished(sums))
        update(optimizer, refused)

        late = Late(sums, grad_norm, refused, state.first_index)
        state.advance(shape.global_batch_size, watch.lap())
        watch.add("communication", exposed_exchange_s(model))
        stop, wished = look_at(logbook.enter(late, state, lr, loader.waited_s), job)
        if held_out is not None and state.step % config.validation.interval == 0:
            heart.mark(state.step, "validation")
            with watch.paused("evaluation"):
                logbook.add(held_out.scores(session.network.bare, autocast(config, world.device)))
        checkpoint = checkpoint or wished or saver.due()
        if checkpoint and not state.refused_in_a_row:  # a rollback must find one from before them
            heart.mark(state.step, "checkpoint")
            asked, _ = look_at(logbook.settle(), job)
            stop = stop or asked
            if not state.refused_in_a_row:
                with watch.paused("checkpoint"):
                    saver.checkpoint()
                    if state.anneal is not None and state.anneal.first_step == state.step:
                        saver.wait()  # what follows from the clock must be on disk first
                checkpoint = False
        profiler.after(state.step)
    heart.mark(state.step, "checkpoint")
    look_at(logbook.settle(), job)
    with watch.paused("checkpoint"):
        saver.checkpoint(last=True)
    profiler.after(state.step, last=True)
    return _ended(session, state)


def _wishes(job: Job, budget: Budget) -> Wishes:
    """What this rank knows of the step under way and the others do not."""
    return Wishes(
        stop=job.asked_to_stop(),
        checkpoint=job.saver.clock_wishes(),
        refuse=job.state.first_index in job.session.recorded.refused,
        damaged=job.loader.damage is not None,
        budget=budget.wish(),
    )


def _ended(session: Session, state: State) -> Outcome:
    last_step = state.last_step(session.plan.config.max_steps)
    checkpoint, stopped = newest_checkpoint(session.run), state.step < last_step
    seconds = goodput.parts(state.time_s, state.spent_s)
    session.screen.say(spent_line(seconds, session.plan.config))
    if stopped:
        text = f"stopped at step {state.step}, saved: the same command goes on"
        session.tell(text, STOPPED, step=state.step, spent_s=seconds)
    else:
        session.tell(f"done: {checkpoint}", "done", step=state.step, spent_s=seconds)
    return Outcome(state.step, stopped, checkpoint)


def look_at(arrived: Arrived, job: Job) -> tuple[bool, bool]:
    """Whether some rank wishes to stop, and to checkpoint; what the step's numbers ask for is
    done."""
    if arrived is None:
        return False, False
    step, reading = arrived
    state, config = job.state, job.session.plan.config.guard
    if reading.wished.damaged:
        _stop_before(step, reading, job)
    if reading.refused:
        state.refused_in_a_row += 1
        _tell_refused(step, reading, job.session)
        if state.refused_in_a_row > config.patience:
            _roll_back(step, job)
    else:
        state.refused_in_a_row = 0
        if reading.grad_norm > 0:
            state.norms = [*state.norms, reading.grad_norm][-config.window :]
    if news := heed(reading.wished.budget, state, job.session.plan.config.max_steps):
        job.session.tell(news, "anneal", step=state.step, anneal=state.anneal)
    return reading.wished.stop, reading.wished.checkpoint or bool(news)


def _tell_refused(step: int, reading: Reading, session: Session) -> None:
    facts = {"step": step, "first_index": reading.first_index}
    if reading.wished.refuse:  # and written down already
        session.screen.say(f"! step {step}: update refused, as it was before")
    elif math.isfinite(reading.grad_norm):
        text = f"! step {step}: gradient norm {reading.grad_norm:.2f} is a spike, update refused"
        session.tell(text, REFUSED, **facts, grad_norm=reading.grad_norm)
    else:
        text = f"! step {step}: gradient not finite, update refused"
        session.tell(text, REFUSED, **facts, grad_norm=None)


def _stop_before(step: int, reading: Reading, job: Job) -> None:
    """Checkpoint as of before `step`, of which a row is damaged, and raise what is wrong with it.

    Every update since has been refused, on all ranks: weights and moments are those of then.
    """
    session, state = job.session, job.state
    found = [error for error in session.world.gather(job.loader.damage) if error is not None]
    state.step, state.next_index = step - 1, reading.first_index
    job.saver.checkpoint(last=True)
    session.journal.event("damaged", step=step, reason=str(found[0]))
    raise ShardError(
        f"{found[0]}; the run is saved at step {step - 1} and goes on from there with the same "
        "command"
    )


def _roll_back(step: int, job: Job) -> None:
    """Leave out the samples from the last good checkpoint to here, and have the run go on from
    it."""
    session, state = job.session, job.state
    most = session.plan.config.guard.max_rollbacks
    refused = f"step {step}: {state.refused_in_a_row} updates in a row were refused"
    if session.recorded.rollbacks >= most:
        job.saver.checkpoint(last=True)
        raise TrainingError(
            f"{refused}, after {most} rollbacks; the run is saved: go on from an earlier "
            "checkpoint (--resume runs/NAME/checkpoints/step-N) with a lower optim.lr or with "
            "--set precision=fp32, or raise guard.max_rollbacks"
        )
    job.saver.finish()
    to_step, begin = session.world.on_main(lambda: _last_good(session))
    session.tell(
        f"! {refused}: back to step {to_step}, without samples {begin} to {state.next_index - 1}",
        ROLLBACK, step=step, to_step=to_step, skipped=[begin, state.next_index],
    )  # fmt: skip
    raise RolledBackError


def _last_good(session: Session) -> tuple[int, int]:
    """Step and next sample of the newest checkpoint that no refusal precedes; later ones set
    aside."""
    mirror = mirror_of(session.run, session.plan.config.checkpoint)
    for checkpoint in reversed(checkpoints(session.run)):
        record = read_record(checkpoint)
        if not record.get("refused_in_a_row"):
            invalidate_after(session.run, int(record["step"]), mirror)
            return int(record["step"]), int(record["next_index"])
    invalidate_after(session.run, -1, mirror)
    return 0, session.first_index
