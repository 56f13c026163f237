"""Every byte of a prepared source compared with what vouches for it.

    root -> sidecars -> rows and masks        manifest.json, which is compared with
    receipts -> shards, refused records       <unit>.json, which name
    plan -> parts, facts                      units.json

`damages` names all that does not fit; repair.py does the units concerned again.
"""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from pipeline.errors import PrepareError
from pipeline.recipe import facts_of
from pipeline.units import Plan, read_plan
from shards.errors import ShardError
from shards.files import is_temporary, json_bytes, sha256_file
from shards.format import (
    MANIFEST,
    PLAN,
    ROW_RECORD,
    TOKENIZER,
    Facts,
    Manifest,
    Receipt,
    ShardInfo,
    row_digests,
    unit_name,
)
from shards.reader import find_sources, read_manifest, read_receipt

ROWS_AT_ONCE: Final = 1024
STRANGE: Final = "no part of the source"
_SHOWN_ROWS: Final = 8


@dataclass(frozen=True)
class Damage:
    """One thing that is wrong, in a file and, where that can be said, in rows of it."""

    file: str
    what: str
    rows: tuple[int, ...] = ()

    def __str__(self) -> str:
        if not self.rows:
            return f"{self.file}: {self.what}"
        shown = ", ".join(map(str, self.rows[:_SHOWN_ROWS]))
        more = len(self.rows) - _SHOWN_ROWS
        rows = f"row{'s' if len(self.rows) > 1 else ''} {shown}"
        return f"{self.file}: {rows}{f' and {more:,} more' if more > 0 else ''}: {self.what}"


def damages(folder: Path) -> Iterator[Damage]:
    """Everything in a source's folder that is not what it was when it was prepared."""
    state = State(folder)
    yield from state.found
    if state.manifest is None and state.plan is None and not state.receipts:
        return
    expected = {MANIFEST, PLAN, TOKENIZER}
    for unit in state.units:
        expected.add(f"{unit}.json")
        receipt = state.receipts.get(unit)
        if receipt is None:
            yield Damage(f"{unit}.json", "the unit's receipt is missing or damaged")
        elif receipt.rejected_sha256 is not None:
            expected.add(f"{unit}.rejected.jsonl")
            if _sha256(folder / f"{unit}.rejected.jsonl") != receipt.rejected_sha256:
                yield Damage(f"{unit}.rejected.jsonl", "missing or damaged")
        for shard in state.shards_of(unit):
            yield from _damages_of_shard(folder, shard, state.facts)
            expected |= {shard.file, f"{shard.stem}.rows.npy", f"{shard.stem}.mask.npy"}
    for path in sorted(folder.iterdir()):
        if path.name not in expected and not is_temporary(path):
            yield Damage(path.name, STRANGE)


def source_folders(folder: Path) -> list[Path]:
    """The folder itself if it is a source's, or else the sources in it; ShardError if none."""
    if (folder / MANIFEST).exists() or (folder / PLAN).exists():
        return [folder]
    return [folder / name for name in find_sources(folder)]


def unit_of(damage: Damage) -> str | None:
    """The unit that a damage belongs to; None if it is one of the whole source's files."""
    name = damage.file.split(".")[0].split("-")[0]
    return name if name.isdigit() else None


class State:
    """What a folder says of itself: manifest, plan and receipts, and where they disagree."""

    def __init__(self, folder: Path) -> None:
        self.found: list[Damage] = []
        self.plan = self._read_plan(folder)
        self.manifest = self._read_manifest(folder)
        if self.manifest is not None:
            self.facts = self.manifest.facts
        elif self.plan is not None:
            self.facts = facts_of(self.plan.recipe)
        else:
            raise PrepareError(
                f"{folder}: neither {MANIFEST} nor {PLAN} can be read, so that nothing tells what "
                "should be there: prepare the source anew"
            )
        self.receipts = self._read_receipts(folder)
        self._compare(folder)

    @property
    def units(self) -> list[str]:
        """The units that there should be."""
        names = set(self.receipts)
        if self.manifest is not None:
            names |= {shard.file.split("-")[0] for shard in self.manifest.shards}
        if self.plan is not None and not _is_limited(self.plan):
            names |= {unit_name(position) for position in range(len(self.plan.units))}
        return sorted(names)

    def shards_of(self, unit: str) -> tuple[ShardInfo, ...]:
        """The unit's shards: as the manifest has them, or else its receipt."""
        if self.manifest is not None:
            return tuple(s for s in self.manifest.shards if s.file.split("-")[0] == unit)
        return self.receipts[unit].shards if unit in self.receipts else ()

    def _read_plan(self, folder: Path) -> Plan | None:
        try:
            plan = read_plan(folder)
        except PrepareError:
            plan = None
        if plan is None or plan.to_bytes() != (folder / PLAN).read_bytes():
            self.found.append(Damage(PLAN, "missing or damaged"))
            return None
        return plan

    def _read_manifest(self, folder: Path) -> Manifest | None:
        try:
            manifest = read_manifest(folder)
        except ShardError as error:
            self.found.append(Damage(MANIFEST, str(error)))
            return None
        if json_bytes(manifest.to_json()) != (folder / MANIFEST).read_bytes():
            self.found.append(Damage(MANIFEST, "it was edited or damaged"))
        return manifest

    def _read_receipts(self, folder: Path) -> dict[str, Receipt]:
        receipts = {}
        for path in sorted(folder.glob("[0-9]*.json")):
            try:
                receipt = read_receipt(path)
            except ShardError:
                continue
            whole = json_bytes(receipt.to_json()) == path.read_bytes()
            if whole and receipt.unit == path.stem and receipt.shards == self._listed(receipt):
                receipts[receipt.unit] = receipt
        return receipts

    def _listed(self, receipt: Receipt) -> tuple[ShardInfo, ...]:
        return receipt.shards if self.manifest is None else self.shards_of(receipt.unit)

    def _compare(self, folder: Path) -> None:
        """Find where the source's own files contradict each other."""
        plans = Counter(receipt.plan_sha256 for receipt in self.receipts.values())
        if self.plan is not None and plans:
            believed = plans.most_common(1)[0][0]
            if believed != self.plan.sha256:
                self.found.append(Damage(PLAN, "it is not the plan that the receipts name"))
                self.plan = None
            for unit in [u for u, r in self.receipts.items() if r.plan_sha256 != believed]:
                del self.receipts[unit]
        if self.manifest is not None and self.plan is not None:
            facts = facts_of(self.plan.recipe)
            if (self.manifest.facts, self.manifest.parts) != (facts, self.plan.parts):
                self.found.append(Damage(MANIFEST, "it does not fit the plan"))
        if self.manifest is not None and set(self.receipts) == set(self.units):
            counted: Counter[str] = Counter()
            for receipt in self.receipts.values():
                counted.update(receipt.rejected)
            if dict(counted) != dict(self.manifest.rejected):
                self.found.append(Damage(MANIFEST, "it counts other refused records"))
        if _sha256(folder / TOKENIZER) != self.facts.tokenizer.sha256:
            self.found.append(Damage(TOKENIZER, "missing or damaged"))


def _is_limited(plan: Plan) -> bool:
    return any(plan.recipe[key] is not None for key in ("max_documents", "max_tokens"))


def _damages_of_shard(folder: Path, shard: ShardInfo, facts: Facts) -> Iterator[Damage]:
    """Damage to a shard, its sidecar and its mask; to rows where the files are otherwise whole."""
    sidecar = folder / f"{shard.stem}.rows.npy"
    records: npt.NDArray[Any] | None = None
    if _sha256(sidecar) != shard.rows_sha256:
        yield Damage(sidecar.name, "missing or damaged")
    else:
        records = np.load(io.BytesIO(sidecar.read_bytes()), allow_pickle=False)
    arrays = [(folder / shard.file, facts.seq_len, np.dtype(facts.dtype).newbyteorder("<"))]
    if facts.masked:
        mask = folder / f"{shard.stem}.mask.npy"
        arrays.append((mask, facts.seq_len // 8, np.dtype(np.uint8)))
    whole = True
    for path, width, dtype in arrays:
        if what := _array_fault(path, (shard.n_rows, width), dtype):
            whole = False
            yield Damage(path.name, what)
    if whole and records is not None and records.dtype == ROW_RECORD:
        mapped = [np.load(path, mmap_mode="r", allow_pickle=False) for path, _, _ in arrays]
        if bad := tuple(_bad_rows(mapped, records)):
            yield Damage(shard.file, "damaged (digests differ)", bad)


def _bad_rows(arrays: list[npt.NDArray[Any]], records: npt.NDArray[Any]) -> Iterator[int]:
    for first in range(0, len(records), ROWS_AT_ONCE):
        here = slice(first, first + ROWS_AT_ONCE)
        digests = row_digests(*(array[here] for array in arrays))
        yield from (first + np.flatnonzero(digests != records["xxh3"][here])).tolist()


def _array_fault(path: Path, shape: tuple[int, int], dtype: np.dtype[Any]) -> str:
    """What is wrong with a .npy file besides its values; empty if nothing is."""
    npy: Any = np.lib.format
    header = io.BytesIO()
    described = {"descr": npy.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    npy.write_array_header_1_0(header, described)
    expected = len(header.getvalue()) + shape[0] * shape[1] * dtype.itemsize
    try:
        with path.open("rb") as file:
            begins = file.read(len(header.getvalue()))
            size = file.seek(0, io.SEEK_END)
    except FileNotFoundError:
        return "missing"
    if size != expected:
        return f"{size:,} bytes where {expected:,} should be"
    return "" if begins == header.getvalue() else "its header is damaged"


def _sha256(path: Path) -> str:
    """A file's SHA-256; of a missing one, that of nothing."""
    return sha256_file(path) if path.is_file() else hashlib.sha256().hexdigest()
