"""All-reduce between the ranks of one machine, in processes of its own that end in bounded time."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Final, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch._C._distributed_c10d import FileStore

from tools.diagnosis.rates import waiter
from tools.errors import ToolError

LIMIT_S: Final = 60.0
_ROUNDS: Final = 5


class ExchangeError(ToolError):
    """Ranks that do not come to a sum, or not to the right one."""


class Exchange(NamedTuple):
    """One all-reduce. Bandwidths as nccl-tests defines them (its doc/PERFORMANCE.md)."""

    n_ranks: int
    n_bytes: int
    seconds: float

    @property
    def algorithm_rate(self) -> float:
        """Bytes a second: size over time."""
        return self.n_bytes / self.seconds

    @property
    def bus_rate(self) -> float:
        """Bytes a second over each link: 2 (n - 1) / n of that, whatever the number of ranks."""
        return self.algorithm_rate * 2 * (self.n_ranks - 1) / self.n_ranks


def measure_exchange(
    device: str, n_ranks: int, n_bytes: int, limit_s: float = LIMIT_S, backend: str | None = None
) -> Exchange:
    """The median of some all-reduces of fp32 sums; ExchangeError if they fail, hang or are wrong.

    Every process has ended when this returns.
    """
    backend = backend or ("nccl" if device == "cuda" else "gloo")
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(
                target=_take_part,
                args=(rank, n_ranks, device, backend, n_bytes // 4, folder, limit_s),
                daemon=True,
            )
            for rank in range(n_ranks)
        ]
        try:
            for process in ranks:
                process.start()
            deadline = time.monotonic() + limit_s
            for process in ranks:
                process.join(max(0.0, deadline - time.monotonic()))
            late = [number for number, process in enumerate(ranks) if process.is_alive()]
        finally:
            for process in ranks:
                if process.pid is not None:
                    process.kill()
                    process.join()
        return Exchange(n_ranks, n_bytes, _outcome(Path(folder), n_ranks, late, limit_s))


def _outcome(folder: Path, n_ranks: int, late: list[int], limit_s: float) -> float:
    """The median time of one all-reduce, or ExchangeError with the first reason found."""
    if late:
        raise ExchangeError(
            f"all-reduce of {n_ranks} ranks hangs: after {limit_s:g} s rank "
            f"{', '.join(map(str, late))} had not ended; look for a firewall on the loopback "
            "interface, and set NCCL_DEBUG=INFO"
        )
    for rank in range(n_ranks):
        if (folder / f"error-{rank}").exists():
            raise ExchangeError(f"rank {rank}: {(folder / f'error-{rank}').read_text()}")
    if not (folder / "seconds").exists():
        raise ExchangeError("a rank was killed (by the system, for its memory?)")
    return float(json.loads((folder / "seconds").read_text()))


def _take_part(
    rank: int, n_ranks: int, device: str, backend: str, n_elements: int, folder: str, limit_s: float
) -> None:
    """One rank, in a process of its own."""
    try:
        if sys.platform == "linux":
            os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = "lo"
        place = torch.device(device, rank) if device == "cuda" else torch.device(device)
        if device == "cuda":
            torch.cuda.set_device(rank)
        else:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // n_ranks))
        dist.init_process_group(
            backend,
            store=FileStore(f"{folder}/store", n_ranks),
            rank=rank,
            world_size=n_ranks,
            timeout=timedelta(seconds=limit_s),
        )
        seconds = _reduce(rank, n_ranks, place, n_elements)
        if rank == 0:
            Path(folder, "seconds").write_text(json.dumps(seconds))
        dist.destroy_process_group()
    except Exception as error:
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        Path(folder, f"error-{rank}").write_text(text)


def _reduce(rank: int, n_ranks: int, place: torch.device, n_elements: int) -> float:
    """Seconds of one all-reduce: the median round of this rank."""
    wait = waiter(place.type)
    gradients = torch.full((n_elements,), float(rank + 1), device=place)
    dist.all_reduce(gradients)
    expected = n_ranks * (n_ranks + 1) / 2
    if not bool((gradients == expected).all()):
        raise ExchangeError(f"the sum over ranks is {float(gradients[0])}, not {expected}")
    gradients.zero_()
    rounds = []
    for _ in range(_ROUNDS):
        dist.barrier()
        wait()
        start = time.perf_counter()
        dist.all_reduce(gradients)
        wait()
        rounds.append(time.perf_counter() - start)
    return sorted(rounds)[_ROUNDS // 2]
