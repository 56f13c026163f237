"""Where a source is read from; files behind URLs that fsspec knows: s3://, gs://, https://, hf://.

Each file system takes its credentials as it documents them. Files are pinned by what the server
tells contents apart with.
"""

from __future__ import annotations

import glob
import io
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Final, cast
from urllib.parse import urlsplit

from pipeline.errors import SourceError
from pipeline.inputs.hub import PATIENCE_S, PatientFile, hub_inputs
from pipeline.inputs.inputs import InputFile, Inputs, LeftOut, listed, spelled
from pipeline.inputs.listing import (
    Candidate,
    embedded_inputs,
    local_inputs,
    of_split,
    why_left_out,
)
from pipeline.inputs.sources import Source, check_available
from shards.errors import one_line

VERSIONS: Final = ("ETag", "etag", "blob_id", "md5Hash", "generation", "LastModified", "mtime")
"""Where file systems say what tells a file's content from another; the first that is there."""


@dataclass(frozen=True)
class UrlInputs(Inputs):
    """Files below one URL, which is `dataset`."""

    patience_s: float = PATIENCE_S
    local: ClassVar[bool] = False

    def open(self, path: str) -> BinaryIO:
        """The bytes of one file of the listing."""
        size = next(file.bytes for file in self.files if file.path == path)
        file = PatientFile(self.url(path), size, self.patience_s)
        return cast(BinaryIO, io.BufferedReader(file, 1 << 20))

    def url(self, path: str) -> str:
        """Where `datasets` finds that file."""
        return f"{self.dataset}/{path}"

    def check(self, file: InputFile) -> None:
        """SourceError if the server has another content for a file than was listed."""
        (info,) = _behind(self.url(file.path)).values()
        now = _listed(file.path, info)
        if now != file:
            raise SourceError(
                f"{self.url(file.path)} has changed since it was listed: {spelled(file)} then, "
                f"{spelled(now)} now: prepare all of it again (--out)"
            )


def open_inputs(
    source: Source, data_files: tuple[str, ...] = (), earlier: Iterable[str] = ()
) -> Inputs:
    """The listing of a source: of the files that are named, else of its own place.

    `earlier`: what an earlier listing of the same local files had.
    """
    if any("://" in pattern for pattern in data_files):
        if local := [pattern for pattern in data_files if "://" not in pattern]:
            raise SourceError(f"{local[0]}: local files and URLs do not go together in one source")
        return url_inputs(data_files, source.split)
    if data_files:
        return local_inputs(data_files, source.split, earlier)
    check_available(source)
    return embedded_inputs(source) if source.embedded else hub_inputs(source)


def url_inputs(patterns: tuple[str, ...], split: str) -> UrlInputs:
    """The files that URLs of files, folders and patterns mean; SourceError says what is wrong."""
    found: dict[str, dict[str, Any]] = {}
    left_out: dict[str, str] = {}
    for pattern in patterns:
        base = _base_of(pattern)
        below = _behind(pattern)
        if base == pattern:  # a folder
            met = [Candidate(Path(url.removeprefix(base))) for url in below]
            met = [each._replace(why=why_left_out(each.path)) for each in met]
            why = {f"{base}{each.path}": each.why for each in of_split(met, split or "train", base)}
        else:
            why = dict.fromkeys(below, "")
        left_out |= {url: reason for url, reason in why.items() if reason}
        found |= {url: info for url, info in below.items() if not why[url]}
    if not found:
        reasons = "; ".join(f"{url}: {why}" for url, why in list(left_out.items())[:3])
        raise SourceError(f"{', '.join(patterns)}: no data file there ({reasons or 'it is empty'})")
    folders = [url.rpartition("/")[0].partition("://") for url in found]
    base = f"{folders[0][0]}://{os.path.commonpath([below for _, _, below in folders])}"
    files = [_listed(url.removeprefix(f"{base}/"), info) for url, info in found.items()]
    ordered = tuple(sorted(files, key=lambda file: file.path.encode()))
    others = tuple(LeftOut(url, 0, why) for url, why in sorted(left_out.items()))
    return UrlInputs(base, "", ordered, left_out=others)


def _base_of(pattern: str) -> str:
    """The pattern itself where it names a folder, by its last `/`; else the folder before it."""
    address = urlsplit(pattern)
    if address.username or address.password or address.query:
        raise SourceError(
            f"{address.scheme}://{address.hostname}...: no password or token in a URL, it would be "
            "kept with the shards: log in as its file system says (variables, files)"
        )
    return pattern if pattern.endswith("/") else pattern.rpartition("/")[0] + "/"


def _behind(pattern: str) -> dict[str, dict[str, Any]]:
    """The files that a URL or pattern names, with what their file system says of each."""
    from fsspec.core import url_to_fs

    try:
        system, path = url_to_fs(pattern)
        system.invalidate_cache()
        if glob.has_magic(path):
            infos = system.glob(path, detail=True)
        elif pattern.endswith("/"):
            infos = system.find(path, detail=True)
        else:
            infos = {path: system.info(path)}
            if infos[path]["type"] == "directory":
                raise IsADirectoryError(f"a folder: name it as {pattern}/")
        files = {name: info for name, info in infos.items() if info.get("type") == "file"}
        return {system.unstrip_protocol(name): info for name, info in files.items()}
    except ImportError as error:
        raise SourceError(f"{pattern}: {one_line(error)}") from error
    except Exception as error:
        raise SourceError(
            f"{pattern}: {one_line(error) or type(error).__name__}: check the address (a folder's "
            "ends in /) and whether you are logged in"
        ) from error


def _listed(path: str, info: dict[str, Any]) -> InputFile:
    version = next((str(info[key]) for key in VERSIONS if info.get(key)), "")
    if info.get("size") is None:
        raise SourceError(f"{path}: its server does not tell its size: download it first")
    return listed(path, info["size"], version)
