"""One run, from its plan to its last commit.

    plan = make_plan(configure(preset="tiny", sets=["max_steps=40"], shards="shards/"))
    train(plan, Path("runs/tiny"))            # summer-train --shards shards/ --preset tiny

What happens to a step's tokens:

1.  `mixture.py` says which rows the step's sample numbers mean; nothing of that is stored.
2.  `loader.py` reads this rank's rows, proves each one and stacks them: [B, T] on the device.
3.  The model returns the sum of the losses. Backward divides it by the targets that a full step
    has, so that micro-batches and ranks just add up.
4.  Ranks add up their gradients (in the last backward pass) and their counts (one reduction).
5.  `optimizer.py` corrects by the true number of targets, clips, and updates, unless the gradient
    is not finite; then the device skips the update by itself.
6.  The numbers of the step are on their way to the host, where `logbook.py` reads them a step
    later: the processor never waits for the device.
7.  When a commit is due, `checkpoint.py` writes all of this down, proven, and the run can be
    killed: the same command goes on from there, bit for bit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final, NamedTuple

from trainer import goodput
from trainer.budget import Budget, heed
from trainer.commits import Committer
from trainer.distributed import join_world
from trainer.faults import named_faults
from trainer.guard import judge
from trainer.logbook import Arrived, Logbook, spent_line
from trainer.optimizer import finish_gradients, set_lr
from trainer.parallel import (
    autocast,
    exposed_exchange_s,
    no_sync_unless_last,
    reseed_attention_dropout,
)
from trainer.plan import Plan
from trainer.profiling import StepProfiler, parse_steps
from trainer.runs import newest_commit
from trainer.schedule import lr_at
from trainer.screen import Screen, Silent
from trainer.session import Session, begin, claim, open_loader
from trainer.signals import listen_for_stop
from trainer.state import State
from trainer.tally import Late, Tally
from trainer.validation import open_held_out

STOPPED: Final = "stopped"
"""The event of a run that was asked to stop and has committed."""


class Outcome(NamedTuple):
    """How a run ended: after which step, whether because it was asked to, and its last commit."""

    step: int
    stopped: bool
    commit: Path


def train(plan: Plan, run: Path, *, resume: str = "auto", screen: Screen | None = None) -> Outcome:
    """How the run ended. It is committed then; `train` with the same plan goes on from there."""
    config, shape = plan.config, plan.shape
    with (
        listen_for_stop() as asked_to_stop,
        join_world(config.device) as world,
        named_faults(world),
        claim(run, world),
        begin(plan, run, resume, world, screen or Silent()) as (session, state),
        open_loader(session, state) as loader,
    ):
        model, optimizer = session.network.model, session.optimizer
        logbook = Logbook(plan, session.journal, session.screen, state)
        watch = goodput.Stopwatch(state.spent_s)
        budget = Budget(config, state, watch, world.is_main)
        committer = Committer(session, state)
        held_out = open_held_out(plan, world)
        profiler = StepProfiler(parse_steps(config.profile_steps if world.is_main else ""), run)
        loss_scale = world.world_size / plan.step_tokens  # W / (G T)
        stop = False
        while state.step < state.last_step(config.max_steps) and not stop:
            profiler.before(state.step + 1)
            lr = set_lr(optimizer, lr_at(state.step, config.optim, config.max_steps, state.anneal))
            tally = Tally(world.device)
            for micro_step in range(shape.grad_accum_steps):
                tokens, targets, dropout_key = loader.next()  # [B, T], [B, T], [B, 2]
                reseed_attention_dropout(config, state.step, micro_step, world.rank)
                with (
                    no_sync_unless_last(model, micro_step, shape.grad_accum_steps),
                    autocast(config, world.device),
                ):
                    loss_sum = model(tokens, targets, dropout_key)
                (loss_sum * loss_scale).backward()  # the true count enters finish_gradients
                tally.add(loss_sum, targets)
            with watch.within("communication"):
                sums = tally.reduce(
                    world,
                    stop=asked_to_stop(),
                    commit=committer.clock_wishes(),
                    budget=budget.wish(),
                )
            grad_norm = finish_gradients(optimizer, plan.step_tokens, sums[1], config.optim)
            optimizer.step()
            optimizer.zero_grad()

            state.advance(shape.global_batch_size, watch.lap())
            watch.add("communication", exposed_exchange_s(model))
            before = logbook.enter(Late(sums, grad_norm), state, lr, loader.waited_s)
            stop, commit = _look_at(before, session, state)
            if held_out is not None and state.step % config.validation.interval == 0:
                with watch.paused("evaluation"):
                    logbook.add(
                        held_out.losses(session.network.bare, autocast(config, world.device))
                    )
            if commit or committer.due():
                asked, _ = _look_at(logbook.settle(), session, state)
                stop = stop or asked
                with watch.paused("checkpoint"):
                    committer.commit()
            profiler.after(state.step)
        _look_at(logbook.settle(), session, state)
        with watch.paused("checkpoint"):
            committer.commit(last=True)
        profiler.after(state.step, last=True)
        return _ended(session, state)


def _ended(session: Session, state: State) -> Outcome:
    last_step = state.last_step(session.plan.config.max_steps)
    commit, stopped = newest_commit(session.run), state.step < last_step
    seconds = goodput.parts(state.time_s, state.spent_s)
    session.screen.say(spent_line(seconds, session.plan.config))
    if stopped:
        text = f"stopped at step {state.step}, committed: the same command goes on"
        session.tell(text, STOPPED, step=state.step, spent_s=seconds)
    else:
        session.tell(f"done: {commit}", "done", step=state.step, spent_s=seconds)
    return Outcome(state.step, stopped, commit)


def _look_at(arrived: Arrived, session: Session, state: State) -> tuple[bool, bool]:
    """Whether some rank wishes to stop, and to commit; a refused update is told and counted."""
    if arrived is None:
        return False, False
    step, reading = arrived
    if reading.refused:
        session.tell(f"! step {step}: gradient not finite, update refused", "refused", step=step)
    state.refused_in_a_row = judge(reading, step, state.refused_in_a_row)
    if news := heed(reading.budget_wish, state, session.plan.config.max_steps):
        session.tell(news, "anneal", step=state.step, anneal=state.anneal)
    return reading.stop_wished, reading.commit_wished or bool(news)
