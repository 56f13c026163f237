"""Where bytes come from: local files, the Hub (hub.py), or what the Python interpreter carries.

Each kind of input is a small picklable value with a listing and `open`; a worker process opens for
itself what its unit needs. Paths in a listing are relative, so that nothing published depends on
whose machine it was made on.
"""

from __future__ import annotations

import glob
import io
import json
import os
import platform
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final, Literal, Protocol

from pipeline.errors import SourceError
from pipeline.sources import Source

Kind = Literal["parquet", "jsonl", "text"]

ENDINGS: Final[dict[str, Kind]] = {
    ".parquet": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".txt": "text",
    ".text": "text",
    ".raw": "text",
    ".md": "text",
    ".rst": "text",
    ".py": "text",
}
LOCAL: Final = "local files"
INTERPRETER: Final = "the Python interpreter"
COMPRESSIONS: Final = {".zst": "zstd", ".gz": "gzip"}


@dataclass(frozen=True)
class Layout:
    """How a file spells its records; `compression` is pyarrow's name or empty."""

    kind: Kind
    compression: str = ""


@dataclass(frozen=True)
class InputFile:
    """A file of the listing: its relative path with `/`, its size, and how it is spelled."""

    path: str
    bytes: int
    layout: Layout


class Inputs(Protocol):
    """A listing in bytewise order of path, and a way to open what is in it."""

    @property
    def files(self) -> tuple[InputFile, ...]:
        """What there is to read."""

    @property
    def dataset(self) -> str:
        """Where it is from, for the manifest."""

    @property
    def revision(self) -> str:
        """Which version of it; empty where there is none."""

    def open(self, path: str) -> BinaryIO:
        """The bytes of one file of the listing."""


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


def listed(path: str, size: int) -> InputFile:
    """The listing's entry for a file; SourceError if nobody knows how to read it."""
    layout = layout_of(path)
    if layout is None:
        raise SourceError(
            f"{path}: no reader for this kind of file; a source is made of "
            f"{', '.join(ENDINGS)} files (all but parquet also .zst or .gz): narrow the pattern"
        )
    return InputFile(path, size, layout)


@dataclass(frozen=True)
class LocalInputs:
    """Files below one folder."""

    base: Path
    files: tuple[InputFile, ...]
    dataset: str = LOCAL
    revision: str = ""

    def open(self, path: str) -> BinaryIO:
        """The bytes of one file of the listing."""
        return (self.base / path).open("rb")


@dataclass(frozen=True)
class PythonDocs:
    """The topics of pydoc as one jsonl file, a topic a record, in order of name."""

    revision: str
    dataset: str = INTERPRETER
    name = "pydoc_data/topics.jsonl"

    @property
    def files(self) -> tuple[InputFile, ...]:
        """The one file."""
        return (listed(self.name, len(self._text())),)

    def open(self, path: str) -> BinaryIO:
        """Its bytes."""
        return io.BytesIO(self._text())

    def _text(self) -> bytes:
        try:
            from pydoc_data.topics import topics
        except ImportError as error:
            raise SourceError(
                "python-docs: this Python was installed without pydoc_data: "
                "install the full standard library"
            ) from error
        lines = (json.dumps({"text": topics[name]}) + "\n" for name in sorted(topics))
        return "".join(lines).encode()


def local_inputs(patterns: tuple[str, ...]) -> LocalInputs:
    """The files that the patterns match; a folder stands for every readable file below it.

    Paths are listed relative to the deepest folder that the patterns name without a wildcard.
    """
    found: set[str] = set()
    bases = []
    for pattern in patterns:
        pattern = str(Path(pattern).expanduser())
        if Path(pattern).is_dir():
            matches = [str(p) for p in Path(pattern).rglob("*") if layout_of(p.name) and _plain(p)]
            bases.append(pattern)
        else:
            matches = [name for name in glob.glob(pattern, recursive=True) if Path(name).is_file()]  # noqa: PTH207
            bases.append(_fixed_folder(pattern))
        if not matches:
            raise SourceError(
                f"no file matches {pattern!r}: check the path and quote the pattern, so that the "
                "shell leaves it alone"
            )
        found |= {os.path.abspath(name) for name in matches}  # noqa: PTH100
    base = Path(os.path.commonpath([os.path.abspath(name) for name in bases]))  # noqa: PTH100
    return LocalInputs(base, _listing(base, [Path(name) for name in found]))


def embedded_inputs(source: Source) -> Inputs:
    """What the running interpreter carries under that name."""
    version = f"{platform.python_implementation().lower()}-{platform.python_version()}"
    if source.name == "python-docs":
        return PythonDocs(version)
    folder = Path(sysconfig.get_path("stdlib"))
    files = [path for path in folder.glob("*.py") if path.stat().st_size]
    if not files:
        raise SourceError(
            f"python-code: this Python keeps no .py files in {folder}: give others with "
            "--data-files"
        )
    return LocalInputs(folder, _listing(folder, files), INTERPRETER, version)


def _listing(base: Path, paths: list[Path]) -> tuple[InputFile, ...]:
    files = []
    for path in paths:
        name = path.relative_to(base).as_posix()
        try:
            name.encode()
        except UnicodeEncodeError:
            raise SourceError(f"{path!r}: its name is not UTF-8: rename the file") from None
        files.append(listed(name, path.stat().st_size))
    return tuple(sorted(files, key=lambda file: file.path.encode()))


def _fixed_folder(pattern: str) -> str:
    """The deepest folder in front of the first wildcard."""
    folder = Path(pattern).parent
    while glob.has_magic(str(folder)):
        folder = folder.parent
    return str(folder)


def _plain(path: Path) -> bool:
    return path.is_file() and not any(part.startswith(".") for part in path.parts[-1:])
