"""Manifest -> rows, each one checked against its digest before anyone sees it."""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import io
import itertools
import os
import resource
import stat
import weakref
from collections import OrderedDict
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from shards.errors import ShardError
from shards.format import (
    MANIFEST,
    PLAN,
    ROW_RECORD,
    Manifest,
    Masks,
    ShardInfo,
    Split,
    Tokens,
    UnitRecord,
    parse_json,
    row_digest,
)

_MOST_FILES: Final = 1 << 16
"""As far as a process' limit of open files is raised, if it may be."""


def most_open_shards() -> int:
    """How many shards a reader may keep open: an eighth of the files that the process may open.

    The soft limit, usually 1,024 for the sake of programs that use select(2), is raised first.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
    if 0 <= soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
    return max(64, (wanted if soft < 0 else soft) // 8)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a prepared source; ShardError says what is wrong and what fixes it."""
    path = folder / MANIFEST
    try:
        return Manifest.from_json(parse_json(path.read_bytes()))
    except (FileNotFoundError, NotADirectoryError):
        if (folder / PLAN).exists():
            raise ShardError(
                f"{folder}: preparation has not finished (no {MANIFEST}): run the same "
                "`summer-prep tokenize` again, it goes on where it stopped"
            ) from None
        raise ShardError(
            f"{folder}: no {MANIFEST} there: it is no prepared source "
            "(`summer-prep tokenize --source NAME --out ...` makes one)"
        ) from None
    except (ShardError, TypeError) as error:
        raise ShardError(
            f"{path}: {error}; delete it and run the same `summer-prep tokenize` again: "
            "it is made from the unit records"
        ) from error


def read_unit_record(path: Path) -> UnitRecord:
    """The unit record in a file; ShardError names the file and the fix if it is none."""
    try:
        return UnitRecord.from_json(parse_json(path.read_bytes()))
    except (ShardError, TypeError) as error:
        raise ShardError(f"{path}: {error}; delete it and prepare the source again") from error


def check_files(folder: Path, manifest: Manifest) -> None:
    """ShardError if a file that the manifest names is not there."""
    names = [name for shard in manifest.shards for name in (shard.file, f"{shard.stem}.rows.npy")]
    there = {path.name for path in folder.iterdir()}
    if missing := [name for name in names if name not in there]:
        raise ShardError(
            f"{folder}: {len(missing):,} files of its shards are missing, {missing[0]} for one: "
            f"`summer-prep repair {folder}` makes them again"
        )


def find_sources(root: Path) -> dict[str, Manifest]:
    """The finished sources in a folder of shards, by folder name; ShardError if there are none."""
    folders = sorted(path for path in root.glob("*") if path.is_dir()) if root.is_dir() else []
    found = {path.name: read_manifest(path) for path in folders if (path / MANIFEST).exists()}
    if found:
        return found
    unfinished = [path.name for path in folders if (path / PLAN).exists()]
    if (root / MANIFEST).exists():
        raise ShardError(
            f"{root} is one source itself: name the folder that holds it, {root.parent}"
        )
    hint = f"prepare one with `summer-prep tokenize --source NAME --out {root}`"
    if unfinished:
        hint = f"unfinished: {', '.join(unfinished)}; run their `summer-prep tokenize` again"
    raise ShardError(f"{root}: no prepared source in this folder; {hint}")


class ShardReader:
    """Rows of one source and split, numbered 0 .. n_rows-1 in the manifest's order.

    Files are opened when they are first needed, so a reader can be sent to worker processes. Each
    sidecar is verified once, and its digests are kept (8 bytes a row, 164 MB for the 20 M rows of
    2,500 shards; mapped, it would take one of the process' open files); an eighth of the files that
    the process may open are shards, the one read longest ago making room for the next. Rows are
    fetched with pread(2), not through a mapping, which costs the same (2 us for 8 KiB): a file that
    shrinks under a mapping ends the process with SIGBUS.
    """

    def __init__(
        self, folder: Path, split: Split = "train", manifest: Manifest | None = None
    ) -> None:
        self.folder, self.split = folder, split
        self.manifest = manifest or read_manifest(folder)
        self._shards = self.manifest.split(split)
        self._starts = [0, *itertools.accumulate(shard.n_rows for shard in self._shards)]
        self._open: OrderedDict[int, _Shard] = OrderedDict()
        self._known: dict[int, _Shard] = {}
        self._most_open = most_open_shards()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict(), "_known": {}}

    @property
    def n_rows(self) -> int:
        """Rows in this split."""
        return self._starts[-1]

    @property
    def seq_len(self) -> int:
        """Tokens a row."""
        return self.manifest.facts.seq_len

    def rows(self, indices: npt.NDArray[np.int64]) -> tuple[Tokens, Masks | None]:
        """Rows [n, seq_len] and, where the source has them, packed loss masks [n, seq_len / 8].

        Every row is compared with its digest. ShardError names source, file and row.
        """
        facts = self.manifest.facts
        rows = np.empty((len(indices), facts.seq_len), np.dtype(facts.dtype).newbyteorder("<"))
        masks = np.empty((len(indices), facts.seq_len // 8), np.uint8) if facts.masked else None
        for place, index in enumerate(indices.tolist()):
            self.read(index, rows[place], None if masks is None else masks[place])
        return rows, masks

    def read(self, index: int, tokens: Tokens, mask: Masks | None) -> None:
        """Fill tokens [seq_len] and mask [seq_len / 8] (None: the source has none) with a row."""
        shard, row = self._find(index)
        shard.read(row, tokens, mask)

    def origin(self, index: int) -> tuple[str, int, int]:
        """Input file, part and record that the row's first token comes from."""
        shard, row = self._find(index)
        records = shard.records()
        part, record = int(records["part"][row]), int(records["record"][row])
        if part >= len(self.manifest.parts):
            raise ShardError(
                f"{self.folder / MANIFEST} lists {len(self.manifest.parts)} parts, and row "
                f"{index} is of part {part}: delete it and run the same `summer-prep tokenize` "
                "again: it is made from the plan"
            )
        return self.manifest.parts[part].file, part, record

    def _find(self, index: int) -> tuple[_Shard, int]:
        if not 0 <= index < self.n_rows:
            raise IndexError(f"row {index} of {self.n_rows}")
        number = bisect.bisect_right(self._starts, index) - 1  # numpy takes five times as long
        shard = self._known.get(number)
        if shard is None or shard.closed:
            shard = self._opened(number)
        elif self._most_open < len(self._shards):  # or none is ever closed
            self._open.move_to_end(number)
        return shard, index - self._starts[number]

    def _opened(self, number: int) -> _Shard:
        if len(self._open) == self._most_open:
            self._open.popitem(last=False)[1].close()
        if number in self._known:
            self._known[number].open()
        else:
            self._known[number] = _Shard(self.folder, self.manifest, self._shards[number])
        shard = self._open[number] = self._known[number]
        return shard


class _Shard:
    """A shard and its mask, found to be what the manifest says, with the digests of its rows."""

    def __init__(self, folder: Path, manifest: Manifest, info: ShardInfo) -> None:
        self._facts, self._info, self._path = manifest.facts, info, folder / info.file
        path = self._path
        try:
            self._data = RowFile(path, (info.n_rows, self._facts.seq_len), self._facts.dtype)
            self._mask = None
            if self._facts.masked:
                path = folder / f"{info.stem}.mask.npy"
                self._mask = RowFile(path, (info.n_rows, self._facts.seq_len // 8), "u1")
            path = folder / f"{info.stem}.rows.npy"
            self._digests = read_sidecar(path, info)["xxh3"].copy()
        except FileNotFoundError:
            raise self._error(f"{path} is missing") from None
        except ValueError as error:
            raise self._error(f"{path} is damaged ({error})") from error
        self._files = (self._data,) if self._mask is None else (self._data, self._mask)
        self.closed = False

    def read(self, row: int, tokens: Tokens, mask: Masks | None) -> None:
        """Fill tokens [seq_len] and mask [seq_len / 8]; ShardError if damaged."""
        complete = self._data.read_into(row, tokens)
        if self._mask is not None and mask is not None:
            complete = self._mask.read_into(row, mask) and complete
        if not complete or row_digest(tokens, mask) != self._digests[row]:
            raise self._error(f"{self._path} row {row} is damaged (its digest differs)")

    def open(self) -> None:
        """Open the files again."""
        try:
            for file in self._files:
                file.open()
        except FileNotFoundError as error:
            raise self._error(f"{error.filename} is missing") from None
        self.closed = False

    def close(self) -> None:
        """Let go of the files."""
        self.closed = True
        for file in self._files:
            file.close()

    def records(self) -> npt.NDArray[np.void]:
        """The row records [n_rows] of the sidecar, read again."""
        return read_sidecar(self._path.with_name(f"{self._info.stem}.rows.npy"), self._info)

    def _error(self, what: str) -> ShardError:
        fix = f"`summer-prep repair {self._path.parent}` makes it again"
        return ShardError(f"{self._facts.source}: {what}; {fix}")


def check_regular(path: Path) -> None:
    """ValueError for what is no file: to open a FIFO would wait for a writer, for ever."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("it is not a regular file")


def read_sidecar(path: Path, info: ShardInfo) -> npt.NDArray[np.void]:
    """A shard's row records [n_rows]; ValueError if they are not those that were written."""
    check_regular(path)
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != info.rows_sha256:
        raise ValueError("its SHA-256 is not the manifest's")
    records: npt.NDArray[np.void] = np.load(io.BytesIO(data), allow_pickle=False)
    if records.dtype != ROW_RECORD or len(records) != info.n_rows:
        raise ValueError(f"it does not list {info.n_rows} rows")
    return records


class RowFile:
    """A two-dimensional .npy file of a known shape, read some rows at a time.

    ValueError if its header or its size is another one.
    """

    def __init__(self, path: Path, shape: tuple[int, int], dtype: str) -> None:
        self._dtype, self._width = np.dtype(dtype).newbyteorder("<"), shape[1]
        wanted = {"descr": self._dtype.str, "fortran_order": False, "shape": shape}
        header = io.BytesIO()
        write_header: Any = np.lib.format.write_array_header_1_0
        write_header(header, wanted)
        self._start, self._row_bytes = header.tell(), self._width * self._dtype.itemsize
        self.n_bytes = self._start + shape[0] * self._row_bytes
        self._path = path
        check_regular(path)
        self.open()
        size = os.fstat(self._handle).st_size
        if size != self.n_bytes:
            raise ValueError(f"{size:,} bytes where {self.n_bytes:,} should be")
        if os.pread(self._handle, self._start, 0) != header.getvalue():
            raise ValueError(f"its header is not that of {shape} {dtype}")

    def open(self) -> None:
        """Open the file, again after a close."""
        self._handle = os.open(self._path, os.O_RDONLY)
        self._closing = weakref.finalize(self, os.close, self._handle)

    def close(self) -> None:
        """Let go of the file."""
        self._closing()

    def read(self, rows: slice) -> npt.NDArray[Any]:
        """The rows [n, width]; they are zero where the file has become shorter."""
        out = np.zeros((rows.stop - rows.start, self._width), self._dtype)
        self.read_into(rows.start, out)
        return out

    def read_into(self, row: int, out: npt.NDArray[Any]) -> bool:
        """Fill `out` with the bytes from a row on; whether there were enough of them."""
        at = self._start + row * self._row_bytes
        return os.preadv(self._handle, [out.data], at) == out.nbytes
