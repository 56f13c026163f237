"""What a run writes down: metrics.jsonl, events.jsonl and, if asked, TensorBoard."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from shards.files import publish_bytes
from trainer.checkpoint.runs import EVENTS, METRICS

Values = Mapping[str, Any]


class Journal:
    """The two logs of a run, appended to by its main rank; other ranks write nothing.

    A disk without room must not end a run that computes well: lines are kept until they fit.
    """

    def __init__(self, run: Path, step: int, *, writes: bool, tensorboard: bool) -> None:
        self._files: dict[str, _Lines] = {}
        self._chart: Callable[[int, Values], None] | None = None
        if writes:
            forget_after(run / METRICS, step)
            self._files = {name: _Lines(run / name) for name in (METRICS, EVENTS)}
            self._chart = _tensorboard(run, step) if tensorboard else None

    def metrics(self, values: Values) -> None:
        """One line for one step."""
        if METRICS in self._files:
            self._files[METRICS].append(values)
        if self._chart is not None:
            self._chart(int(values["step"]), values)

    def event(self, kind: str, **facts: Any) -> None:
        """One line for something that happened, with the time of day."""
        if EVENTS in self._files:
            self._files[EVENTS].append(_event(kind, facts))


def append_event(run: Path, kind: str, **facts: Any) -> None:
    """One line for something that only one rank has noticed, whichever it is."""
    _Lines(run / EVENTS).append(_event(kind, facts))


def _event(kind: str, facts: Values) -> Values:
    return {"event": kind, **facts, "unix_s": round(time.time(), 3)}


class _Lines:
    """A file of JSON lines in which a line is whole or absent."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._kept: list[bytes] = []

    def append(self, value: Values) -> None:
        self._kept.append(json.dumps(value).encode() + b"\n")
        handle = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            size = os.fstat(handle).st_size
            data = b"".join(self._kept)
            try:
                whole = os.write(handle, data) == len(data)
            except OSError:
                whole = False
            if whole:
                self._kept.clear()
            else:
                os.ftruncate(handle, size)
        finally:
            os.close(handle)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a log; a last line cut short by a kill is left out."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_bytes().splitlines(keepends=True)
            if line.endswith(b"\n")]  # fmt: skip


def forget_after(path: Path, step: int) -> None:
    """Drop a log's lines of steps after `step`: the run makes them again."""
    if path.exists():
        kept = [line for line in read_lines(path) if line["step"] <= step]
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
