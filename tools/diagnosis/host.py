"""Devices and their memory, and what the operating system allows."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import torch

from shards.errors import SummerError
from shards.reader import find_sources
from tools.diagnosis.results import CheckResult, Context
from trainer.config import memory
from trainer.distributed.devices import device_memory_bytes

NUMA_BALANCING: Final = Path("/proc/sys/kernel/numa_balancing")
SHARED_MEMORY: Final = Path("/dev/shm")
_MI300X_GUIDE: Final = (
    "AMD Instinct MI300X workload optimization (rocm.docs.amd.com/en/latest/how-to/rocm-for-ai/"
    "inference-optimization/workload.html)"
)
_NCCL_DOCKER: Final = (
    "NCCL User Guide, Troubleshooting (docs.nvidia.com/deeplearning/nccl/user-guide/docs/"
    "troubleshooting.html)"
)
_NCCL_SHARED: Final = 1 << 30  # what that document gives a container
_FILES_PER_SOURCE: Final = 128  # shards/reader.py holds as many open
_OTHER_FILES: Final = 256
_BUSY: Final = 0.5  # of the cores, before anything is measured


def devices(context: Context) -> Iterator[CheckResult]:
    """What torch sees, and whether all of it is the same."""
    if context.device != "cuda":
        large = context.config.preset == "summer-4b"
        size = device_memory_bytes(context.device) / 1e9
        threads = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
        text, fix = (
            f"{context.device}, {threads}, {size:.0f} GB",
            "use accelerators for this preset",
        )
        yield CheckResult("warn" if large else "note", "devices", text, fix if large else "")
        return
    names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    if len(names) < context.nproc:
        text = f"{len(names)} for {context.nproc} ranks"
        yield CheckResult("fail", "devices", text, f"--nproc {len(names)}")
    alike, size = len(set(names)) == 1, device_memory_bytes("cuda") / 1e9
    text = f"{len(names)} x {names[0]}, {size:.0f} GB" if alike else f"mixed: {', '.join(names)}"
    yield CheckResult("ok" if alike else "warn", "devices", text)


def other_work(context: Context) -> Iterator[CheckResult]:
    """Whether others use the cores while rates are measured."""
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    text = f"load {load:.1f} on {cores} cores"
    if load <= _BUSY * cores:
        yield CheckResult("ok", "other work", text)
        return
    fix = "run this again when the machine is idle"
    yield CheckResult("warn", "other work", f"{text}: the rates below are too low", fix)


def memory_fits(context: Context) -> Iterator[CheckResult]:
    """Whether the preset, training on one sequence at a time, fits into a device."""
    parts = memory.memory_by_part(context.config, 1, context.device)
    limit = device_memory_bytes(context.device, context.nproc)
    needed, fits = sum(parts.values()), memory.fits(parts, limit)
    text = f"{context.config.preset} needs {needed / 1e9:.1f} GB for one sequence a device"
    spread = f"shard_degree={context.nproc}" if context.nproc > 1 else "shard_degree, on several"
    fix = "" if fits else f"a smaller preset, activation_checkpointing=full, or {spread}"
    text = f"{text}, of {limit / 1e9:.1f} GB"
    figures = {"needed_bytes": needed, "device_bytes": limit}
    yield CheckResult("ok" if fits else "fail", "memory", text, fix, figures=figures)


def numa_balancing(context: Context) -> Iterator[CheckResult]:
    """Whether the kernel moves pages about while the ranks work."""
    if not NUMA_BALANCING.exists() or NUMA_BALANCING.read_text().strip() == "0":
        yield CheckResult("ok", "numa", "automatic NUMA balancing is off")
        return
    text = "automatic NUMA balancing is on: times vary, and collectives are slower"
    fix = "sudo sysctl kernel.numa_balancing=0"
    yield CheckResult("warn", "numa", text, fix, _MI300X_GUIDE)


def shared_memory(context: Context) -> Iterator[CheckResult]:
    """Room for the micro-batches that loader workers hand over, and for NCCL between ranks."""
    if not SHARED_MEMORY.exists():
        return
    loader, model = context.config.loader, context.config.model
    batch = (context.config.micro_batch_size or 16) * model.seq_len * 16  # two of int64
    ahead = context.nproc * max(1, loader.num_workers) * (loader.prefetch + 1)
    needed = batch * ahead + (_NCCL_SHARED if context.device == "cuda" and context.nproc > 1 else 0)
    free = shutil.disk_usage(SHARED_MEMORY).free
    text = f"{free / 1e9:.3g} GB free in {SHARED_MEMORY}, up to {needed / 1e9:.2g} GB needed"
    if free >= needed:
        yield CheckResult("ok", "shared mem", text)
        return
    fix = "docker run --ipc=host, or --shm-size=8g"
    yield CheckResult("warn", "shared mem", f"{text}: loader workers may die", fix, _NCCL_DOCKER)


def open_files(context: Context) -> Iterator[CheckResult]:
    """Whether a process may hold as many shards open as it reads."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = _OTHER_FILES + 2 * _FILES_PER_SOURCE * len(context.config.mixture)
    if context.shards is not None:
        needed = _OTHER_FILES
        with contextlib.suppress(SummerError):  # the check of the shards reports it
            for manifest in find_sources(context.shards).values():
                n_files = min(_FILES_PER_SOURCE, len(manifest.shards))
                needed += n_files * (2 if manifest.facts.masked else 1)
    text = f"{soft:,} a process, up to {needed:,} needed"
    if soft == resource.RLIM_INFINITY or soft >= needed:
        yield CheckResult("ok", "open files", text)
        return
    fix = f"ulimit -n {needed if hard == resource.RLIM_INFINITY else min(hard, 65_536)}"
    yield CheckResult("warn", "open files", text, fix, "shards/reader.py")
