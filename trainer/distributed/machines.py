"""Several machines: how many there may be, and what a launcher does when one is out of reach.

A machine that is lost ends the ranks of the others, whose launchers then wait for it. The one where
they meet (--rdzv-endpoint) keeps what they know of each other: while it is away, the others try
again until it answers.
"""

from __future__ import annotations

import re
import socket
import sys
import time
from collections.abc import Callable
from typing import Final

from torch import distributed as dist
from torch.distributed.elastic.rendezvous import (
    RendezvousConnectionError,
    RendezvousError,
    RendezvousTimeoutError,
)
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

from shards.errors import one_line
from trainer.errors import ConfigError, TrainingError

PORT: Final = 29500  # torchrun's own
RETURN_S: Final = 900.0
"""How long a launcher waits for the machine where all meet."""


def machine_counts(nnodes: str) -> tuple[int, int]:
    """The least and the most machines of `--nnodes 2` or `--nnodes 1:2`."""
    found = re.fullmatch(r"(\d+)(?::(\d+))?", nnodes)
    least, most = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 1 <= least <= most:
        raise ConfigError(f"--nnodes {nnodes}: give a number of machines, or least:most as in 1:2")
    return least, most


def relaunch_after_loss(launch: Callable[[], None], endpoint: str, restarts: int) -> None:
    """Launch, and launch again each time that the machine where all meet was lost and is back.

    TrainingError where it does not come back, or was lost more often than `restarts`.
    """
    host, port = parse_rendezvous_endpoint(endpoint, PORT)
    for lost in range(1, restarts + 2):
        try:
            launch()
            return
        except RendezvousTimeoutError as error:
            raise TrainingError(
                f"the other machines did not come to {host}:{port}: start them, each with the same "
                "command; the last checkpoint is intact"
            ) from error
        except (RendezvousConnectionError, dist.DistError):
            why = f"{host}:{port}, where the machines meet, was lost"
        except RendezvousError as error:
            raise TrainingError(f"{one_line(error)}: run the same command again") from error
        if lost > restarts:
            raise TrainingError(f"{why} {lost} times: run the same command again")
        sys.stderr.write(f"! {why}; waiting up to {RETURN_S / 60:.0f} minutes for it\n")
        _wait_for(host, port)


def _wait_for(host: str, port: int) -> None:
    """Return once somebody listens there."""
    ends = time.monotonic() + RETURN_S
    while time.monotonic() < ends:
        try:
            socket.create_connection((host, port), timeout=5).close()
            return
        except OSError:
            time.sleep(1)
    raise TrainingError(
        f"{host}:{port}, where the machines meet, did not come back within {RETURN_S / 60:.0f} "
        "minutes; the last checkpoint is intact: run the same command again"
    )
