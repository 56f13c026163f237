"""One run, from its plan to its last checkpoint.

    plan = make_plan(configure(preset="tiny", sets=["max_steps=40"], shards="shards/"))
    train(plan, Path("runs/tiny"))            # summer-train --shards shards/ --preset tiny

What happens to a step's tokens:

1.  `mixture.py` says which rows the step's sample numbers mean; nothing of that is stored.
2.  `batches.py` reads this rank's rows, verifies and stacks them; `loader.py` reads ahead.
3.  The model returns the sum of the losses. Backward divides it by the targets of a full step, so
    that micro-batches and ranks just add up: gradients in the last backward pass, counts in one
    reduction.
4.  `optimizer.py` corrects by the true number of targets, clips, and updates, unless `guard.py`
    finds the gradient harmful; then the device skips the update by itself.
5.  `metrics_logger.py` reads the step's numbers a step later: nothing waits for the device.
6.  When a checkpoint is due, `save.py` writes all of this down, and the run can be killed: the same
    command goes on from there, bit for bit.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from shards.errors import ShardError
from trainer.checkpoint.retention import invalidate_after, mirror_of
from trainer.checkpoint.runs import checkpoints, newest_checkpoint
from trainer.checkpoint.storage import read_record
from trainer.config.deadline import stop_time
from trainer.config.sections import parse_steps
from trainer.config.train_plan import TrainPlan
from trainer.data.loader import Loader
from trainer.distributed.devices import keep_freed_memory
from trainer.distributed.world import (
    join_world,
    listen_for_stop,
    restarted_by_torchrun,
    translate_comm_errors,
)
from trainer.errors import TrainingError
from trainer.faults.guard import Guard
from trainer.faults.heartbeat import Watchdog, watch_ranks
from trainer.faults.inject import Faults, check_reachable, parse_faults
from trainer.metrics import goodput, metrics_logger
from trainer.metrics.display import Display
from trainer.metrics.metrics import RunEvent
from trainer.metrics.metrics_logger import TARGETS, CompletedStep, StepFlags, StepMetrics, flagged
from trainer.metrics.profiling import StepProfiler
from trainer.optimizer.optimizer import finish_gradients, set_lr, update
from trainer.optimizer.schedule import lr_at
from trainer.session import network
from trainer.session.budget import Budget, apply_request
from trainer.session.resume import begin, open_held_out, resume_loader
from trainer.session.save import CheckpointSaver, open_saver
from trainer.session.state import Session, State, claim


class TrainingJob(NamedTuple):
    """What the loop of one rank works with."""

    session: Session
    state: State
    loader: Loader
    saver: CheckpointSaver
    watchdog: Watchdog
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
    plan: TrainPlan, run: Path, *, resume: str = "auto", display: Display | None = None
) -> Outcome:
    """How the run ended. It is saved; `train` with the same plan goes on from there."""
    display = display or Display()
    orders, restarted = parse_faults(), restarted_by_torchrun()
    check_reachable(orders, plan.shape.world_size, plan.config.max_steps)
    state_bytes = plan.memory["weights"] + plan.memory["moments"]
    until = stop_time(plan.config.stop_after, state_bytes)
    with (
        listen_for_stop() as asked,
        join_world(plan.config.device, plan.config.guard.hang_timeout_s) as world,
        translate_comm_errors(world),
        claim(run, world),
        watch_ranks(run, world, plan.config.guard.hang_timeout_s) as watchdog,
    ):
        if world.device.type == "cpu":
            keep_freed_memory()
        faults = Faults(orders, run, world.rank)

        def asked_to_stop() -> bool:
            return asked() or time.time() > until

        while True:
            try:
                with (
                    begin(plan, run, resume, world, display, restarted=restarted) as found,
                    resume_loader(*found, faults) as loader,
                    open_saver(*found) as saver,
                ):
                    return _go_on(
                        TrainingJob(*found, loader, saver, watchdog, faults, asked_to_stop)
                    )
            except RolledBackError:
                restarted = True
            gc.collect()  # the old model, before another is made


def _go_on(job: TrainingJob) -> Outcome:
    """Train from the state that was found to the end, or until some rank is asked to stop."""
    session, state, loader, saver, watchdog, faults, _ = job
    plan, world, optimizer = session.plan, session.world, session.optimizer
    config, shape, model = plan.config, plan.shape, session.network.model
    guard = Guard(config.guard, state.norms, world.device)
    logger = metrics_logger.MetricsLogger(plan, session.journal, session.display, state)
    watch = goodput.Stopwatch(state.spent_s)
    budget = Budget(config, state, watch, world.is_main)
    held_out = open_held_out(plan, world)
    profiler = StepProfiler(parse_steps(config.profile_steps if world.is_main else ""), session.run)
    loss_scale = world.world_size / plan.step_tokens  # W / (G T)
    if config.compile and state.step < state.last_step(config.max_steps):
        session.display.wait("compiling ...")
    stop = checkpoint = False
    while state.step < state.last_step(config.max_steps) and not stop:
        profiler.before(state.step + 1)
        lr = set_lr(optimizer, lr_at(state.step, config.optim, config.max_steps, state.anneal))
        scale = loss_scale * faults.inject(state.step + 1, loader)
        step_sums = metrics_logger.StepSums(world.device)
        for micro_step in range(shape.grad_accum_steps):
            watchdog.mark(state.step + 1, "data")
            tokens, targets, dropout_key = loader.next()  # [B, T], [B, T], [B, 2]
            watchdog.mark(state.step + 1, "gradient")
            network.reseed_attention_dropout(config, state.step, micro_step, world.rank)
            with (
                network.no_sync_unless_last(model, micro_step, shape.grad_accum_steps),
                network.autocast(config, world.device),
            ):
                loss_sum = model(tokens, targets, dropout_key)
            (loss_sum * scale).backward()  # the true count enters finish_gradients
            step_sums.add(loss_sum, targets)
        with watch.within("communication"):
            sums = step_sums.reduce(world, _flags(job, budget))
        grad_norm = finish_gradients(optimizer, plan.step_tokens, sums[TARGETS], config.optim)
        skip = guard.should_skip(
            grad_norm, flagged=flagged(sums, "skip") + flagged(sums, "damaged")
        )
        update(optimizer, skip, keep_gradients=network.gradients_in_buckets(model))

        pending = metrics_logger.PendingMetrics(sums, skip, state.first_index, grad_norm=grad_norm)
        state.advance(shape.global_batch_size, watch.lap())
        watch.add("communication", network.exposed_exchange_s(model))
        stop, requested = apply_step_result(logger.submit(pending, lr, loader.waited_s), job)
        if held_out is not None and state.step % config.validation.interval == 0:
            watchdog.mark(state.step, "validation")
            with watch.paused("evaluation"):
                logger.add_scores(
                    held_out.scores(session.network.bare, network.autocast(config, world.device))
                )
        checkpoint = checkpoint or requested or saver.due_by_steps()
        if checkpoint and not state.refused_in_a_row:  # a rollback must find one from before them
            watchdog.mark(state.step, "checkpoint")
            asked, _ = apply_step_result(logger.flush(), job)
            stop = stop or asked
            if not state.refused_in_a_row:
                with watch.paused("checkpoint"):
                    saver.checkpoint()
                    if state.anneal is not None and state.anneal.first_step == state.step:
                        saver.wait()  # what follows from the clock must be on disk first
                checkpoint = False
        profiler.after(state.step)
    watchdog.mark(state.step, "checkpoint")
    apply_step_result(logger.flush(), job)
    with watch.paused("checkpoint"):
        saver.checkpoint(last=True)
    profiler.after(state.step, last=True)
    return _ended(session, state)


def _flags(job: TrainingJob, budget: Budget) -> StepFlags:
    """What this rank knows of the step under way and the others do not."""
    return StepFlags(
        stop=job.asked_to_stop(),
        checkpoint=job.saver.due_by_clock(),
        skip=job.state.first_index in job.session.history.skipped,
        damaged=job.loader.damage is not None,
        budget=budget.request(),
    )


def _ended(session: Session, state: State) -> Outcome:
    last_step = state.last_step(session.plan.config.max_steps)
    checkpoint, stopped = newest_checkpoint(session.run), state.step < last_step
    seconds = goodput.parts(state.time_s, state.spent_s)
    price = session.plan.config.dollars_per_hour / 3600
    cost = f"; $ {sum(seconds.values()) * price:.2f}" if price else ""
    session.display.print(f"time: {goodput.time_shares(seconds)}{cost}")
    if stopped:
        text = f"stopped at step {state.step}, saved: the same command goes on"
        session.log(text, RunEvent.STOPPED, step=state.step, spent_s=seconds)
    else:
        session.log(f"done: {checkpoint}", RunEvent.DONE, step=state.step, spent_s=seconds)
    return Outcome(state.step, stopped, checkpoint)


def apply_step_result(completed: CompletedStep, job: TrainingJob) -> tuple[bool, bool]:
    """Whether to stop, and to checkpoint; what else the step's numbers ask for is done here."""
    if completed is None:
        return False, False
    step, metrics = completed
    state, config = job.state, job.session.plan.config.guard
    if metrics.flags.damaged:
        _stop_before(step, metrics, job)
    if metrics.skipped:
        state.refused_in_a_row += 1
        _log_skipped(step, metrics, job.session)
        if state.refused_in_a_row > config.patience:
            _roll_back(step, job)
    else:
        state.refused_in_a_row = 0
        if metrics.grad_norm > 0:
            state.norms = [*state.norms, metrics.grad_norm][-config.window :]
    if news := apply_request(metrics.flags.budget, state, job.session.plan.config.max_steps):
        job.session.log(news, RunEvent.ANNEAL, step=state.step, anneal=state.anneal)
    return metrics.flags.stop, metrics.flags.checkpoint or bool(news)


def _log_skipped(step: int, metrics: StepMetrics, session: Session) -> None:
    facts = {"step": step, "first_index": metrics.first_index}
    if metrics.flags.skip:  # and written down already
        session.display.print(f"! step {step}: update skipped, as it was before")
        return
    norm = metrics.grad_norm if math.isfinite(metrics.grad_norm) else None
    what = "not finite" if norm is None else f"norm {norm:.2f} is a spike"
    text = f"! step {step}: gradient {what}, update skipped"
    session.log(text, RunEvent.SKIPPED, **facts, grad_norm=norm)


def _stop_before(step: int, metrics: StepMetrics, job: TrainingJob) -> None:
    """Checkpoint as of before `step`, of which a row is damaged (updates stopped), and raise."""
    session, state = job.session, job.state
    found = [error for error in session.world.gather(job.loader.damage) if error is not None]
    state.step, state.next_index = step - 1, metrics.first_index
    job.saver.checkpoint(last=True)
    session.journal.event(RunEvent.DAMAGED, step=step, reason=str(found[0]))
    raise ShardError(
        f"{found[0]}; the run is saved at step {step - 1} and goes on from there with the same "
        "command"
    )


def _roll_back(step: int, job: TrainingJob) -> None:
    """Have the run go on from the last good checkpoint, without the samples from there to here."""
    session, state = job.session, job.state
    most = session.plan.config.guard.max_rollbacks
    skipped = f"step {step}: {state.refused_in_a_row} updates in a row were skipped"
    if session.history.rollbacks >= most:
        job.saver.checkpoint(last=True)
        raise TrainingError(
            f"{skipped}, after {most} rollbacks; the run is saved: go on from an earlier "
            "checkpoint (--resume runs/NAME/checkpoints/step-N) with a lower optim.lr or with "
            "--set precision=fp32, or raise guard.max_rollbacks"
        )
    job.saver.finish()
    to_step, begin = session.world.on_main(lambda: _last_good(session))
    session.log(
        f"! {skipped}: back to step {to_step}, without samples {begin} to {state.next_index - 1}",
        RunEvent.ROLLBACK, step=step, to_step=to_step, skipped=[begin, state.next_index],
    )  # fmt: skip
    raise RolledBackError


def _last_good(session: Session) -> tuple[int, int]:
    """Step and next sample of the newest checkpoint before the skipped updates, now the last."""
    mirror = mirror_of(session.run, session.plan.config.checkpoint)
    for checkpoint in reversed(checkpoints(session.run)):
        record = read_record(checkpoint)
        if not record.get("refused_in_a_row"):
            invalidate_after(session.run, int(record["step"]), mirror)
            return int(record["step"]), int(record["next_index"])
    invalidate_after(session.run, -1, mirror)
    return 0, session.first_index
