"""Where bytes come from: local files, the Hub (hub.py), or what the Python interpreter carries.

Each kind is a small picklable value; a worker process opens for itself what its unit needs. Paths
in a listing are relative, so that nothing published depends on whose machine it was made on.
"""

from __future__ import annotations

import glob
import io
import json
import os
import platform
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final, Literal

from pipeline.errors import SourceError
from pipeline.inputs.sources import Source

Kind = Literal["parquet", "jsonl", "text"]

ENDINGS: Final[dict[str, Kind]] = {
    ".parquet": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".txt": "text",
    ".text": "text",
    ".raw": "text",
    ".py": "text",
}
LOCAL: Final = "local files"
INTERPRETER: Final = "the Python interpreter"
CARDS: Final = ("README", "LICENSE", "LICENCE")
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


@dataclass(frozen=True)
class Inputs:
    """A listing in bytewise order of path; where it is from and which version, for the manifest."""

    dataset: str
    revision: str
    files: tuple[InputFile, ...]

    def open(self, path: str) -> BinaryIO:
        """The bytes of one file of the listing."""
        raise NotImplementedError


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
class LocalInputs(Inputs):
    """Files below one folder."""

    base: Path

    def open(self, path: str) -> BinaryIO:
        """The bytes of one file of the listing."""
        return (self.base / path).open("rb")


class PythonDocs(Inputs):
    """The topics of pydoc as one jsonl file, a topic a record, in order of name."""

    def open(self, path: str) -> BinaryIO:
        """Its bytes."""
        return io.BytesIO(_topics())


def _topics() -> bytes:
    from pydoc_data.topics import topics

    return "".join(json.dumps({"text": topics[name]}) + "\n" for name in sorted(topics)).encode()


def local_inputs(patterns: tuple[str, ...]) -> LocalInputs:
    """The files that the patterns match; a folder stands for all data files below it.

    A data set's card beside the data (README, LICENSE) is left out. Paths are listed relative to
    the deepest folder that the patterns name without a wildcard.
    """
    found: set[Path] = set()
    bases = []
    for pattern in patterns:
        matches, base = _matches(str(Path(pattern).expanduser()))
        if not matches:
            raise SourceError(
                f"no file matches {pattern!r}: check the path, and quote the pattern for the shell"
            )
        found |= matches
        bases.append(base)
    base = Path(os.path.commonpath(bases))
    return LocalInputs(LOCAL, "", _listing(base, found), base)


def _matches(pattern: str) -> tuple[set[Path], Path]:
    """The files that a pattern means, and the deepest folder in front of its first wildcard."""
    base = Path(pattern)
    if base.is_file():
        return {_absolute(base)}, _absolute(base.parent)
    if base.is_dir():
        below = [path for path in base.rglob("[!.]*") if path.is_file()]
        kinds = {path: layout.kind for path in below if (layout := layout_of(path.name))}
        # beside tables, text files are notes and scripts
        found = {path for path, kind in kinds.items() if kind != "text"} or set(kinds)
    else:
        while glob.has_magic(str(base)):
            base = base.parent
        names = glob.iglob(pattern, recursive=True)  # noqa: PTH207 - a Path's glob takes no absolute
        found = {path for path in map(Path, names) if path.is_file()}
    data = {_absolute(path) for path in found if not path.name.upper().startswith(CARDS)}
    return data, _absolute(base)


def _absolute(path: Path) -> Path:
    """Without `..`, but with links left as they are named."""
    return Path(os.path.abspath(path))  # noqa: PTH100


def embedded_inputs(source: Source) -> Inputs:
    """What the running interpreter carries under that name."""
    version = f"{platform.python_implementation().lower()}-{platform.python_version()}"
    if source.name == "python-docs":
        file = listed("pydoc_data/topics.jsonl", len(_topics()))
        return PythonDocs(INTERPRETER, version, (file,))
    folder = Path(sysconfig.get_path("stdlib"))
    files = [path for path in folder.glob("*.py") if path.stat().st_size]
    return LocalInputs(INTERPRETER, version, _listing(folder, files), folder)


def _listing(base: Path, paths: Iterable[Path]) -> tuple[InputFile, ...]:
    files = [listed(path.relative_to(base).as_posix(), path.stat().st_size) for path in paths]
    try:
        return tuple(sorted(files, key=lambda file: file.path.encode()))
    except UnicodeEncodeError as error:
        raise SourceError(f"{error.object!r}: its name is not UTF-8: rename the file") from None
