"""The planned run in small, hurt in every way that trainer/faults/inject.py knows.

undisturbed   trained, told to stop in the middle, gone on with another mixture, to the end
hurt          the same, with a fault in each stretch between two checkpoints; every launch goes on
              from what the one before left
guarded       gradients that are NaN, too large, and bad for so long that the run rolls back
replay        the guarded run from the beginning, with nothing but its events beside it

A fault left no trace if the next checkpoint that both runs have is the same, byte for byte.
"""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import torch

from shards.reader import find_sources
from tools.errors import RehearsalError
from tools.rehearsal.certificate import Certificate, Row, publish
from tools.rehearsal.runs import Comparison, compare_checkpoints, last_step, record_of, train_hurt
from trainer.checkpoint.runs import EVENTS, newest_checkpoint
from trainer.checkpoint.storage import read_record
from trainer.metrics.metrics import RunEvent, read_events

STOPPED_ON_REQUEST: Final = 75  # EX_TEMPFAIL: "try again", which is what a stopped run asks for
INTERVAL: Final = 6  # steps between checkpoints, and between faults
STRETCHES: Final = 9
TIMEOUT_S: Final = 15.0  # until a stopped rank is given up
_LIMIT_S: Final = 600.0
_MOST_BYTES: Final = 2 << 30
_PATIENCE: Final = 2
_SOURCES: Final = ("python-code", "python-docs")

Events = list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """What is rehearsed, and where."""

    shards: Path | None
    preset: str
    sets: tuple[str, ...]
    out: Path
    seed: int

    @cached_property
    def steps(self) -> list[int]:
        """For each stretch between checkpoints, the step that is hit."""
        chooser = random.Random(self.seed)
        return [n * INTERVAL + chooser.randrange(2, INTERVAL) for n in range(STRETCHES)]

    def arguments(self, *, second: bool = False) -> list[str]:
        """What summer-train is told; in the second half with other weights of the sources."""
        names = list(find_sources(self.out / "shards"))
        weights = {name: 1 if second else 2 + place for place, name in enumerate(reversed(names))}
        settings: dict[str, object] = {
            "max_steps": STRETCHES * INTERVAL,
            "global_batch_tokens": 8 * self.seq_len,
            "compile": "false",
            "log_interval": 1,
            "validation.interval": 0,
            "loader.num_workers": 1,
            "checkpoint.interval_steps": INTERVAL,
            "checkpoint.keep_every": INTERVAL,
            "guard.hang_timeout_s": TIMEOUT_S,
            "guard.window": 16,
            "guard.patience": _PATIENCE,
            **{f"mixture.{name}": weight for name, weight in weights.items()},
        }
        if torch.cuda.device_count() < 2:
            settings["device"] = "cpu"
        sets = [*(f"{key}={value}" for key, value in settings.items()), *self.sets]
        ranks = max(2, torch.cuda.device_count())
        start = ["--shards", str(self.out / "shards"), "--preset", self.preset]
        return [*start, "--nproc", str(ranks), *(x for s in sets for x in ("--set", s))]

    @property
    def seq_len(self) -> int:
        """Tokens a row."""
        return next(iter(find_sources(self.out / "shards").values())).facts.seq_len


def rehearse(rehearsal: Rehearsal, report: Callable[[str], None]) -> Certificate:
    """The certificate of a rehearsal, also written into its folder."""
    out, started = rehearsal.out, time.monotonic()
    if out.exists() and any(out.iterdir()):
        raise RehearsalError(f"{out} is not empty: name a new folder with --out, or remove it")
    report("preparing")
    prepare(rehearsal)
    report("undisturbed: training")
    middle = rehearsal.steps[2]
    launch(rehearsal, "undisturbed", f"sigterm:0:{middle}", STOPPED_ON_REQUEST)
    launch(rehearsal, "undisturbed", "", 0, second=True)
    rows = [*hurt(rehearsal, report), *guarded(rehearsal, report)]
    report("scoring both")
    last = compare_checkpoints(out / "hurt", out / "undisturbed", STRETCHES * INTERVAL)
    record = read_record(newest_checkpoint(out / "hurt"))
    certificate = Certificate(
        command=f"summer-train {' '.join(rehearsal.arguments())}",
        steps=last.step,
        seconds=time.monotonic() - started,
        versions=record["versions"],
        data={name: facts["root"] for name, facts in record["data"].items()},
        digests=last.files,
        scores={name: score(rehearsal, name) for name in ("hurt", "undisturbed")},
        rows=tuple(rows),
    )
    publish(certificate, out)
    return certificate


def prepare(rehearsal: Rehearsal) -> None:
    """OUT/shards: a copy of the sources named, or the standard library's text."""
    out = rehearsal.out
    if rehearsal.shards is not None:
        size = sum(path.stat().st_size for path in rehearsal.shards.rglob("*") if path.is_file())
        if size > _MOST_BYTES:
            raise RehearsalError(
                f"{rehearsal.shards} holds {size / 1e9:.1f} GB, and is copied, because a bit of it "
                "is flipped: prepare a smaller one with --max-tokens"
            )
        found = find_sources(rehearsal.shards)
        if len(found) < 2:
            raise RehearsalError(f"{rehearsal.shards}: a mixture that changes needs two sources")
        if not any(manifest.n_val_rows for manifest in found.values()):
            raise RehearsalError(
                f"{rehearsal.shards}: no document is held out, so nothing could be scored: prepare "
                "them again with a larger --val-fraction"
            )
        shutil.copytree(rehearsal.shards, out / "shards")
        return
    out.mkdir(parents=True, exist_ok=True)
    sources = [option for name in _SOURCES for option in ("--source", name)]
    tokenizer = out / "tokenizer.model"
    _prep("tokenizer", "--train", *sources, "--vocab-size", "2048", "--out", str(tokenizer))
    for name in _SOURCES:
        _prep(
            "tokenize", "--source", name, "--out", str(out / "shards"), "--val-fraction", "0.02",
            "--tokenizer", str(tokenizer), "--seq-len", "256", "--max-tokens", "2000000",
        )  # fmt: skip


def launch(
    rehearsal: Rehearsal, name: str, faults: str, expected: int, *, second: bool = False
) -> bool:
    """Whether a launch of a run ended with the exit code that was promised."""
    run = rehearsal.out / name
    code = train_hurt(rehearsal.arguments(second=second), run, faults, _LIMIT_S)
    if code != expected and not faults:
        lines = run.with_suffix(".log").read_text(errors="replace").strip().splitlines()
        raise RehearsalError(f"{run}: exit code {code}: {lines[-1] if lines else 'no output'}")
    return code == expected


def hurt(rehearsal: Rehearsal, report: Callable[[str], None]) -> list[Row]:
    """The faults of processes, disks and data, one after the other in one run."""
    run, steps = rehearsal.out / "hurt", rehearsal.steps
    worker, killed, term, full, stopped, interrupt, rot = steps[:7]
    report("hurt: a worker dies, a rank is killed, one is asked to stop")
    asked = launch(
        rehearsal, "hurt", f"worker:0:{worker},sigkill:1:{killed},sigterm:1:{term}",
        STOPPED_ON_REQUEST,
    )  # fmt: skip
    report("hurt: another mixture, a full disk, a rank stands still, Ctrl-C")
    asked_again = launch(
        rehearsal, "hurt", f"full-disk:0:{full},sigstop:1:{stopped},sigint:0:{interrupt}",
        STOPPED_ON_REQUEST, second=True,
    )  # fmt: skip
    report("hurt: a row rots, is repaired, and the newest checkpoint is damaged")
    refused = launch(rehearsal, "hurt", f"bit-flip:1:{rot}", 1, second=True)
    told = "summer-prep repair" in run.with_suffix(".log").read_text()
    for name in find_sources(rehearsal.out / "shards"):
        _prep("repair", str(rehearsal.out / "shards" / name))
    broken = newest_checkpoint(run)
    _flip_a_bit(broken)
    launch(rehearsal, "hurt", "", 0, second=True)
    events = read_events(run)
    resumes = [int(event["step"]) for event in events if event["event"] == "resume"]
    kinds = {str(event["event"]) for event in events}
    fell_back = [event for event in events if event["event"] == "fallback"]
    lost_by_kill = _lost(run, events, "sigkill", killed)
    lost_by_stop = _lost(run, events, "sigstop", stopped)
    met = {
        "worker dies": (worker, "loader" in kinds, 0),
        "rank killed": (killed, lost_by_kill >= 0, lost_by_kill),
        "SIGTERM": (term, asked, 0),
        "mixture changed": (term, "mixture" in kinds, 0),
        "full disk": (full, RunEvent.CHECKPOINT_FAILED in kinds, 0),
        "rank stopped": (stopped, "hung" in kinds and (run / "stacks").is_dir(), lost_by_stop),
        "SIGINT": (interrupt, asked_again, 0),
        "row rots": (rot, refused and told and "damaged" in kinds, 0),
        "checkpoint damaged": (rot, bool(fell_back), rot - 1 - resumes[-1]),
    }
    return [_row(rehearsal, "hurt", "undisturbed", fault, *facts) for fault, facts in met.items()]


def guarded(rehearsal: Rehearsal, report: Callable[[str], None]) -> list[Row]:
    """The faults of numbers, and the run once more from its events alone."""
    run, replay = rehearsal.out / "guarded", rehearsal.out / "replay"
    nan, spike, first = rehearsal.steps[0], rehearsal.steps[3], rehearsal.steps[5]
    bad = range(first, first + _PATIENCE + 1)
    report("guarded: gradients that are NaN or too large, and too many of them")
    faults = [f"nan:1:{nan}", f"spike:0:{spike}", *(f"nan:0:{step}" for step in bad)]
    launch(rehearsal, "guarded", ",".join(faults), 0)
    report("replay: the same from its events alone")
    replay.mkdir()
    shutil.copy(run / EVENTS, replay / EVENTS)
    launch(rehearsal, "replay", "", 0)
    events = read_events(run)
    refused = {int(event["step"]) for event in events if event["event"] == RunEvent.SKIPPED}
    back = [event for event in events if event["event"] == "rollback"]
    lost = int(back[0]["step"]) - int(back[0]["to_step"]) if back else 0
    met = {
        "gradient NaN": (nan, nan in refused, 0),
        "gradient spike": (spike, spike in refused, 0),
        "bad steps persist": (first, len(back) == 1, lost),
    }
    return [_row(rehearsal, "guarded", "replay", fault, *facts) for fault, facts in met.items()]


def score(rehearsal: Rehearsal, name: str) -> float:
    """Held-out bits per byte of a run's last checkpoint."""
    from tools.evaluation.heldout import evaluate_heldout
    from tools.models.loading import Choice, load

    run = rehearsal.out / name
    return evaluate_heldout(
        load(Choice(run=run, device="cpu")), rehearsal.out / "shards", limit=20
    ).total.model


def _row(
    rehearsal: Rehearsal, run: str, twin: str, fault: str, step: int, detected: bool, lost: int
) -> Row:
    here, there = rehearsal.out / run, rehearsal.out / twin
    compared = _next_common_checkpoint(here, there, step)
    return Row(
        fault=fault,
        step=step,
        detected=detected,
        recovered=compared is not None and last_step(here) == STRETCHES * INTERVAL,
        steps_lost=max(0, lost),
        identical=compared is not None and compared.identical,
    )


def _next_common_checkpoint(here: Path, there: Path, step: int) -> Comparison | None:
    """The first checkpoints from `step` on that both runs have, compared; None if there are
    none."""
    for after in range(step, STRETCHES * INTERVAL + 1):
        if record_of(here, after).exists() and record_of(there, after).exists():
            return compare_checkpoints(here, there, after)
    return None


def _lost(run: Path, events: Events, kind: str, step: int) -> int:
    """Steps made again after a fault that cost a restart; -1 if no restart followed it."""
    struck = (run / "faults" / f"{kind}-1-{step}").stat().st_mtime
    for event in events:
        if event["event"] in ("start", "resume") and event["unix_s"] > struck:
            return step - 1 - int(event["step"])
    return -1


def _flip_a_bit(checkpoint: Path) -> None:
    """Flip one bit in the middle of a checkpoint's largest file."""
    path = max(checkpoint.glob("*.safetensors"), key=lambda file: file.stat().st_size)
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))


def _prep(*arguments: str) -> None:
    """Run summer-prep as a user would."""
    command = [sys.executable, "-m", "pipeline.cli", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RehearsalError(f"summer-prep {arguments[0]}: {done.stderr.strip()}")
