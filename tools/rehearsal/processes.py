"""Training runs as processes of their own: interrupted, killed, and compared byte for byte.

`train_and_kill` ends a run with SIGKILL, which no program can catch or prepare for; the same
command continues from the last checkpoint. A twin is trained without interruption up to a
checkpoint past the kill, and every file of both checkpoints, weights and optimizer moments, is
compared by its SHA-256.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tools.errors import RehearsalError
from trainer.checkpoint.runs import METRICS, RECORD, checkpoint_path
from trainer.faults.inject import VARIABLE
from trainer.metrics.metrics import read_lines

POLL_S: Final = 0.05
GRACE_S: Final = 120.0

Watch = Callable[[int], None]
"""Called with the last step logged, every POLL_S, while a run goes on."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two checkpoints of the same step, file by file: {name: (SHA-256 of one, of the other)}."""

    step: int
    files: dict[str, tuple[str | None, str | None]]

    @property
    def identical(self) -> bool:
        """Whether both have the same files with the same bytes."""
        return bool(self.files) and all(one == other for one, other in self.files.values())


def train(arguments: Sequence[str], run: Path, watch: Watch | None = None) -> None:
    """Train to the end; RehearsalError with the last line if the run fails."""
    with training(arguments, run) as process:
        wait_until(lambda: process.poll() is not None, process, run, watch)
    if process.returncode != 0:
        raise RehearsalError(_failure(run, process.returncode))


def train_and_kill(
    arguments: Sequence[str], run: Path, step: int, watch: Watch | None = None
) -> int:
    """The last step that was logged when, after `step`, the run was ended with SIGKILL."""
    with training(arguments, run) as process:
        wait_until(lambda: last_step(run) >= step, process, run, watch)
        return last_step(run)  # the process is killed as the block ends


def train_with_faults(arguments: Sequence[str], run: Path, faults: str, limit_s: float) -> int:
    """The exit code of a run with these faults (trainer/faults/inject.py); -9 after `limit_s`."""
    with training(arguments, run, faults) as process:
        try:
            return process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return -signal.SIGKILL


def train_until_checkpoint(
    arguments: Sequence[str], run: Path, step: int, watch: Watch | None = None
) -> None:
    """Train until the checkpoint of `step` is there, then ask the run to stop."""
    with training(arguments, run) as process:
        wait_until(lambda: record_of(run, step).exists(), process, run, watch)
        process.terminate()
        process.wait(GRACE_S)


def compare_checkpoints(one: Path, other: Path, step: int) -> Comparison:
    """Every file of two runs' checkpoints of `step`, by the digests that the checkpoints record."""
    first, second = _digests(one, step), _digests(other, step)
    files = {name: (first.get(name), second.get(name)) for name in sorted({*first, *second})}
    return Comparison(step=step, files=files)


def record_of(run: Path, step: int) -> Path:
    """The file that is there when the checkpoint of `step` is complete."""
    return checkpoint_path(run, step) / RECORD


def last_step(run: Path) -> int:
    """The last step in metrics.jsonl, 0 before the first; a line half written does not count."""
    lines = read_lines(run / METRICS)
    return int(lines[-1]["step"]) if lines else 0


@contextlib.contextmanager
def training(
    arguments: Sequence[str], run: Path, faults: str = ""
) -> Iterator[subprocess.Popen[bytes]]:
    """`summer-train` in a process group of its own, its output in <run>.log; killed at the end."""
    log = run.with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "trainer.cli", *arguments, "--out", str(run)],
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, VARIABLE: faults},
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def wait_until(
    condition: Callable[[], bool],
    process: subprocess.Popen[bytes],
    run: Path,
    watch: Watch | None = None,
) -> None:
    """Wait for a condition; RehearsalError if the run ends before it is met."""
    while not condition():
        if process.poll() is not None and not condition():
            raise RehearsalError(_failure(run, process.returncode))
        if watch is not None:
            watch(last_step(run))
        time.sleep(POLL_S)


def _failure(run: Path, code: int) -> str:
    lines = run.with_suffix(".log").read_text(errors="replace").strip().splitlines()
    last = lines[-1] if lines else "no output"
    return f"{run}: training ended early with exit code {code}: {last}"


def _digests(run: Path, step: int) -> dict[str, str]:
    path = record_of(run, step)
    if not path.exists():
        raise RehearsalError(f"{run} has no checkpoint of step {step}; was it asked to save there?")
    files = json.loads(path.read_text())["files"]
    return {name: entry["sha256"] for name, entry in files.items()}
