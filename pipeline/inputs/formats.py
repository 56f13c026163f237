"""What a file is by its first bytes, what is inside its compression, and the rarer formats.

Parquet and lines are read by reading.py. Whatever else `datasets` reads comes through its builders,
a file a part; a JSON array is cut into lines here, as those builders would hold all of it at once.
"""

from __future__ import annotations

import codecs
import glob
import io
import json
import lzma
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any, BinaryIO, Final, cast

import pyarrow as pa
import zstandard

from pipeline.errors import SourceError
from pipeline.inputs.inputs import BLOCK_BYTES, COMPRESSIONS, InputFile, Inputs
from shards.errors import one_line

HEAD_BYTES: Final = 1 << 16
MAX_ELEMENT: Final = 128 << 20
"""Characters of one element of a JSON array."""
TABLE_ROWS: Final = 1000
_ZSTD: Final = b"\x28\xb5\x2f\xfd"
_ZSTD_HEADER_BYTES: Final = 18
_MAGIC: Final[tuple[tuple[bytes, str, str], ...]] = (
    (b"version https://git-lfs", "a Git LFS pointer and not the data", "git lfs pull"),
    (b"PAR1", "a parquet file", "name it .parquet"),
    (b"ARROW1", "an Arrow file", "name it .arrow"),
    (b"PK\x03\x04", "a zip archive", "unzip it"),
    (b"\x1f\x8b", "compressed by gzip", "name it .gz"),
    (b"BZh", "compressed by bzip2", "name it .bz2"),
    (b"\xfd7zXZ\x00", "compressed by xz", "name it .xz"),
    (_ZSTD, "compressed by zstd", "name it .zst"),
    (b"\x04\x22\x4d\x18", "compressed by lz4", "name it .lz4"),
    (b"<!DOCTYPE", "a web page", "the download went wrong: fetch it again"),
)
"""How a file of some kind begins, what to call it, and what to do where another was expected."""


def check_kind(inputs: Inputs, file: InputFile) -> None:
    """SourceError if a file's first bytes are those of another kind than its name says."""
    with inputs.open(file.path) as raw:
        head = raw.read(24)
    for magic, what, fix in _MAGIC:
        own = file.layout.kind == "parquet" and magic == b"PAR1"
        own |= file.path.endswith(".arrow") and magic == b"ARROW1"
        own |= bool(file.layout.compression) and fix.removeprefix("name it ") in COMPRESSIONS
        if head.startswith(magic) and not own:
            raise SourceError(f"{file.path} is {what}: {fix}")


def decompressed(raw: BinaryIO, file: InputFile) -> BinaryIO:
    """The file's content; a compressed stream that ends inside a frame raises OSError."""
    if not (compression := file.layout.compression):
        return raw
    if compression == "xz":
        return cast(BinaryIO, _Xz(raw))
    if compression == "zstd":
        return cast(BinaryIO, io.BufferedReader(_Zstd(raw, file.path), 1 << 20))
    return cast(BinaryIO, pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), compression))


class _Xz(lzma.LZMAFile):
    """An xz stream whose faults are OSErrors."""

    def read(self, size: int | None = -1) -> bytes:
        """So many bytes, fewer at the end."""
        try:
            return super().read(-1 if size is None else size)
        except (EOFError, lzma.LZMAError) as error:
            raise OSError(str(error)) from error


class _Zstd(io.RawIOBase):
    """Frames of zstd one after another, of any window: pyarrow's reader takes 128 MiB at most."""

    def __init__(self, raw: BinaryIO, path: str) -> None:
        super().__init__()
        self._raw, self._path = raw, path
        self._frame: Any = None
        self._data = memoryview(b"")

    def readable(self) -> bool:
        """Yes."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer with what is there; 0 at the end of the last frame."""
        while not self._data:
            packed = self._raw.read(1 << 18)
            if not packed:
                if self._frame is not None:
                    raise OSError("it ends inside a zstd frame")
                return 0
            self._data = memoryview(self._of(packed))
        n = min(len(buffer), len(self._data))
        buffer[:n], self._data = self._data[:n], self._data[n:]
        return n

    def _of(self, packed: bytes) -> bytes:
        out = []
        try:
            while packed:
                if self._frame is None:
                    self._begin(packed)
                out.append(self._frame.decompress(packed))
                packed = b""
                if self._frame.eof:
                    packed, self._frame = self._frame.unused_data, None
        except zstandard.ZstdError as error:
            raise OSError(str(error)) from error
        return b"".join(out)

    def _begin(self, packed: bytes) -> None:
        standard = packed.startswith(_ZSTD) and len(packed) >= _ZSTD_HEADER_BYTES
        if standard and (number := zstandard.get_frame_parameters(packed).dict_id):
            raise SourceError(
                f"{self._path} is compressed with a dictionary (number {number}), which is not "
                "part of it: decompress it with `zstd -d -D DICTIONARY`"
            )
        self._frame = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()


def is_array(inputs: Inputs, file: InputFile) -> bool:
    """Whether a file of JSON is an array of records, and not a record a line."""
    unusual = not _without_compression(file.path).endswith(".json")
    if unusual and (file.layout.compression or not inputs.local):
        return False  # to look would cost as much as to read
    with inputs.open(file.path) as raw:
        head = decompressed(raw, file).read(HEAD_BYTES).removeprefix(codecs.BOM_UTF8)
    first, _, more = head.lstrip().partition(b"\n")
    if file.path.endswith(".json") and first.rstrip() == b"{" and more.strip():
        raise SourceError(
            f"{file.path} is one JSON object over many lines, not a record a line: write its "
            "records out, as with `jq -c '.data[]'`"
        )
    if not first.startswith(b"[") or head.lstrip()[1:].lstrip()[:1] not in (b"{", b"]"):
        return False
    try:
        json.loads(first)
        return not more.strip()  # all of it is on one line
    except ValueError:
        return True


def _without_compression(path: str) -> str:
    for ending in COMPRESSIONS:
        path = path.removesuffix(ending)
    return path


def array_lines(stream: BinaryIO, path: str) -> Iterator[bytes]:
    """The elements of a JSON array, a line each, some megabytes at a time."""
    utf8, decoder = codecs.getincrementaldecoder("utf-8-sig")(), json.JSONDecoder()
    text, at, lines, size = "", 0, list[str](), 0
    while "[" not in text:
        text += utf8.decode(stream.read(BLOCK_BYTES))
    at = text.find("[") + 1
    while True:
        at = _next(text, at)
        if text[at : at + 1] == "]":
            break
        try:
            element, end = decoder.raw_decode(text, at)
            complete = _next(text, end) < len(text)  # a number may go on
        except ValueError:
            complete = False
        if complete:
            at = end
            lines.append(json.dumps(element) + "\n")
            size += len(lines[-1])
        else:
            more = stream.read(max(BLOCK_BYTES, len(text) - at))
            if not more or len(text) - at > MAX_ELEMENT:
                raise SourceError(
                    f"{path}: its JSON array is cut off or broken near {text[at : at + 40]!r}: "
                    "fetch it again, or write a record a line"
                )
            text, at = text[at:] + utf8.decode(more), 0
        if size > BLOCK_BYTES:
            yield "".join(lines).encode()
            lines, size = [], 0
    if lines:
        yield "".join(lines).encode()


def _next(text: str, at: int) -> int:
    """The place of the next character that is neither space nor comma."""
    while at < len(text) and text[at] in " \t\r\n,":
        at += 1
    return at


def table_batches(inputs: Inputs, file: InputFile, column: str) -> Iterator[pa.Table]:
    """The rows of a file that one of the builders of `datasets` reads, as Arrow tables."""
    from datasets import load_dataset_builder

    kind = PurePosixPath(_without_compression(file.path)).suffix[1:].lower()
    # text that reads `NA` or `12` is text
    csv = {"keep_default_na": False, "converters": {column: str}}
    options = {"csv": csv, "tsv": {**csv, "sep": "\t"}}.get(kind, {})
    url = inputs.url(file.path)
    url = url if "://" in url else glob.escape(url)
    builder = {"tsv": "csv"}.get(kind, kind)
    try:
        # not load_dataset: it takes a folder ./arrow that save_to_disk made for what is asked for
        made = load_dataset_builder(builder, data_files={"train": [url]}, **options)
        rows: Any = made.as_streaming_dataset(split="train")
        yield from rows.with_format("arrow").iter(batch_size=TABLE_ROWS)
    except (SourceError, OSError):
        raise
    except Exception as error:  # of pandas, pyarrow or datasets: each has its own
        cause = error.__cause__ or error
        raise SourceError(
            f"{file.path} cannot be read as {kind} ({one_line(cause)}): fetch it again, or write "
            "it as JSON lines"
        ) from error
