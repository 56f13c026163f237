"""What is wrong with one shard: with its file, its sidecar, its mask, its rows, its counts."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from shards.files import sha256_file
from shards.format import ROW_RECORD, Facts, ShardInfo, row_digests

ROWS_AT_ONCE: Final = 1024
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


def damages_of_shard(folder: Path, shard: ShardInfo, facts: Facts) -> Iterator[Damage]:
    """Damage to a shard, its sidecar and its mask; to rows where the files are otherwise whole."""
    sidecar = folder / f"{shard.stem}.rows.npy"
    records: npt.NDArray[Any] | None = None
    if digest_of(sidecar) != shard.rows_sha256:
        yield Damage(sidecar.name, "missing or damaged")
    else:
        records = np.load(io.BytesIO(sidecar.read_bytes()), allow_pickle=False)
    arrays = [_RowsOf(folder / shard.file, shard.n_rows, facts.seq_len, np.dtype(facts.dtype))]
    if facts.masked:
        mask = folder / f"{shard.stem}.mask.npy"
        arrays.append(_RowsOf(mask, shard.n_rows, facts.seq_len // 8, np.dtype(np.uint8)))
    faults = [Damage(array.path.name, fault) for array in arrays if (fault := array.fault())]
    yield from faults
    if faults or records is None or (records.dtype, len(records)) != (ROW_RECORD, shard.n_rows):
        return
    try:
        bad, n_tokens, n_documents = _compare_rows(arrays, records, facts)
    except OSError as error:
        yield Damage(shard.file, f"cannot be read ({error.strerror})")
        return
    if bad:
        yield Damage(shard.file, "damaged (digests differ)", tuple(bad))
    found = (n_tokens, n_documents, arrays[0].bytes, "val" if "-val-" in shard.file else "train")
    if not bad and found != (shard.n_tokens, shard.n_documents, shard.bytes, shard.split):
        yield Damage(shard.file, "its tokens, documents, bytes or split are not those listed")


def _compare_rows(
    arrays: list[_RowsOf], records: npt.NDArray[Any], facts: Facts
) -> tuple[list[int], int, int]:
    """Rows whose digest differs; tokens; documents."""
    bad: list[int] = []
    n_tokens = n_documents = first = 0
    for rows, *masks in zip(*arrays, strict=True):
        digests = row_digests(rows, *masks)
        here = records["xxh3"][first : first + len(rows)]
        bad += (first + np.flatnonzero(digests != here)).tolist()
        n_tokens += int(np.count_nonzero(rows != facts.tokenizer.pad_id))
        n_documents += int(np.count_nonzero(rows == facts.tokenizer.bos_id))
        first += len(rows)
    return bad, n_tokens, n_documents


class _RowsOf:
    """The rows of a .npy file of a known shape, some at a time.

    They are read, not mapped: of a failing disk a mapping makes SIGBUS, reading an error.
    """

    def __init__(self, path: Path, n_rows: int, width: int, dtype: np.dtype[Any]) -> None:
        npy: Any = np.lib.format
        header = io.BytesIO()
        self._dtype, self._width = dtype.newbyteorder("<"), width
        described = {"descr": npy.dtype_to_descr(self._dtype), "fortran_order": False}
        npy.write_array_header_1_0(header, {**described, "shape": (n_rows, width)})
        self.path, self._header = path, header.getvalue()
        self._row_bytes = width * dtype.itemsize
        self.bytes = len(self._header) + n_rows * self._row_bytes

    def fault(self) -> str:
        """What is wrong with the file besides its values; empty if nothing is."""
        try:
            with self.path.open("rb") as file:
                begins = file.read(len(self._header))
                size = file.seek(0, io.SEEK_END)
        except FileNotFoundError:
            return "missing"
        except OSError as error:
            return f"cannot be read ({error.strerror})"
        if size != self.bytes:
            return f"{size:,} bytes where {self.bytes:,} should be"
        return "" if begins == self._header else "its header is damaged"

    def __iter__(self) -> Iterator[npt.NDArray[Any]]:
        with self.path.open("rb") as file:
            file.seek(len(self._header))
            while data := file.read(ROWS_AT_ONCE * self._row_bytes):
                yield np.frombuffer(data, self._dtype).reshape(-1, self._width)


def digest_of(path: Path) -> str:
    """A file's SHA-256; empty if it cannot be read."""
    try:
        return sha256_file(path)
    except OSError:
        return ""
