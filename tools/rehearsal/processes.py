"""Training runs as processes of their own: interrupted, killed, and compared byte for byte.

No program can catch SIGKILL or prepare for it; the same command continues from the last checkpoint.
A twin is trained without interruption up to a checkpoint past the kill, and every file of both
checkpoints, weights and optimizer moments, is compared by its SHA-256.
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
from typing import Any, Final

from tools.errors import ToolError
from trainer.checkpoint.runs import RECORD, checkpoint_path
from trainer.faults.inject import VARIABLE
from trainer.metrics.metrics import read_metrics

POLL_S: Final = 0.05
SOURCES: Final = ("python-code", "python-docs")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two checkpoints of the same step, file by file: {name: (SHA-256 of one, of the other)}."""

    step: int
    files: dict[str, tuple[str | None, str | None]]

    @property
    def identical(self) -> bool:
        """Whether both have the same files with the same bytes."""
        return bool(self.files) and all(one == other for one, other in self.files.values())


def learn_vocabulary(tokenizer: Path, **how: Any) -> None:
    """Make the model of a vocabulary, from the text that every Python carries."""
    sources = [f"--source={name}" for name in SOURCES]
    summer_prep("tokenizer", "--train", *sources, "--vocab-size=2048", f"--out={tokenizer}", **how)


def prepare_source(name: str, tokenizer: Path, shards: Path, *more: str, **how: Any) -> None:
    """Make SHARDS/<name> of one of the SOURCES."""
    shape = ("--seq-len=256", "--val-fraction=0.02", f"--tokenizer={tokenizer}")
    summer_prep("tokenize", f"--source={name}", f"--out={shards}", *shape, *more, **how)


def summer_prep(*arguments: str, shown: bool = False) -> None:
    """Run summer-prep as a user would, its output `shown`; ToolError if it fails."""
    command = [sys.executable, "-m", "pipeline.cli", *arguments]
    done = subprocess.run(command, capture_output=not shown, text=True, check=False)
    if done.returncode:
        raise ToolError(f"summer-prep {arguments[0]}: {(done.stderr or 'failed').strip()}")


def train(
    arguments: Sequence[str],
    run: Path,
    watch: Callable[[int], None] | None = None,
    until: Callable[[], bool] | None = None,
) -> None:
    """Train to the end; or until a condition is met, which ends the run with SIGKILL.

    `watch` is called with the last step logged, every POLL_S. ToolError with the run's last
    line if it fails, or ends before the condition is met.
    """
    with training_process(arguments, run) as process:
        while until is None or not until():
            code = process.poll()
            if code is not None and (code or (until is not None and not until())):
                raise failure(run, code)
            if code is not None:
                return
            if watch is not None:
                watch(last_step(run))
            time.sleep(POLL_S)


def train_with_faults(arguments: Sequence[str], run: Path, faults: str, limit_s: float) -> int:
    """The exit code of a run with these faults (trainer/faults/inject.py); -9 after `limit_s`."""
    with training_process(arguments, run, faults) as process:
        try:
            return process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return -signal.SIGKILL


def train_suspended(
    arguments: Sequence[str], run: Path, step: int, seconds: float, limit_s: float
) -> int:
    """The exit code of a run whose processes are all stopped for a while after a step."""
    with training_process(arguments, run) as process:
        while process.poll() is None and last_step(run) < step:
            time.sleep(POLL_S)
        job = family(process.pid)
        for number in (signal.SIGSTOP, signal.SIGCONT):
            for pid in job:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            time.sleep(seconds if number == signal.SIGSTOP else 0)
        try:
            return process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return -signal.SIGKILL


def family(pid: int) -> list[int]:
    """A process and its descendants (Linux)."""
    found = [pid]
    for one in found:
        for children in Path("/proc").glob(f"{one}/task/*/children"):
            found += map(int, children.read_text().split())
    return found


@contextlib.contextmanager
def training_process(
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


def failure(run: Path, code: int) -> ToolError:
    """The error that a run's exit code is, with the last line of its output."""
    lines = run.with_suffix(".log").read_text(errors="replace").strip().splitlines()
    last = lines[-1] if lines else "no output"
    return ToolError(f"{run}: training ended early with exit code {code}: {last}")


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
    lines = read_metrics(run)
    return int(lines[-1]["step"]) if lines else 0


def _digests(run: Path, step: int) -> dict[str, str]:
    path = record_of(run, step)
    if not path.exists():
        raise ToolError(f"{run} has no checkpoint of step {step}; was it asked to save there?")
    files = json.loads(path.read_text())["files"]
    return {name: entry["sha256"] for name, entry in files.items()}
