"""The faults of a rehearsal, one run each, and the certificate of what became of them.

undisturbed     trained from start to end, for comparison
kill -9         SIGKILL at a random step, started again
SIGTERM         asked to stop at a random step: commits, exits with 75, started again
damaged commit  SIGKILL, then one bit of the newest commit is flipped: falls back, goes on
"""

from __future__ import annotations

import json
import platform
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from shards.files import publish_json
from tools.interruption import (
    RehearsalError,
    compare_commits,
    last_step,
    train,
    train_and_kill,
    train_and_terminate,
)
from trainer.config import load_config
from trainer.runs import commits, newest_commit, step_of

STOPPED_ON_REQUEST: Final = 75  # EX_TEMPFAIL: "try again", which is what a stopped run asks for


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one fault did: the step it hit, the commit the run went on from, and the end."""

    fault: str
    hit_after_step: int
    resumed_from: int
    as_promised: bool
    identical: bool

    @property
    def steps_lost(self) -> int:
        """Steps that had to be computed again."""
        return self.hit_after_step - self.resumed_from


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """The outcomes, and what they hold for."""

    command: str
    last_step: int
    digests: dict[str, str]
    versions: dict[str, str]
    outcomes: tuple[Outcome, ...]

    @property
    def kept(self) -> bool:
        """Whether every fault was met as promised and left no trace."""
        return all(outcome.as_promised and outcome.identical for outcome in self.outcomes)

    def table(self) -> list[str]:
        """One line a fault."""
        lines = [
            "fault             hit after   resumed from   steps lost   as promised   bit-identical"
        ]
        lines += [
            f"{o.fault:<15} {o.hit_after_step:>11} {o.resumed_from:>14} {o.steps_lost:>12}"
            f" {_yes(o.as_promised):>13} {_yes(o.identical):>15}"
            for o in self.outcomes
        ]
        return lines


def rehearse(
    arguments: Sequence[str], out: Path, seed: int, report: Callable[[str], None]
) -> Certificate:
    """The certificate of a rehearsal with these arguments of summer-train, also in `out`."""
    if out.exists() and any(out.iterdir()):
        raise RehearsalError(f"{out} is not empty: name a new folder with --out, or remove it")
    twin = out / "undisturbed"
    report("undisturbed: training")
    train(arguments, twin)
    last = step_of(newest_commit(twin))
    interval = load_config(twin).checkpoint.interval_steps
    if not 0 < 2 * interval < last - 1:
        raise RehearsalError(
            f"checkpoint.interval_steps is {interval} in a run of {last} steps: give one "
            "below half of that (--set checkpoint.interval_steps=): a run must have two commits"
        )
    chooser = random.Random(seed)
    outcomes = []
    for fault in ("SIGKILL", "SIGTERM", "damaged commit"):
        spared = 2 if fault == "damaged commit" else 1  # commits that must be there by then
        step = chooser.randrange(spared * interval + 1, last)
        report(f"{fault}: training, hit after step {step}")
        outcomes.append(_disturb(fault, arguments, out / fault.replace(" ", "-"), step, twin, last))
    same = compare_commits(twin, twin, last)
    certificate = Certificate(
        command=f"summer-train {' '.join(arguments)}",
        last_step=last,
        digests={name: here or "" for name, (here, _) in same.files.items()},
        versions={"python": platform.python_version(), "torch": version("torch")},
        outcomes=tuple(outcomes),
    )
    publish_json(out / "certificate.json", {**asdict(certificate), "kept": certificate.kept})
    return certificate


def _disturb(
    fault: str, arguments: Sequence[str], run: Path, step: int, twin: Path, last: int
) -> Outcome:
    """Train a run with this fault after `step`, go on to the end, and compare it with its twin."""
    as_promised = True
    if fault == "SIGTERM":
        hit, code = train_and_terminate(arguments, run, step)
        as_promised = code == STOPPED_ON_REQUEST
    else:
        hit = train_and_kill(arguments, run, step)
    if fault == "damaged commit":
        _flip_a_bit(newest_commit(run))
    train(arguments, run)
    resumed = [event for event in _events(run) if event["event"] == "resume"]
    if fault == "damaged commit":
        as_promised = len(commits(run)) >= 1 and "damaged" in run.with_suffix(".log").read_text()
    return Outcome(
        fault=fault,
        hit_after_step=hit,
        resumed_from=int(resumed[-1]["step"]) if resumed else 0,
        as_promised=as_promised and last_step(run) == last,
        identical=compare_commits(run, twin, last).identical,
    )


def _flip_a_bit(commit: Path) -> None:
    """Flip one bit in the middle of a commit's largest file."""
    path = max(commit.glob("*.safetensors"), key=lambda file: file.stat().st_size)
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))


def _events(run: Path) -> list[dict[str, Any]]:
    path = run / "events.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _yes(value: bool) -> str:
    return "yes" if value else "NO"
