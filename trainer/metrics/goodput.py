"""Where a run's seconds went, over all its sessions.

compute        training steps, less what follows
data           waiting for the loader
communication  waiting for other ranks: gradients that the backward pass did not hide (as DDP
               samples them, every hundredth step), and a step's sums
checkpoint     checkpoints, as long as training waited for them
evaluation     held-out sequences
start          from the run's first start to its first step
restarts       lost to every further start: the steps made again and starting up; not the time in
               which nothing ran, from the last sign of life on, that nobody is paid for

All is read off the host's clock: what a device still has to do when a checkpoint or an evaluation
begins is counted there, at most one step each time.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, Final

from trainer.metrics.metrics import RunEvent

_ENDS: Final = (RunEvent.STOPPED, RunEvent.DONE)  # from then on no time is lost

_OF_STEPS: Final = ("data", "communication")
_APART: Final = ("checkpoint", "evaluation", "start", "restarts")

Spent = dict[str, float]


class Stopwatch:
    """Training time in laps; what is paused belongs to no lap, and is added to its kind."""

    def __init__(self, spent_s: Spent) -> None:
        self.spent_s = spent_s
        self.longest_s: Spent = {}
        self._mark = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last lap."""
        before, self._mark = self._mark, time.perf_counter()
        return self._mark - before

    def add(self, kind: str, seconds: float) -> None:
        """Count seconds of a kind."""
        self.spent_s[kind] = self.spent_s.get(kind, 0.0) + seconds
        self.longest_s[kind] = max(self.longest_s.get(kind, 0.0), seconds)

    @contextmanager
    def within(self, kind: str) -> Iterator[None]:
        """Time inside belongs to the lap, and is counted as this kind too."""
        start = time.perf_counter()
        yield
        self.add(kind, time.perf_counter() - start)

    @contextmanager
    def paused(self, kind: str) -> Iterator[None]:
        """Time inside is left out of the lap."""
        start = time.perf_counter()
        with self.within(kind):
            yield
        self._mark += time.perf_counter() - start


def parts(time_s: float, spent_s: Mapping[str, float]) -> Spent:
    """Seconds of each part, from those of training steps and those of the kinds."""
    of_steps = {kind: spent_s.get(kind, 0.0) for kind in _OF_STEPS}
    apart = {kind: spent_s.get(kind, 0.0) for kind in _APART}
    return {"compute": max(0.0, time_s - sum(of_steps.values())), **of_steps, **apart}


def count_start(
    spent_s: Spent,
    began: float,
    saved: float | None,
    events: Sequence[Mapping[str, Any]],
    alive: float,
) -> None:
    """Count the time up to now as that of a start, or as lost to a restart.

    `began` is when this process was started, `saved` when the checkpoint that it resumes was
    written, `events` are the run's so far, `alive` when it last wrote a log. All in Unix seconds.
    """
    kind, lost_s = "start", 0.0
    if events:
        kind, since = "restarts", events[0]["unix_s"] if saved is None else saved
        away_s = sum(
            after["unix_s"] - before["unix_s"]
            for before, after in pairwise(events)
            if before["event"] in _ENDS and before["unix_s"] >= since
        )
        lost_s = max(0.0, min(alive, began) - since - away_s)
    spent_s[kind] = spent_s.get(kind, 0.0) + lost_s + max(0.0, time.time() - began)


def time_shares(seconds: Mapping[str, float]) -> str:
    """The parts as shares of their sum, for people; parts without a share are left out."""
    total_s = sum(seconds.values())
    shares = [f"{part} {value / total_s:.1%}" for part, value in seconds.items() if value > 0]
    return f"{total_s:,.0f} s in all: {', '.join(shares)}"
