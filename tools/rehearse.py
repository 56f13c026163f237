"""summer-rehearse: hurt a small run on purpose, and show that it ends as if nothing had been."""

from __future__ import annotations

from pathlib import Path

import click

from shards.errors import one_line_failures


@click.command(epilog="Example: summer-rehearse --shards shards/ --preset tiny --set max_steps=40")
@click.option("--shards", type=click.Path(path_type=Path), required=True, help="Prepared sources.")
@click.option("--preset", default="tiny", show_default=True, help="Which model to train.")
@click.option("--set", "sets", multiple=True, metavar="KEY=VALUE", help="As for summer-train.")
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("rehearsal"), show_default=True,
    help="Where its runs and the certificate go.",
)  # fmt: skip
@click.option("--seed", default=0, show_default=True, help="Chooses the steps that are hit.")
@one_line_failures()
def main(shards: Path, preset: str, sets: tuple[str, ...], out: Path, seed: int) -> None:
    """Train the same run undisturbed, killed, told to stop, and with a damaged commit.

    Each disturbed run is started again with the same command, and its last commit must have the
    undisturbed one's bytes: weights and optimizer moments. The table is also written to
    OUT/certificate.json. Exit code 1 if anything is not as promised.
    """
    from tools.rehearsal import rehearse

    arguments = ["--shards", str(shards), "--preset", preset]
    arguments += [text for change in sets for text in ("--set", change)]
    certificate = rehearse(arguments, out, seed, report=lambda text: click.echo(text))
    for line in certificate.table():
        click.echo(line)
    click.echo(f"certificate: {out / 'certificate.json'}")
    if not certificate.kept:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
