"""summer-trace: what a run saw at a step, and when it sees a document.

summer-trace runs/tiny --step 12                       every row: its source, document and text
summer-trace runs/tiny --step 12 --rank 0 --chars 0    one rank's rows, in full
summer-trace runs/tiny --document lib/abc.py:0         the steps that see it, past and future
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tools.command import FOLDER, command

if TYPE_CHECKING:
    from tools.tracing.run_trace import TracedRow


@command("summer-trace runs/tiny --step 12 --rank 0")
@click.argument("run", type=FOLDER)
@click.option("--step", type=int, help="A step, counted from 1.")
@click.option("--rank", type=int, help="Only this rank's rows.")
@click.option("--document", metavar="FILE:RECORD", help="A document, as --step names it.")
@click.option("--chars", default=200, show_default=True, help="Characters of each row; 0: all.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a row.")
def main(
    run: Path, step: int | None, rank: int | None, document: str | None, chars: int, as_json: bool
) -> None:
    """What RUN saw at a step, or the steps at which it sees a document."""
    from tools.tracing.run_trace import RunTrace

    if (step is None) == (document is None):
        raise click.UsageError("give --step or --document, one of them")
    trace = RunTrace(run)
    found = trace.at_step(step, rank) if step is not None else trace.of_document(str(document))
    row = None
    for row in found:
        click.echo(json.dumps(asdict(row)) if as_json else _to_text(row, chars))
    if row is None:
        click.echo("no step of this run sees it", err=True)


def _to_text(row: TracedRow, chars: int) -> str:
    text = row.text[: chars or None]
    more = len(row.text) - len(text)
    return (
        f"step {row.step} rank {row.rank} micro-step {row.micro_step}: "
        f"sample {row.index}, {row.source} epoch {row.epoch} row {row.row}, "
        f"from {row.origin}\n{text}{f' ... {more} more' if more else ''}\n"
    )


if __name__ == "__main__":
    main()
