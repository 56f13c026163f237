"""Faults on order, for tests and rehearsals: `SUMMER_FAULT=kind:rank:step,...`.

Each strikes once, at the start of that step of that rank; a file in the run's folder remembers it,
so that it does not strike again when the run comes back.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np

from shards.reader import ShardReader
from trainer.checkpoint.runs import EVENTS
from trainer.data.loader import Loader
from trainer.errors import ConfigError
from trainer.metrics.metrics import read_lines

VARIABLE: Final = "SUMMER_FAULT"
KINDS: Final = {
    "nan": "the rank's gradient is not a number",
    "spike": "the rank's gradient is 10,000 times too large",
    "sigterm": "the rank is asked to stop",
    "sigint": "the rank is asked to stop",
    "sigkill": "the rank is killed",
    "sigstop": "the rank is stopped and stays so",
    "full-disk": "the rank can write no file beyond 4 KiB until a checkpoint has been refused",
    "rot": "a bit flips in the first row that the rank is about to read for the step",
    "worker": "one of the rank's loader workers is killed",
}
_SIGNALS: Final = {"sigterm", "sigint", "sigkill", "sigstop"}
_FACTORS: Final = {"nan": float("nan"), "spike": 1e4}
_SMALL: Final = 4096


class Fault(NamedTuple):
    """One fault on order."""

    kind: str
    rank: int
    step: int


def ordered_faults(text: str | None = None) -> tuple[Fault, ...]:
    """The faults in a text, by default that of SUMMER_FAULT; ConfigError for a kind unknown."""
    faults = []
    for order in filter(None, (os.environ.get(VARIABLE, "") if text is None else text).split(",")):
        kind, _, place = order.strip().partition(":")
        rank, _, step = place.partition(":")
        if kind not in KINDS or not (rank.isdigit() and step.isdigit() and int(step) > 0):
            raise ConfigError(
                f"{VARIABLE}={order}: write it as kind:rank:step; kinds are {', '.join(KINDS)}"
            )
        faults.append(Fault(kind, int(rank), int(step)))
    return tuple(faults)


def refuse_unmet(faults: tuple[Fault, ...], n_ranks: int, max_steps: int) -> None:
    """ConfigError for a fault that would never strike: its rank or step is not in the run."""
    for fault in faults:
        if fault.rank >= n_ranks or fault.step > max_steps:
            raise ConfigError(
                f"{VARIABLE}={':'.join(map(str, fault))} would never strike: this run has ranks 0 "
                f"to {n_ranks - 1} and steps 1 to {max_steps}; name one of these"
            )


class Faults:
    """The faults of one rank."""

    def __init__(self, faults: tuple[Fault, ...], run: Path, rank: int) -> None:
        self._mine = [fault for fault in faults if fault.rank == rank]
        self._run = run
        self._room: tuple[int, int] | None = None  # the limit on files before the disk was full

    def strike(self, step: int, loader: Loader) -> float:
        """What the step's gradient is to be multiplied with: 1.0 unless a fault says otherwise."""
        if not self._mine:
            return 1.0
        self._empty_disk()
        factor = 1.0
        for fault in self._mine:
            if fault.step == step and fault.kind != "rot" and self._first_time(fault):
                factor *= _FACTORS.get(fault.kind, 1.0)
                self._hit(fault.kind, loader)
        return factor

    def rotten(self) -> Iterator[int]:
        """The steps whose first row rots, each once; asked before anything is read ahead."""
        for fault in self._mine:
            if fault.kind == "rot" and self._first_time(fault):
                yield fault.step

    def _hit(self, kind: str, loader: Loader) -> None:
        if kind in _SIGNALS:
            os.kill(os.getpid(), getattr(signal, kind.upper()))
        elif kind == "worker":
            if not (pids := loader.worker_pids()):
                raise ConfigError(f"{VARIABLE}=worker: there is none; set loader.num_workers=1")
            os.kill(pids[0], signal.SIGKILL)
        elif kind == "full-disk":
            self._room = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (_SMALL, self._room[1]))

    def _empty_disk(self) -> None:
        if self._room and any(
            e["event"] == "checkpoint refused" for e in read_lines(self._run / EVENTS)
        ):
            resource.setrlimit(resource.RLIMIT_FSIZE, self._room)
            self._room = None

    def _first_time(self, fault: Fault) -> bool:
        marks = self._run / "faults"
        marks.mkdir(exist_ok=True)
        with contextlib.suppress(FileExistsError):
            (marks / "-".join(map(str, fault))).touch(exist_ok=False)
            return True
        return False


def flip_a_bit(reader: ShardReader, row: int) -> None:
    """Damage one row of a source on disk, as a failing disk might."""
    for shard in reader.manifest.split(reader.split):
        if row < shard.n_rows:
            rows = np.load(reader.folder / shard.file, mmap_mode="r+")
            rows[row, 0] ^= 1
            rows.flush()
            return
        row -= shard.n_rows
