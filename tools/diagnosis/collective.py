"""All-reduce between the ranks of one machine, in processes of its own that end in bounded time."""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Final

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore
from torch.multiprocessing.spawn import ProcessException, spawn

from tools.errors import ToolError

_ROUNDS: Final = 5


class ExchangeError(ToolError):
    """Ranks that do not arrive at a sum, or not at the right one."""


@dataclass(frozen=True)
class Exchange:
    """An all-reduce of `n_bytes` of fp32 sums, which may take `limit_s`, start-up included."""

    device: str
    n_ranks: int
    n_bytes: int
    limit_s: float = 60.0
    backend: str = ""  # nccl on GPUs, gloo elsewhere


def time_all_reduce(exchange: Exchange) -> float:
    """Seconds that it takes, a median; ExchangeError if it fails, hangs or has a wrong sum.

    Every process has ended when this returns.
    """
    n_ranks, limit_s = exchange.n_ranks, exchange.limit_s
    with tempfile.TemporaryDirectory() as folder:
        ranks = spawn(  # type: ignore[no-untyped-call]
            _take_part, (exchange, Path(folder)), n_ranks, join=False, daemon=True
        )
        deadline = time.monotonic() + limit_s
        try:
            while not ranks.join(max(0.0, deadline - time.monotonic())):
                if time.monotonic() >= deadline:
                    raise ExchangeError(
                        f"all-reduce of {n_ranks} ranks hangs: not done after {limit_s:g} s; look "
                        "for a firewall on the loopback interface, and set NCCL_DEBUG=INFO"
                    )
        except ProcessException as error:
            reason = str(error).strip().splitlines()[-1][:300]
            raise ExchangeError(f"rank {error.error_index}: {reason}") from error
        finally:
            for process in ranks.processes:
                process.kill()
                process.join()
        return float(Path(folder, "seconds").read_text())


def _take_part(rank: int, exchange: Exchange, folder: Path) -> None:
    """One rank, in a process of its own: rank 0 writes the median to FOLDER/seconds."""
    n_ranks, device = exchange.n_ranks, exchange.device
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = "lo"
    if device == "cuda":
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // n_ranks))
    dist.init_process_group(
        exchange.backend or ("nccl" if device == "cuda" else "gloo"),
        store=FileStore(str(folder / "store"), n_ranks),
        rank=rank,
        world_size=n_ranks,
        timeout=timedelta(seconds=exchange.limit_s),
    )
    gradients = torch.full((exchange.n_bytes // 4,), float(rank + 1), device=device)
    dist.all_reduce(gradients)
    expected = n_ranks * (n_ranks + 1) / 2
    if not bool((gradients == expected).all()):
        raise ExchangeError(f"the sum over ranks is {float(gradients[0])}, not {expected}")
    gradients.zero_()
    rounds = []
    for _ in range(_ROUNDS):
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(gradients)
        gradients[0].item()  # waits for the device
        rounds.append(time.perf_counter() - start)
    if rank == 0:
        (folder / "seconds").write_text(str(statistics.median(rounds)))
    dist.destroy_process_group()
