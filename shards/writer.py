"""Rows -> shards, unit records, manifest. With the same rows it writes the same bytes again.

The order of publishing is what makes a unit exactly-once: shard, mask, sidecar, rejected records,
and only then the unit record. A process that dies anywhere before it leaves intact files that
the next try writes over with the same bytes.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from shards.errors import ShardError
from shards.files import publish, publish_bytes, publish_json
from shards.format import (
    MANIFEST,
    ROW_RECORD,
    Facts,
    Manifest,
    Masks,
    Ordinals,
    Part,
    ShardInfo,
    Split,
    Tokens,
    UnitRecord,
    combine,
    row_digests,
    unit_name,
)
from shards.reader import read_unit_record

SHARD_BYTES: Final = 64 << 20
"""A shard's size at most. It is also what a writer holds in memory for each split."""


class ShardWriter:
    """Collects the rows of one unit and publishes them as shards.

        writer = ShardWriter(folder, "00000", facts)
        writer.add("train", rows, parts, records)      # as often as it takes
        record = writer.finish(rejected, plan_sha256)

    Where shards are cut depends on the rows alone, not on how `add` was given them.
    """

    def __init__(self, folder: Path, unit: str, facts: Facts) -> None:
        if facts.masked and facts.seq_len % 8:
            raise ShardError(f"seq_len {facts.seq_len}: rows with a loss mask need a multiple of 8")
        self._folder, self._unit, self._facts = folder, unit, facts
        self._open: dict[Split, _Buffer] = {}
        self._shards: dict[Split, list[ShardInfo]] = {"train": [], "val": []}

    def add(
        self,
        split: Split,
        rows: Tokens,
        parts: Ordinals,
        records: Ordinals,
        masks: Masks | None = None,
    ) -> None:
        """Append rows [n, seq_len] with the part and record [n] of each one's first token."""
        if (given := masks is not None) != self._facts.masked:
            raise ShardError(f"{self._facts.packing!r} does not fit rows with masks: {given}")
        while len(rows):
            buffer = self._open.setdefault(split, _Buffer(self._facts))
            n = buffer.append(rows, parts, records, masks)
            if not buffer.room:
                self._publish(split)
            rows, parts, records = rows[n:], parts[n:], records[n:]
            masks = None if masks is None else masks[n:]

    def finish(self, rejected: Sequence[Mapping[str, object]], plan_sha256: str) -> UnitRecord:
        """The unit's record, published after everything it lists.

        `rejected` holds one {reason, file, record} a rejected record.
        """
        for split in tuple(self._open):
            self._publish(split)
        rejected_sha256 = None
        if rejected:
            lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in rejected)
            publish_bytes(self._folder / f"{self._unit}.rejected.jsonl", lines.encode())
            rejected_sha256 = hashlib.sha256(lines.encode()).hexdigest()
        unit_record = UnitRecord(
            unit=self._unit,
            plan_sha256=plan_sha256,
            shards=(*self._shards["train"], *self._shards["val"]),
            rejected=dict(sorted(Counter(str(record["reason"]) for record in rejected).items())),
            rejected_sha256=rejected_sha256,
        )
        publish_json(self._folder / f"{self._unit}.json", unit_record.to_json())
        return unit_record

    def _publish(self, split: Split) -> None:
        rows, records, masks = self._open.pop(split).contents()
        done = self._shards[split]
        middle = "" if split == "train" else "-val"
        stem = f"{self._unit}{middle}-{len(done):03d}"
        records["xxh3"] = row_digests(rows, masks)
        n_bytes = _publish_array(self._folder / f"{stem}.npy", rows)
        if masks is not None:
            _publish_array(self._folder / f"{stem}.mask.npy", masks)
        sidecar = io.BytesIO()
        np.save(sidecar, records, allow_pickle=False)
        publish_bytes(self._folder / f"{stem}.rows.npy", sidecar.getvalue())
        tokenizer = self._facts.tokenizer
        done.append(
            ShardInfo(
                file=f"{stem}.npy",
                split=split,
                n_rows=len(rows),
                n_tokens=int(np.count_nonzero(rows != tokenizer.pad_id)),
                n_documents=int(np.count_nonzero(rows == tokenizer.bos_id)),
                bytes=n_bytes,
                rows_sha256=hashlib.sha256(sidecar.getvalue()).hexdigest(),
            )
        )


class _Buffer:
    """Rows of a shard that is not full yet. Pages that are never written cost no memory."""

    def __init__(self, facts: Facts) -> None:
        dtype = np.dtype(facts.dtype).newbyteorder("<")
        capacity = max(1, SHARD_BYTES // (facts.seq_len * dtype.itemsize))
        self._rows = np.empty((capacity, facts.seq_len), dtype)
        self._records = np.empty(capacity, ROW_RECORD)
        self._masks = np.empty((capacity, facts.seq_len // 8), np.uint8) if facts.masked else None
        self._n = 0

    @property
    def room(self) -> int:
        return len(self._rows) - self._n

    def append(self, rows: Tokens, parts: Ordinals, records: Ordinals, masks: Masks | None) -> int:
        """The number of rows for which there was room."""
        n = min(len(rows), self.room)
        here = slice(self._n, self._n + n)
        self._rows[here] = rows[:n]
        self._records["part"][here], self._records["record"][here] = parts[:n], records[:n]
        if self._masks is not None and masks is not None:
            self._masks[here] = masks[:n]
        self._n += n
        return n

    def contents(self) -> tuple[Tokens, npt.NDArray[np.void], Masks | None]:
        masks = None if self._masks is None else self._masks[: self._n]
        return self._rows[: self._n], self._records[: self._n], masks


def write_manifest(
    folder: Path, facts: Facts, parts: Sequence[Part], n_units: int
) -> Manifest | None:
    """The manifest, published, once all `n_units` records are there; None before that.

    Whoever finds the records complete may call it: every caller writes the same bytes.
    """
    paths = [folder / f"{unit_name(position)}.json" for position in range(n_units)]
    if not all(path.exists() for path in paths):
        return None
    manifest = combine(facts, parts, map(read_unit_record, paths))
    publish_json(folder / MANIFEST, manifest.to_json())
    return manifest


def _publish_array(path: Path, array: npt.NDArray[np.generic]) -> int:
    """Size in bytes of the .npy file published."""
    with publish(path) as file:
        np.save(file, array, allow_pickle=False)
        return file.tell()
