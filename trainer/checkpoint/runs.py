"""Where a run keeps things, and how to find the newest.

runs/<name>/
  config.json            the resolved configuration, written before the first step
  tokenizer.model        copied from the shards: a run explains itself
  metrics.jsonl          one line for each logged step
  events.jsonl           starts, resumes, checkpoints, skipped updates, rollbacks
  ranks/, stacks/        signs of life of each rank; what each was doing when one hung
  checkpoints/step-<n>/  weights and moments as safetensors; complete when checkpoint.json is there
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
RECORD: Final = "checkpoint.json"
FORMER_RECORD: Final = "COMMIT.json"  # its name until version 0.1
EVALUATIONS: Final = "evaluations"


def checkpoint_path(run: Path, step: int) -> Path:
    """The folder of the checkpoint after `step` updates."""
    return run / CHECKPOINTS / f"step-{step}"


def record_path(checkpoint: Path) -> Path:
    """The file that makes a folder a checkpoint, under the name that it has or would get."""
    former = checkpoint / FORMER_RECORD
    return former if former.exists() else checkpoint / RECORD


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder holds a complete checkpoint: its record is there."""
    return record_path(folder).is_file()


def step_of(checkpoint: Path) -> int:
    """The updates that a checkpoint holds, from its folder's name; -1 if that is no such name."""
    match = re.fullmatch(r"step-(\d+)", checkpoint.name)
    return int(match[1]) if match else -1


def checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = (path for path in (run / CHECKPOINTS).glob("step-*") if step_of(path) >= 0)
    return sorted(filter(is_checkpoint, found), key=step_of)


def newest_checkpoint(run: Path) -> Path:
    """The last checkpoint of a run; ConfigError if there is none."""
    if found := checkpoints(run):
        return found[-1]
    if not (run / CONFIG).exists():
        raise ConfigError(f"{run}: no {CONFIG} there, so it is no run of summer-train")
    raise ConfigError(f"{run}: nothing is saved yet; let it train on, or name another run")


def runs_by_age(runs: Path = Path("runs")) -> list[Path]:
    """The runs under `runs` that have a checkpoint, the most recently saved first."""
    found = {run.parent: checkpoints(run.parent) for run in runs.glob(f"*/{CONFIG}")}
    dated = {run: record_path(done[-1]).stat().st_mtime_ns for run, done in found.items() if done}
    return sorted(dated, key=lambda run: -dated[run])


def newest_run(runs: Path = Path("runs")) -> Path:
    """The run under `runs` with the most recent checkpoint; ConfigError if there is none."""
    if found := runs_by_age(runs):
        return found[0]
    raise ConfigError(
        f"{runs}: no run with a checkpoint; `summer-train --shards shards/ --preset tiny` makes one"
    )
