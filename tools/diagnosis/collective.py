"""All-reduce between the ranks of one machine, in processes of its own that end in bounded time."""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore
from torch.multiprocessing.spawn import ProcessException, spawn

from tools.errors import ToolError


class ExchangeError(ToolError):
    """Ranks that do not arrive at a sum, or not at the right one."""


def time_all_reduce(
    device: str, n_ranks: int, n_bytes: int, limit_s: float = 60.0, backend: str = ""
) -> float:
    """Seconds of an all-reduce of so many bytes of fp32 sums, a median of five.

    `backend` is nccl on GPUs and gloo elsewhere. ExchangeError if it fails, has a wrong sum, or
    takes longer than `limit_s`, start-up included; every process has ended when this returns.
    """
    backend = backend or ("nccl" if device == "cuda" else "gloo")
    with tempfile.TemporaryDirectory() as folder:
        arguments = (device, n_ranks, n_bytes, backend, Path(folder))
        ranks = spawn(_take_part, arguments, n_ranks, join=False, daemon=True)  # type: ignore[no-untyped-call]
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


def _take_part(
    rank: int, device: str, n_ranks: int, n_bytes: int, backend: str, folder: Path
) -> None:
    """One rank, in a process of its own: rank 0 writes the median to FOLDER/seconds."""
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = "lo"
    if device == "cuda":
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // n_ranks))
    store = FileStore(str(folder / "store"), n_ranks)
    dist.init_process_group(backend, store=store, rank=rank, world_size=n_ranks)
    gradients = torch.full((n_bytes // 4,), float(rank + 1), device=device)
    dist.all_reduce(gradients)
    expected = n_ranks * (n_ranks + 1) / 2
    if not bool((gradients == expected).all()):
        raise ExchangeError(f"the sum over ranks is {float(gradients[0])}, not {expected}")
    gradients.zero_()
    rounds = []
    for _ in range(5):
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(gradients)
        gradients[0].item()  # waits for the device
        rounds.append(time.perf_counter() - start)
    if rank == 0:
        (folder / "seconds").write_text(str(statistics.median(rounds)))
    dist.destroy_process_group()
