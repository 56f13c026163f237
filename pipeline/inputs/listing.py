"""Which local files a source is made of, which are left out, and why.

A file that is named is taken. A pattern is obeyed, or rejected where it matches what cannot be
read or a test set next to a training set. Of a folder, the data files below it are taken, those of
one split; what is left out is listed with its reason, and where it looks like data nothing starts.
"""

from __future__ import annotations

import glob
import os
import platform
import re
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

from pipeline.errors import SourceError
from pipeline.inputs.inputs import (
    ENDINGS,
    INTERPRETER,
    LOCAL,
    InputFile,
    Inputs,
    LeftOut,
    LocalInputs,
    PythonDocs,
    input_file,
    layout_of,
    listed,
    pydoc_topics,
)
from pipeline.inputs.sources import Source

ALL: Final = "all"
SPLITS: Final = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Words in a file's name, or its folder's, that say which split it is of (as `datasets` has it)."""
CARDS: Final = ("README", "LICENSE", "LICENCE")
METADATA: Final = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
ARCHIVES: Final = {
    ".zip", ".tar", ".tgz", ".7z", ".rar", ".zst", ".gz", ".bz2", ".xz", ".lz4", ".br", ".lzma",
    ".warc", ".avro", ".orc", ".feather", ".h5", ".hdf5", ".db", ".sqlite", ".pkl",
}  # fmt: skip
MEDIA: Final = {".png", ".jpg", ".jpeg", ".gif", ".webp", ".svg", ".pdf", ".mp3", ".mp4", ".wav"}
LARGE_BYTES: Final = 1 << 20
"""A file of any other ending looks like data from this size on."""

HIDDEN: Final = "hidden"
CARD: Final = "a card"
OF_DATASETS: Final = "metadata of datasets"
NO_READER: Final = "no reader for its ending"
BESIDE: Final = "text next to tables"
NO_FILE: Final = "not a regular file"
A_FOLDER: Final = "a folder"
_HARMLESS: Final = (HIDDEN, CARD, OF_DATASETS)


class Candidate(NamedTuple):
    """A file that was met; `why` it is left out, if it is."""

    path: Path
    why: str = ""  # it is left out


def local_inputs(
    patterns: tuple[str, ...], split: str = "", earlier: Iterable[str] = ()
) -> LocalInputs:
    """The files that paths, patterns and folders mean; SourceError where that is not clear.

    `split` chooses among a folder's files, by their names: `train` unless it is said, or `all`.
    Files of an `earlier` listing are taken where they still are. Paths are listed relative to the
    deepest folder that is named without a wildcard.
    """
    found: dict[Path, str] = {}
    bases = []
    for pattern in patterns:
        entries, below = _meant_by(str(Path(pattern).expanduser()), split, known=bool(earlier))
        for path, why in entries:
            found[path] = why if found.get(path, "taken") else ""  # taken, if for any pattern
        bases.append(below)
    base = Path(os.path.commonpath(bases))
    found |= {base / path: "" for path in earlier if (base / path).is_file()}
    taken = _without_twins(found)
    if not earlier:
        _check_left_out(found, patterns)
    if not taken:
        reasons = "; ".join(f"{path.name}: {why}" for path, why in list(found.items())[:3])
        raise SourceError(f"{', '.join(patterns)}: no data file in it ({reasons or 'it is empty'})")
    left_out = [
        LeftOut(_relative(path, base), _size(path), why) for path, why in found.items() if why
    ]
    files = in_order(base, taken)
    return LocalInputs(LOCAL, "", files, base, left_out=tuple(sorted(left_out)))


def embedded_inputs(source: Source) -> Inputs:
    """What the running interpreter carries under that name."""
    version = f"{platform.python_implementation().lower()}-{platform.python_version()}"
    if source.name == "python-docs":
        file = listed("pydoc_data/topics.jsonl", len(pydoc_topics()))
        return PythonDocs(INTERPRETER, version, (file,))
    folder = Path(sysconfig.get_path("stdlib"))
    paths = sorted(path for path in folder.glob("*.py") if path.stat().st_size)
    files = tuple(input_file(path.name, path, pinned=False) for path in paths)
    return LocalInputs(INTERPRETER, version, files, folder)


def check_split_of_use(patterns: Iterable[str], split: str) -> None:
    """SourceError for a split that chooses nothing: only a folder's files are chosen by it."""
    folders = (name.endswith("/") or Path(name).expanduser().is_dir() for name in patterns)
    if split not in ("", ALL) and not any(folders):
        raise SourceError(
            f"--split {split} does nothing here: --data-files names the files; leave it out, or "
            "name their folder"
        )


def in_order(base: Path, paths: Iterable[Path], *, pinned: bool = True) -> tuple[InputFile, ...]:
    """The listing's entries of files below a folder, in bytewise order of their paths."""
    files = [input_file(_relative(path, base), path, pinned=pinned) for path in paths]
    try:
        return tuple(sorted(files, key=lambda file: file.path.encode()))
    except UnicodeEncodeError as error:
        raise SourceError(f"{error.object!r}: its name is not UTF-8: rename the file") from None


def split_of(relative: Path) -> str:
    """The split that a file's name says it is of, or else its folder's; empty if none does."""
    if relative.suffix == ".py":
        return ""  # test_x.py is code like any other
    for part in reversed(relative.parts):
        words = set(re.split(r"[^a-z]+", part.lower()))
        named = [split for split, names in SPLITS.items() if words & set(names)]
        if named:
            return named[0] if len(named) == 1 else ""
    return ""


def _meant_by(pattern: str, split: str, *, known: bool) -> tuple[list[Candidate], Path]:
    """What a path or pattern means, and the deepest folder in front of its first wildcard."""
    base = Path(pattern)
    if base.is_file():
        return [Candidate(_absolute(base))], _absolute(base.parent)
    if base.is_dir():
        base = _absolute(base)
        met = [each._replace(path=each.path.relative_to(base)) for each in _below(base)]
        chosen = of_split(met, split or "train", str(base))
        return [each._replace(path=base / each.path) for each in chosen], base
    while glob.has_magic(str(base)):
        base = base.parent
    names = glob.iglob(pattern, recursive=True)  # noqa: PTH207 - a Path's glob takes no absolute
    paths = [_absolute(Path(name)) for name in names]
    if not paths:
        raise SourceError(
            f"no file matches {pattern!r}: check the path, and quote the pattern for the shell"
        )
    base, files = _absolute(base), [path for path in paths if path.is_file()]
    folders = [Candidate(p, A_FOLDER) for p in paths if p.is_dir() and "**" not in pattern]
    others = [Candidate(p, NO_FILE) for p in paths if not p.is_dir() and not p.is_file()]
    if split != ALL and not known:
        _check_splits(files, base, pattern)
    return [*map(Candidate, files), *folders, *others], base


def _check_splits(files: list[Path], base: Path, pattern: str) -> None:
    """SourceError where a pattern matches a test set next to a training set."""
    splits = {path: split_of(path.relative_to(base)) for path in files}
    held_out = next((path for path, split in splits.items() if split not in ("", "train")), None)
    if held_out is not None and "train" in splits.values():
        raise SourceError(
            f"{pattern!r} matches {_relative(held_out, base)} next to training files: narrow it, "
            f"or --split {ALL} to train on that file too"
        )


def _below(folder: Path) -> Iterator[Candidate]:
    """All that is below a folder, links followed, hidden folders named and not entered."""
    seen = set()
    texts, tables = [], False
    for here, folders, names in os.walk(folder, followlinks=True):
        at = Path(here).stat()
        if (at.st_dev, at.st_ino) in seen:  # a link back
            folders.clear()
            continue
        seen.add((at.st_dev, at.st_ino))
        yield from (Candidate(Path(here, name), HIDDEN) for name in folders if name[0] == ".")
        folders[:] = [name for name in folders if name[0] != "."]
        for path in (Path(here, name) for name in sorted(names)):
            why = why_left_out(path.relative_to(folder)) if path.is_file() else NO_FILE
            layout = layout_of(path.name)
            if not why and layout is not None and layout.kind == "text":
                texts.append(path)
            else:
                tables = tables or not why
                yield Candidate(path, why)
    for path in texts:  # next to tables, text files are notes and scripts
        yield Candidate(path, BESIDE if tables else "")


def why_left_out(relative: Path) -> str:
    """Why a file of a folder is left out by its name; empty if it is not."""
    layout = layout_of(relative.name)
    if any(part.startswith(".") for part in relative.parts):
        return HIDDEN
    if relative.name in METADATA:
        return OF_DATASETS
    if relative.name.upper().startswith(CARDS) and (layout is None or layout.kind == "text"):
        return CARD
    return "" if layout else NO_READER


def of_split(entries: list[Candidate], split: str, folder: str) -> list[Candidate]:
    """Of a folder's files, given relative, only those of a split, if names say splits at all."""
    splits = {each.path: split_of(each.path) for each in entries if not each.why}
    if split == ALL or not any(splits.values()):
        return entries
    names = {known: name for name, words in SPLITS.items() for known in words}
    wanted = names.get(split, split)
    # what has no split's name belongs to the training text
    taken = {wanted, ""} if wanted == "train" else {wanted}
    if splits and not taken & set(splits.values()):
        there = " and ".join(sorted(set(splits.values())))
        raise SourceError(
            f"{folder} has no {wanted} files, only {there}: choose with --split, or --split {ALL}"
        )
    others = {path: f"{name} split" for path, name in splits.items() if name not in taken}
    return [each._replace(why=others.get(each.path, each.why)) for each in entries]


def _without_twins(found: dict[Path, str]) -> list[Path]:
    """The files that are taken; of several names of one file the first, the others are left out."""
    first: dict[tuple[int, int], Path] = {}
    for path in sorted(path for path, why in found.items() if not why):
        at = path.stat()
        twin = first.setdefault((at.st_dev, at.st_ino), path)
        if twin != path:
            found[path] = f"the same file as {twin.name}"
    return list(first.values())


def _check_left_out(found: dict[Path, str], patterns: tuple[str, ...]) -> None:
    """SourceError where something that is left out looks like data."""
    data = [path for path, why in found.items() if why and _looks_like_data(path, why)]
    if data:
        names = ", ".join(f"{path} ({found[path]})" for path in data[:3])
        more = f" and {len(data) - 3} more" if len(data) > 3 else ""
        raise SourceError(
            f"{', '.join(patterns)}: this looks like data and would be left out: {names}{more}: "
            "move it away, or name the files that are meant by a pattern (--list shows all)"
        )


def _looks_like_data(path: Path, why: str) -> bool:
    if why in _HARMLESS or why.startswith("the same file") or why.endswith(" split"):
        return False
    if path.is_dir():
        return any(layout_of(name) for _, _, names in os.walk(path) for name in names)
    data_endings = ARCHIVES | {ending for ending, kind in ENDINGS.items() if kind != "text"}
    if why != BESIDE and data_endings & {suffix.lower() for suffix in path.suffixes}:
        return True
    return path.suffix.lower() not in MEDIA and _size(path) >= LARGE_BYTES


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _relative(path: Path, base: Path) -> str:
    return path.relative_to(base).as_posix()


def _absolute(path: Path) -> Path:
    """Without `..`, but with links left as they are named."""
    return Path(os.path.abspath(path))  # noqa: PTH100
