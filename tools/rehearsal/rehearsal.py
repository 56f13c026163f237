"""A small run on two ranks with every fault that trainer/faults/inject.py can cause.

uninterrupted  trained, asked to stop in the middle, continued with another mixture, to the end
faulted        the same, with a fault in each interval between two checkpoints; every launch
               continues from what the one before left
guarded        gradients that are NaN, too large, and bad for so long that the run rolls back
replay         the guarded run from the beginning, given nothing but its events

A fault was without consequence if the next checkpoint that both runs have is the same, byte for
byte.
"""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final

import torch

from shards.reader import find_sources
from tools.errors import ToolError
from tools.rehearsal.certificate import (
    FAULTED,
    GUARDED,
    Certificate,
    FaultCase,
    FaultResult,
    publish,
)
from tools.rehearsal.processes import (
    SOURCES,
    compare_checkpoints,
    failure,
    last_step,
    learn_vocabulary,
    prepare_source,
    record_of,
    summer_prep,
    train_suspended,
    train_with_faults,
)
from trainer.checkpoint.runs import EVENTS, METRICS, newest_checkpoint
from trainer.checkpoint.storage import read_record
from trainer.config.config import configure
from trainer.metrics.metrics import RunEvent, read_events

STOPPED_ON_REQUEST: Final = 75  # EX_TEMPFAIL: "try again", which is what a stopped run asks for
INTERVAL: Final = 6  # steps between checkpoints, and between faults
N_INTERVALS: Final = 9
TIMEOUT_S: Final = 15.0  # until a stopped rank is given up
_LIMIT_S: Final = 600.0
_MOST_BYTES: Final = 2 << 30
_PATIENCE: Final = 2
_TORN: Final = b'{"event": "res' + bytes(512)
"""What a loss of power leaves at the end of a log: half a line, and zeros."""
_BEYOND_S: Final = 8.0
"""How much longer than the hang timeout the job is suspended: its watchdogs allow some seconds."""


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
        """For each interval between checkpoints, the step that is hit."""
        chooser = random.Random(self.seed)
        return [n * INTERVAL + chooser.randrange(2, INTERVAL) for n in range(N_INTERVALS)]

    def orders(self, cases: Iterable[FaultCase]) -> str:
        """The value of SUMMER_FAULT that causes these faults."""
        return ",".join(f"{c.order}:{self.steps[c.interval]}" for c in cases if c.order)

    def arguments(self, *, second: bool = False) -> list[str]:
        """Arguments of summer-train; in the second half with other weights of the sources."""
        manifests = find_sources(self.out / "shards")
        weights = {n: 1 if second else 2 + place for place, n in enumerate(reversed(manifests))}
        settings: dict[str, object] = {
            "max_steps": N_INTERVALS * INTERVAL,
            "global_batch_tokens": 8 * next(iter(manifests.values())).facts.seq_len,
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
        start = ["--shards", str(self.out / "shards"), "--preset", self.preset]
        start += ["--nproc", str(max(2, torch.cuda.device_count()))]
        return [*start, *(f"--set={each}" for each in sets)]

    def launch(self, name: str, faults: str, expected: int, *, second: bool = False) -> bool:
        """Whether a launch of a run ended with the exit code that was promised."""
        run = self.out / name
        code = train_with_faults(self.arguments(second=second), run, faults, _LIMIT_S)
        if code != expected and not faults:
            raise failure(run, code)
        return code == expected


def rehearse(rehearsal: Rehearsal, report: Callable[[str], None]) -> Certificate:
    """The certificate of a rehearsal, also written into its folder."""
    out, started = rehearsal.out, time.monotonic()
    check_inputs(rehearsal)
    report("preparing")
    prepare(rehearsal)
    report("uninterrupted: training")
    middle = f"sigterm:0:{rehearsal.steps[2]}"
    rehearsal.launch("uninterrupted", middle, STOPPED_ON_REQUEST)
    rehearsal.launch("uninterrupted", "", 0, second=True)
    results = (*run_faulted(rehearsal, report), *run_guarded(rehearsal, report))
    report("scoring both")
    last = compare_checkpoints(out / "faulted", out / "uninterrupted", N_INTERVALS * INTERVAL)
    record = read_record(newest_checkpoint(out / "faulted"))
    certificate = Certificate(
        command=f"summer-train {' '.join(rehearsal.arguments())}",
        steps=last.step,
        seconds=time.monotonic() - started,
        versions=record["versions"],
        data={name: facts["root"] for name, facts in record["data"].items()},
        bit_exact=record.get("bit_exact"),
        digests=last.files,
        scores={name: score(rehearsal, name) for name in ("faulted", "uninterrupted")},
        rows=results,
    )
    publish(certificate, out)
    return certificate


def check_inputs(rehearsal: Rehearsal) -> None:
    """An error for whatever would end the rehearsal later: folder, settings, or given shards."""
    out, shards = rehearsal.out, rehearsal.shards
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ToolError(f"{out} is not empty: name a new folder with --out, or remove it")
    configure(preset=rehearsal.preset, sets=rehearsal.sets)
    if shards is None:
        return
    size = sum(path.stat().st_size for path in shards.rglob("*") if path.is_file())
    if size > _MOST_BYTES:
        raise ToolError(
            f"{shards} holds {size / 1e9:.1f} GB, and is copied, because a bit of it is flipped:"
            " prepare a smaller one with --max-tokens"
        )
    found = find_sources(shards)
    if len(found) < 2:
        raise ToolError(f"{shards}: a mixture that changes needs two sources")
    if not any(manifest.n_val_rows for manifest in found.values()):
        raise ToolError(
            f"{shards}: no document is held out, so nothing could be scored: prepare the sources"
            " with a larger --val-fraction"
        )


def prepare(rehearsal: Rehearsal) -> None:
    """OUT/shards: a copy of the given sources, or the standard library's text."""
    out, tokenizer = rehearsal.out, rehearsal.out / "tokenizer.model"
    if rehearsal.shards is not None:
        shutil.copytree(rehearsal.shards, out / "shards")
        return
    out.mkdir(parents=True, exist_ok=True)
    learn_vocabulary(tokenizer)
    for name in SOURCES:
        prepare_source(name, tokenizer, out / "shards", "--max-tokens=2000000")


def run_faulted(rehearsal: Rehearsal, report: Callable[[str], None]) -> list[FaultResult]:
    """The faults of processes, disks and data, one after the other in one run."""
    run, orders, launch = rehearsal.out / "faulted", rehearsal.orders, rehearsal.launch
    report("faulted: a worker dies, a rank is killed, one is asked to stop")
    sigterm = launch("faulted", orders(FAULTED[:3]), STOPPED_ON_REQUEST)
    report("faulted: another mixture, a full disk, a rank is stopped, Ctrl-C")
    sigint = launch("faulted", orders(FAULTED[3:7]), STOPPED_ON_REQUEST, second=True)
    report("faulted: a sequence is damaged, repaired, and the newest checkpoint is damaged")
    stopped = launch("faulted", orders(FAULTED[7:9]), 1, second=True)
    advised = "summer-prep repair" in run.with_suffix(".log").read_text()
    for name in find_sources(rehearsal.out / "shards"):
        summer_prep("repair", str(rehearsal.out / "shards" / name))
    _flip_a_bit(newest_checkpoint(run))
    report("faulted: the terminal closes, the logs are torn, the whole job is suspended")
    sighup = launch("faulted", orders(FAULTED[9:]), STOPPED_ON_REQUEST, second=True)
    _tear_logs(run)
    hung = _count(run, RunEvent.HUNG)
    arguments, step = rehearsal.arguments(second=True), rehearsal.steps[FAULTED[-1].interval]
    code = train_suspended(arguments, run, step - 1, TIMEOUT_S + _BEYOND_S, _LIMIT_S)
    also = {
        "terminal closed": sighup,
        "logs torn": not any(_goes_on_in_a_torn_line(run / name) for name in (EVENTS, METRICS)),
        "job suspended": code == 0 and _count(run, RunEvent.HUNG) == hung,
        "SIGTERM": sigterm,
        "SIGINT": sigint,
        "sequence damaged": stopped and advised,
        "rank stopped": (run / "stacks").is_dir(),
    }
    twin = rehearsal.out / "uninterrupted"
    return [_result(rehearsal, case, run, twin, also.get(case.name, True)) for case in FAULTED]


def run_guarded(rehearsal: Rehearsal, report: Callable[[str], None]) -> list[FaultResult]:
    """The faults of numbers, and the run repeated from its events alone."""
    run, replay = rehearsal.out / "guarded", rehearsal.out / "replay"
    report("guarded: gradients that are NaN or too large, and too many of them")
    first = rehearsal.steps[GUARDED[2].interval]
    more = [f"{GUARDED[2].order}:{first + 1 + n}" for n in range(_PATIENCE)]
    rehearsal.launch("guarded", ",".join([rehearsal.orders(GUARDED), *more]), 0)
    report("replay: the same from its events alone")
    replay.mkdir()
    shutil.copy(run / EVENTS, replay / EVENTS)
    rehearsal.launch("replay", "", 0)
    return [_result(rehearsal, case, run, replay, True) for case in GUARDED]


def score(rehearsal: Rehearsal, name: str) -> float:
    """Held-out bits per byte of a run's last checkpoint."""
    from tools.evaluation.heldout import evaluate_heldout
    from tools.evaluation.tasks import TaskOptions
    from tools.models.loading import ModelSpec, load

    run = rehearsal.out / name
    options = TaskOptions(shards=rehearsal.out / "shards", limit=20)
    result = evaluate_heldout(load(ModelSpec(run=run, device="cpu")), options)
    return float(result["total"]["model"])


def _result(
    rehearsal: Rehearsal, case: FaultCase, run: Path, twin: Path, also: bool
) -> FaultResult:
    """What became of a fault. It is detected if its event was written, once or at its step."""
    step, end = rehearsal.steps[case.interval], N_INTERVALS * INTERVAL
    events = read_events(run)
    starts = [event for event in events if event["event"] in ("start", "resume")]
    reports = [event for event in events if event["event"] == case.event]
    if case.event == RunEvent.SKIPPED:
        reports = [event for event in reports if event["step"] == step]
    elif case.event == RunEvent.ROLLBACK:  # a run may have others, of its own
        reports = [event for event in reports if event["step"] == step + _PATIENCE]
    lost, resumed = 0, starts
    if case.order in ("sigkill:1", "sigstop:1"):
        fault = run / "faults" / f"{case.order.replace(':', '-')}-{step}"
        resumed = [event for event in starts if event["unix_s"] > fault.stat().st_mtime]
        lost = step - 1 - (int(resumed[0]["step"]) if resumed else 0)
    elif case.event == "fallback":
        lost = step - 1 - int(starts[-1]["step"])
    elif case.event == RunEvent.ROLLBACK and reports:
        also = len(reports) == 1
        lost = int(reports[0]["step"]) - int(reports[0]["to_step"])
    both = (s for s in range(step, end + 1)
            if record_of(run, s).exists() and record_of(twin, s).exists())  # fmt: skip
    common = next(both, None)
    return FaultResult(
        fault=case.name,
        step=step,
        detected=bool(reports) and bool(resumed) and also,
        recovered=common is not None and last_step(run) == end,
        steps_lost=max(0, lost),
        identical=common is not None and compare_checkpoints(run, twin, common).identical,
    )


def _count(run: Path, kind: str) -> int:
    return sum(event["event"] == kind for event in read_events(run))


def _tear_logs(run: Path) -> None:
    for name in (EVENTS, METRICS):
        with (run / name).open("ab") as log:
            log.write(_TORN)


def _goes_on_in_a_torn_line(log: Path) -> bool:
    _, torn, behind = log.read_bytes().partition(_TORN)
    return bool(torn) and not behind.startswith(b"\n")


def _flip_a_bit(checkpoint: Path) -> None:
    """Flip one bit in the middle of a checkpoint's largest file."""
    path = max(checkpoint.glob("*.safetensors"), key=lambda file: file.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
