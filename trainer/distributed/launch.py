"""Ranks started by torchrun inside this process, and how they ended.

Inside, because torchrun as a command turns every way to end into exit code 1, and a run that was
asked to stop, and has saved, must not look like one that failed.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import elastic_launch
from torch.distributed.run import config_from_args, get_args_parser

from shards.errors import SummerError, one_line
from trainer.config.deadline import SLOW_DISK, STARTED
from trainer.distributed.machines import relaunch_after_loss
from trainer.distributed.rendezvous import MACHINES, ONE_MACHINE, local_address
from trainer.errors import LostRankError, TrainingError

ASKED_TO_STOP: Final = 75
"""Exit code (EX_TEMPFAIL) of a run that was asked to stop and has saved."""

EXIT_REASON: Final = "SUMMER_EXIT_REASON"
"""Variable with the file in which the first rank of a machine says how the run ended."""

_HANDED_ON: Final = ("TERM", "INT", "HUP", "QUIT", "USR1", "USR2")  # signals, to the ranks
_PARENT_DEATH_SIGNAL: Final = 1  # PR_SET_PDEATHSIG
_RESTARTS: Final = 3


class Launch(NamedTuple):
    """How many processes, where, and where they meet; empty options are left to torchrun."""

    nproc: int
    nnodes: str = "1"
    state_bytes: int = 0  # what all ranks checkpoint before they end
    options: tuple[str, ...] = ()  # further flags of torchrun, each `--name=value`
    module: str = "trainer.cli"  # whose command line all processes run


def torchrun_arguments(launch: Launch, arguments: Sequence[str]) -> list[str]:
    """What follows `torchrun` on a command line that runs the module with these arguments."""
    restarts = [option for option in launch.options if "restarts" in option]
    one_machine = launch.nnodes == "1" and len(restarts) == len(launch.options)
    return [
        *(["--standalone"] if one_machine else []),
        *([] if restarts else [f"--max-restarts={_RESTARTS}"]),
        f"--nnodes={launch.nnodes}",
        f"--nproc-per-node={launch.nproc}",
        *launch.options,
        "-m",
        launch.module,
        *arguments,
    ]


def launch_line(launch: Launch, arguments: Sequence[str]) -> str:
    """The command that does by hand what `run_on_all` does."""
    return shlex.join(["torchrun", *torchrun_arguments(launch, arguments)])


def run_on_all(launch: Launch, arguments: Sequence[str]) -> int:
    """The exit code of a run on all ranks: 0 when it is complete, 75 when it was asked to stop.

    A job that lost a rank is restarted, up to --max-restarts. TrainingError says why it ended.
    """
    with tempfile.TemporaryDirectory() as folder:
        reason = Path(folder) / "reason"
        os.environ[EXIT_REASON] = str(reason)  # the ranks inherit it
        _run_on_all(launch, arguments)
        text = reason.read_text() if reason.exists() else ""
    if text.isdigit():
        return int(text)
    raise TrainingError(text or f"the run was ended before it was complete{_again(launch)}")


def write_exit_reason(train: Callable[[], int], *also: type[Exception]) -> int:
    """A rank's exit code: 0 also for an end after which torchrun must not start it again."""
    expected: tuple[type[Exception], ...] = (SummerError, *also)
    try:
        reason = str(train())
    except LostRankError:
        raise
    except expected as error:
        reason = one_line(error)
    if os.environ["LOCAL_RANK"] == "0":
        Path(os.environ[EXIT_REASON]).write_text(reason)
    return 0


def end_with_launcher() -> None:
    """Have the kernel ask this rank to stop when its launcher has ended, even by SIGKILL (Linux).

    Else it would train on for ever, with the devices and the lock of the run.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGTERM)


def _run_on_all(launch: Launch, arguments: Sequence[str]) -> None:
    # what torchrun would set to 1, with a warning; each rank sets its own number later anyway
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // launch.nproc)))
    parser = get_args_parser()
    parser.allow_abbrev = False  # it would take a command's --run for the beginning of --run-path
    args = parser.parse_args(torchrun_arguments(launch, arguments))
    under_nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    handed_on = [name for name in _HANDED_ON if name != "HUP" or not under_nohup]
    args.signals_to_handle = ",".join(f"SIG{name}" for name in handed_on)
    if args.standalone:
        args.rdzv_backend, args.rdzv_endpoint, args.standalone = ONE_MACHINE, "127.0.0.1:0", False
    elif args.rdzv_backend in ("c10d", "static") and args.rdzv_endpoint:
        args.rdzv_backend = MACHINES
        args.local_addr = args.local_addr or local_address(args.rdzv_endpoint.rpartition(":")[0])
        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # it would listen on all interfaces
    os.environ.setdefault(STARTED, str(time.time()))
    # torchrun gives ranks 30 seconds between SIGTERM and SIGKILL
    grace_s = 60 + round(launch.state_bytes / SLOW_DISK)
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(grace_s))
    config, entrypoint, entry_args = config_from_args(args)
    for name in logging.root.manager.loggerDict:
        if name.startswith("torch.distributed.elastic"):  # each has a level of its own
            logging.getLogger(name).setLevel(logging.CRITICAL)  # our messages say it better

    def launched() -> None:
        with contextlib.suppress(SignalException):
            elastic_launch(config=config, entrypoint=entrypoint)(*entry_args)

    try:
        if args.rdzv_backend == MACHINES:
            relaunch_after_loss(launched, args.rdzv_endpoint, args.max_restarts)
        else:
            launched()
    except ChildFailedError as error:
        rank, first = error.get_first_failure()
        raise TrainingError(
            f"rank {rank} ended with exit code {first.exitcode}; its messages are above"
            f"{_again(launch)}"
        ) from error


def _again(launch: Launch) -> str:
    intact = "; the last checkpoint is intact" if launch.state_bytes else ""
    return f"{intact}: run the same command again"
