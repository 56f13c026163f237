"""A small run that is killed again and again, and ends with the weights of one that was not.

    make soak
    python -m tools.rehearsal.soak --shards shards/ --kills 100

The run is started as a user starts it, ended with SIGKILL at a random moment, and started again by
the same command, until it has been killed so often; then it trains to its end. A moment may be in a
step, in a checkpoint that is being written, in a purge, or before the first step.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import click

from shards.errors import one_line_failures
from tools.errors import RehearsalError
from tools.rehearsal.runs import (
    compare_checkpoints,
    last_step,
    train,
    train_for,
)
from trainer.checkpoint.runs import METRICS, newest_checkpoint, step_of
from trainer.metrics.metrics import read_lines

SMALL = (
    "model.n_layers=2", "model.d_model=64", "model.d_ff=128", "global_batch_tokens=512",
    "compile=false", "checkpoint.interval_steps=3", "validation.interval=0",
)  # fmt: skip
"""A step takes a fraction of a second: most of the time is starting up, and saving."""


class Soaked(NamedTuple):
    """What became of a run that was killed."""

    identical: bool
    kills: int
    goodput: float  # the undisturbed run's seconds, of all that the killed one took
    cold_s: float  # from the first start to the first step
    resumed_s: list[float]  # from each start after a kill to its first new step


def soak(
    arguments: Sequence[str], out: Path, kills: int, seed: int, report: Callable[[str], None]
) -> Soaked:
    """What became of a run that was killed so many times, beside an undisturbed one in `out`."""
    if out.exists() and any(out.iterdir()):
        raise RehearsalError(f"{out} is not empty: name a new folder with --out, or remove it")
    whole, killed, chooser = out / "undisturbed", out / "killed", random.Random(seed)
    first_seen: list[float] = []
    began = time.monotonic()

    def watch(step: int) -> None:
        if step and not first_seen:
            first_seen.append(time.monotonic() - began)

    train(arguments, whole, watch)
    whole_s, last, cold_s = (
        time.monotonic() - began,
        step_of(newest_checkpoint(whole)),
        first_seen[0],
    )
    report(f"undisturbed: {last} steps in {whole_s:.1f} s, the first after {cold_s:.1f} s")
    began, resumed_s = time.monotonic(), []
    for kill in range(1, kills + 1):
        after_s = chooser.uniform(0.2, 1.6) * cold_s
        try:
            first_s = train_for(arguments, killed, after_s)
        except RehearsalError:
            if last_step(killed) < last:
                raise
            kills = kill - 1
            report(f"done after {kills} kills: --set max_steps=N makes it last longer")
            break
        resumed_s += [] if first_s is None else [first_s]
        report(f"kill {kill} after {after_s:.1f} s, at step {last_step(killed)}")
    train(arguments, killed)
    took_s = time.monotonic() - began
    same = compare_checkpoints(whole, killed, last).identical and _log(whole) == _log(killed)
    return Soaked(same, kills, whole_s / took_s, cold_s, resumed_s)


def _log(run: Path) -> list[tuple[int, float, float]]:
    return [(line["step"], line["loss"], line["grad_norm"]) for line in read_lines(run / METRICS)]


@click.command(epilog="Example: python -m tools.rehearsal.soak --shards shards/ --kills 5")
@click.option("--shards", type=click.Path(path_type=Path), required=True, help="Prepared sources.")
@click.option("--set", "sets", multiple=True, metavar="KEY=VALUE", help="As for summer-train.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("soak"), show_default=True,
              help="Where both runs go; a new folder.")  # fmt: skip
@click.option("--kills", default=100, show_default=True, help="How often the run is killed.")
@click.option("--seed", default=0, show_default=True, help="Chooses the moments.")
@one_line_failures()
def main(shards: Path, sets: tuple[str, ...], out: Path, kills: int, seed: int) -> None:
    """Kill a run again and again; its last weights must be those of one that was not killed."""
    arguments = ["--shards", str(shards), "--preset", "tiny"]
    arguments += [text for change in (*SMALL, *sets) for text in ("--set", change)]
    soaked = soak(arguments, out, kills, seed, click.echo)
    click.echo(
        f"{soaked.kills} kills; first step {soaked.cold_s:.1f} s after a cold start, after a kill "
        f"{max(soaked.resumed_s, default=0):.1f} s at most; goodput {soaked.goodput:.1%}; "
        f"weights, moments and log identical: {'yes' if soaked.identical else 'NO'}"
    )
    if not soaked.identical:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
