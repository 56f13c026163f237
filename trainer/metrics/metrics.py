"""What a run writes down: metrics.jsonl, events.jsonl and, if asked, TensorBoard."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any, Final, NamedTuple

from shards.files import publish_bytes
from shards.shape import check_shape
from trainer.checkpoint.runs import EVENTS, METRICS

Values = Mapping[str, Any]


class RunEvent(StrEnum):
    """What a line of events.jsonl is about: its `event`."""

    START = "start"
    RESUME = "resume"
    FALLBACK = "fallback"  # the newest checkpoint was damaged: an older one is resumed
    MIXTURE = "mixture"  # other weights from here on
    CHECKPOINT = "checkpoint"
    CHECKPOINT_FAILED = "checkpoint failed"
    PURGE_FAILED = "purge failed"
    MIRRORED = "mirrored"
    MIRROR_FAILED = "mirror failed"
    SKIPPED = "skipped"  # an update
    ROLLBACK = "rollback"
    DAMAGED = "damaged"  # a row of the shards
    LOADER = "loader"  # a worker died
    HUNG = "hung"  # a rank
    ANNEAL = "anneal"
    STOPPED = "stopped"  # asked to, and saved
    DONE = "done"


_OLD_EVENTS: Final = {
    "commit": RunEvent.CHECKPOINT,
    "commit refused": RunEvent.CHECKPOINT_FAILED,
    "purge refused": RunEvent.PURGE_FAILED,
    "mirror refused": RunEvent.MIRROR_FAILED,
    "refused": RunEvent.SKIPPED,
}
"""What version 0.1 called them."""


NEW_HISTORY: Final = "anew"
"""Key of an event from which on earlier ones do not count."""


class Journal:
    """The two logs of a run, written by its main rank; lines wait until the disk has room."""

    def __init__(self, run: Path, step: int, *, writes: bool, tensorboard: bool) -> None:
        self._files: dict[str, _Lines] = {}
        self._chart: Callable[[int, Values], None] | None = None
        if writes:
            drop_lines_after(run / METRICS, step)
            self._files = {name: _Lines(run / name) for name in (METRICS, EVENTS)}
            if tensorboard:
                self._best_effort(lambda: setattr(self, "_chart", _tensorboard(run, step)))

    def metrics(self, values: Values) -> None:
        """One line for one step."""
        if METRICS in self._files:
            self._files[METRICS].append(values)
        if (chart := self._chart) is not None:
            self._best_effort(lambda: chart(int(values["step"]), values))

    def event(self, kind: str, **facts: Any) -> None:
        """One line for something that happened, with the time of day; with a checkpoint, both
        logs are on the disk."""
        if EVENTS in self._files:
            self._files[EVENTS].append(_event(kind, facts))
        for file in self._files.values() if kind == RunEvent.CHECKPOINT else ():
            file.flush_to_disk()

    def _best_effort(self, act: Callable[[], None]) -> None:
        """Do something for TensorBoard; what fails there, a full disk, is no reason to end."""
        try:
            act()
        except Exception as error:
            self._chart = None
            logging.getLogger(__name__).warning(
                "! TensorBoard has failed (%s) and is left alone; metrics.jsonl goes on", error
            )


def report_rank_failure(run: Path, text: str, event: str, **facts: Any) -> None:
    """Say on stderr and in events.jsonl what this rank alone has noticed, whichever it is."""
    with contextlib.suppress(OSError):
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()
    _Lines(run / EVENTS).append(_event(event, {"text": text, **facts}))


def _event(kind: str, facts: Values) -> Values:
    return {"event": kind, **facts, "unix_s": round(time.time(), 3)}


class _Lines:
    """A file of JSON lines in which a line is complete or absent."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._pending: list[bytes] = []
        if path.exists() and not (data := path.read_bytes()).endswith(b"\n") and data:
            self._pending.append(b"\n")  # what a power cut has torn ends before what is added

    def append(self, value: Values) -> None:
        self._pending.append(json.dumps(value).encode() + b"\n")
        handle = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            size, data, written = os.fstat(handle).st_size, b"".join(self._pending), 0
            with contextlib.suppress(OSError):
                written = os.write(handle, data)
            if written == len(data):
                self._pending.clear()
            else:
                os.ftruncate(handle, size)
        finally:
            os.close(handle)

    def flush_to_disk(self) -> None:
        """Have all lines survive a power cut, if the disk lets them."""
        with contextlib.suppress(OSError):
            handle = os.open(self._path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


_LINE: Final[dict[str, dict[str, object]]] = {
    METRICS: {"step": int},
    EVENTS: {"event": str, "unix_s": float, "first_index": int, "skipped": list},
}
"""What is read of a line; the first key must be there."""


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """What a run logged of its steps, in order."""
    return _read_log(run / METRICS)


def _read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log that can be read; how many cannot (power lost, copied while written) is
    said once. A last line that is being written is not one of them."""
    shape = _LINE[path.name]
    needed, lines, damaged = next(iter(shape)), list[dict[str, Any]](), 0
    data = path.read_bytes() if path.exists() else b""
    for text in data.split(b"\n")[:-1]:
        try:
            line = json.loads(text)
            check_shape(line, shape)
            line[needed]
            lines.append(line)
        except (ValueError, KeyError, RecursionError):
            damaged += bool(text.strip(b"\0 \r"))
    if damaged:
        _say_damaged(path, damaged)
    return lines


@functools.cache
def _say_damaged(path: Path, n_lines: int) -> None:
    logging.getLogger(__name__).warning("! %s: damaged lines left out: %d", path, n_lines)


def read_events(run: Path) -> list[dict[str, Any]]:
    """The events of a run, each by today's name, whichever version wrote it."""
    return [
        {**line, "event": _OLD_EVENTS.get(line["event"], line["event"])}
        for line in _read_log(run / EVENTS)
    ]


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


def drop_lines_after(path: Path, step: int) -> None:
    """Remove a log's lines of steps after `step`: the run makes them again."""
    if path.exists():
        kept = [line for line in _read_log(path) if line["step"] <= step]
        data = b"".join(json.dumps(line).encode() + b"\n" for line in kept)
        if data != path.read_bytes():
            publish_bytes(path, data)


def _tensorboard(run: Path, step: int) -> Callable[[int, Values], None]:
    """A function that charts the numbers of a line; points after `step` are taken back."""
    from torch.utils.tensorboard import SummaryWriter  # a second of imports, only if asked for

    writer = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)

    def chart(step: int, values: Values) -> None:
        for name, value in values.items():
            for key, number in value.items() if isinstance(value, Mapping) else [("", value)]:
                if isinstance(number, (int, float)) and name != "step":
                    writer.add_scalar(f"{name}/{key}".rstrip("/"), number, step)
        writer.flush()

    return chart
