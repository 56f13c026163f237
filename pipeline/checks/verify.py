"""Every byte of a prepared source compared with what it should be.

dataset hash -> sidecars -> rows, masks       manifest.json
unit records -> shards, rejected records      <unit>.json: what the manifest says, by unit
plan -> parts, facts                          units.json: unit records name its SHA-256
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np

from pipeline.errors import PrepareError
from pipeline.text.json_tokenizer import load_tokenizer
from pipeline.units.units import PreparePlan, read_plan
from shards.errors import SummerError
from shards.files import is_temporary, json_bytes, sha256_file
from shards.format import (
    EXCLUDED,
    MANIFEST,
    PLAN,
    TOKEN_BYTES,
    TOKENIZER_CONFIG,
    TOKENIZER_JSON,
    Facts,
    Manifest,
    ShardInfo,
    UnitRecord,
    combine,
    row_digests,
    tokenizer_path,
    unit_name,
)
from shards.reader import RowFile, find_sources, read_manifest, read_sidecar, read_unit_record

UNEXPECTED_FILE: Final = "no part of the source"
ROWS_AT_ONCE: Final = 1024
_SHOWN_ROWS: Final = 8

T = TypeVar("T")


@dataclass(frozen=True)
class Damage:
    """One thing that is wrong, in a file and, where that can be said, in rows of it."""

    file: str
    what: str
    rows: tuple[int, ...] = ()

    @property
    def unit(self) -> str | None:
        """The unit that it belongs to; None if the file is of no unit."""
        name = self.file.split(".")[0].split("-")[0]
        return name if name.isdigit() else None

    @property
    def is_stranger(self) -> bool:
        """Whether the file belongs to nothing and harms nothing, as a .DS_Store does."""
        return self.what == UNEXPECTED_FILE and self.unit is None

    def __str__(self) -> str:
        if not self.rows:
            return f"{self.file}: {self.what}"
        shown, more = ", ".join(map(str, self.rows[:_SHOWN_ROWS])), len(self.rows) - _SHOWN_ROWS
        return f"{self.file}: rows {shown}{f' and {more:,} more' * (more > 0)}: {self.what}"


def source_folders(folder: Path) -> list[Path]:
    """The folder itself if it is a source's, or else the sources in it; ShardError if none."""
    if (folder / MANIFEST).exists() or (folder / PLAN).exists():
        return [folder]
    return [folder / name for name in find_sources(folder)]


def find_damage(folder: Path) -> Iterator[Damage]:
    """Everything in a source's folder that is not what it was when it was prepared."""
    metadata = Metadata(folder)
    yield from metadata.damage
    yield from _tokenizer_damage(folder, metadata.facts)
    expected = {MANIFEST, PLAN, TOKEN_BYTES, tokenizer_path(folder).name}
    if excluded := metadata.facts.exclude:
        expected |= {EXCLUDED}
        if digest_of(folder / EXCLUDED) != excluded["sha256"]:
            yield Damage(EXCLUDED, "missing or damaged")
    expected |= {TOKENIZER_CONFIG} if TOKENIZER_JSON in expected else set()
    for unit in metadata.units:
        expected |= {f"{unit}.json"}
        record = metadata.records.get(unit)
        if record is None:
            yield Damage(f"{unit}.json", "the unit's record is missing or damaged")
        elif record.rejected_sha256 is not None:
            rejected = f"{unit}.rejected.jsonl"
            expected |= {rejected}
            if digest_of(folder / rejected) != record.rejected_sha256:
                yield Damage(rejected, f"missing or damaged, or its digest in {unit}.json is")
        for shard in metadata.shards_of(unit):
            yield from _shard_damage(folder, shard, metadata.facts)
            expected |= _files_of(shard)
    for path in sorted(folder.iterdir()):
        if path.name not in expected and not is_temporary(path):
            yield Damage(path.name, UNEXPECTED_FILE)
        elif not path.resolve().is_relative_to(folder.resolve()):
            yield Damage(path.name, "a link that leads out of the folder")


class Metadata:
    """The manifest, the plan and the unit records of a folder, without those that are damaged.

    A file is accepted if it is spelled as it was written and fits the others: the plan, if unit
    records name its SHA-256; a unit record, if it names the plan and lists what the manifest does;
    the manifest, if it is what plan and unit records add up to. Where manifest and unit record
    list different shards, the shards decide.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.damage: list[Damage] = []
        self.plan = _read(folder / PLAN, lambda _: read_plan(folder), PreparePlan.to_json)
        self.manifest = _read(folder / MANIFEST, lambda _: read_manifest(folder), Manifest.to_json)
        self._listed: dict[str, list[ShardInfo]] = {}  # the manifest's shards, by unit
        for shard in self.manifest.shards if self.manifest is not None else ():
            self._listed.setdefault(shard.file.split("-")[0], []).append(shard)
        self.records = self._read_unit_records()
        if self.plan is not None and self.records:
            sha256 = self.plan.sha256
            named = {unit: r for unit, r in self.records.items() if r.plan_sha256 == sha256}
            self.plan, self.records = (self.plan, named) if named else (None, self.records)
        if self.plan is None:
            self.damage.append(Damage(PLAN, "missing, damaged, or not what unit records name"))
        if self.manifest is None:
            self.damage.append(Damage(MANIFEST, "missing or damaged"))
        known = self.plan or self.manifest
        if known is None:
            raise PrepareError(
                f"{folder}: no {MANIFEST}, no {PLAN}: name a source, or prepare the source again"
            )
        self.facts: Facts = known.facts
        if self.manifest is not None:
            self._compare(self.manifest)

    @property
    def units(self) -> list[str]:
        """The units that there should be."""
        names = set(self.records)
        if self.manifest is not None:
            names |= set(self._listed)
        if self.plan is not None and not _is_limited(self.plan):
            names |= {unit_name(position) for position in range(len(self.plan.units))}
        return sorted(names)

    def shards_of(self, unit: str) -> tuple[ShardInfo, ...]:
        """The unit's shards: as the manifest has them, or else its record."""
        if self.manifest is not None:
            return tuple(self._listed.get(unit, ()))
        return self.records[unit].shards if unit in self.records else ()

    def _read_unit_records(self) -> dict[str, UnitRecord]:
        records = {}
        for path in sorted(self._folder.glob("[0-9]*.json")):
            record = _read(path, read_unit_record, UnitRecord.to_json)
            if record and record.unit == path.stem and _counts_its_rejected(record, self._folder):
                records[record.unit] = record
        return records

    def _compare(self, manifest: Manifest) -> None:
        for unit, record in list(self.records.items()):
            if record.shards != self.shards_of(unit):
                if self._are_there(unit, record.shards):
                    self._reject_manifest(f"it lists other shards of unit {unit}")
                    return
                del self.records[unit]
        if self.plan is None or set(self.records) != set(self.units):
            return
        records = map(self.records.__getitem__, self.units)
        if manifest != combine(self.facts, self.plan.parts, records):
            self._reject_manifest("it is not what the plan and the unit records add up to")

    def _reject_manifest(self, what: str) -> None:
        self.damage.append(Damage(MANIFEST, what))
        self.manifest = None

    def _are_there(self, unit: str, shards: tuple[ShardInfo, ...]) -> bool:
        """Whether the unit's files are these shards, undamaged, and no others."""
        listed = {name for shard in shards for name in _files_of(shard)}
        there = {path.name for path in self._folder.glob(f"{unit}-*.npy")}
        return there <= listed and not any(
            any(_shard_damage(self._folder, shard, self.facts)) for shard in shards
        )


def _read(path: Path, read: Callable[[Path], T | None], to_json: Callable[[T], Any]) -> T | None:
    """What a file holds; None unless it can be read and is spelled as it was written."""
    try:
        value = read(path)
        return value if value and json_bytes(to_json(value)) == path.read_bytes() else None
    except (OSError, SummerError, KeyError, TypeError):
        return None


def digest_of(path: Path) -> str:
    """A file's SHA-256; empty if it cannot be read."""
    try:
        return sha256_file(path)
    except OSError:
        return ""


def _is_limited(plan: PreparePlan) -> bool:
    return any(plan.recipe.get(key) is not None for key in ("max_documents", "max_tokens"))


def _counts_its_rejected(record: UnitRecord, folder: Path) -> bool:
    """Whether the record has the reasons of the list that it names; of a damaged list, unknown."""
    path = folder / f"{record.unit}.rejected.jsonl"
    if record.rejected_sha256 is None:
        return not record.rejected
    if digest_of(path) != record.rejected_sha256:
        return True
    lines = path.read_bytes().splitlines()
    return Counter(json.loads(line)["reason"] for line in lines) == Counter(record.rejected)


def _tokenizer_damage(folder: Path, facts: Facts) -> Iterator[Damage]:
    path, lengths = tokenizer_path(folder), folder / TOKEN_BYTES
    if digest_of(path) != facts.tokenizer.sha256:
        yield Damage(path.name, "missing or damaged")
        return
    tokenizer = None
    with contextlib.suppress(OSError, SummerError):
        tokenizer = load_tokenizer(folder, facts.tokenizer.name)
    if path.name == TOKENIZER_JSON and (tokenizer is None or tokenizer.info != facts.tokenizer):
        yield Damage(TOKENIZER_CONFIG, "missing or damaged")
    elif lengths.exists() and (  # earlier versions wrote none
        tokenizer is None or lengths.read_bytes() != tokenizer.token_bytes_file()
    ):
        yield Damage(TOKEN_BYTES, "damaged")


def _files_of(shard: ShardInfo) -> set[str]:
    return {shard.file, f"{shard.stem}.rows.npy", f"{shard.stem}.mask.npy"}


def _shard_damage(folder: Path, shard: ShardInfo, facts: Facts) -> Iterator[Damage]:
    """Damage to a shard, its sidecar and its mask; to rows where the files are otherwise intact."""
    n, seq_len = shard.n_rows, facts.seq_len
    openers: dict[str, Callable[[Path], Any]] = {
        f"{shard.stem}.rows.npy": lambda path: read_sidecar(path, shard)["xxh3"],
        shard.file: lambda path: RowFile(path, (n, seq_len), facts.dtype),
    }
    if facts.masked:
        openers[f"{shard.stem}.mask.npy"] = lambda path: RowFile(path, (n, seq_len // 8), "u1")
    opened: list[Any] = []
    for name, opener in openers.items():
        try:
            opened.append(opener(folder / name))
        except FileNotFoundError:
            yield Damage(name, "missing")
        except (OSError, ValueError) as error:
            yield Damage(name, f"damaged ({error})")
    if len(opened) < len(openers):
        return
    digests, *files = opened
    bad: list[int] = []
    n_tokens = n_documents = largest = 0
    for first in range(0, n, ROWS_AT_ONCE):
        here = slice(first, min(first + ROWS_AT_ONCE, n))
        try:
            rows, *masks = (file.read(here) for file in files)
        except OSError as error:
            yield Damage(shard.file, f"cannot be read ({error.strerror})")
            return
        bad += (first + np.flatnonzero(row_digests(rows, *masks) != digests[here])).tolist()
        text = rows[rows != facts.tokenizer.pad_id]
        n_tokens, largest = n_tokens + len(text), max(largest, int(text.max(initial=0)))
        n_documents += int(np.count_nonzero(rows == facts.tokenizer.bos_id))
    found = (n_tokens, n_documents, files[0].n_bytes, "val" if "-val-" in shard.file else "train")
    if bad:
        yield Damage(shard.file, "damaged (digests differ)", tuple(bad))
    elif largest >= facts.tokenizer.vocab_size:
        size = facts.tokenizer.vocab_size
        yield Damage(shard.file, f"token {largest} is beyond the vocabulary of {size}")
    elif found != (shard.n_tokens, shard.n_documents, shard.bytes, shard.split):
        yield Damage(shard.file, "its tokens, documents, bytes or split are not those listed")
