"""Loss curves as pictures. Needs matplotlib, which comes with the extra `report`."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from shards.files import publish_bytes
from tools.errors import ReportError
from tools.reporting.run_log import RunLog

_POINTS: Final = 4000
"""Points drawn of one curve; a screen shows no more."""

SMOOTHED_SHARE: Final = 0.02
"""Share of the longest run's steps that the strong curve averages over."""

_MARKED_EVENTS: Final = {"resume", "fallback", "rollback", "refused", "mixture", "anneal"}


def write_loss_curve(runs: Sequence[RunLog], path: Path) -> Path:
    """The PNG file written: training loss by step, one curve a run."""
    publish_bytes(path, loss_curve_png(runs))
    return path


def loss_curve_png(runs: Sequence[RunLog]) -> bytes:
    """A PNG picture of the runs' losses by step: each step faint, their average strong.

    Held-out losses, where a run measured them, are dots.
    """
    figure = _figure()
    axes = figure.add_subplot()
    # one average for all: equal losses must look equal, however long the runs are
    over = SMOOTHED_SHARE * max(len(run.steps) for run in runs)
    for number, run in enumerate(runs):
        steps, losses = run.series("loss")
        stride = max(1, len(steps) // _POINTS)
        colour = f"C{number}"
        axes.plot(steps[::stride], losses[::stride], color=colour, alpha=0.25, linewidth=0.8)
        axes.plot(
            steps[::stride],
            smoothed(losses, over)[::stride],
            color=colour,
            linewidth=1.8,
            label=run.name,
        )
        held_out_steps, held_out = run.series("val_loss")
        if held_out:
            label = f"{run.name}, held out"
            axes.plot(held_out_steps, held_out, "o--", color=colour, markersize=4, label=label)
        for event in run.events:
            if "step" in event and event.get("event") in _MARKED_EVENTS:
                axes.axvline(event["step"], color=colour, linestyle=":", linewidth=0.8)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=144, metadata={"Software": None})
    return picture.getvalue()


def smoothed(values: Sequence[float], over: float) -> list[float]:
    """An exponential average over about `over` values, without the bias of its start."""
    memory = 1 - 1 / max(1.0, over)
    average, weight, result = 0.0, 0.0, []
    for value in values:
        average = memory * average + (1 - memory) * value
        weight = memory * weight + (1 - memory)
        result.append(average / weight)
    return result


def _figure() -> Any:
    """An empty picture that belongs to no window system; ReportError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ReportError(
            "drawing needs matplotlib, which is not installed: pip install 'summerlm[report]'"
        ) from error
    return Figure(figsize=(8, 4.5), layout="constrained")
