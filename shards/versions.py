"""This version, the formats of its files, and the errors for what only another version knows.

A run's config.json, a checkpoint's record and an exported config.json name their writer,
`summerlm_version`; those of 0.1.0 do not. Files that lack a key mean its default (or what
trainer/config/config.py says they mean); a version that does not know a key rejects the file,
naming the version that does. Shards depend on their content alone, so they name no version:
unknown keys are left alone there, and what older code would misread is another `format`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any, Final

from shards.errors import VersionError

VERSION: Final = "0.2.0"
"""Of the package: pyproject.toml reads it from here."""

SHARDS: Final = "summerlm-shards/1"  # manifest.json and the units' records
UNITS: Final = "summerlm-units/1"  # units.json
EXCLUDE: Final = "summerlm-exclude/1"  # a list of sequences for --exclude
RUN: Final = "summerlm-run/1"  # a run's config.json
CHECKPOINT: Final = "summerlm-checkpoint/1"  # checkpoint.json
CERTIFICATE: Final = "summerlm-certificate/1"  # certificate.json
_FORMER: Final = {"summerlm-commit/1": CHECKPOINT}  # written until 0.1.0

FORMAT_KEY: Final = "format"
WRITER_KEY: Final = "summerlm_version"
STAMP: Final = (FORMAT_KEY, WRITER_KEY)
_FIRST: Final = "0.1.0"


def stamp(file_format: str) -> dict[str, str]:
    """The first two keys of a file: its format and this version."""
    return {FORMAT_KEY: file_format, WRITER_KEY: VERSION}


def writer_of(table: Mapping[str, Any]) -> str:
    """The version that wrote a file."""
    return str(table.get(WRITER_KEY, _FIRST))


def check_format(table: Mapping[str, Any], wanted: str, where: object) -> None:
    """VersionError for a file of another format."""
    found = table.get(FORMAT_KEY)
    if found != wanted and _FORMER.get(str(found)) != wanted:
        raise VersionError(
            f"{where} is of format {found!r}, written by SummerLM {writer_of(table)}, and this "
            f"version ({VERSION}) reads {wanted!r}: upgrade"
        )


def check_keys(keys: Iterable[str], known: Collection[str], where: object, writer: str) -> None:
    """VersionError for a key that is not known: what it asks for would not be done."""
    if unknown := [key for key in keys if key not in known]:
        raise VersionError(
            f"{where}: written by SummerLM {writer} with {unknown[0]}, which this version "
            f"({VERSION}) does not know: upgrade"
        )
