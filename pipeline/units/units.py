"""The plan: the input cut into parts, parts filled into units, units put in a fair order.

    part    a parquet row group; 64 MiB of lines; a whole file of any other kind
    unit    consecutive parts of the listing, about 256 MiB: what one worker does in one go, and
            what is done again after a crash. Of a small listing a 64th, 8 MiB at least
    order   by XXH3-64 of the unit's first `<path>:<first>`, so that any prefix of the units is a
            fair sample of all and not the alphabet's first files

It depends on the listing and the recipe alone, and is written into `units.json` once.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import xxhash

from pipeline.errors import PrepareError, SourceError
from pipeline.inputs.formats import check_kind, is_array
from pipeline.inputs.inputs import INTERPRETER, InputFile, Inputs, listed
from pipeline.inputs.lines import overlaps_itself
from pipeline.inputs.records import check_column, column_bytes, damaged, open_parquet
from pipeline.inputs.sources import Source
from shards.errors import ShardError, SummerError, one_line
from shards.files import json_bytes
from shards.format import PLAN, Facts, Part, facts_of, parse_json
from shards.shape import build, check_shape
from shards.versions import FORMAT_KEY, UNITS, check_format

UNIT_BYTES: Final = 256 << 20
LEAST_UNIT_BYTES: Final = 8 << 20
UNITS_WANTED: Final = 64
LINES_BYTES: Final = 64 << 20
EXPANSION: Final = 4
"""Text bytes expected of one byte of a compressed file."""
FOOTERS_AT_ONCE: Final = 16


@dataclass(frozen=True)
class WeighedPart:
    """A part with its bytes of text (a guess if it is compressed) and the bytes read for them."""

    part: Part
    text_bytes: int
    read_bytes: int


@dataclass(frozen=True)
class Unit:
    """The parts [first, last) of the plan's list, their text and what must be read for it."""

    first: int
    last: int
    text_bytes: int
    read_bytes: int


@dataclass(frozen=True)
class PreparePlan:
    """Who does what. `recipe` holds all else that the output's bytes depend on."""

    recipe: Mapping[str, Any]
    files: tuple[InputFile, ...]
    parts: tuple[Part, ...]
    units: tuple[Unit, ...]

    def to_json(self) -> dict[str, object]:
        """The plan as it stands in units.json."""
        return {
            FORMAT_KEY: UNITS,
            **self.recipe,
            "files": [_spelled(file) for file in self.files],
            "parts": [asdict(part) for part in self.parts],
            "units": [asdict(unit) for unit in self.units],
        }

    def to_bytes(self) -> bytes:
        """The bytes of units.json."""
        return json_bytes(self.to_json())

    def parts_of(self, position: int) -> list[tuple[int, Part]]:
        """The parts of one unit with their numbers."""
        unit = self.units[position]
        return [(number, self.parts[number]) for number in range(unit.first, unit.last)]

    @functools.cached_property
    def facts(self) -> Facts:
        """What the manifest and every shard need to know; ShardError if the recipe lacks it."""
        return facts_of(self.recipe)

    @functools.cached_property
    def source(self) -> Source:
        """The source that the plan was made for."""
        same = ("licence", "dataset", "revision", "config", "split", "text_column", "shape")
        return Source(
            name=self.recipe["source"],
            about="",
            separator=self.recipe.get("separator", ""),
            embedded=self.recipe["dataset"] == INTERPRETER,
            **{name: self.recipe[name] for name in same},
        )

    @functools.cached_property
    def sha256(self) -> str:
        """What unit records name the plan by."""
        return hashlib.sha256(self.to_bytes()).hexdigest()


@dataclass(frozen=True)
class _ListedFile:
    path: str
    bytes: int
    version: str = ""


@dataclass(frozen=True)
class _Listed:
    """What a plan lists; all else in it is the recipe."""

    files: tuple[_ListedFile, ...]
    parts: tuple[Part, ...]
    units: tuple[Unit, ...]


_NUMBER: Final = frozenset((int, type(None)))
_RECIPE: Final = {
    **dict.fromkeys(("config", "split", "separator", "text_column"), str),
    "max_documents": _NUMBER,
    "max_tokens": _NUMBER,
    "unit_bytes": int,
}


def _spelled(file: InputFile) -> dict[str, Any]:
    """A file in the plan; the plans of 0.2.0 and before have no versions of files."""
    version = {"version": file.version} if file.version else {}
    return {"path": file.path, "bytes": file.bytes, **version}


def _file(file: _ListedFile) -> InputFile:
    return listed(file.path, file.bytes, file.version)


def read_plan(folder: Path) -> PreparePlan | None:
    """The plan that a folder holds, or None."""
    try:
        data = (folder / PLAN).read_bytes()
    except FileNotFoundError:
        return None
    try:
        value = parse_json(data)
    except ShardError as error:
        raise PrepareError(
            f"{folder / PLAN} is damaged ({error}): delete it, and the same command goes on"
        ) from error
    try:
        check_shape(value, {})  # that it is an object at all
        check_format(value, UNITS, PLAN)
        listed = build(_Listed, value)
        kept = {k: v for k, v in value.items() if k not in (FORMAT_KEY, *_Listed.__annotations__)}
        check_shape(kept, _RECIPE, "the recipe")
        plan = PreparePlan(kept, tuple(map(_file, listed.files)), listed.parts, listed.units)
        _ = plan.facts, plan.source
        _check_order(plan)
        return plan
    except (KeyError, TypeError, ValueError, SummerError) as error:
        raise PrepareError(
            f"{folder / PLAN} is no plan of this version ({one_line(error).lstrip('.')}): "
            f"delete {folder}, prepare again"
        ) from error


def _check_order(plan: PreparePlan) -> None:
    """ValueError unless units are consecutive parts, all of them, of files that are listed."""
    order = sorted(plan.units, key=lambda unit: unit.first)
    ends = [0, *(unit.last for unit in order)]
    if [unit.first for unit in order] != ends[:-1] or ends[-1] != len(plan.parts):
        raise ValueError("its units are not all of its parts")
    names = {file.path for file in plan.files}
    if unknown := [part.file for part in plan.parts if part.file not in names]:
        raise ValueError(f"it lists no file {unknown[0]!r}")


def make_plan(
    recipe: Mapping[str, Any], inputs: Inputs, source: Source, unit_bytes: int
) -> PreparePlan:
    """The plan for a listing. Reads the footers of parquet files; SourceError if one is damaged."""
    weighed = cut_into_parts(inputs, source)
    if not sum(part.text_bytes for part in weighed):
        names = ", ".join(file.path for file in inputs.files[:3]) or "the listing"
        raise SourceError(f"{source.name}: there is nothing to read in {names} (0 bytes of text)")
    units = fill_units(weighed, min(unit_bytes, _share(sum(part.text_bytes for part in weighed))))
    return PreparePlan(recipe, inputs.files, tuple(w.part for w in weighed), tuple(units))


def cut_into_parts(inputs: Inputs, source: Source) -> list[WeighedPart]:
    """Every file of the listing in parts, in order."""
    kinds = {file.layout.kind for file in inputs.files}
    if source.separator and "text" not in kinds:
        raise SourceError(
            f"{source.name} has no text file that --separator or --shape lines could cut, only "
            f"{', '.join(sorted(kinds))}: leave it out"
        )
    with ThreadPoolExecutor(FOOTERS_AT_ONCE) as pool:
        cut = pool.map(lambda file: _parts_of(inputs, source, file), inputs.files)
        return [part for parts in cut for part in parts]


def fill_units(weighed: Sequence[WeighedPart], unit_bytes: int) -> list[Unit]:
    """Consecutive parts together until a unit holds `unit_bytes` of text; units in fair order."""
    units: list[tuple[int, Unit]] = []
    begun = text_bytes = read_bytes = 0
    for end, part in enumerate(weighed, start=1):
        text_bytes += part.text_bytes
        read_bytes += part.read_bytes
        if text_bytes >= unit_bytes or end == len(weighed):
            first = weighed[begun].part
            key = xxhash.xxh3_64_intdigest(f"{first.file}:{first.first}".encode())
            units.append((key, Unit(begun, end, text_bytes, read_bytes)))
            begun, text_bytes, read_bytes = end, 0, 0
    return [unit for _, unit in sorted(units, key=lambda entry: (entry[0], entry[1].first))]


def _parts_of(inputs: Inputs, source: Source, file: InputFile) -> list[WeighedPart]:
    kind = file.layout.kind
    if not file.bytes and (kind in ("parquet", "table") or file.layout.compression):
        raise SourceError(f"{file.path} is empty (0 bytes): fetch it again, or leave it out")
    if file.bytes and inputs.local:
        check_kind(inputs, file)
    if kind == "parquet":
        return _row_groups(inputs, source, file)
    if file.layout.compression:
        return [WeighedPart(Part(file=file.path, first=0, last=file.bytes),
                            file.bytes * EXPANSION, file.bytes)]  # fmt: skip
    step = file.bytes
    separator = source.separator.encode()
    if (kind == "jsonl" and source.shape != "lines" and not is_array(inputs, file)) or (
        kind == "text" and separator and not overlaps_itself(separator)
    ):
        step = min(LINES_BYTES, _share(file.bytes))
    cuts = [*range(0, file.bytes, max(1, step)), file.bytes] if file.bytes else [0, 0]
    return [
        WeighedPart(Part(file=file.path, first=first, last=last), last - first, last - first)
        for first, last in itertools.pairwise(cuts)
    ]


def _row_groups(inputs: Inputs, source: Source, file: InputFile) -> list[WeighedPart]:
    try:
        with inputs.open(file.path) as raw:
            parquet = open_parquet(raw)
            schema, metadata = parquet.schema_arrow, parquet.metadata
    except (OSError, pa.ArrowException) as error:
        raise damaged(file.path, error) from error
    check_column(schema, file.path, source.text_column, chat=source.shape == "chat")
    # a page may run on from one row group into the next
    step = max(1, metadata.num_row_groups) if source.shape == "lines" else 1
    parts = []
    for first in range(0, metadata.num_row_groups, step):
        sizes = column_bytes(metadata, range(first, first + step), source.text_column)
        parts.append(WeighedPart(Part(file=file.path, first=first, last=first + step), *sizes))
    return parts


def _share(n_bytes: int) -> int:
    """A 64th of something, but no less than the smallest unit."""
    return max(LEAST_UNIT_BYTES, n_bytes // UNITS_WANTED)
