"""Runs -> one HTML page of figures, charts, events and settings; or one chart as an SVG file.

A new column of the first table is one line of COLUMNS, a new chart one line of CHARTS. Neither file
refers to another one. The templates are report.html and chart.svg, next to this file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from pathlib import Path
from statistics import median
from typing import Any, Final

from jinja2 import Environment, FileSystemLoader

from shards.files import publish_bytes
from tools.errors import ToolError
from trainer.checkpoint.runs import CONFIG, METRICS
from trainer.metrics.metrics import RunEvent, read_events, read_metrics

COLOURS: Final = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b")
SMOOTHED_SHARE: Final = 0.02
"""Share of the longest run's steps that the strong curve averages over."""
_MARKED: Final = {
    RunEvent.RESUME, RunEvent.FALLBACK, RunEvent.ROLLBACK, RunEvent.SKIPPED, RunEvent.MIXTURE,
    RunEvent.ANNEAL,
}  # fmt: skip
_POINTS: Final = 2000  # about as many are drawn of one curve; a screen shows no more
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 790, 30, 305  # of the plot, in units of chart.svg's viewBox

Points = list[tuple[int, float]]


@dataclass(frozen=True)
class RunLog:
    """What a run wrote about itself. `steps` are in order; of a step logged twice, the later."""

    name: str
    config: dict[str, Any]
    steps: list[dict[str, Any]]
    events: list[dict[str, Any]]

    @classmethod
    def read(cls, folder: Path) -> RunLog:
        """The log of a run; ToolError if the folder holds none."""
        by_step = {line["step"]: line for line in read_metrics(folder)}
        if not by_step:
            why = "no step has been logged yet" if (folder / METRICS).exists() else f"no {METRICS}"
            raise ToolError(f"{folder}: {why}: name the folder of a run, such as runs/NAME")
        try:
            config = json.loads((folder / CONFIG).read_text()) if (folder / CONFIG).exists() else {}
        except ValueError as error:
            raise ToolError(
                f"{folder / CONFIG} is damaged ({error}): restore or remove it"
            ) from error
        steps = [by_step[step] for step in sorted(by_step)]
        return cls(folder.resolve().name, config, steps, read_events(folder))

    def series(self, field: str) -> Points:
        """(step, value) of each step that logged the field with a finite value."""
        logged = [(line["step"], line.get(field)) for line in self.steps]
        return [
            (step, value)
            for step, value in logged
            if isinstance(value, (int, float)) and math.isfinite(value)
        ]

    @property
    def spent(self) -> dict[str, float]:
        """Seconds by part, up to the last step; empty if they were not logged."""
        return dict(self.steps[-1].get("spent_s", {}))


def smoothed(points: Points, over: float) -> Points:
    """An exponential average over about `over` values, without the bias of its start."""
    keep, average, weight, result = 1 - 1 / max(1.0, over), 0.0, 0.0, []
    for step, value in points:
        average, weight = keep * average + (1 - keep) * value, keep * weight + (1 - keep)
        result.append((step, average / weight))
    return result


def _last_average(run: RunLog) -> str:
    points = smoothed(run.series("loss"), SMOOTHED_SHARE * len(run.steps))
    return f"{points[-1][1]:.3f}" if points else "–"


def _cell(field: str, choose: Callable[[list[float]], float], form: str) -> Callable[[RunLog], str]:
    def cell(run: RunLog) -> str:
        values = [value for _, value in run.series(field)]
        return format(choose(values), form) if values else "–"

    return cell


COLUMNS: Final[tuple[tuple[str, Callable[[RunLog], str]], ...]] = (
    ("run", lambda run: run.name),
    ("steps", _cell("step", itemgetter(-1), ",.0f")),
    ("tokens", _cell("tokens", itemgetter(-1), ",.0f")),
    ("first loss", _cell("loss", itemgetter(0), ".3f")),
    ("last loss (averaged)", _last_average),
    ("held out", _cell("val_loss", itemgetter(-1), ".3f")),
    ("bits/byte", _cell("val_bits_per_byte", itemgetter(-1), ".4f")),
    ("tokens/s", _cell("tokens_per_s", median, ",.0f")),
    ("time, s", _cell("time_s", max, ",.0f")),
)


@dataclass(frozen=True)
class Chart:
    """A field by step, each value faint and their average strong; another field dashed."""

    title: str
    field: str
    dashed: str = ""


LOSS: Final = Chart("loss (nats per token)", "loss", dashed="val_loss")
CHARTS: Final = (
    LOSS,
    Chart("tokens a second", "tokens_per_s"),
    Chart("gradient norm", "grad_norm"),
)


def draw(chart: Chart, runs: Sequence[RunLog]) -> dict[str, Any] | None:
    """What chart.svg is filled with; None if no run logged the field."""
    # one average for all: equal curves must look equal, however long the runs are
    over = SMOOTHED_SHARE * max(len(run.steps) for run in runs)
    lines: list[tuple[Points, dict[str, Any]]] = []
    for number, run in enumerate(runs):
        raw, look = run.series(chart.field), {"colour": COLOURS[number % len(COLOURS)]}
        lines.append((raw, {**look, "width": 0.8, "opacity": 0.3, "label": ""}))
        lines.append((smoothed(raw, over), {**look, "width": 1.8, "opacity": 1, "label": run.name}))
        dashed = {**look, "width": 1.5, "opacity": 1, "dash": "6 3"}
        lines.append((run.series(chart.dashed), {**dashed, "label": f"{run.name}, held out"}))
    values = [value for points, _ in lines for _, value in points]
    if not values:
        return None
    low, high, last = min(values), max(values), max(run.steps[-1]["step"] for run in runs)
    x = partial(_scaled, of=(0, last), to=(_LEFT, _RIGHT))
    y = partial(_scaled, of=(low, high), to=(_BOTTOM, _TOP))
    quarters = [n / 4 for n in range(5)]
    return {
        "title": chart.title,
        "x_ticks": [(x(last * q), f"{last * q:,.0f}") for q in quarters],
        "y_ticks": [(y(v), _short(v)) for v in (low + (high - low) * q for q in quarters)],
        "marks": [
            (x(event["step"]), COLOURS[number % len(COLOURS)], event["event"])
            for number, run in enumerate(runs)
            for event in run.events
            if event.get("event") in _MARKED and "step" in event
        ],
        "lines": [
            {
                **look,
                "points": " ".join(f"{x(step)},{y(value)}" for step, value in points[::stride]),
            }
            for points, look in lines
            if points and (stride := len(points) // _POINTS + 1)
        ],
    }


def _scaled(value: float, of: tuple[float, float], to: tuple[float, float]) -> float:
    """The value's place in the picture, to a tenth of a unit."""
    share = (value - of[0]) / ((of[1] - of[0]) or 1)
    return round(to[0] + (to[1] - to[0]) * share, 1)


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _filled(template: str, **values: Any) -> bytes:
    templates = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
    dumps = partial(json.dumps, ensure_ascii=False)
    return templates.get_template(template).render(values, dumps=dumps).encode()


def write_loss_chart(folders: Sequence[Path], path: Path) -> Path:
    """The SVG file written: training loss by step, one curve a run, held-out losses dashed."""
    publish_bytes(path, _filled("chart.svg", chart=draw(LOSS, [RunLog.read(f) for f in folders])))
    return path


def write_report(folders: Sequence[Path], path: Path) -> Path:
    """The HTML file written: every run's figures, charts, events and configuration."""
    runs = [RunLog.read(folder) for folder in folders]
    charts = [drawn for chart in CHARTS if (drawn := draw(chart, runs))]
    parts = list(dict.fromkeys(part for run in runs for part in run.spent))
    page = _filled("report.html", runs=runs, columns=COLUMNS, charts=charts, parts=parts)
    publish_bytes(path, page)
    return path
