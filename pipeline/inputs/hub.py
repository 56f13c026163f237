"""The Hugging Face Hub: a listing pinned to a commit, and files read with retries.

`datasets` resolves name, config and patterns to a list of files; no code of a data set is run.
"""

from __future__ import annotations

import io
import time
from dataclasses import dataclass
from typing import Any, BinaryIO, ClassVar, Final, cast

from pipeline.errors import SourceError
from pipeline.inputs.inputs import InputFile, Inputs, listed
from pipeline.inputs.sources import Source
from shards.errors import one_line

CONNECT_S: Final = 10
"""How long the first question to the Hub may take: without a network the answer comes at once."""
PATIENCE_S: Final = 300.0
"""How long reading goes on trying without a byte."""
LONGEST_PAUSE_S: Final = 30.0
BLOCK_BYTES: Final = 16 << 20
PATHS_AT_ONCE: Final = 500


@dataclass(frozen=True)
class HubInputs(Inputs):
    """Files of a data set on the Hub, at one commit."""

    licence: str = ""
    patience_s: float = PATIENCE_S
    local: ClassVar[bool] = False

    def open(self, path: str) -> BinaryIO:
        """The bytes of one file of the listing."""
        url = self.url(path)
        size = next(file.bytes for file in self.files if file.path == path)
        return cast(BinaryIO, io.BufferedReader(PatientFile(url, size, self.patience_s), 1 << 20))

    def url(self, path: str) -> str:
        """Where `datasets` finds that file."""
        return f"hf://datasets/{self.dataset}@{self.revision}/{path}"


def hub_inputs(source: Source) -> HubInputs:
    """The source's files at the commit its revision names now; SourceError says what is wrong."""
    from huggingface_hub import HfApi, HfFileSystem

    try:
        info = HfApi().dataset_info(
            source.dataset, revision=source.revision or None, timeout=CONNECT_S
        )
        sha = str(info.sha)
        files = _listing(source, sha)
        url = f"hf://datasets/{source.dataset}@{sha}/{files[0].path}"
        with HfFileSystem().open(url, cache_type="none", size=files[0].bytes) as first:
            first.read(1)  # a gated data set lists its files for everybody
    except Exception as error:
        raise _explained(error, source) from error
    card: Any = info.card_data or {}
    licence = card.get("license") or ""
    licence = ", ".join(licence) if isinstance(licence, list) else str(licence)
    return HubInputs(source.dataset, sha, files, licence)


def _listing(source: Source, sha: str) -> tuple[InputFile, ...]:
    from datasets import load_dataset_builder
    from huggingface_hub import HfApi

    prefix = f"hf://datasets/{source.dataset}@{sha}/"
    if source.patterns:
        patterns = [prefix + pattern for pattern in source.patterns]
        builder = load_dataset_builder("parquet", data_files={source.split: patterns})  # or any
    else:
        builder = load_dataset_builder(source.dataset, source.config or None, revision=sha)
    splits = builder.config.data_files or {}
    if source.split not in splits:
        raise SourceError(
            f"{source.dataset} has no split {source.split!r} (it has {', '.join(splits)})"
        )
    paths = sorted({url.removeprefix(prefix) for url in splits[source.split]}, key=str.encode)
    files: list[InputFile] = []
    for first in range(0, len(paths), PATHS_AT_ONCE):
        some = paths[first : first + PATHS_AT_ONCE]
        found = HfApi().get_paths_info(source.dataset, some, revision=sha, repo_type="dataset")
        sizes = {entry.path: entry.size for entry in found if hasattr(entry, "size")}
        files += [listed(path, sizes[path]) for path in some]
    return tuple(files)


class PatientFile(io.RawIOBase):
    """A file behind a URL that fsspec knows, read with retries.

    A failed read is tried again from the same byte, with growing pauses, until nothing has come
    for `patience_s`; then SourceError. A short answer counts as a failed one.
    """

    def __init__(self, url: str, size: int, patience_s: float) -> None:
        super().__init__()
        self._url, self._size, self._patience_s = url, size, patience_s
        self._at = 0
        self._file: Any = None

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a byte."""
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer, as far as the file goes."""
        wanted = max(0, min(len(buffer), self._size - self._at))
        data = self._insist(wanted) if wanted else b""
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def close(self) -> None:
        """Let go of the connection."""
        self._let_go()
        super().close()

    def _insist(self, wanted: int) -> bytes:
        began, pause = time.monotonic(), 1.0
        while True:
            try:
                return self._read(wanted)
            except Exception as error:
                self._let_go()
                waited = time.monotonic() - began
                if not _is_passing(error) or waited >= self._patience_s:
                    place = "the Hub" if self._url.startswith("hf://") else "its server"
                    raise SourceError(
                        f"{self._url}: {one_line(error)} (tried for {waited:.0f} s): start the "
                        f"same command again when {place} is well, it goes on where it stopped"
                    ) from error
                time.sleep(min(pause, self._patience_s - waited))
                pause = min(2 * pause, LONGEST_PAUSE_S)

    def _read(self, wanted: int) -> bytes:
        from fsspec.core import url_to_fs

        if self._file is None:
            system, path = url_to_fs(self._url)
            # other file systems ask for the size themselves
            known = {"size": self._size} if self._url.startswith("hf://") else {}
            self._file = system.open(
                path, "rb", block_size=BLOCK_BYTES, cache_type="readahead", **known
            )
        self._file.seek(self._at)
        data = bytes(self._file.read(wanted))
        if len(data) != wanted:
            raise OSError(f"{len(data)} bytes came where {wanted} were asked for")
        return data

    def _let_go(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _is_passing(error: Exception) -> bool:
    """Whether a failure may be gone at the next try."""
    from huggingface_hub import errors

    library = type(error).__module__.partition(".")[0]
    if library in ("aiohttp", "botocore", "aiobotocore", "gcsfs"):
        return not isinstance(error, FileNotFoundError)

    # a gated repository is one of these, too
    final = errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.EntryNotFoundError
    return _is_network(error) and not isinstance(error, final)


def _explained(error: Exception, source: Source) -> SourceError:
    """The failure in the user's words, with the fix."""
    from huggingface_hub import constants, errors

    if isinstance(error, SourceError):
        return error
    name, copies = source.dataset, "or give a local copy with --data-files"
    causes: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in causes:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    for kind, message in {
        errors.GatedRepoError: f"is gated: accept its terms at {constants.ENDPOINT}/datasets/"
        f"{name}, then log in with `hf auth login` or set HF_TOKEN; {copies}",
        errors.RevisionNotFoundError: f"has no revision {source.revision!r}: leave --revision out",
        errors.RepositoryNotFoundError: "is not on the Hub, or is private and needs a token "
        f"(HF_TOKEN): check the name, {copies}",
    }.items():
        if any(isinstance(cause, kind) for cause in causes):
            return SourceError(f"{name} {message}")
    if any(map(_is_network, causes)):
        return SourceError(
            f"the Hub ({constants.ENDPOINT}) cannot be reached for {name} ({one_line(error)}): "
            f"check the network or HF_ENDPOINT, {copies}"
        )
    return SourceError(f"{name}: {one_line(error)}: check --config and --revision, {copies}")


def _is_network(error: BaseException) -> bool:
    from huggingface_hub.errors import HfHubHTTPError

    # its bases are OSError and the root of the HTTP library that this release stands on
    return isinstance(error, HfHubHTTPError.__bases__) and not isinstance(error, FileNotFoundError)
