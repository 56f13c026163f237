"""What a step's numbers ask for, once they are there: all ranks read the same, and do the same."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from shards.errors import ShardError
from trainer.checkpoint.retention import abandon_after, mirror_of
from trainer.checkpoint.runs import checkpoints
from trainer.checkpoint.storage import read_record
from trainer.data.loader import Loader
from trainer.errors import TrainingError
from trainer.faults.guard import REFUSED, ROLLBACK
from trainer.faults.heartbeat import Heart
from trainer.faults.inject import Faults
from trainer.metrics.step_metrics import Reading
from trainer.session.budget import heed
from trainer.session.logbook import Arrived
from trainer.session.save import CheckpointSaver
from trainer.session.session import Session
from trainer.session.state import State


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
            abandon_after(session.run, int(record["step"]), mirror)
            return int(record["step"]), int(record["next_index"])
    abandon_after(session.run, -1, mirror)
    return 0, session.first_index
