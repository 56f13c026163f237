"""Lines of text, JSON or not -> records, a few megabytes at a time.

Lines end at `\\n` only, and a blank line is no record.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json

from pipeline.inputs.inputs import BLOCK_BYTES
from pipeline.inputs.records import (
    BAD_UTF8,
    CUT,
    LARGE,
    MAX_RECORD_BYTES,
    MISSING,
    NO_OBJECT,
    NOT_JSON,
    WRONG_TYPE,
    Records,
    turn_type,
)
from pipeline.inputs.sources import Source


def read_lines(
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


def numbered(several: Iterable[Records]) -> Iterator[Records]:
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


def read_whole(stream: BinaryIO) -> Iterator[Records]:
    """The file as one record."""
    chunks, size = [], 0
    while size <= MAX_RECORD_BYTES and (data := stream.read(BLOCK_BYTES)):
        chunks.append(data)
        size += len(data)
    if size > MAX_RECORD_BYTES:
        yield Records(0, pa.nulls(1, pa.large_binary()), {0: f"{LARGE}: {CUT}"})
    else:
        yield Records(0, pa.array([b"".join(chunks)], pa.large_binary()))
