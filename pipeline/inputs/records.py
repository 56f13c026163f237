"""Records of a part as Arrow columns, those of parquet files too, and why one is rejected."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any, BinaryIO, Final

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import SourceError

MAX_RECORD_BYTES: Final = 128 << 20

NOT_JSON: Final = "not JSON"
NO_OBJECT: Final = "not a JSON object"
MISSING: Final = "field missing"
WRONG_TYPE: Final = "wrong type"
BAD_UTF8: Final = "invalid UTF-8"
LARGE: Final = "above 128 MiB"
CUT: Final = "--separator or --shape lines makes documents of it"

SCHEMAS: Final = (("from", "value"), ("role", "content"))
"""How a turn of a conversation is spelled: the keys of its role and of its text."""

TEXT_TYPES: Final = (
    pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view,
    pa.types.is_binary, pa.types.is_large_binary,
)  # fmt: skip
LIST_TYPES: Final = (pa.types.is_list, pa.types.is_large_list)


@dataclass(frozen=True)
class Records:
    """Consecutive records of a part, the first of them number `first`.

    `values` is an Arrow array of strings or bytes, or a list of conversations; None where a record
    was rejected. `reasons` has the reason by place in `values`; a None without one is MISSING.
    """

    first: int
    values: Any
    reasons: dict[int, str] = field(default_factory=dict)


def check_column(schema: pa.Schema, path: str, column: str, *, chat: bool) -> None:
    """SourceError unless the file has the column, of a type that can hold texts, or turns."""
    found = _type_of(schema, column)
    if found is None:
        raise SourceError(
            f"{path} has no column {column!r}; it has {', '.join(schema.names)}: see --text-column"
        )
    if pa.types.is_dictionary(found):
        found = found.value_type
    good = (pa.types.is_null, *(LIST_TYPES if chat else TEXT_TYPES))
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


def column_of(table: pa.Table | pa.RecordBatch, column: str, *, chat: bool) -> Any:
    """The column of some rows; one of nulls has a type like any other."""
    if column in table.schema.names:
        found = table.column(column)
    else:
        first, *fields = column.split(".")
        found = pc.struct_field(table.column(first), fields)
    if pa.types.is_null(found.type):
        return [None] * len(found) if chat else found.cast(pa.string())
    return found


def turn_type() -> pa.DataType:
    """The Arrow type of one turn of a conversation, in whichever schema, that calls no tools.

    A turn with anything else (parts, calls) does not fit it, and is read as JSON is.
    """
    keys = itertools.chain.from_iterable(SCHEMAS)
    return pa.struct([*((key, pa.string()) for key in keys), ("tool_calls", pa.null())])


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
            if is_of(chunk, column):
                plain += chunk.total_uncompressed_size
                packed += chunk.total_compressed_size
    return plain, packed


def is_of(chunk: pq.ColumnChunkMetaData, column: str) -> bool:
    """Whether a chunk of a row group is of the column, or of a field in it."""
    return bool(chunk.path_in_schema.split(".")[0] == column)
