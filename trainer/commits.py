"""When a run commits, and what becomes of its commits."""

from __future__ import annotations

import time

from trainer import checkpoint
from trainer.errors import CheckpointError
from trainer.runs import commit_path, commits
from trainer.session import Session
from trainer.state import State


class Committer:
    """Says when a commit is due, writes it, and keeps what must be kept."""

    def __init__(self, session: Session, state: State) -> None:
        self._session, self._state = session, state
        self._config = session.plan.config.checkpoint
        self._committed_at = time.monotonic()
        own = session.world.on_main(lambda: commits(session.run))  # not one resumed from elsewhere
        self._committed_step = state.step if commit_path(session.run, state.step) in own else None

    def clock_wishes(self) -> bool:
        """Whether this rank, if it is the main one, finds that enough time has passed."""
        minutes = (time.monotonic() - self._committed_at) / 60
        interval = self._config.interval_minutes
        return self._session.world.is_main and 0 < interval <= minutes

    def due(self) -> bool:
        """Whether a commit is due by the number of steps."""
        interval = self._config.interval_steps
        return interval > 0 and self._state.step % interval == 0

    def commit(self, *, last: bool = False) -> None:
        """Commit the state, unless it is. A failure is told; only that of the last is fatal."""
        session, step = self._session, self._state.step
        if step == self._committed_step:
            return
        started = time.monotonic()
        self._committed_at = started  # a failure too: the next try is an interval away
        tensors = checkpoint.tensors_of(session.network.bare, session.optimizer)
        record = self._state.record(session.plan)
        try:
            folder = checkpoint.save(session.run, tensors, record, session.world)
        except CheckpointError as error:
            session.journal.event("commit refused", step=step, reason=str(error))
            if last:
                raise
            session.screen.say(f"! {error}; TRAINING GOES ON")
            return
        self._committed_step = step
        session.world.on_main(lambda: checkpoint.purge(session.run, self._config))
        seconds = round(time.monotonic() - started, 3)
        session.tell(f"committed {folder} in {seconds:.1f} s", "commit", step=step, took_s=seconds)
