"""What the operating system allows: NUMA balancing, shared memory, open files, host memory."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from model.config import count_params
from shards.reader import find_sources
from tools.diagnosis.environment_variables import MI300X_GUIDE
from tools.diagnosis.findings import Finding, Subject
from trainer.distributed.devices import available_memory_bytes

NUMA_BALANCING: Final = Path("/proc/sys/kernel/numa_balancing")
SHARED_MEMORY: Final = Path("/dev/shm")
_NCCL_DOCKER: Final = (
    "NCCL User Guide, Troubleshooting (docs.nvidia.com/deeplearning/nccl/user-guide/docs/"
    "troubleshooting.html)"
)
_NCCL_SHARED: Final = 1 << 30  # what that document gives a container
_FILES_A_SOURCE: Final = 128  # shards/reader.py holds as many open
_OTHER_FILES: Final = 256
_BUSY: Final = 0.5  # of the cores, before this looks at anything
_STAGED_A_PARAMETER: Final = 36  # trainer/session/save.py: three times weights and moments


def other_work(subject: Subject) -> Iterator[Finding]:
    """Whether others use the cores while rates are measured."""
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    text = f"load {load:.1f} on {cores} cores"
    if load <= _BUSY * cores:
        yield Finding("ok", "other work", text)
        return
    mend = "run this again when the machine is idle"
    yield Finding("warn", "other work", f"{text}: the rates below are too low", mend)


def numa_balancing(subject: Subject) -> Iterator[Finding]:
    """Whether the kernel moves pages about while the ranks work."""
    if not NUMA_BALANCING.exists():
        yield Finding("ok", "numa", "this kernel does no automatic NUMA balancing")
        return
    if NUMA_BALANCING.read_text().strip() == "0":
        yield Finding("ok", "numa", "automatic NUMA balancing is off")
        return
    text = "automatic NUMA balancing is on: times vary, and collectives are slower"
    yield Finding("warn", "numa", text, "sudo sysctl kernel.numa_balancing=0", MI300X_GUIDE)


def shared_memory(subject: Subject) -> Iterator[Finding]:
    """Room for the micro-batches that loader workers hand over, and for NCCL between ranks."""
    if not SHARED_MEMORY.exists():
        return
    loader, model = subject.config.loader, subject.config.model
    rows = subject.config.micro_batch_size or 16
    batch = rows * model.seq_len * 16  # tokens and targets, int64
    ahead = subject.nproc * max(1, loader.num_workers) * (loader.prefetch + 1)
    needed = batch * ahead + (_NCCL_SHARED if subject.device == "cuda" and subject.nproc > 1 else 0)
    free = shutil.disk_usage(SHARED_MEMORY).free
    text = f"{free / 1e9:.3g} GB free in {SHARED_MEMORY}, up to {needed / 1e9:.2g} GB needed"
    if free >= needed:
        yield Finding("ok", "shared mem", text)
        return
    mend = "docker run --ipc=host, or --shm-size=8g"
    yield Finding("warn", "shared mem", f"{text}: loader workers may die", mend, _NCCL_DOCKER)


def limits(subject: Subject) -> Iterator[Finding]:
    """Open files for all shards at hand, and locked memory for NCCL."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = _files(subject)
    text = f"{soft:,} a process, up to {needed:,} needed"
    if soft != resource.RLIM_INFINITY and soft < needed:
        mend = f"ulimit -n {needed if hard == resource.RLIM_INFINITY else min(hard, 65_536)}"
        yield Finding("warn", "open files", text, mend, "shards/reader.py")
    else:
        yield Finding("ok", "open files", text)
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if subject.device == "cuda" and subject.nproc > 1 and locked != resource.RLIM_INFINITY:
        text = f"{locked / 1e6:,.1f} MB may be locked: InfiniBand and pinned buffers want no limit"
        mend = "ulimit -l unlimited, or docker run --ulimit memlock=-1"
        yield Finding("warn", "locked mem", text, mend, _NCCL_DOCKER)


def _files(subject: Subject) -> int:
    """Files that one reading process may hold open; twice as many if all sources had masks."""
    if subject.shards is None:
        return _OTHER_FILES + 2 * _FILES_A_SOURCE * len(subject.config.mixture)
    held = (
        min(_FILES_A_SOURCE, len(manifest.shards)) * (2 if manifest.facts.masked else 1)
        for manifest in find_sources(subject.shards).values()
    )
    return _OTHER_FILES + sum(held)


def host_memory(subject: Subject) -> Iterator[Finding]:
    """Whether checkpoints can be written beside training."""
    free = available_memory_bytes()
    if free is None:
        return
    needed = _STAGED_A_PARAMETER * count_params(subject.config.model)
    text = f"{free / 1e9:,.1f} GB free, {needed / 1e9:,.1f} GB needed to checkpoint beside training"
    if free >= needed:
        yield Finding("ok", "host memory", text)
    else:
        yield Finding("warn", "host memory", f"{text}: it will wait for each checkpoint")
