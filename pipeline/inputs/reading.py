"""Files -> records, a few megabytes at a time, with every rejected record named.

A part is read from start to end into `Records`: an Arrow array (or a list, for conversations) of
consecutive records. A record that is not what it should be becomes None and gets a reason; its
number is its ordinal in its part, rejected ones included. Lines end at `\\n` only, and a blank
line is no record.
"""

from __future__ import annotations

import functools
import io
import itertools
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import repeat
from typing import Any, BinaryIO, Final

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json
import pyarrow.parquet as pq

from pipeline.errors import SourceError
from pipeline.inputs.formats import (
    BLOCK_BYTES,
    array_lines,
    decompressed,
    is_array,
    table_batches,
)
from pipeline.inputs.inputs import InputFile, Inputs
from pipeline.inputs.sources import Source
from pipeline.text.chat import SCHEMAS
from shards.format import Part

MAX_RECORD_BYTES: Final = 128 << 20
MAX_BATCH_ROWS: Final = 16_384
DELTA_ROWS: Final = 4
"""Rows read at once where each may repeat nearly all of the one before (DELTA_BYTE_ARRAY)."""

NOT_JSON: Final = "not JSON"
NO_OBJECT: Final = "not a JSON object"
MISSING: Final = "field missing"
WRONG_TYPE: Final = "wrong type"
BAD_UTF8: Final = "invalid UTF-8"
LARGE: Final = "above 128 MiB"
CUT: Final = "--separator or --shape lines makes documents of it"

_TEXT_TYPES: Final = (
    pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view,
    pa.types.is_binary, pa.types.is_large_binary,
)  # fmt: skip
_LIST_TYPES: Final = (pa.types.is_list, pa.types.is_large_list)


@dataclass(frozen=True)
class Records:
    """Consecutive records of a part, the first of them number `first`.

    `values` is an Arrow array of strings or bytes, or a list of conversations; None where a record
    was rejected. `reasons` has the reason by place in `values`; a None without one is MISSING.
    """

    first: int
    values: Any
    reasons: dict[int, str] = field(default_factory=dict)


class PartReader:
    """Reads parts of one source; keeps the last parquet file open for the parts that follow."""

    def __init__(self, inputs: Inputs, source: Source) -> None:
        self._inputs, self._source = inputs, source
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
                    found = _numbered(map(parse, array_lines(stream, file.path), repeat(0)))
                elif kind == "jsonl":
                    found = _read_lines(stream, part.first, last, parse)
                elif ending := source.separator.encode():
                    parse = functools.partial(split_texts, ending=ending)
                    found = _read_lines(stream, part.first, last, parse, ending)
                elif source.shape == "lines":
                    found = _read_lines(stream, 0, None, raw_lines)
                else:
                    found = _read_whole(stream)
                for records in found:
                    self.share = (raw.tell() - part.first) / max(1, part.last - part.first)
                    yield records

    def _read_table(self, file: InputFile) -> Iterator[Records]:
        first = 0
        for table in table_batches(self._inputs, file, self._source.text_column):
            check_column(table.schema, file.path, self._source)
            yield Records(first, column_of(table, self._source))
            first += table.num_rows

    def close(self) -> None:
        """Close the file that was kept open."""
        if self._parquet is not None:
            self._parquet[1].close()
            self._parquet = None

    def _read_parquet(self, part: Part) -> Iterator[Records]:
        parquet = self._open_parquet(part.file)
        column, metadata = self._source.text_column, parquet.metadata
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
            yield Records(first, column_of(batch, self._source))
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
        chunks = [chunk for chunk in chunks if _is_of(chunk, column)]
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
            check_column(parquet.schema_arrow, path, self._source)
            self._parquet = (path, raw, parquet)
        return self._parquet[2]


def _is_of(chunk: pq.ColumnChunkMetaData, column: str) -> bool:
    return bool(chunk.path_in_schema.split(".")[0] == column)


def _dictionaries(array: Any) -> Iterator[Any]:
    """The dictionaries of an array or of what is nested in it."""
    if pa.types.is_dictionary(array.type):
        yield array.dictionary
    elif any(is_type(array.type) for is_type in _LIST_TYPES):
        yield from _dictionaries(array.values)
    elif pa.types.is_struct(array.type):
        for place in range(array.type.num_fields):
            yield from _dictionaries(array.field(place))


def _longest(values: Any) -> int:
    """Bytes of the longest of some strings."""
    return int(pc.max(pc.binary_length(values)).as_py() or 0)


def open_parquet(raw: BinaryIO) -> pq.ParquetFile:
    """The file's footer, read; pages are fetched as they are needed, and checked."""
    return pq.ParquetFile(raw, pre_buffer=False, page_checksum_verification=True)


def damaged(path: str, error: Exception) -> SourceError:
    """What to say of a file that cannot be read."""
    if isinstance(error, OSError) and error.errno is not None:
        return SourceError(f"{path}: {error.strerror}")
    return SourceError(f"{path} is damaged ({error}): fetch the file again")


def column_bytes(metadata: pq.FileMetaData, groups: range, column: str) -> tuple[int, int]:
    """Uncompressed and compressed bytes of a column, or of a field in one, in some row groups."""
    plain = packed = 0
    for row_group in map(metadata.row_group, groups):
        for chunk in map(row_group.column, range(row_group.num_columns)):
            if _is_of(chunk, column):
                plain += chunk.total_uncompressed_size
                packed += chunk.total_compressed_size
    return plain, packed


def check_column(schema: pa.Schema, path: str, source: Source) -> None:
    """SourceError unless the file has the source's column, of a type that can hold it."""
    column = source.text_column
    found = _type_of(schema, column)
    if found is None:
        raise SourceError(
            f"{path} has no column {column!r}; it has {', '.join(schema.names)}: see --text-column"
        )
    if pa.types.is_dictionary(found):
        found = found.value_type
    chat = source.shape == "chat"
    good = (pa.types.is_null, *(_LIST_TYPES if chat else _TEXT_TYPES))
    if not any(is_type(found) for is_type in good):
        wanted = "a list of turns" if chat else "text"
        raise SourceError(
            f"{path}: column {column!r} is {found}, not {wanted}: choose another with --text-column"
        )


def _type_of(schema: pa.Schema, column: str) -> pa.DataType | None:
    """The type of a column, or of a field in one: `meta.text`, unless a column is called that."""
    if column in schema.names:
        return schema.field(column).type
    first, *fields = column.split(".")
    found = schema.field(first).type if first in schema.names else None
    for name in fields:
        if found is None or not pa.types.is_struct(found) or found.get_field_index(name) < 0:
            return None
        found = found.field(name).type
    return found


def column_of(table: pa.Table | pa.RecordBatch, source: Source) -> Any:
    """The source's column of some rows; one of nulls has a type like any other."""
    column = source.text_column
    if column in table.schema.names:
        found = table.column(column)
    else:
        first, *fields = column.split(".")
        found = pc.struct_field(table.column(first), fields)
    if pa.types.is_null(found.type):
        return [None] * len(found) if source.shape == "chat" else found.cast(pa.string())
    return found


def turn_type() -> pa.DataType:
    """The Arrow type of one turn of a conversation, in whichever schema, that calls no tools.

    A turn with anything else (parts, calls) does not fit it, and is read as JSON is.
    """
    keys = itertools.chain.from_iterable(SCHEMAS)
    return pa.struct([*((key, pa.string()) for key in keys), ("tool_calls", pa.null())])


def _read_lines(
    stream: BinaryIO,
    first_byte: int,
    last: int | None,
    parse: Callable[[bytes, int], Records],
    ending: bytes = b"\n",
) -> Iterator[Records]:
    """The records that `parse` makes of the lines, a block at a time."""
    first = 0
    for block in line_blocks(stream, first_byte, last, ending):
        if block is None:
            records = [Records(first, pa.nulls(1, pa.large_binary()), {0: LARGE})]
        else:
            records = [parse(block, first)]
        del block
        first += len(records[0].values)
        yield records.pop()  # neither is kept here: a line may be of many megabytes


def _numbered(several: Iterable[Records]) -> Iterator[Records]:
    """Records with their numbers, counted on."""
    first = 0
    for records in several:
        yield replace(records, first=first)
        first += len(records.values)


def line_blocks(
    stream: BinaryIO, first: int, last: int | None, ending: bytes = b"\n"
) -> Iterator[bytes | None]:
    """Complete lines, about 8 MiB at a time; None stands for one line above the largest record.

    The lines are those that begin in [first, last), so that neighbouring ranges share none. They
    may have another `ending`; of one that `overlaps_itself` the range has to be a whole file.
    """
    end, width = last if last is not None else sys.maxsize, len(ending)
    at, tail = _skip_line(stream, first - width, end, ending) if first else (0, bytearray())
    searched = 0  # so many bytes of the tail hold no line end
    while (begun := at - len(tail)) < end:  # the tail begins with a line, and it is one of ours
        found = tail.find(ending, max(searched, end - width - begun)) if at >= end else -1
        cut = found + width if found >= 0 else _last_end(tail, ending, searched)
        if cut:
            lines = [bytes(tail[:cut])]
            del tail[:cut]
            searched = max(0, len(tail) - width + 1)
            yield lines.pop()  # not kept here: a line may be of many megabytes
        elif len(tail) > MAX_RECORD_BYTES:
            yield None
            at, tail = _skip_line(stream, at, end, ending, bytes(tail[len(tail) - width + 1 :]))
            searched = 0
        elif data := stream.read(min(BLOCK_BYTES, max(end - at, 1 << 20))):
            searched = max(0, len(tail) - width + 1)
            at += len(data)
            tail += data
        else:
            if tail:
                yield bytes(tail)
            return


def _last_end(tail: bytearray, ending: bytes, searched: int) -> int:
    """Where the last complete line in the tail ends, 0 if there is none."""
    if overlaps_itself(ending):  # `\n\n` in `\n\n\n`: which one it is, is counted from the front
        *lines, rest = tail.split(ending)
        return len(tail) - len(rest) if lines else 0
    found = tail.rfind(ending, searched)
    return found + len(ending) if found >= 0 else 0


def overlaps_itself(ending: bytes) -> bool:
    """Whether two of them can share bytes."""
    return any(ending.startswith(ending[cut:]) for cut in range(1, len(ending)))


def _skip_line(
    stream: BinaryIO, at: int, end: int, ending: bytes, before: bytes = b""
) -> tuple[int, bytearray]:
    """Position reached and what was read behind the first line end in [at, end).

    `before` stands in front of `at`: a line end may begin there.
    """
    if stream.seekable():
        stream.seek(at)
    while at < end and (data := stream.read(min(1 << 16, end - at))):
        at += len(data)
        data = before + data
        if (found := data.find(ending)) >= 0:
            return at, bytearray(data[found + len(ending) :])
        before = data[max(0, len(data) - len(ending) + 1) :]
    return at, bytearray()


def parse_lines(block: bytes, first: int, source: Source) -> Records:
    """The records of complete lines: one for each that is not blank."""
    lines = block if block.endswith(b"\n") else block + b"\n"
    values = _parse_fast(lines, source) if _one_object_a_line(lines) else None
    if values is not None:
        return Records(first, values)
    return _parse_slowly(lines, first, source)


def _one_object_a_line(lines: bytes) -> bool:
    """Whether each line, taken by its first and last byte, can be one JSON object, in UTF-8.

    pyarrow reads objects, not lines: it takes two on a line or one over two lines, and a line
    `null` ends the process (pyarrow 26: a segmentation fault). A line that begins with `{` and one
    before it that ends with `}` cannot be of the same object.
    """
    count = lines.count(b"\n")
    if not lines.startswith(b"{") or lines.count(b"\n{") != count - 1:
        return False
    if lines.count(b"}\n") + lines.count(b"}\r\n") != count:
        return False
    try:
        lines.decode()
        return True
    except UnicodeDecodeError:
        return False


def _parse_fast(lines: bytes, source: Source) -> pa.Array | list[Any] | None:
    """The column, read by pyarrow; None where a line is odd, so that all are read one by one."""
    chat = source.shape == "chat"
    kind = pa.list_(turn_type()) if chat else pa.string()
    column, (first, *fields) = source.text_column, source.text_column.split(".")
    nested = kind
    for name in reversed(fields):
        nested = pa.struct([(name, nested)])
    schema = pa.schema({column: kind, first: nested})
    try:
        table = pyarrow.json.read_json(
            io.BytesIO(lines),
            read_options=pyarrow.json.ReadOptions(use_threads=False, block_size=len(lines) + 1),
            parse_options=pyarrow.json.ParseOptions(
                explicit_schema=schema, unexpected_field_behavior="ignore"
            ),
        )
    except pa.ArrowException:
        return None
    if table.num_rows != lines.count(b"\n"):
        return None
    values = table.column(column).combine_chunks()
    if fields:  # a record's own column of that name goes first
        inner = pc.struct_field(table.column(first).combine_chunks(), fields)
        values = pc.if_else(values.is_valid(), values, inner)
    return values.to_pylist() if chat else values


def _parse_slowly(lines: bytes, first: int, source: Source) -> Records:
    values: list[Any] = []
    reasons: dict[int, str] = {}
    for line in lines.split(b"\n"):
        if not line.strip():
            continue
        value, reason = _parse_line(line, source)
        if reason:
            reasons[len(values)] = reason
        values.append(value)
    if source.shape == "chat":
        return Records(first, values, reasons)
    return Records(first, pa.array(values, pa.large_binary()), reasons)


def _parse_line(line: bytes, source: Source) -> tuple[Any, str]:
    """The field's value and an empty reason, or None and the reason."""
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return None, BAD_UTF8
    except (ValueError, RecursionError):
        return None, NOT_JSON
    if not isinstance(value, dict):
        return None, NO_OBJECT
    found = value.get(source.text_column)
    if found is None and "." in source.text_column:
        found = _inside(value, source.text_column)
    if found is None:
        return None, MISSING
    if source.shape == "chat":
        return found, ""
    if not isinstance(found, str):
        return None, WRONG_TYPE
    try:
        return found.encode(), ""
    except UnicodeEncodeError:  # half of a surrogate pair, spelled as an escape
        return None, BAD_UTF8


def _inside(value: Any, path: str) -> Any:
    """What is in an object under `meta.text`, or None."""
    for name in path.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def raw_lines(block: bytes, first: int) -> Records:
    """Each line with its line end, blank ones included, as a record."""
    return Records(first, pa.array(io.BytesIO(block).readlines(), pa.large_binary()))


def split_texts(block: bytes, first: int, ending: bytes) -> Records:
    """The texts between separators, each a record; blank ones are none, as blank lines are none."""
    if ending == b"\n":
        block = block.replace(b"\r\n", b"\n")
    texts = [text for text in block.split(ending) if text.strip()]
    return Records(first, pa.array(texts, pa.large_binary()))


def _read_whole(stream: BinaryIO) -> Iterator[Records]:
    """The file as one record."""
    chunks, size = [], 0
    while size <= MAX_RECORD_BYTES and (data := stream.read(BLOCK_BYTES)):
        chunks.append(data)
        size += len(data)
    if size > MAX_RECORD_BYTES:
        yield Records(0, pa.nulls(1, pa.large_binary()), {0: f"{LARGE}: {CUT}"})
    else:
        yield Records(0, pa.array([b"".join(chunks)], pa.large_binary()))
