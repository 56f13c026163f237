"""From a step of a run to the text it saw, and from a document to the steps that see it.

Nothing was recorded for this: the data order is a pure function of what COMMIT.json says, so any
step, past or to come, can be looked up, and so can any row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.tokenizer import Tokenizer
from shards.format import TOKENIZER, Manifest
from shards.reader import ShardReader, find_sources
from tools.errors import TraceError
from tools.provenance import document_name, rows_of_document
from trainer.checkpoint import read_record
from trainer.config import RunConfig, load_config
from trainer.metrics import read_lines
from trainer.mixture import BatchShape, DataOrder, Phase, micro_batch_indices
from trainer.runs import METRICS, commits


@dataclass(frozen=True, kw_only=True)
class Sighting:
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


class RunTrace:
    """A run's data order, with the shards it was drawn from and the steps it was cut into."""

    def __init__(self, run: Path) -> None:
        self.config: RunConfig = load_config(run)
        record = _newest_record(run)
        manifests = find_sources(Path(self.config.shards))
        phases, rows = _order_facts(self.config, record, manifests)
        self.order = DataOrder(seed=self.config.seed, rows=rows, phases=phases)
        folders = {name: Path(self.config.shards) / name for name in self.order.sources}
        self.readers = {
            name: ShardReader(folder, manifest=manifests[name])
            for name, folder in folders.items()
            if name in manifests
        }
        n_rows = max(1, self.config.global_batch_tokens // self.config.model.seq_len)
        world_size = record["world_size"] if record else 1
        size = self.config.micro_batch_size or n_rows // world_size
        self.shape = BatchShape(n_rows, size, world_size)
        lines = read_lines(run / METRICS)
        self._anchors = [(0, 0), *((line["step"], line["next_index"]) for line in lines)]
        path = run / TOKENIZER
        self._tokenizer = Tokenizer.load(path) if path.exists() else None

    def at_step(self, step: int, rank: int | None = None) -> Iterator[Sighting]:
        """What the ranks (or one of them) computed on in the step that was number `step`."""
        if not 1 <= step <= self.config.max_steps:
            raise TraceError(f"--step {step}: this run has the steps 1 to {self.config.max_steps}")
        if rank is not None and not 0 <= rank < self.shape.world_size:
            last = self.shape.world_size - 1
            raise TraceError(f"--rank {rank}: this run has the ranks 0 to {last}")
        first = self._first_index(step)
        for number in range(self.shape.world_size) if rank is None else (rank,):
            for micro_step in range(self.shape.grad_accum_steps):
                indices = micro_batch_indices(
                    self.config.seed, first, self.shape, micro_step, number
                )
                for index in indices.tolist():
                    yield self._sighting(step, number, micro_step, index)

    def of_document(self, name: str) -> Iterator[Sighting]:
        """Every step up to the run's end at which a row with a piece of FILE:RECORD is seen."""
        end = self._first_index(self.config.max_steps + 1)
        found = [
            (source, row)
            for source, reader in self.readers.items()
            for row in rows_of_document(reader, name)
        ]
        if not found:
            raise TraceError(
                f"--document {name}: no training row holds it: it was held out or rejected, or "
                "it has another name (--step N shows names)"
            )
        indices = []
        for source, row in found:
            epoch = 0
            while (index := self.order.find(source, epoch, row)) is not None and index < end:
                indices.append(index)
                epoch += 1
        for index in sorted(indices):
            step = self._step_of(index)
            rank, micro_step = self._place(self._first_index(step), index)
            yield self._sighting(step, rank, micro_step, index)

    def _sighting(self, step: int, rank: int, micro_step: int, index: int) -> Sighting:
        located = self.order.locate(np.array([index], np.int64))
        source, row = self.order.sources[int(located.source[0])], int(located.row[0])
        if source not in self.readers:
            raise TraceError(f"{source}: its shards are not in {self.config.shards} any more")
        reader = self.readers[source]
        tokens, _ = reader.rows(located.row)
        _, part, record = reader.origin(row)
        return Sighting(
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

    def _first_index(self, step: int) -> int:
        """The sample that a step begins with: from the log, and beyond it by the batch size."""
        done = step - 1
        before = max(anchor for anchor in self._anchors if anchor[0] <= done)
        after = next((anchor for anchor in self._anchors if anchor[0] > done), None)
        rows = self.shape.global_batch_size
        if after is not None:
            rows = (after[1] - before[1]) // (after[0] - before[0])
        return int(before[1] + (done - before[0]) * rows)

    def _step_of(self, index: int) -> int:
        """The step that computes on a sample."""
        low, high = 1, self.config.max_steps
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self._first_index(middle) <= index else (low, middle - 1)
        return low

    def _place(self, first: int, index: int) -> tuple[int, int]:
        """Rank and micro-step of a sample of the step that begins with `first`."""
        for micro_step in range(self.shape.grad_accum_steps):
            for rank in range(self.shape.world_size):
                if index in micro_batch_indices(
                    self.config.seed, first, self.shape, micro_step, rank
                ):
                    return rank, micro_step
        raise TraceError(f"sample {index} is in no batch of {self.shape.global_batch_size} rows")


def _newest_record(run: Path) -> dict[str, Any] | None:
    """What the newest commit says; None before the first."""
    found = commits(run)
    return read_record(found[-1]) if found else None


def _order_facts(
    config: RunConfig, record: dict[str, Any] | None, manifests: Mapping[str, Manifest]
) -> tuple[list[Phase], dict[str, int]]:
    """The phases of a run and the training rows of its sources; TraceError if these changed."""
    rows = {name: m.n_rows - m.n_val_rows for name, m in manifests.items()}
    if record is None:
        return [Phase(0, {name: int(share) for name, share in config.mixture.items()})], rows
    for name, facts in record["data"].items():
        if name in manifests and manifests[name].root != facts["root"]:
            raise TraceError(
                f"{config.shards}/{name} is not the data that the run has read: bring the old "
                "shards back"
            )
        rows[name] = facts["n_rows"]
    return [Phase(int(first), weights) for first, weights in record["phases"]], rows
