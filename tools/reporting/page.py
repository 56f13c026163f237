"""Runs -> one HTML page that needs nothing beside itself: figures, curves, events, settings."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Final

from shards.files import publish_bytes
from tools.reporting.figures import SMOOTHED_SHARE, loss_curve_png, smoothed
from tools.reporting.run_log import RunLog

_STYLE: Final = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .25rem .8rem; border-bottom: 1px solid #ccc; text-align: right; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; }
pre { background: #f5f5f2; padding: .8rem; overflow-x: auto; font-size: 13px; }
"""


def write_report(runs: Sequence[RunLog], path: Path) -> Path:
    """The HTML file written, published whole."""
    publish_bytes(path, report_page(runs).encode())
    return path


def report_page(runs: Sequence[RunLog]) -> str:
    """A page with every run's figures in one table and their loss curves in one picture."""
    picture = base64.b64encode(loss_curve_png(runs)).decode()
    title = html.escape(", ".join(run.name for run in runs))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style></head>
<body><h1>{title}</h1>
{_table(("run", *_FIGURES), ([run.name, *_figures(run)] for run in runs))}
<p><img alt="training loss by step" src="data:image/png;base64,{picture}"></p>
<h2>Where the time went</h2>
{_time_table(runs)}
{"".join(_details(run) for run in runs)}
</body></html>
"""


_FIGURES: Final = (
    "steps",
    "tokens",
    "first loss",
    "last loss (averaged)",
    "held out",
    "bits/byte",
    "tokens/s",
    "time",
)


def _figures(run: RunLog) -> list[str]:
    """One run's row of the table; what was not logged is a dash."""
    steps, losses = run.series("loss")
    tokens, held_out, bits, rates, times = (
        run.series(name)[1]
        for name in ("tokens", "val_loss", "val_bits_per_byte", "tokens_per_s", "time_s")
    )
    return [
        f"{steps[-1]:,}" if steps else "–",
        f"{tokens[-1]:,.0f}" if tokens else "–",
        f"{losses[0]:.3f}" if losses else "–",
        f"{smoothed(losses, SMOOTHED_SHARE * len(losses))[-1]:.3f}" if losses else "–",
        f"{held_out[-1]:.3f}" if held_out else "–",
        f"{bits[-1]:.4f}" if bits else "–",
        f"{median(rates):,.0f}" if rates else "–",
        f"{max(times):,.0f} s" if times else "–",
    ]


def _time_table(runs: Sequence[RunLog]) -> str:
    """Each run's seconds by part, and their share; a part without any is a dash."""
    spent = [run.steps[-1].get("spent_s", {}) for run in runs]
    names = list(dict.fromkeys(part for seconds in spent for part in seconds))
    rows = []
    for run, seconds in zip(runs, spent, strict=True):
        whole = sum(seconds.values())
        cells = [f"{s:,.0f} s ({s / whole:.1%})" if (s := seconds.get(part)) else "–"
                 for part in names]  # fmt: skip
        rows.append([run.name, f"{whole:,.0f} s" if seconds else "–", *cells])
    return _table(("run", "in all", *names), rows)


def _details(run: RunLog) -> str:
    """A run's events and its resolved configuration, folded away."""
    events = "\n".join(json.dumps(event, ensure_ascii=False) for event in run.events) or "none"
    config = json.dumps(run.config, indent=1, ensure_ascii=False)
    return (
        f"<h2>{html.escape(run.name)}</h2>"
        f"<details><summary>{len(run.events)} events</summary>"
        f"<pre>{html.escape(events)}</pre></details>"
        f"<details><summary>configuration</summary><pre>{html.escape(config)}</pre></details>\n"
    )


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """An HTML table of plain texts."""
    heads = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    lines = ("".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows)
    return f"<table><tr>{heads}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"
