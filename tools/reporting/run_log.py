"""What a run wrote about itself, read back: configuration, measured steps, events.

    runs/NAME/config.json      the resolved configuration
    runs/NAME/metrics.jsonl    one line a logged step
    runs/NAME/events.jsonl     starts, resumes, refusals, rollbacks, changes of mixture

If a step stands there twice the later line counts; a last line that a kill cut short is left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.errors import ReportError
from trainer.checkpoint.runs import CONFIG, METRICS
from trainer.metrics.metrics import read_events, read_lines

Line = Mapping[str, Any]


@dataclass(frozen=True)
class RunLog:
    """A run's own words. `steps` are in order of step, each there once."""

    folder: Path
    config: Line
    steps: tuple[Line, ...]
    events: tuple[Line, ...]

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.resolve().name

    def series(self, field: str) -> tuple[list[int], list[float]]:
        """Steps at which a field was logged, and its values there."""
        logged = [(line["step"], line[field]) for line in self.steps if line.get(field) is not None]
        return [step for step, _ in logged], [float(value) for _, value in logged]


def read_run(folder: Path) -> RunLog:
    """The log of a run; ReportError if the folder holds none."""
    metrics = folder / METRICS
    if not metrics.is_file():
        raise ReportError(
            f"{folder}: no {METRICS} there: name the folder of a run, such as runs/NAME"
        )
    by_step = {line["step"]: line for line in read_lines(metrics) if "step" in line}
    if not by_step:
        raise ReportError(f"{metrics}: no step has been logged yet; let the run make some")
    config = folder / CONFIG
    return RunLog(
        folder,
        json.loads(config.read_text()) if config.is_file() else {},
        tuple(by_step[step] for step in sorted(by_step)),
        tuple(read_events(folder)),
    )
