"""A process that has imported the stage and forks it as often as asked, to be killed.

    python tests/crash_process.py       a JSON request a line on stdin, a JSON answer a line

    {"start": [ARGUMENT...], "log": FILE, "stop": N, "where": "main", "spoil": ""}   -> its pid
    {"wait": PID}                                                                    -> its status

Each start is a `summer-prep` command in a process group of its own. What it does to the disk are
its points (a write has two: before it and half-way), a line of the log each: it dies by SIGKILL
when it comes to number N. Workers are forked rather than spawned, so that a round takes a twentieth
of a second; units and shards are small. `spoil` names a guarantee that is broken on purpose.
"""

import contextlib
import gc
import io
import json
import multiprocessing
import os
import pathlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm  # type: ignore[import-untyped]

import shards.files
import shards.writer
from pipeline import cli
from pipeline.units import recipe

UNIT_BYTES = 1 << 11
SHARD_BYTES = 1 << 11


class Points:
    """Notes what a process does to the disk, and ends it at the point it was given."""

    def __init__(self, log: Path, stop: int, where: str) -> None:
        self._log = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self._stop, self._in_worker, self._main = stop, where == "worker", os.getpid()
        self._seen = 0

    def pass_by(self, event: str, path: object, to: object = "") -> None:
        """Come to a point."""
        if self._in_worker == (os.getpid() != self._main):
            if self._seen == self._stop:
                os.kill(os.getpid(), signal.SIGKILL)
            self._seen += 1
        line = "\t".join([event, *(os.path.basename(os.fspath(p)) for p in (path, to))])  # type: ignore[call-overload]
        os.write(self._log, f"{line}\n".encode())

    def watch(self) -> None:
        """Stand at every way to the disk that the stage takes."""
        self._watch_call("fsync", lambda handle: os.readlink(f"/proc/self/fd/{handle}"))
        for name in ("replace", "link", "unlink"):
            self._watch_call(name, os.fspath)
        points, plain = self, Path.open

        class File(io.FileIO):
            def write(self, data: Any) -> int:
                data = memoryview(data).cast("B")
                points.pass_by("write", self.name)
                super().write(data[: len(data) // 2])
                points.pass_by("half", self.name)
                super().write(data[len(data) // 2 :])
                return len(data)

        def opened(path: Path, mode: str = "r", *rest: Any, **named: Any) -> Any:
            if "w" not in mode:
                return plain(path, mode, *rest, **named)
            points.pass_by("open", path)
            return io.BufferedWriter(File(path, mode))

        def save(file: Any, array: Any, **named: Any) -> None:  # numpy writes past a file's `write`
            whole = io.BytesIO()
            plain_save(whole, array, **named)
            file.write(whole.getvalue())

        plain_save = np.save
        pathlib.Path.open = opened  # type: ignore[method-assign, assignment]
        np.save = save  # type: ignore[assignment]

    def _watch_call(self, name: str, spelled: Callable[[Any], Any]) -> None:
        plain = getattr(os, name)

        def call(*arguments: Any, **named: Any) -> Any:
            self.pass_by(name, *map(spelled, arguments))
            return plain(*arguments, **named)

        setattr(os, name, call)


@contextlib.contextmanager
def _in_place(path: Path) -> Iterator[Any]:
    with path.open("wb") as file:
        yield file, path


def _finish_with_the_record_first(self: Any, *arguments: Any) -> Any:
    """A unit's end as it should not be: what the unit_record vouches for comes after it."""
    later: list[tuple[Path, io.BytesIO]] = []

    @contextlib.contextmanager
    def hold_back(path: Path) -> Iterator[io.BytesIO]:
        later.append((path, io.BytesIO()))
        yield later[-1][1]

    writer, publish_bytes = shards.writer, shards.files.publish_bytes
    writer.publish, plain = hold_back, writer.publish  # type: ignore[attr-defined]
    writer.publish_bytes = lambda path, data: later.append((path, io.BytesIO(data)))  # type: ignore[attr-defined]
    unit_record = _plain_finish(self, *arguments)
    writer.publish, writer.publish_bytes = plain, publish_bytes  # type: ignore[attr-defined]
    for path, data in later:
        publish_bytes(path, data.getvalue())
    return unit_record


_plain_finish = shards.writer.ShardWriter.finish
SPOILS: dict[str, Any] = {
    "nothing": (shards.files, "json_bytes", shards.files.json_bytes),
    "no rename": (shards.files, "_temporary", _in_place),
    "no flush": (shards.files, "_flush_to_device", lambda file: file.flush()),
    "no flush of the folder": (shards.files, "fsync_folder", lambda folder: None),
    "unit record first": (shards.writer.ShardWriter, "finish", _finish_with_the_record_first),
}


def serve() -> None:
    alive: dict[int, int] = {}
    for line in sys.stdin:
        order = json.loads(line)
        if "start" in order:
            ours, theirs = os.pipe()
            pid = os.fork()
            if not pid:
                _run(order, [ours, *alive.values()])
            os.setpgid(pid, pid)
            os.close(theirs)
            alive[pid] = ours
            print(pid, flush=True)
        else:
            _, status = os.waitpid(order["wait"], 0)
            with open(alive.pop(order["wait"]), "rb") as pipe:
                pipe.read()  # ends when the last of its workers has ended
            print(os.waitstatus_to_exitcode(status), flush=True)


def _run(order: Any, handles: list[int]) -> None:
    """Be the command."""
    code = 1
    try:
        os.setpgid(0, 0)
        for handle in handles:
            os.close(handle)
        nowhere = os.open(os.devnull, os.O_RDWR)
        for handle in (0, 1):
            os.dup2(nowhere, handle)
        os.dup2(os.open(order["log"] + ".err", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        _become_small()
        holder, name, spoilt = SPOILS[order["spoil"]]
        getattr(holder, name)
        setattr(holder, name, spoilt)
        points = Points(Path(order["log"]), order["stop"], order["where"])
        points.watch()
        cli.main(order["start"], standalone_mode=False)
        points.pass_by("end", "")
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stderr.flush()
        os._exit(code)


def _become_small() -> None:
    recipe.UNIT_BYTES, recipe.LEAST_UNIT_BYTES = UNIT_BYTES, 1  # type: ignore[attr-defined]
    shards.writer.SHARD_BYTES = SHARD_BYTES  # type: ignore[misc]
    fork = multiprocessing.get_context("fork")
    multiprocessing.get_context = lambda method=None: fork  # type: ignore[assignment]


def _share_no_lock() -> None:
    """tqdm, which `datasets` uses, has a lock among processes and a thread that takes it.

    A child killed while it held that lock stopped all the children after it, for ever.
    """
    tqdm.set_lock(threading.RLock())
    tqdm.monitor_interval = 0


if __name__ == "__main__":
    _share_no_lock()
    with contextlib.redirect_stdout(sys.stderr):  # once, for all that is imported late
        cli.main(sys.argv[1:], standalone_mode=False)
    gc.freeze()  # what was made so far stays shared with the children
    serve()
