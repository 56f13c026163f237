"""`summer-train`: the command line of training."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import click

from shards.errors import one_line_failures
from shards.versions import VERSION


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(VERSION, prog_name="summerlm")
@click.option("--shards", help="Folder of prepared sources. [shards, or those of the run]")
@click.option("--preset", help="A preset by name; without it, the reference run summer-4b.")
@click.option("--config", "file", type=click.Path(path_type=Path, exists=True, dir_okay=False),
              help="A TOML file of your own instead of a preset.")  # fmt: skip
@click.option("--set", "sets", multiple=True, metavar="KEY=VALUE", help="Change one key.")
@click.option("--out", type=click.Path(path_type=Path), help="The run's folder. [runs/PRESET]")
@click.option("--resume", default="auto", show_default=True, metavar="auto|never|PATH",
              help="Go on from --out's newest checkpoint, from none, or this one.")  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Show the plan and the arithmetic; train nothing.")
@click.option("--nproc", type=click.IntRange(1), help="Processes on this machine. [its devices]")
@click.option("--nnodes", default="1", show_default=True, help="Machines.")
@click.option("--node-rank", help="This machine's number.")
@click.option("--rdzv-backend", help="How machines meet (as in torchrun).")
@click.option("--rdzv-endpoint", help="Where machines meet, host:port.")
@click.option("--rdzv-id", help="The name they meet under.")
@click.option("--max-restarts", help="How often a job that lost a rank starts again.")
@one_line_failures()
def main(**options: Any) -> None:
    """Train a model on prepared shards, on every device of this machine.

    A run that was killed goes on where it was saved, with the same command. Keys of --set:
    see the plan that --dry-run prints.

    Example: summer-train --shards shards/ --preset tiny --set max_steps=40
    """
    from shards.reader import find_sources
    from trainer.config.config import configure, shards_of

    options["shards"] = options["shards"] or shards_of(options["out"], options["resume"])
    given = {name: options[name] for name in ("preset", "file", "sets", "shards")}
    configured = configure(**given)  # a mistake is reported before the seconds that torch takes
    if "RANK" not in os.environ:
        find_sources(Path(options["shards"]))

    # torch's C++ warns of each lost connection with a stack; what matters is said in a line
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from trainer.start import Request, start

    flags = ("node_rank", "rdzv_backend", "rdzv_endpoint", "rdzv_id", "max_restarts")
    torchrun = {name: options.pop(name) for name in flags}
    request = Request(
        **options,
        configured=configured,
        torchrun={name: value for name, value in torchrun.items() if value is not None},
    )
    sys.exit(start(request, sys.stdout))


if __name__ == "__main__":
    main()
