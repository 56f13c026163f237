"""summer-doctor: is this machine ready for a run, and how fast should the run be?

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

from tools.command import command, device_option

if TYPE_CHECKING:
    from tools.diagnosis.machine import CheckResult

_FOLDER = click.Path(path_type=Path, exists=True, file_okay=False)
_COLOURS = {"ok": "green", "note": "blue", "warn": "yellow", "fail": "red"}
_INDENT = " " * 18


@command("summer-doctor --preset summer-4b --shards shards/")
@click.option("--preset", default="summer-4b", show_default=True, help="The run that is planned.")
@device_option
@click.option("--nproc", type=click.IntRange(1), help="Ranks.  [default: one for each device]")
@click.option("--shards", type=_FOLDER, help="Prepared sources: read and timed.")
@click.option("--out", type=_FOLDER, default=Path(), help="Where it would write.  [default: .]")
@click.option("--set", "sets", multiple=True, metavar="KEY=VALUE", help="As for summer-train.")
@click.option("--probe", is_flag=True, help="Train 200 steps, and resume: the price of the rest.")
@click.option("--sources", is_flag=True, help="Name the document behind each piece of advice.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, sources included.")
def main(sources: bool, as_json: bool, **options: Any) -> None:
    """Check the machine: devices, kernels, speed, disk, data. Exit code 1 if it is not ready."""
    from tools.diagnosis.checks import make_context, run_checks

    context = make_context(**options)
    results = []
    for result in run_checks(context):
        results.append(result)
        if not as_json:
            click.echo("\n".join(_lines(result, sources)))
    failed = list(dict.fromkeys(result.topic for result in results if result.verdict == "fail"))
    rate = context.measured.get("tokens_per_s")
    if as_json:
        facts = {
            "go": not failed, "preset": options["preset"], "device": context.device,
            "ranks": context.nproc, "expected_tokens_per_s": rate,
            "findings": [{**asdict(result), "mend": result.fix} for result in results],
        }  # fmt: skip
        click.echo(json.dumps(facts))
    elif failed:
        click.echo(click.style(f"not ready: {', '.join(failed)}", fg="red", bold=True))
    else:
        warned = sum(result.verdict == "warn" for result in results)
        text = f"ready: {options['preset']} can run" + (f", warnings: {warned}" if warned else "")
        text += f"; {rate:,.0f} tokens/s measured" if rate else ""
        click.echo(click.style(text, fg="green", bold=True))
    raise SystemExit(1 if failed else 0)


def _lines(result: CheckResult, sources: bool) -> list[str]:
    """A result in columns, its fix and its source below it."""
    width = max(60, min(110, shutil.get_terminal_size((100, 24)).columns))
    texts = [result.detail, result.fix and f"-> {result.fix}"]
    texts += [result.source] if sources else []
    wrap = textwrap.TextWrapper(
        width - len(_INDENT), break_on_hyphens=False, break_long_words=False
    ).wrap  # addresses are not cut
    first, *others = [line for text in texts for line in wrap(text)] or [""]
    verdict = click.style(f"{result.verdict:<5}", fg=_COLOURS[result.verdict])
    return [f"{verdict} {result.topic:<12}{first}", *(_INDENT + line for line in others)]


if __name__ == "__main__":
    main()
