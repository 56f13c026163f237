"""Files -> records, a few megabytes at a time, with every rejected record named.

A part is read from start to end into `Records`: an Arrow array (or a list, for conversations) of
consecutive records. A record that is not what it should be becomes None and gets a reason; its
number is its ordinal in its part, rejected ones included.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from itertools import repeat
from typing import Any, BinaryIO, Final

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import SourceError
from pipeline.inputs.formats import array_lines, decompressed, is_array, table_batches
from pipeline.inputs.inputs import BLOCK_BYTES, InputFile, Inputs
from pipeline.inputs.lines import (
    numbered,
    parse_lines,
    raw_lines,
    read_lines,
    read_whole,
    split_texts,
)
from pipeline.inputs.records import (
    LIST_TYPES,
    MAX_RECORD_BYTES,
    Records,
    check_column,
    column_bytes,
    column_of,
    damaged,
    is_of,
    open_parquet,
)
from pipeline.inputs.sources import Source
from shards.format import Part

MAX_BATCH_ROWS: Final = 16_384
DELTA_ROWS: Final = 4
"""Rows read at once where each may repeat nearly all of the one before (DELTA_BYTE_ARRAY)."""


class PartReader:
    """Reads parts of one source; keeps the last parquet file open for the parts that follow."""

    def __init__(self, inputs: Inputs, source: Source) -> None:
        self._inputs, self._source = inputs, source
        self._column, self._chat = source.text_column, source.shape == "chat"
        self.share = 0.0  # of the part at work, how much has been read; 0: unknown
        self._files = {file.path: file for file in inputs.files}
        self._parquet: tuple[str, BinaryIO, pq.ParquetFile] | None = None

    def read(self, part: Part) -> Iterator[Records]:
        """The part's records in order; SourceError names a file that is damaged or gone."""
        file = self._files.get(part.file)
        if file is None:
            raise SourceError(f"{part.file} is not among the files given: give the same ones again")
        self._inputs.check(file)
        try:
            self.share = 0.0
            for records in self._records(part, file):
                if self._inputs.local:
                    self._inputs.check(file)
                yield records
        except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
            self._inputs.check(file)  # that it has changed says more than that it is damaged
            raise damaged(part.file, error) from error
        self._inputs.check(file)

    def _records(self, part: Part, file: InputFile) -> Iterator[Records]:
        kind, source = file.layout.kind, self._source
        if kind == "parquet":
            yield from self._read_parquet(part)
        elif kind == "table":
            yield from self._read_table(file)
        else:
            whole = part.first == 0 and part.last == file.bytes
            array = kind == "jsonl" and whole and is_array(self._inputs, file)
            parse = functools.partial(parse_lines, source=source)
            last = None if file.layout.compression else part.last
            with self._inputs.open(part.file) as raw:
                stream = decompressed(raw, file)
                if array:
                    found = numbered(map(parse, array_lines(stream, file.path), repeat(0)))
                elif kind == "jsonl":
                    found = read_lines(stream, part.first, last, parse)
                elif ending := source.separator.encode():
                    parse = functools.partial(split_texts, ending=ending)
                    found = read_lines(stream, part.first, last, parse, ending)
                elif source.shape == "lines":
                    found = read_lines(stream, 0, None, raw_lines)
                else:
                    found = read_whole(stream)
                for records in found:
                    self.share = (raw.tell() - part.first) / max(1, part.last - part.first)
                    yield records

    def _read_table(self, file: InputFile) -> Iterator[Records]:
        first = 0
        for table in table_batches(self._inputs, file, self._column):
            check_column(table.schema, file.path, self._column, chat=self._chat)
            yield Records(first, column_of(table, self._column, chat=self._chat))
            first += table.num_rows

    def close(self) -> None:
        """Close the file that was kept open."""
        if self._parquet is not None:
            self._parquet[1].close()
            self._parquet = None

    def _read_parquet(self, part: Part) -> Iterator[Records]:
        parquet = self._open_parquet(part.file)
        column, metadata = self._column, parquet.metadata
        groups = range(part.first, part.last)
        weight, _ = column_bytes(metadata, groups, column)
        rows = sum(metadata.row_group(group).num_rows for group in groups)
        batch_rows = max(1, min(MAX_BATCH_ROWS, rows * BLOCK_BYTES // max(1, weight)))
        if batch_rows * weight > MAX_RECORD_BYTES:
            batch_rows = min(batch_rows, self._fitting_rows(parquet, groups))
        first = 0
        for batch in parquet.iter_batches(
            batch_size=batch_rows, row_groups=list(groups), columns=[column], use_threads=False
        ):
            self.share = (first + batch.num_rows) / max(1, rows)
            yield Records(first, column_of(batch, self._column, chat=self._chat))
            first += batch.num_rows

    def _fitting_rows(self, parquet: pq.ParquetFile, groups: range) -> int:
        """So many rows that together they cannot decode to more than the largest record.

        A value of the dictionary may stand for thousands of rows, so it is looked at first: of each
        row group one row is read with it.
        """
        assert self._parquet is not None
        column = self._source.text_column
        every = map(parquet.metadata.row_group, groups)
        chunks = [group.column(place) for group in every for place in range(group.num_columns)]
        chunks = [chunk for chunk in chunks if is_of(chunk, column)]
        if any("DELTA_BYTE_ARRAY" in chunk.encodings for chunk in chunks):
            return DELTA_ROWS
        texts = {c.path_in_schema for c in chunks if c.physical_type == "BYTE_ARRAY"}
        probe = pq.ParquetFile(
            self._parquet[1],
            metadata=parquet.metadata,
            read_dictionary=sorted(texts),
            pre_buffer=False,
        )
        longest = 1
        for group in groups:
            rows = probe.iter_batches(1, row_groups=[group], columns=[column], use_threads=False)
            for batch in itertools.islice(rows, 1):
                longest = max(longest, *map(_longest, _dictionaries(batch.column(0))), 1)
        # conversations become Python's strings
        room = MAX_RECORD_BYTES // (4 if self._source.shape == "chat" else 1)
        return max(1, room // longest)

    def _open_parquet(self, path: str) -> pq.ParquetFile:
        if self._parquet is None or self._parquet[0] != path:
            self.close()
            raw = self._inputs.open(path)
            parquet = open_parquet(raw)
            check_column(parquet.schema_arrow, path, self._column, chat=self._chat)
            self._parquet = (path, raw, parquet)
        return self._parquet[2]


def _dictionaries(array: Any) -> Iterator[Any]:
    """The dictionaries of an array or of what is nested in it."""
    if pa.types.is_dictionary(array.type):
        yield array.dictionary
    elif any(is_type(array.type) for is_type in LIST_TYPES):
        yield from _dictionaries(array.values)
    elif pa.types.is_struct(array.type):
        for place in range(array.type.num_fields):
            yield from _dictionaries(array.field(place))


def _longest(values: Any) -> int:
    """Bytes of the longest of some strings."""
    return int(pc.max(pc.binary_length(values)).as_py() or 0)
