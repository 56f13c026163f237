"""One process for each device, through torchrun, in this process.

In this process, because torchrun as a command turns every way to end into exit code 1, and a run
that was asked to stop, and has saved, must be told from one that failed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import elastic_launch
from torch.distributed.run import config_from_args, get_args_parser

from shards.errors import SummerError
from trainer.errors import LostRankError, TrainingError

ASKED_TO_STOP: Final = 75
"""Exit code (EX_TEMPFAIL) of a run that was asked to stop and has saved."""

OUTCOME: Final = "SUMMER_OUTCOME"
"""Where the first rank of a machine leaves word for the launcher of how the run ended."""

_RESTARTS: Final = 3
_SLOW_DISK: Final = 100e6  # bytes a second, of a state that is saved before the end


class Launch(NamedTuple):
    """How many processes, where, and where they meet; empty options are left to torchrun."""

    nproc: int
    nnodes: str = "1"
    state_bytes: int = 0  # what all ranks checkpoint before they end
    options: tuple[str, ...] = ()  # further flags of torchrun, each `--name=value`


def torchrun_arguments(launch: Launch, arguments: Sequence[str]) -> list[str]:
    """What follows `torchrun` on a command line that trains with these arguments."""
    elsewhere = launch.nnodes != "1" or any("restarts" not in option for option in launch.options)
    restarts = any("restarts" in option for option in launch.options)
    return [
        *([] if elsewhere else ["--standalone"]),
        *([] if restarts else [f"--max-restarts={_RESTARTS}"]),
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


def run_on_all(launch: Launch, arguments: Sequence[str]) -> int:
    """The exit code of a run on all ranks: 0 when it is complete, 75 when it was asked to stop.

    A job that lost a rank starts again, up to --max-restarts. TrainingError says why it ended.
    """
    with tempfile.TemporaryDirectory() as folder:
        os.environ[OUTCOME] = str(Path(folder) / "outcome")  # the ranks inherit it
        _run_on_all(launch, arguments)
        with contextlib.suppress(FileNotFoundError):
            word = Path(os.environ[OUTCOME]).read_text()
            if word.isdigit():
                return int(word)
            raise TrainingError(word)
    raise TrainingError(
        "the run was ended before it could checkpoint; the last checkpoint stands: "
        "run the same command again"
    )


def leave_word(train: Callable[[], int]) -> int:
    """The exit code of a rank: 0 also for an end that another start would only bring about again.

    The launcher is told what it was: torchrun starts a job again whatever code a rank ends with,
    also one that was asked to stop.
    """
    try:
        word = str(train())
    except LostRankError:
        raise
    except SummerError as error:
        word = str(error)
    if os.environ["LOCAL_RANK"] == "0":
        Path(os.environ[OUTCOME]).write_text(word)
    return 0


def _run_on_all(launch: Launch, arguments: Sequence[str]) -> None:
    # what torchrun would set to 1, with a warning; each rank sets its own number later anyway
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // launch.nproc)))
    args = get_args_parser().parse_args(torchrun_arguments(launch, arguments))
    if args.standalone:
        args.rdzv_backend, args.rdzv_endpoint = "c10d", "localhost:0"
    # torchrun gives ranks 30 seconds between SIGTERM and SIGKILL
    grace_s = 60 + round(launch.state_bytes / _SLOW_DISK)
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(grace_s))
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
        raise TrainingError(
            f"rank {rank} ended with exit code {first.exitcode}; what it said stands above, "
            "and the last checkpoint stands: run the same command again"
        ) from error
