"""Publishing files so that nothing visible is ever half a file.

A file is written under a temporary name in its own folder, flushed to the device, renamed, and
then the folder itself is flushed: after a power cut the name is either absent or complete.

A temporary is locked (flock) while its writer lives, and the kernel lets go when the writer dies,
however it dies. So whoever can lock one knows that nobody will finish it. (The pid in the name is
for people: pids come back, in containers within seconds.)
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import io
import itertools
import json
import os
import re
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, Final

_LARGEST_TEXT: Final = 256 << 20  # a manifest of 2,500 shards has 1 MB
_OWN_FILES: Final = "only regular files are read and written here; put the file itself there"
_TEMPORARY = re.compile(r"^\..+\.tmp-[\w.]*-\d+-\d+$")
_count = itertools.count()


def is_temporary(path: Path) -> bool:
    """Whether the name is one under which files are written before they are published."""
    return _TEMPORARY.match(path.name) is not None


def fsync_folder(folder: Path) -> None:
    """Flush a folder's entries, so that a rename inside it survives a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def publish(path: Path) -> Iterator[IO[bytes]]:
    """A binary file that appears as `path`, complete and durable, once the block has ended well."""
    with _temporary(path) as (file, temporary):
        yield file
        _flush_to_device(file)
        temporary.replace(path)
    fsync_folder(path.parent)


def publish_bytes(path: Path, data: bytes) -> None:
    """Publish `data` as `path`."""
    with publish(path) as file:
        file.write(data)


def json_bytes(value: object) -> bytes:
    """The one way to spell JSON here: UTF-8, keys in the given order, one final newline."""
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def publish_json(path: Path, value: object) -> None:
    """Publish `value` as JSON."""
    publish_bytes(path, json_bytes(value))


def create_once(path: Path, data: bytes) -> bool:
    """True if this call published `data` as `path`, False if `path` was there already.

    The name is given by link(2), which fails for an existing one, to a complete temporary. Where
    there are no hard links, of two first calls in the same moment the later one counts: True if
    what is there is `data`.
    """
    with _temporary(path) as (file, temporary):
        file.write(data)
        _flush_to_device(file)
        try:
            path.hardlink_to(temporary)
        except FileExistsError:
            return False
        except OSError:  # exFAT, gcsfuse and the like have no hard links
            if path.exists():
                return False
            temporary.replace(path)
    fsync_folder(path.parent)
    return path.read_bytes() == data


@contextlib.contextmanager
def one_at_a_time(path: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """A block that no other process is in for a file or folder; `waiting` is called if one is."""
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            _lock(handle)
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def in_use(path: Path) -> Iterator[None]:
    """A block in which other processes see the file to be in use."""
    with path.open("rb") as file:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_SH)
        yield


def is_in_use(path: Path) -> bool:
    """Whether a process is in such a block."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no such file, or a file system without locks
        return False
    return False


def read_plain(path: Path, limit: int = _LARGEST_TEXT) -> bytes:
    """The bytes of a regular file; ValueError for a link, a pipe, or more than `limit` bytes.

    A folder may come from a stranger: a link in it would read, or change, what lies elsewhere.
    """
    with open_plain(path) as file:
        if (size := os.fstat(file.fileno()).st_size) > limit:
            raise ValueError(f"{path} has {size:,} bytes, more than the {limit:,} it may have")
        return file.read()


def open_plain(path: Path, flags: int = os.O_RDONLY) -> io.FileIO:
    """A regular file opened without following a link; ValueError if it is anything else."""
    try:
        handle = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise ValueError(f"{path} is a link: {_OWN_FILES}") from error
        raise
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise ValueError(f"{path} is no regular file: {_OWN_FILES}")
    return io.FileIO(handle, "rb" if flags == os.O_RDONLY else "r+b")


def read_json(path: Path, limit: int = _LARGEST_TEXT) -> Any:
    """The JSON value of a regular file; ValueError if it holds none, or one that nests deeply."""
    try:
        return json.loads(read_plain(path, limit))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, lower-case hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remove_abandoned(folder: Path) -> int:
    """The number of temporaries removed: those whose writers are gone."""
    removed = 0
    for path in filter(is_temporary, list(folder.iterdir())):
        with contextlib.suppress(OSError), path.open("rb") as file:  # renamed meanwhile, or locked
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
            removed += 1
    return removed


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[tuple[IO[bytes], Path]]:
    """A new locked file beside `path` and its name, which is gone when the block ends."""
    host = re.sub(r"[^\w.]", "_", socket.gethostname())
    while True:
        temporary = path.with_name(f".{path.name}.tmp-{host}-{os.getpid()}-{next(_count)}")
        with temporary.open("wb") as file:
            _lock(file)
            if not temporary.exists():  # someone tidied up between the open and the lock
                continue
            try:
                yield file, temporary
            except OSError as error:
                if error.errno is not None and error.filename in (None, str(temporary)):
                    error.filename = str(path)  # what a person knows
                raise
            finally:
                temporary.unlink(missing_ok=True)
            return


def _lock(file: IO[bytes] | int) -> None:
    """Wait for the lock, and keep it until the file is closed."""
    with contextlib.suppress(OSError):  # a file system without locks: temporaries stay there
        fcntl.flock(file, fcntl.LOCK_EX)


def _flush_to_device(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())
