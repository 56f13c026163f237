"""Faults injected by tests and rehearsals: `SUMMER_FAULT=kind:rank:step,...`.

Each happens once, at the start of that step of that rank: a file in the run's folder remembers it.
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
from trainer.data.loader import Loader
from trainer.errors import ConfigError
from trainer.metrics.metrics import RunEvent, read_events

VARIABLE: Final = "SUMMER_FAULT"
KINDS: Final = {
    "nan": "the rank's gradient is not a number",
    "spike": "the rank's gradient is 10,000 times too large",
    "sigterm": "the rank is asked to stop",
    "sigint": "the rank is asked to stop",
    "sighup": "the rank is asked to stop, as by a terminal that closes",
    "sigkill": "the rank is killed",
    "sigstop": "the rank is stopped and stays so",
    "full-disk": "the rank can write no file beyond 4 KiB until a checkpoint has failed",
    "bit-flip": "a bit flips in the first row that the rank is about to read for the step",
    "worker": "one of the rank's loader workers is killed",
}
_SIGNALS: Final = {"sigterm", "sigint", "sighup", "sigkill", "sigstop"}
_FACTORS: Final = {"nan": float("nan"), "spike": 1e4}
_SMALL: Final = 4096
_OLD_KINDS: Final = {"rot": "bit-flip"}  # as version 0.1 called it


class Fault(NamedTuple):
    """One fault to inject."""

    kind: str
    rank: int
    step: int


def parse_faults(text: str | None = None) -> tuple[Fault, ...]:
    """The faults in a text, by default that of SUMMER_FAULT; ConfigError for a kind unknown."""
    faults = []
    for order in filter(None, (os.environ.get(VARIABLE, "") if text is None else text).split(",")):
        kind, _, place = order.strip().partition(":")
        kind = _OLD_KINDS.get(kind, kind)
        rank, _, step = place.partition(":")
        if kind not in KINDS or not (rank.isdigit() and step.isdigit() and int(step) > 0):
            raise ConfigError(
                f"{VARIABLE}={order}: write it as kind:rank:step; kinds are {', '.join(KINDS)}"
            )
        faults.append(Fault(kind, int(rank), int(step)))
    return tuple(faults)


def check_reachable(faults: tuple[Fault, ...], n_ranks: int, max_steps: int) -> None:
    """ConfigError for a fault that would never happen: its rank or step is not in the run."""
    for fault in faults:
        if fault.rank >= n_ranks or fault.step > max_steps:
            raise ConfigError(
                f"{VARIABLE}={':'.join(map(str, fault))} would never happen: this run has ranks 0 "
                f"to {n_ranks - 1} and steps 1 to {max_steps}; name one of these"
            )


class Faults:
    """The faults of one rank."""

    def __init__(self, faults: tuple[Fault, ...], run: Path, rank: int) -> None:
        self._mine = [fault for fault in faults if fault.rank == rank]
        self._run = run
        self._file_limit: tuple[int, int] | None = None  # before the disk was full

    def inject(self, step: int, loader: Loader) -> float:
        """What the step's gradient is to be multiplied with: 1.0 unless a fault says otherwise."""
        happened = [event["event"] for event in read_events(self._run)] if self._file_limit else []
        if self._file_limit and RunEvent.CHECKPOINT_FAILED in happened:
            resource.setrlimit(resource.RLIMIT_FSIZE, self._file_limit)
            self._file_limit = None
        factor = 1.0
        for fault in self._mine:
            if fault.step == step and fault.kind != "bit-flip" and self._first_time(fault):
                factor *= _FACTORS.get(fault.kind, 1.0)
                self._cause(fault.kind, loader)
        return factor

    def bit_flip_steps(self) -> Iterator[int]:
        """The steps in whose first row a bit flips, each once; asked before rows are read ahead."""
        for fault in self._mine:
            if fault.kind == "bit-flip" and self._first_time(fault):
                yield fault.step

    def _cause(self, kind: str, loader: Loader) -> None:
        if kind in _SIGNALS:
            os.kill(os.getpid(), getattr(signal, kind.upper()))
        elif kind == "worker":
            if not (pids := loader.worker_pids()):
                raise ConfigError(f"{VARIABLE}=worker: there is none; set loader.num_workers=1")
            os.kill(pids[0], signal.SIGKILL)
        elif kind == "full-disk":
            self._file_limit = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (_SMALL, self._file_limit[1]))

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
