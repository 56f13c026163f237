"""What known accelerators have. An unknown one has no peak here, so no MFU is shown for it."""

from __future__ import annotations

import contextlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch


@dataclass(frozen=True, kw_only=True)
class Accelerator:
    """One device as torch counts them (half of an MI250X). Dense bf16, as its maker states it."""

    name: str
    bf16_tflops: float
    memory_gb: int


# Makers' data sheets, dense figures (NVIDIA's tables print twice that, "with sparsity").
# The first whose name stands in the driver's name for the device is taken.
ACCELERATORS: Final = (
    Accelerator(name="MI355X", bf16_tflops=2500.0, memory_gb=288),
    Accelerator(name="MI350X", bf16_tflops=2300.0, memory_gb=288),
    Accelerator(name="MI325X", bf16_tflops=1307.4, memory_gb=256),
    Accelerator(name="MI300X", bf16_tflops=1307.4, memory_gb=192),
    Accelerator(name="MI250X", bf16_tflops=191.5, memory_gb=64),
    Accelerator(name="MI210", bf16_tflops=181.0, memory_gb=64),
    Accelerator(name="B200", bf16_tflops=2250.0, memory_gb=180),
    Accelerator(name="GH200", bf16_tflops=989.4, memory_gb=96),
    Accelerator(name="H200", bf16_tflops=989.4, memory_gb=141),
    Accelerator(name="H100 PCIe", bf16_tflops=756.0, memory_gb=80),
    Accelerator(name="H100 NVL", bf16_tflops=835.0, memory_gb=94),
    Accelerator(name="H100", bf16_tflops=989.4, memory_gb=80),
    Accelerator(name="A100", bf16_tflops=312.0, memory_gb=80),
    Accelerator(name="L40S", bf16_tflops=362.0, memory_gb=48),
    Accelerator(name="L4", bf16_tflops=121.0, memory_gb=24),
    Accelerator(name="RTX 4090", bf16_tflops=165.2, memory_gb=24),
    Accelerator(name="RTX 3090", bf16_tflops=71.0, memory_gb=24),
)


def find_accelerator(name: str) -> Accelerator | None:
    """The entry for a driver's or a person's name of a device (`mi300x`), None if unknown."""
    for accelerator in ACCELERATORS:
        if re.search(rf"(?<![A-Z0-9]){accelerator.name}(?![0-9])", name, re.IGNORECASE):
            return accelerator
    return None


def pick_device(wish: str) -> str:
    """The type of device to train on: the wish, or for `auto` the best that is there."""
    if wish != "auto":
        return wish
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def device_name(kind: str) -> str:
    """What the driver calls the device."""
    return torch.cuda.get_device_name() if kind == "cuda" else kind


def device_memory_bytes(kind: str, sharers: int = 1) -> int:
    """Memory of one device; of the machine, divided among `sharers` processes, for cpu and mps."""
    if kind == "cuda":
        return int(torch.cuda.get_device_properties(torch.device("cuda")).total_memory)
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")  # a container may be allowed less than there is
    if limit.exists() and (text := limit.read_text().strip()).isdigit():
        total = min(total, int(text))
    return total // sharers


def available_memory_bytes() -> int | None:
    """Host memory that nothing needs now; None where the system does not say."""
    try:
        entries = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) << 10 for line in entries if "MemAvailable" in line)
    except (OSError, StopIteration):
        return None
    cgroup = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):  # no container, or one without a limit
        limit = int((cgroup / "memory.max").read_text())
        used = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        free = min(free, limit - int(used["anon"]))
    return free
