"""Which unit next: every missing one, or the shortest prefix of them that meets a limit."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from pathlib import Path

from pipeline.units.job import NO_LIMIT, Amount, Limit, PrepareJob, Submit
from shards.files import fsync_folder
from shards.format import ShardInfo, UnitRecord


def run_all(
    positions: Iterable[int], submit: Submit, at_once: int, unit_done: Callable[[int], None]
) -> None:
    """Run the units, at most `at_once` of them handed out at a time."""
    ahead, running = iter(positions), dict[Future[UnitRecord], int]()
    while True:
        for position in itertools.islice(ahead, at_once - len(running)):
            running[submit(position, NO_LIMIT)] = position
        if not running:
            return
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            future.result()
            unit_done(running.pop(future))


class LimitedRun:
    """The shortest prefix of the units that meets a limit, the last unit cut at a document.

    Where the prefix ends is only known when all units before are done, so with several workers
    units are begun ahead, by what the finished ones yielded, and uncut. One that turns out to hold
    the end is done once more with the exact limit, and those behind it are removed: the result is
    that of one worker.
    """

    def __init__(self, job: PrepareJob, limit: Limit, submit: Submit, at_once: int) -> None:
        self._folder, self._units, self._limit = job.folder, job.plan.units, limit
        self._submit, self._at_once = submit, at_once
        self._running: dict[int, Future[UnitRecord]] = {}
        self._limits: dict[int, Limit] = {}
        self._total, self._text_bytes = Amount(), 0

    def run(self, done: Mapping[int, UnitRecord], unit_done: Callable[[int], None]) -> int:
        """The number of units in the prefix; `done` are the records of an earlier try."""
        n_units = 0
        for position, unit in enumerate(self._units):
            if self._limit.is_met_by(self._total):
                break
            left = self._limit.after(self._total)
            if position not in done:
                self._begin(position, left)
                self._begin_ahead(position, done)
                record = self._running.pop(position).result()
            else:
                record = done[position]
            if left.is_met_by(amount_of(record.shards)) and self._limits.get(position) != left:
                self._begin(position, left)
                record = self._running.pop(position).result()
            self._total += amount_of(record.shards)
            self._text_bytes += unit.text_bytes
            n_units += 1
            unit_done(position)
        for future in self._running.values():
            future.result()
        remove_units(self._folder, lambda number: number >= n_units)
        return n_units

    def _begin(self, position: int, limit: Limit) -> None:
        if position not in self._running:
            # an earlier try may have gone further
            remove_units(self._folder, lambda number: number == position)
            self._limits[position] = limit
            self._running[position] = self._submit(position, limit)

    def _begin_ahead(self, position: int, done: Mapping[int, UnitRecord]) -> None:
        """Begin later units, as far as the limit is likely to reach."""
        if not self._text_bytes:
            return
        expected = self._total
        for ahead in range(position, len(self._units)):
            if len(self._running) >= self._at_once or self._limit.is_met_by(expected):
                return
            if ahead not in done:
                self._begin(ahead, self._limit)
            share = self._units[ahead].text_bytes / self._text_bytes
            total = self._total
            expected += Amount(round(total.documents * share), round(total.tokens * share))


def amount_of(shards: Iterable[ShardInfo]) -> Amount:
    """Documents and tokens in some shards."""
    shards = tuple(shards)
    return Amount(sum(s.n_documents for s in shards), sum(s.n_tokens for s in shards))


def remove_units(folder: Path, chosen: Callable[[int], bool]) -> None:
    """Remove what was published of the units whose numbers are chosen, unit records first."""
    files = ((path, path.name.split(".")[0].split("-")[0]) for path in folder.iterdir())
    found = [path for path, unit in files if unit.isdigit() and chosen(int(unit))]
    records = [path for path in found if path.suffix == ".json"]
    for path in records:
        path.unlink()
    if records:
        fsync_folder(folder)  # or a loss of power could bring back a record without its shards
    for path in found:
        path.unlink(missing_ok=True)
