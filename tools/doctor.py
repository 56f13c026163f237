"""summer-doctor: is this machine fit for a run? Go or no-go, and how fast it should be.

summer-doctor --preset summer-4b --shards shards/ --out runs/
summer-doctor --preset tiny --nproc 2 --json
"""

from __future__ import annotations

import json
import shutil
import textwrap
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from shards.errors import one_line_failures

if TYPE_CHECKING:
    from tools.diagnosis.findings import Finding

_FOLDER = click.Path(path_type=Path, exists=True, file_okay=False)
_COLOURS = {"ok": "green", "note": "blue", "warn": "yellow", "fail": "red"}
_INDENT = " " * 18


@click.command(epilog="Example: summer-doctor --preset summer-4b --shards shards/")
@click.option("--preset", default="summer-4b", show_default=True, help="The run that is planned.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda", "mps"]), default="auto")
@click.option("--nproc", type=click.IntRange(1), help="Ranks.  [default: one for each device]")
@click.option("--shards", type=_FOLDER, help="Prepared sources: read and timed.")
@click.option("--out", type=_FOLDER, default=Path(), help="Where it would write.  [default: .]")
@click.option("--sources", is_flag=True, help="Name the document behind each piece of advice.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, sources included.")
@one_line_failures()
def main(sources: bool, as_json: bool, **subject: Any) -> None:
    """Look at the machine: devices, kernels, speed, disk, data. Exit code 1 on no-go."""
    from tools.diagnosis.checks import examine, make_subject

    examined = make_subject(**subject)
    findings = []
    for finding in examine(examined):
        findings.append(finding)
        if not as_json:
            click.echo("\n".join(_lines(finding, sources)))
    in_the_way = list(dict.fromkeys(f.topic for f in findings if f.verdict == "fail"))
    rate = examined.measured.get("tokens_per_s")
    if as_json:
        answer = {
            "go": not in_the_way, "preset": subject["preset"], "device": examined.device,
            "ranks": examined.nproc, "expected_tokens_per_s": rate,
            "findings": [asdict(finding) for finding in findings],
        }  # fmt: skip
        click.echo(json.dumps(answer))
    elif in_the_way:
        click.echo(click.style(f"no-go: {', '.join(in_the_way)}", fg="red", bold=True))
    else:
        warned = sum(finding.verdict == "warn" for finding in findings)
        text = f"go: {subject['preset']} can run" + (f", warnings: {warned}" if warned else "")
        text += f"; expect about {rate:,.0f} tokens/s (an estimate)" if rate else ""
        click.echo(click.style(text, fg="green", bold=True))
    raise SystemExit(1 if in_the_way else 0)


def _lines(finding: Finding, sources: bool) -> list[str]:
    """A finding in columns, its mend and its source below it."""
    width = max(60, min(110, shutil.get_terminal_size((100, 24)).columns))
    texts = [finding.detail, finding.mend and f"-> {finding.mend}"]
    texts += [finding.source] if sources else []
    wrap = textwrap.TextWrapper(
        width - len(_INDENT), break_on_hyphens=False, break_long_words=False
    ).wrap  # addresses stay whole
    first, *others = [line for text in texts for line in wrap(text)] or [""]
    verdict = click.style(f"{finding.verdict:<5}", fg=_COLOURS[finding.verdict])
    return [f"{verdict} {finding.topic:<12}{first}", *(_INDENT + line for line in others)]


if __name__ == "__main__":
    main()
