"""summer-report: what runs have done, on one HTML page that can be mailed.

    summer-report runs/tiny runs/tiny-2 --out report.html

The page is a single file: tables of figures and of where the time went, charts, the events and the
configuration of each run.
"""

from __future__ import annotations

from pathlib import Path

import click

from tools.command import FOLDER, Destination, command


@command("summer-report runs/tiny --out report.html")
@click.argument("runs", nargs=-1, type=FOLDER, metavar="[RUN]...")
@click.option(
    "--out", type=Destination(".html"), help="Page to write; report.html in the first run."
)
def main(runs: tuple[Path, ...], out: Path | None) -> None:
    """Write one HTML page about RUNs (the newest under runs/ if none is named)."""
    from tools.reporting.page import write_report

    if not runs:
        from trainer.checkpoint.runs import newest_run

        runs = (newest_run(),)
    click.echo(f"wrote {write_report(runs, out or runs[0] / 'report.html')}")


if __name__ == "__main__":
    main()
