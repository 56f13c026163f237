"""One process for each device, through torchrun, in this process.

In this process, because torchrun as a command turns every way to end into exit code 1, and a run
that was asked to stop, and has committed, must be told from one that failed.
"""

from __future__ import annotations

import logging
import os
import shlex
from collections.abc import Sequence
from typing import Final, NamedTuple

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import elastic_launch
from torch.distributed.run import config_from_args, get_args_parser

from trainer.errors import TrainingError

ASKED_TO_STOP: Final = 75
"""Exit code (EX_TEMPFAIL) of a run that was asked to stop and has committed."""


class Launch(NamedTuple):
    """How many processes, where, and where they meet; empty options are left to torchrun."""

    nproc: int
    nnodes: str = "1"
    options: tuple[str, ...] = ()  # further flags of torchrun, each `--name=value`


def torchrun_arguments(launch: Launch, arguments: Sequence[str]) -> list[str]:
    """What follows `torchrun` on a command line that trains with these arguments."""
    meeting = ["--standalone"] if launch.nnodes == "1" and not launch.options else []
    return [
        *meeting,
        f"--nnodes={launch.nnodes}",
        f"--nproc-per-node={launch.nproc}",
        *launch.options,
        "-m",
        "trainer.cli",
        *arguments,
    ]


def launch_line(launch: Launch, arguments: Sequence[str]) -> str:
    """The command that does by hand what `run_on_all` does."""
    return shlex.join(["torchrun", *torchrun_arguments(launch, arguments)])


def run_on_all(launch: Launch, arguments: Sequence[str]) -> None:
    """Train on all ranks until they end, well or because they were asked to stop.

    TrainingError if a rank failed.
    """
    # what torchrun would set to 1, with a warning; each rank sets its own number later anyway
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // launch.nproc)))
    args = get_args_parser().parse_args(torchrun_arguments(launch, arguments))
    if args.standalone:
        args.rdzv_backend, args.rdzv_endpoint = "c10d", "localhost:0"
    config, entrypoint, entry_args = config_from_args(args)
    for name in logging.root.manager.loggerDict:
        if name.startswith("torch.distributed.elastic"):  # each has a level of its own
            logging.getLogger(name).setLevel(logging.CRITICAL)  # what they say is said better here
    try:
        elastic_launch(config=config, entrypoint=entrypoint)(*entry_args)
    except SignalException:
        return
    except ChildFailedError as error:
        rank, first = error.get_first_failure()
        if first.exitcode == ASKED_TO_STOP:  # the others then are about to end, or were made to
            return
        raise TrainingError(
            f"rank {rank} ended with exit code {first.exitcode}; what it said stands above, "
            "and the last commit stands: run the same command again"
        ) from error
