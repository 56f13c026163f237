"""summer-doctor: is this machine fit for a run? Go or no-go, and why.

summer-doctor --preset summer-4b
summer-doctor --preset tiny --json
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from shards.errors import one_line_failures

_FOLDER = click.Path(path_type=Path, exists=True, file_okay=False)


@click.command(epilog="Example: summer-doctor --preset summer-4b")
@click.option("--preset", default="summer-4b", show_default=True, help="The run that is planned.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda", "mps"]), default="auto")
@click.option("--out", type=_FOLDER, default=Path(), help="Where it would write.  [default: .]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@one_line_failures()
def main(preset: str, device: str, out: Path, as_json: bool) -> None:
    """Look at the machine: devices, kernels, speed, disk. Exit code 1 on no-go."""
    from tools.checks import Subject, examine
    from trainer.config import configure
    from trainer.devices import pick_device

    config = configure(preset=preset).config
    subject = Subject(config=config, device=pick_device(device), folder=out)
    findings = []
    for finding in examine(subject):
        findings.append(finding)
        if not as_json:
            click.echo(f"{finding.verdict:<5} {finding.topic:<12} {finding.detail}")
    in_the_way = [finding.topic for finding in findings if finding.verdict == "fail"]
    if as_json:
        listed = [asdict(finding) for finding in findings]
        click.echo(json.dumps({"go": not in_the_way, "preset": preset, "findings": listed}))
    else:
        click.echo(f"no-go: {', '.join(in_the_way)}" if in_the_way else f"go: {preset} can run")
    raise SystemExit(1 if in_the_way else 0)


if __name__ == "__main__":
    main()
