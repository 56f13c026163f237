"""From a step of a run to the text it saw, and from a document to the steps that see it.

No step is recorded for this: the data order is a pure function, so any step, past or future, can
be looked up, and so can any row. What is recorded is where the order was restarted: the events of
a start and of each resumption (after a rollback too) hold the step, the sample, the samples left
out, how a step is divided among ranks, and the phases of the mixture.

A document is named FILE:RECORD. A file that was read in several parts (the row groups of a parquet
file, 64 MiB of lines) numbers the records of each from 0: `web.parquet#2:17` is in its third part.
"""

import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, groupby, pairwise
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.text.json_tokenizer import load_tokenizer
from shards.format import Manifest, tokenizer_path
from shards.reader import ShardReader, find_sources
from tools.errors import ToolError
from trainer.checkpoint.runs import checkpoints
from trainer.checkpoint.storage import read_record
from trainer.config.config import RunConfig, load_config
from trainer.data.batches import StepRange
from trainer.data.mixture import BatchShape, DataOrder, Phase, leave_out
from trainer.metrics.metrics import read_events

_NAME: Final = re.compile(r"(?P<file>.+?)(?:#(?P<part>\d+))?:(?P<record>\d+)")


@dataclass(frozen=True, kw_only=True)
class TracedRow:
    """One row at one step. `origin` is FILE:RECORD of the document that the row begins in."""

    step: int
    rank: int
    micro_step: int
    index: int
    source: str
    epoch: int
    row: int
    origin: str
    text: str


class _Section(NamedTuple):
    """The steps from one (re)start of the run to the next."""

    after_step: int
    next_index: int
    skipped: tuple[tuple[int, int], ...]
    shape: BatchShape

    def places(self, seed: int, step: int) -> Iterator[tuple[int, int, int]]:
        """Rank, micro-step and sample of everything that a step computes on, in that order."""
        n_steps = step - self.after_step
        for rank in range(self.shape.world_size):
            steps = StepRange(
                first_index=self.next_index, n_steps=n_steps, shape=self.shape, rank=rank,
                skipped=self.skipped, done=(n_steps - 1) * self.shape.grad_accum_steps,
            )  # fmt: skip
            for micro_step, number in enumerate(steps.numbers):
                for index in steps.indices(seed, number).tolist():
                    yield rank, micro_step, index

    def first_index(self, step: int) -> int:
        """The sample that a step begins with."""
        places = np.array((step - 1 - self.after_step) * self.shape.global_batch_size)
        return int(leave_out(self.next_index, places, self.skipped))


class RunTrace:
    """A run's data order, with the shards it was drawn from and the steps it was cut into."""

    def __init__(self, run: Path) -> None:
        self.config: RunConfig = load_config(run)
        saved = checkpoints(run)
        record = read_record(saved[-1]) if saved else None
        manifests = find_sources(Path(self.config.shards))
        begun = [e for e in read_events(run) if e["event"] in ("start", "resume")]
        phases, rows = _order_facts(self.config, record, manifests)
        if begun:
            phases = [Phase(int(first), weights) for first, weights in begun[-1]["phases"]]
        self.order = DataOrder(seed=self.config.seed, rows=rows, phases=phases)
        folders = {name: Path(self.config.shards) / name for name in self.order.sources}
        self.readers = {
            name: ShardReader(folder, manifest=manifests[name])
            for name, folder in folders.items()
            if name in manifests
        }
        n_rows = max(1, self.config.global_batch_tokens // self.config.model.seq_len)
        shape = BatchShape(n_rows, self.config.micro_batch_size or n_rows, 1)
        self._sections = _sections(begun) or [_Section(0, 0, (), shape)]  # has not begun
        anneal = (record or {}).get("anneal")
        self.last_step = min(self.config.max_steps, sum(anneal or [self.config.max_steps]))
        path = tokenizer_path(run)
        self._tokenizer = load_tokenizer(path) if path.exists() else None

    def at_step(self, step: int, rank: int | None = None) -> Iterator[TracedRow]:
        """What the ranks (or one of them) computed on in the step that was number `step`."""
        first = self._sections[0].after_step + 1
        if not first <= step <= self.last_step:
            before = f"; those before {first} were made in another run" if first > 1 else ""
            raise ToolError(
                f"--step {step}: this run has the steps {first} to {self.last_step}{before}"
            )
        section = next(each for each in reversed(self._sections) if each.after_step < step)
        if rank is not None and not 0 <= rank < section.shape.world_size:
            last = section.shape.world_size - 1
            raise ToolError(f"--rank {rank}: this run has the ranks 0 to {last} at step {step}")
        for place in section.places(self.config.seed, step):
            if rank in (None, place[0]):
                yield self._row(step, *place)

    def of_document(self, name: str) -> Iterator[TracedRow]:
        """Every step up to the run's end at which a row with a piece of FILE:RECORD is seen."""
        found = [
            (source, row)
            for source, reader in self.readers.items()
            for row in rows_of_document(reader, name)
        ]
        if not found:
            raise ToolError(
                f"--document {name}: no training row holds it: it was held out or rejected, or "
                "it has another name (--step N shows names)"
            )
        end = self._sections[-1].first_index(self.last_step + 1)
        indices = []
        for source, row in found:
            for epoch in count():
                index = self.order.find(source, epoch, row)
                if index is None or index >= end:
                    break
                indices.append(index)
        for index in sorted(indices):
            yield from self._seen_at(index)

    def _row(self, step: int, rank: int, micro_step: int, index: int) -> TracedRow:
        located = self.order.locate(np.array([index], np.int64))
        source, row = self.order.sources[int(located.source[0])], int(located.row[0])
        if source not in self.readers:
            raise ToolError(f"{source}: its shards are no longer in {self.config.shards}")
        reader = self.readers[source]
        tokens, _ = reader.rows(located.row)
        _, part, record = reader.origin(row)
        return TracedRow(
            step=step,
            rank=rank,
            micro_step=micro_step,
            index=index,
            source=source,
            epoch=int(located.epoch[0]),
            row=row,
            origin=document_name(reader.manifest, part, record),
            text=self._decode(tokens[0].tolist()),
        )

    def _decode(self, ids: list[int]) -> str:
        """The row's text, with <s> where a document begins; its ids if there is no tokenizer."""
        tokenizer = self._tokenizer
        if tokenizer is None:
            return " ".join(map(str, ids))
        begins = [0, *(place for place, id_ in enumerate(ids) if id_ == tokenizer.bos_id), len(ids)]
        pieces = [tokenizer.decode(ids[first:last]) for first, last in pairwise(begins)]
        return "<s>".join(pieces)

    def _seen_at(self, index: int) -> Iterator[TracedRow]:
        """The step that computes on a sample; none if it is left out or later."""
        ends = [*(each.after_step for each in self._sections[1:]), self.last_step]
        for section, end in zip(self._sections, ends, strict=True):
            steps = range(section.after_step + 1, end + 1)
            number = bisect_right(steps, index, key=section.first_index)
            for step in steps[max(0, number - 1) : number]:
                for place in section.places(self.config.seed, step):
                    if place[2] == index:
                        yield self._row(step, *place)
                        return


def _sections(begun: Sequence[Mapping[str, Any]]) -> list[_Section]:
    """The sections of a run's history, without those that going back to a checkpoint undid."""
    sections: list[_Section] = []
    for event in begun:
        sections = [each for each in sections if each.after_step < event["step"]]
        skipped = tuple((int(begin), int(end)) for begin, end in event["skipped"])
        shape = BatchShape(**event["shape"])
        sections.append(_Section(event["step"], event["next_index"], skipped, shape))
    return sections


def _order_facts(
    config: RunConfig, record: dict[str, Any] | None, manifests: Mapping[str, Manifest]
) -> tuple[list[Phase], dict[str, int]]:
    """The phases of a run and the training rows of its sources; ToolError if these changed."""
    rows = {name: m.n_rows - m.n_val_rows for name, m in manifests.items()}
    if record is None or "phases" not in record:  # of a converted run
        return [Phase(0, {name: int(share) for name, share in config.mixture.items()})], rows
    for name, facts in record.get("data", {}).items():
        if name in manifests and manifests[name].root != facts["root"]:
            raise ToolError(
                f"{config.shards}/{name} is not the data that the run has read: restore the "
                "old shards"
            )
        rows[name] = facts["n_rows"]
    return [Phase(int(first), weights) for first, weights in record["phases"]], rows


def document_name(manifest: Manifest, part: int, record: int) -> str:
    """FILE:RECORD, or FILE#PART:RECORD where the file has several parts."""
    parts = _parts_of(manifest, manifest.parts[part].file)
    which = f"#{parts.index(part)}" if len(parts) > 1 else ""
    return f"{manifest.parts[part].file}{which}:{record}"


def rows_of_document(reader: ShardReader, name: str) -> list[int]:
    """The training rows that hold a piece of the document; none if its file is another source's.

    A row's sidecar names the document of its first token. A document's rows are those that begin
    inside it, and the row before, unless the first of them begins with the document's BOS. One
    that no row begins in lies inside the row before it, unless it was held out or rejected, which
    the rows alone cannot say.
    """
    wanted = _key_of(reader.manifest, name)
    if wanted is None:
        return []
    begun = [(keys, first) for keys, first in _rows_by_unit(reader) if keys[0] <= wanted]
    if not begun:
        return []
    keys, first_row = max(begun, key=lambda unit: int(unit[0][0]))
    left, right = (int(np.searchsorted(keys, wanted, side)) for side in ("left", "right"))
    if 0 < left < right:
        tokens, _ = reader.rows(np.array([first_row + left], np.int64))
        left -= int(tokens[0, 0]) != reader.manifest.facts.tokenizer.bos_id
    elif left == right:
        left -= 1
    return list(range(first_row + left, first_row + max(right, left + 1)))


def _key_of(manifest: Manifest, name: str) -> int | None:
    """Part and record of a named document as one sortable number."""
    match = _NAME.fullmatch(name)
    if match is None:
        raise ToolError(f"--document {name}: write it as FILE:RECORD, as --step shows it")
    files = {part.file for part in manifest.parts}
    file, record = match["file"], int(match["record"])
    named = [file] if file in files else [each for each in files if each.endswith(f"/{file}")]
    if len(named) > 1:
        raise ToolError(f"{file}: there are several, {', '.join(sorted(named)[:3])}: name one")
    if not named:
        return None
    parts = _parts_of(manifest, named[0])
    if match["part"] is None and len(parts) > 1:
        raise ToolError(f"{file} was read in {len(parts)} parts: write {file}#PART:{record}")
    number = int(match["part"] or 0)
    if number >= len(parts):
        raise ToolError(f"{file}#{number}: that file has the parts 0 to {len(parts) - 1}")
    return parts[number] << 32 | record


def _parts_of(manifest: Manifest, file: str) -> list[int]:
    return [number for number, part in enumerate(manifest.parts) if part.file == file]


def _rows_by_unit(reader: ShardReader) -> Iterator[tuple[npt.NDArray[np.int64], int]]:
    """Of each unit: the key of each of its training rows, ascending, and the first row's number."""
    first_row = 0
    by_unit = groupby(reader.manifest.split("train"), key=lambda shard: shard.stem.split("-")[0])
    for _, shards in by_unit:
        files = [reader.folder / f"{shard.stem}.rows.npy" for shard in shards]
        records = np.concatenate([np.load(file, allow_pickle=False) for file in files])
        if len(records):
            keys = records["part"].astype(np.int64) << 32 | records["record"].astype(np.int64)
            yield keys, first_row
        first_row += len(records)
