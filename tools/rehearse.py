"""summer-rehearse: a small run with every fault that can be injected, and what became of each."""

from __future__ import annotations

from pathlib import Path

import click

from tools.command import FOLDER, command


@command("summer-rehearse --preset tiny --set model.n_layers=2")
@click.option("--shards", type=FOLDER, help="Prepared sources; copied first.")
@click.option("--preset", default="tiny", show_default=True, help="Which model to train.")
@click.option("--set", "sets", multiple=True, metavar="KEY=VALUE", help="As for summer-train.")
@click.option(
    "--out", type=FOLDER, default=Path("rehearsal"), show_default=True,
    help="Where its runs and the certificate go.",
)  # fmt: skip
@click.option("--seed", default=0, show_default=True, help="Chooses the steps that are hit.")
def main(shards: Path | None, preset: str, sets: tuple[str, ...], out: Path, seed: int) -> None:
    """Train with every fault injected, resume after each, and compare with an uninterrupted twin.

    Without --shards the Python standard library's own text is prepared. Two ranks train; the
    mixture changes in the middle; at the end both models are scored. About five minutes on two
    cores. OUT/certificate.md and .json say what was promised and what was found. Exit code 1 if
    anything is not as promised.
    """
    from tools.rehearsal.certificate import table
    from tools.rehearsal.rehearsal import Rehearsal, rehearse

    rehearsal = Rehearsal(shards=shards, preset=preset, sets=sets, out=out, seed=seed)
    certificate = rehearse(rehearsal, report=lambda text: click.echo(text))
    for line in table(certificate):
        click.echo(line)
    click.echo(f"certificate: {out / 'certificate.md'}")
    if not certificate.kept:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
