"""Runs that are killed, and the proof that it did no harm.

A run is started as a user starts it, as a process of its own. `train_and_kill` ends it with
SIGKILL, which no program can catch or prepare for; the same command goes on from the last
checkpoint; and a twin that nobody disturbed is trained up to a checkpoint past the kill. Then every
file of both checkpoints, weights and optimizer moments, is compared by its SHA-256.
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
from trainer.faults.inject import VARIABLE
from trainer.metrics.metrics import read_events

POLL_S: Final = 0.05
GRACE_S: Final = 120.0

Watch = Callable[[int], None]
"""Called with the last step logged, again and again, while a run goes on."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two checkpoints of the same step, file by file: {name: (SHA-256 here, SHA-256 there)}."""

    step: int
    files: dict[str, tuple[str | None, str | None]]

    @property
    def identical(self) -> bool:
        """Whether both have the same files with the same bytes."""
        return bool(self.files) and all(here == there for here, there in self.files.values())


def train(arguments: Sequence[str], run: Path, watch: Watch | None = None) -> None:
    """Train to the end; RehearsalError with the last line if the run fails."""
    with _training(arguments, run) as process:
        _wait_until(lambda: process.poll() is not None, process, run, watch)
    if process.returncode != 0:
        raise RehearsalError(_failed(run, process.returncode))


def train_and_kill(
    arguments: Sequence[str], run: Path, step: int, watch: Watch | None = None
) -> int:
    """The last step that was logged when, after `step`, the run was ended with SIGKILL."""
    with _training(arguments, run) as process:
        _wait_until(lambda: last_step(run) >= step, process, run, watch)
        logged = last_step(run)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return logged


def train_for(arguments: Sequence[str], run: Path, seconds: float) -> float | None:
    """Seconds to the first new step of a run that is ended with SIGKILL after so many; or None.

    RehearsalError if it had ended by then.
    """
    began, starts, first_step_s = time.monotonic(), len(_starts(run)), None
    with _training(arguments, run) as process:
        while (now_s := time.monotonic() - began) < seconds:
            if process.poll() is not None:
                raise RehearsalError(_failed(run, process.returncode))
            there = _starts(run)
            if first_step_s is None and len(there) > starts and last_step(run) > there[-1]:
                first_step_s = now_s
            time.sleep(POLL_S)
    return first_step_s  # the process was killed as the block ended


def train_hurt(arguments: Sequence[str], run: Path, faults: str, limit_s: float) -> int:
    """The exit code of a run with these faults (trainer/faults/inject.py); -9 after `limit_s`."""
    with _training(arguments, run, faults) as process:
        try:
            return process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return -signal.SIGKILL


def train_until_checkpoint(
    arguments: Sequence[str], run: Path, step: int, watch: Watch | None = None
) -> None:
    """Train until the checkpoint of `step` is there, then tell the run to stop."""
    with _training(arguments, run) as process:
        _wait_until(lambda: record_of(run, step).exists(), process, run, watch)
        process.terminate()
        process.wait(GRACE_S)


def compare_checkpoints(here: Path, there: Path, step: int) -> Comparison:
    """Every file of two runs' checkpoints of `step`, by the digests that the checkpoints vouch
    for."""
    digests = [_digests(run, step) for run in (here, there)]
    names = sorted({*digests[0], *digests[1]})
    files = {name: (digests[0].get(name), digests[1].get(name)) for name in names}
    return Comparison(step=step, files=files)


def record_of(run: Path, step: int) -> Path:
    """Where the checkpoint of `step` is recorded."""
    return run / "checkpoints" / f"step-{step}" / "checkpoint.json"


def last_step(run: Path) -> int:
    """The last step in metrics.jsonl, 0 before the first; a line half written does not count."""
    metrics = run / "metrics.jsonl"
    if not metrics.exists():
        return 0
    lines = metrics.read_bytes().split(b"\n")[:-1]
    return int(json.loads(lines[-1])["step"]) if lines else 0


def _starts(run: Path) -> list[int]:
    """The steps after which a run was started, or started again, so far."""
    return [
        int(event["step"]) for event in read_events(run) if event["event"] in ("start", "resume")
    ]


@contextlib.contextmanager
def _training(
    arguments: Sequence[str], run: Path, faults: str = ""
) -> Iterator[subprocess.Popen[bytes]]:
    """`summer-train` in a process group of its own, its output in <run>.log."""
    log = run.with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "trainer.cli", *arguments, "--out", str(run)]
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
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


def _wait_until(
    condition: Callable[[], bool],
    process: subprocess.Popen[bytes],
    run: Path,
    watch: Watch | None = None,
) -> None:
    while not condition():
        if process.poll() is not None and not condition():
            raise RehearsalError(_failed(run, process.returncode))
        if watch is not None:
            watch(last_step(run))
        time.sleep(POLL_S)


def _failed(run: Path, code: int) -> str:
    lines = run.with_suffix(".log").read_text(errors="replace").strip().splitlines()
    return (
        f"{run}: training ended early with exit code {code}: {lines[-1] if lines else 'no output'}"
    )


def _digests(run: Path, step: int) -> dict[str, str]:
    path = record_of(run, step)
    if not path.exists():
        raise RehearsalError(f"{run} has no checkpoint of step {step}; was it asked to save there?")
    files = json.loads(path.read_text())["files"]
    return {name: entry["sha256"] for name, entry in files.items()}
