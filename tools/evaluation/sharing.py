"""One command on several processes of this machine, which share its work.

Each is told its rank as torchrun would (whose own options are in the way of ours: it takes `--run`
for the beginning of `--run-path`).
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import IO

from tools.errors import EvaluationError

_POLL_S = 0.05
_GRACE_S = 5.0


def run_shared(module: str, arguments: Sequence[str], n_processes: int) -> int:
    """The exit code of a module run by several processes; the first of them speaks.

    EvaluationError, with its last line, if another than the first fails first; all are ended.
    """
    with tempfile.TemporaryFile() as said:
        processes: list[subprocess.Popen[bytes]] = []
        environment = {
            **os.environ,
            "WORLD_SIZE": str(n_processes),
            "LOCAL_WORLD_SIZE": str(n_processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(_free_port()),
        }
        try:
            for rank in range(n_processes):
                ranked = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                silent = {"stdout": subprocess.DEVNULL, "stderr": said} if rank else {}
                command = [sys.executable, "-m", module, *arguments]
                processes.append(subprocess.Popen(command, env=ranked, **silent))  # type: ignore[call-overload]
            return _wait(processes, said)
        finally:
            for process in processes:
                process.terminate()
            for process in processes:
                process.wait()


def _wait(processes: Sequence[subprocess.Popen[bytes]], said: IO[bytes]) -> int:
    while True:
        codes = [process.poll() for process in processes]
        if all(code == 0 for code in codes):
            return 0
        if failed := [rank for rank, code in enumerate(codes) if code]:
            break
        time.sleep(_POLL_S)
    try:  # what is wrong for one is mostly wrong for all, and the first says it
        if code := processes[0].wait(_GRACE_S):
            return code
    except subprocess.TimeoutExpired:
        pass
    said.seek(0)
    last = said.read().decode(errors="replace").strip().rpartition("\n")[2]
    raise EvaluationError(f"process {failed[0]} failed: {last.removeprefix('error: ')}")


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])
