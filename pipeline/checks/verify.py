"""Every byte of a prepared source compared with what vouches for it.

    root -> sidecars -> rows and masks        manifest.json, which is compared with
    receipts -> shards, refused records       <unit>.json, which name
    plan -> parts, facts                      units.json

`damages` names all that does not fit; repair.py does the units concerned again.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from pipeline.checks.damage import Damage, damages_of_shard, digest_of
from pipeline.errors import PrepareError
from pipeline.units.recipe import facts_of
from pipeline.units.units import Plan, read_plan
from shards.errors import ShardError
from shards.files import is_temporary, json_bytes
from shards.format import (
    MANIFEST,
    PLAN,
    TOKENIZER,
    Facts,
    Manifest,
    Receipt,
    ShardInfo,
    unit_name,
)
from shards.reader import find_sources, read_manifest, read_receipt

STRANGE: Final = "no part of the source"


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
            if digest_of(folder / f"{unit}.rejected.jsonl") != receipt.rejected_sha256:
                what = "it is missing or damaged, or its digest in the receipt is"
                yield Damage(f"{unit}.rejected.jsonl", what)
        for shard in state.shards_of(unit):
            yield from damages_of_shard(folder, shard, state.facts)
            expected |= _files_of(shard)
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
    """What a folder says of itself: manifest, plan and receipts that can be believed.

    Each vouches for some of what the others say. Where two of them differ the rows decide, or the
    majority; what is not believed is a damage, and is left out here.
    """

    def __init__(self, folder: Path) -> None:
        self.found: list[Damage] = []
        self.plan = self._read_plan(folder)
        self.manifest = self._read_manifest(folder)
        self.receipts = self._read_receipts(folder)
        self._compare_with_plan()
        if self.plan is not None:
            self.facts = facts_of(self.plan.recipe)
        elif self.manifest is not None:
            self.facts = self.manifest.facts
        else:
            raise PrepareError(
                f"{folder}: neither {MANIFEST} nor {PLAN} can be read, so that nothing tells what "
                "should be there: prepare the source anew"
            )
        self._compare_with_receipts(folder)
        if digest_of(folder / TOKENIZER) != self.facts.tokenizer.sha256:
            self.found.append(Damage(TOKENIZER, "missing or damaged"))

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

    def knows(self, unit: str) -> bool:
        """Whether anything tells what the unit was."""
        return self.manifest is not None or unit in self.receipts

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
            if whole and receipt.unit == path.stem and _counts_its_refusals(receipt, folder):
                receipts[receipt.unit] = receipt
        return receipts

    def _compare_with_plan(self) -> None:
        """The plan is the one that most receipts name; the manifest has its facts and parts."""
        named = Counter(receipt.plan_sha256 for receipt in self.receipts.values())
        if self.plan is None:
            return
        sha256 = self.plan.sha256
        believed = max(named, key=lambda name: (named[name], name == sha256), default=sha256)
        if believed != sha256:
            self.found.append(Damage(PLAN, "it is not the plan that the receipts name"))
            self.plan = None
        self.receipts = {u: r for u, r in self.receipts.items() if r.plan_sha256 == believed}
        if self.plan is not None and self.manifest is not None:
            facts = facts_of(self.plan.recipe)
            if (self.manifest.facts, self.manifest.parts) != (facts, self.plan.parts):
                self._disbelieve("it does not fit the plan")

    def _compare_with_receipts(self, folder: Path) -> None:
        """Receipts list what the manifest lists; if not, the rows tell which of them is right."""
        for unit, receipt in list(self.receipts.items()):
            listed = self.shards_of(unit)
            if receipt.shards == listed:
                continue
            right = _is_borne_out(folder, unit, receipt.shards, self.facts)
            if right and not _is_borne_out(folder, unit, listed, self.facts):
                self._disbelieve(f"it lists other shards of unit {unit} than there are")
            else:
                del self.receipts[unit]
        if self.manifest is None or set(self.receipts) != set(self.units):
            return
        receipts = [self.receipts[unit] for unit in self.units]
        counted = sum((Counter(receipt.rejected) for receipt in receipts), Counter[str]())
        if self.manifest.shards != tuple(shard for r in receipts for shard in r.shards):
            self._disbelieve("its shards are in another order")
        elif dict(counted) != dict(self.manifest.rejected):
            self._disbelieve("it counts other refused records")

    def _disbelieve(self, what: str) -> None:
        self.found.append(Damage(MANIFEST, what))
        self.manifest = None


def _is_limited(plan: Plan) -> bool:
    return any(plan.recipe[key] is not None for key in ("max_documents", "max_tokens"))


def _counts_its_refusals(receipt: Receipt, folder: Path) -> bool:
    """Whether the receipt has the reasons of the list that it names; of a damaged list, unknown."""
    path = folder / f"{receipt.unit}.rejected.jsonl"
    if receipt.rejected_sha256 is None:
        return not receipt.rejected
    if digest_of(path) != receipt.rejected_sha256:
        return True
    lines = path.read_bytes().splitlines()
    return Counter(json.loads(line)["reason"] for line in lines) == Counter(receipt.rejected)


def _files_of(shard: ShardInfo) -> set[str]:
    return {shard.file, f"{shard.stem}.rows.npy", f"{shard.stem}.mask.npy"}


def _is_borne_out(folder: Path, unit: str, shards: tuple[ShardInfo, ...], facts: Facts) -> bool:
    """Whether these are the unit's shards, to judge by the files."""
    listed = {name for shard in shards for name in _files_of(shard)}
    there = {path.name for path in folder.glob(f"{unit}-*.npy")}
    names = [shard.file for shard in shards]
    in_order = names == sorted(set(names))
    return (
        in_order
        and there <= listed
        and not any(any(damages_of_shard(folder, s, facts)) for s in shards)
    )
