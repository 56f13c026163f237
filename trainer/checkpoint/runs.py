"""Where a run keeps things, and how to find the newest.

runs/<name>/
  config.json            the resolved configuration, written before the first step
  tokenizer.model        copied from the shards: a run explains itself
  metrics.jsonl          one line for each logged step
  events.jsonl           starts, resumes, commits refused, updates refused, rollbacks
  ranks/, stacks/        signs of life of each rank; what each was doing when one hung
  checkpoints/step-<n>/  weights and moments as safetensors; committed when COMMIT.json is there
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from trainer.errors import ConfigError

CONFIG: Final = "config.json"
METRICS: Final = "metrics.jsonl"
EVENTS: Final = "events.jsonl"
CHECKPOINTS: Final = "checkpoints"
COMMIT: Final = "COMMIT.json"
EVALUATIONS: Final = "evaluations"

_STEP: Final = re.compile(r"step-(\d+)")


def commit_path(run: Path, step: int) -> Path:
    """The folder of the commit after `step` updates."""
    return run / CHECKPOINTS / f"step-{step}"


def step_of(commit: Path) -> int:
    """The updates that a commit holds, from its folder's name; -1 if that is no such name."""
    match = _STEP.fullmatch(commit.name)
    return int(match[1]) if match else -1


def commits(run: Path) -> list[Path]:
    """The committed checkpoints of a run, oldest first."""
    found = [path.parent for path in (run / CHECKPOINTS).glob(f"step-*/{COMMIT}")]
    return sorted((path for path in found if step_of(path) >= 0), key=step_of)


def newest_commit(run: Path) -> Path:
    """The last committed checkpoint of a run; ConfigError if there is none."""
    if found := commits(run):
        return found[-1]
    if not (run / CONFIG).exists():
        raise ConfigError(f"{run}: no {CONFIG} there, so it is no run of summer-train")
    raise ConfigError(f"{run}: nothing is committed yet; let it train on, or name another run")


def runs_by_age(runs: Path = Path("runs")) -> list[Path]:
    """The runs under `runs` that have a commit, the most recently committed first."""
    found = {run.parent: commits(run.parent) for run in runs.glob(f"*/{CONFIG}")}
    dated = {run: (done[-1] / COMMIT).stat().st_mtime_ns for run, done in found.items() if done}
    return sorted(dated, key=lambda run: -dated[run])


def newest_run(runs: Path = Path("runs")) -> Path:
    """The run under `runs` with the most recent commit; ConfigError if there is none."""
    for run in runs_by_age(runs):
        return run
    raise ConfigError(
        f"{runs}: no run with a committed checkpoint; "
        "`summer-train --shards shards/ --preset tiny` makes one"
    )
