"""What events.jsonl says of skipped updates and rollbacks that a checkpoint may not know yet."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

from trainer.metrics.metrics import RunEvent, read_events

NEW_HISTORY: Final = "anew"
"""Key of an event from which on earlier ones do not count."""


class GuardHistory(NamedTuple):
    """What events.jsonl says of a run's past that its checkpoints may not know yet."""

    skipped: frozenset[int] = frozenset()  # the first sample of each step whose update was skipped
    left_out: tuple[tuple[int, int], ...] = ()  # samples [begin, end) that rollbacks passed over
    rollbacks: int = 0


def read_history(run: Path) -> GuardHistory:
    """The skipped updates and rollbacks since the run's history began."""
    history = GuardHistory()
    for event in read_events(run):
        if event.get(NEW_HISTORY):
            history = GuardHistory()
        if event["event"] == RunEvent.SKIPPED and "first_index" in event:
            history = history._replace(skipped=history.skipped | {int(event["first_index"])})
        if event["event"] == RunEvent.ROLLBACK:
            left_out = add_left_out(history.left_out, *map(int, event["skipped"]))
            history = history._replace(left_out=left_out, rollbacks=history.rollbacks + 1)
    return history


def add_left_out(
    ranges: Sequence[tuple[int, int]], begin: int, end: int
) -> tuple[tuple[int, int], ...]:
    """Ranges of samples, ascending, with one more that ends after them and absorbs the overlap."""
    return (*((b, min(e, begin)) for b, e in ranges if b < begin), (begin, end))
