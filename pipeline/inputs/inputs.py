"""Where bytes come from: local files, the Hub (hub.py), or what the Python interpreter carries.

Each kind is a small picklable value; a worker process opens for itself what its unit needs. Paths
in a listing are relative, so that nothing published depends on whose machine it was made on.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO, ClassVar, Final, Literal, NamedTuple

from pipeline.errors import SourceError

Kind = Literal["parquet", "jsonl", "text", "table"]
"""`table`: read through one of the builders that come with `datasets`."""

ENDINGS: Final[dict[str, Kind]] = {
    ".parquet": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".txt": "text",
    ".text": "text",
    ".raw": "text",
    ".py": "text",
    ".csv": "table",
    ".tsv": "table",
    ".arrow": "table",
    ".xml": "text",
}
BLOCK_BYTES: Final = 8 << 20
"""What is read, and made into records, at a time."""

LOCAL: Final = "local files"
INTERPRETER: Final = "the Python interpreter"
COMPRESSIONS: Final = {
    ".zst": "zstd",
    ".gz": "gzip",
    ".bz2": "bz2",
    ".xz": "xz",
    ".lz4": "lz4",
}


@dataclass(frozen=True)
class Layout:
    """How a file spells its records; `compression` is a value of COMPRESSIONS or empty."""

    kind: Kind
    compression: str = ""


@dataclass(frozen=True)
class InputFile:
    """A file of the listing: its relative path with `/`, its size, and how it is spelled.

    `version` tells this content from a later one of the same size: a local file's time of
    modification in ns, a URL's ETag; empty where a revision says it for all files.
    """

    path: str
    bytes: int
    layout: Layout
    version: str = ""


class LeftOut(NamedTuple):
    """A file that was found and is not part of the listing."""

    path: str
    bytes: int
    why: str


@dataclass(frozen=True)
class Inputs:
    """A listing in bytewise order of path; where it is from and which version, for the manifest."""

    dataset: str
    revision: str
    files: tuple[InputFile, ...]
    left_out: tuple[LeftOut, ...] = field(default=(), kw_only=True)
    local: ClassVar[bool] = True

    def open(self, path: str) -> BinaryIO:
        """The bytes of one file of the listing."""
        raise NotImplementedError

    def url(self, path: str) -> str:
        """Where `datasets` finds that file."""
        raise NotImplementedError

    def check(self, file: InputFile) -> None:
        """SourceError if a file is not what it was when it was listed."""


def layout_of(path: str) -> Layout | None:
    """How a file of that name is spelled; None for an ending that is not known."""
    stem, compression = path, ""
    for ending, name in COMPRESSIONS.items():
        if path.endswith(ending):
            stem, compression = path.removesuffix(ending), name
    kind = ENDINGS.get(Path(stem).suffix.lower())
    if kind is None or (kind == "parquet" and compression):
        return None
    return Layout(kind, compression)


def listed(path: str, size: int, version: str = "") -> InputFile:
    """The listing's entry for a file; SourceError if nobody knows how to read it."""
    layout = layout_of(path)
    if layout is None:
        raise SourceError(
            f"{path}: no reader for this kind of file; a source is made of "
            f"{', '.join(ENDINGS)} files (all but parquet also .zst or .gz): narrow the pattern"
        )
    return InputFile(path, size, layout, version)


def input_file(relative: str, path: Path, *, pinned: bool = True) -> InputFile:
    """The listing's entry for a local file, pinned to its time of modification or not."""
    at = path.stat()
    return listed(relative, at.st_size, str(at.st_mtime_ns) if pinned else "")


def spelled(file: InputFile) -> str:
    """A file's size and version, as a person reads them."""
    when = file.version
    if when.isdigit():  # nanoseconds
        seconds, ns = divmod(int(when), 10**9)
        when = f"of {datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S}.{ns:09} UTC"
    return f"{file.bytes:,} bytes {when}".rstrip()


def listing_lines(inputs: Inputs) -> list[str]:
    """Each file with its size, and each that is left out with the reason."""
    lines = [f"{file.bytes:>15,}  {file.path}" for file in inputs.files]
    lines += [f"{size:>15,}  {path}  left out: {why}" for path, size, why in inputs.left_out]
    return [*lines, listing_summary(inputs)]


def listing_summary(inputs: Inputs) -> str:
    """How many files are taken, how many are left out and why, in a line."""
    files = "1 file" if len(inputs.files) == 1 else f"{len(inputs.files):,} files"
    text = f"{files}, {sum(file.bytes for file in inputs.files):,} bytes"
    if inputs.left_out:
        reasons = Counter(entry.why for entry in inputs.left_out)
        why = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
        text += f"; {len(inputs.left_out):,} left out: {why} (--list shows them)"
    return text


@dataclass(frozen=True)
class LocalInputs(Inputs):
    """Files below one folder."""

    base: Path

    def open(self, path: str) -> BinaryIO:
        """The bytes of one file of the listing."""
        return (self.base / path).open("rb")

    def url(self, path: str) -> str:
        """Where `datasets` finds that file."""
        return str(self.base / path)

    def check(self, file: InputFile) -> None:
        """SourceError if a file has another size or time of modification than it had."""
        path = self.base / file.path
        try:
            now = input_file(file.path, path, pinned=bool(file.version))
        except OSError as error:
            raise SourceError(f"{file.path}: {error.strerror}: give the same file again") from error
        if now != file:
            raise SourceError(
                f"{path} has changed since it was listed: {spelled(file)} then, {spelled(now)} "
                "now: put the old file back, with its time, or prepare all of it again (--out)"
            )


class PythonDocs(Inputs):
    """The topics of pydoc as one jsonl file, a topic a record, in order of name."""

    def open(self, path: str) -> BinaryIO:
        """Its bytes."""
        return io.BytesIO(pydoc_topics())


def pydoc_topics() -> bytes:
    """The topics as lines of JSON."""
    from pydoc_data.topics import topics

    return "".join(json.dumps({"text": topics[name]}) + "\n" for name in sorted(topics)).encode()
