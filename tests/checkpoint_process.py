"""A process that has imported the trainer and forks it as often as asked, to be killed.

    python tests/checkpoint_process.py    a JSON request a line on stdin, a JSON answer a line

    {"set": [KEY=VALUE...], "shards": F, "run": F, "stop_at": STEP, "point": N, "watch": "/step-6"}
        -> [exit status, events seen]
    and "ranks": N, "dies": RANK, "port": PORT
        -> the same of that rank; the others are ended when it dies, as torchrun does

What a run does under paths that hold the text `watch` are its points, two for each fsync (before
and after) and one before each file opened for writing, renamed, removed or made: it dies by SIGKILL
when it comes to number N. It stops after `stop_at` as if it had been asked to.
"""

import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import safetensors.torch  # noqa: F401  these two are imported late; here it is done once for all runs
import torch
import torch._dynamo

from trainer.config.config import configure
from trainer.config.resolve import make_plan
from trainer.session.state import State
from trainer.train import train
from trainer_samples import become

_EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir")


class Points:
    """Counts what a process does to the watched paths, and ends it at the point it was told."""

    def __init__(self, watch: list[str], stop: int) -> None:
        self._watch, self._stop, self.seen = watch, stop, 0
        self._lock = threading.RLock()
        self._fsync = os.fsync
        os.fsync = self._watched_fsync  # type: ignore[assignment]  # no audit event tells of it
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if event in _EVENTS and isinstance(args[0], (str, os.PathLike)):
            if event == "open" and not args[2] & (os.O_WRONLY | os.O_RDWR):
                return
            self._pass_by(_whole(os.fspath(args[0]), args[-1]))

    def _watched_fsync(self, handle: int) -> None:
        path = os.readlink(f"/proc/self/fd/{handle}")
        self._pass_by(path)
        self._fsync(handle)
        self._pass_by(path)

    def _pass_by(self, path: str) -> None:
        if any(text in path for text in self._watch):
            with self._lock:
                if self.seen == self._stop:
                    os.kill(os.getpid(), signal.SIGKILL)
                self.seen += 1


def _whole(path: str, folder: Any) -> str:
    """The path, also where it is named relative to the handle of a folder (rmtree)."""
    if isinstance(folder, int) and folder > 0 and not path.startswith("/"):
        return f"{os.readlink(f'/proc/self/fd/{folder}')}/{path}"
    return path


def serve() -> None:
    for line in sys.stdin:
        request = {"ranks": 1, "dies": 0, "port": 0, **json.loads(line)}
        ours, theirs = os.pipe()
        ranks: list[int] = []
        for rank in range(request["ranks"]):
            if not (pid := os.fork()):
                _run(request, rank, theirs)
            ranks.append(pid)
        os.close(theirs)
        _, status = os.waitpid(ranks.pop(request["dies"]), 0)
        for other in ranks:
            if status:
                os.kill(other, signal.SIGKILL)
            _, ended = os.waitpid(other, 0)
            status = status or ended
        with open(ours, "rb") as pipe:
            seen = pipe.read()
        print(json.dumps([os.waitstatus_to_exitcode(status), int(seen or 0)]), flush=True)


def _run(request: Any, rank: int, pipe: int) -> None:
    code, dies = 1, rank == request["dies"]
    try:
        torch.set_num_threads(1)
        if request["ranks"] > 1:
            become(rank, request["ranks"], request["port"])
        plan = make_plan(
            configure(preset="tiny", sets=request["set"], shards=request["shards"]),
            request["ranks"],
        )
        advance = State.advance

        def stop_then(self: State, n_rows: int, seconds: float) -> None:
            advance(self, n_rows, seconds)
            if self.step + 1 == request["stop_at"]:  # read a step later
                os.kill(os.getpid(), signal.SIGTERM)

        State.advance = stop_then  # type: ignore[method-assign]
        points = Points(request["watch"], request["point"] if dies else -1)
        train(plan, Path(request["run"]))
        if dies:
            os.write(pipe, str(points.seen).encode())
        code = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve()
