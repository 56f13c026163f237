"""Documents by name, FILE:RECORD, and the rows of shards that hold them.

A file that was read in several parts (the row groups of a parquet file, 64 MiB of lines) numbers
the records of each part from 0: `web.parquet#2:17` is record 17 of its third part.
"""

from __future__ import annotations

import re
from itertools import groupby
from typing import Final

import numpy as np
import numpy.typing as npt

from shards.format import ROW_RECORD, Manifest
from shards.reader import ShardReader
from tools.errors import TraceError

_NAME: Final = re.compile(r"(?P<file>.+?)(?:#(?P<part>\d+))?:(?P<record>\d+)")


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
    wanted = _find(reader.manifest, name)
    if wanted is None:
        return []
    begun = [(keys, first) for keys, first in _units(reader) if keys[0] <= wanted]
    if not begun:
        return []
    keys, first_row = max(begun, key=lambda unit: int(unit[0][0]))
    left, right = (int(np.searchsorted(keys, wanted, side)) for side in ("left", "right"))
    if left == right or (left > 0 and not _begins_with_bos(reader, first_row + left)):
        left -= 1
    return list(range(first_row + left, first_row + max(right, left + 1)))


def _find(manifest: Manifest, name: str) -> int | None:
    """Part and record of a named document as one sortable number."""
    match = _NAME.fullmatch(name)
    if match is None:
        raise TraceError(f"--document {name}: write it as FILE:RECORD, as --step shows it")
    files = {part.file for part in manifest.parts}
    file, record = match["file"], int(match["record"])
    named = [file] if file in files else [each for each in files if each.endswith(f"/{file}")]
    if len(named) > 1:
        raise TraceError(f"{file}: there are several, {', '.join(sorted(named)[:3])}: name one")
    if not named:
        return None
    parts = _parts_of(manifest, named[0])
    if match["part"] is None and len(parts) > 1:
        raise TraceError(f"{file} was read in {len(parts)} parts: write {file}#PART:{record}")
    number = int(match["part"] or 0)
    if number >= len(parts):
        raise TraceError(f"{file}#{number}: that file has the parts 0 to {len(parts) - 1}")
    return parts[number] << 32 | record


def _parts_of(manifest: Manifest, file: str) -> list[int]:
    return [number for number, part in enumerate(manifest.parts) if part.file == file]


def _units(reader: ShardReader) -> list[tuple[npt.NDArray[np.int64], int]]:
    """Of each unit: the key of each of its training rows, ascending, and the first row's number."""
    units, first_row = [], 0
    by_unit = groupby(reader.manifest.split("train"), key=lambda shard: shard.stem.split("-")[0])
    for _, shards in by_unit:
        sidecars = [
            np.load(reader.folder / f"{shard.stem}.rows.npy", allow_pickle=False)
            for shard in shards
        ]
        records = np.concatenate([np.empty(0, ROW_RECORD), *sidecars])
        keys = records["part"].astype(np.int64) << 32 | records["record"].astype(np.int64)
        units.append((keys, first_row))
        first_row += len(records)
    return units


def _begins_with_bos(reader: ShardReader, row: int) -> bool:
    tokens, _ = reader.rows(np.array([row], np.int64))
    return int(tokens[0, 0]) == reader.manifest.facts.tokenizer.bos_id
