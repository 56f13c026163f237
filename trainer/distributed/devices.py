"""What known accelerators have. For an unknown one, and for CPUs, no MFU is shown."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from shards.errors import SummerError

_M_TRIM_THRESHOLD: Final = -1  # malloc.h
_M_MMAP_MAX: Final = -4


@dataclass(frozen=True)
class Accelerator:
    """One device as torch counts them (half of an MI250X), as its maker states it."""

    name: str
    bf16_tflops: float  # the dense peak
    memory_gb: int
    memory_tb_s: float
    source: str
    gemm_tflops: float | None = None  # what the maker itself measures in bf16 products
    gemm_source: str = ""


_MAF: Final = "AMD ROCm blog, Measuring Max-Achievable FLOPs - Part 2 (2025-02-28)"

# Dense figures (NVIDIA's tables print twice that, "with sparsity").
# The first whose name is part of the driver's name for the device is taken.
# fmt: off
ACCELERATORS: Final = (
    Accelerator("MI355X", 2500.0, 288, 8.0, "AMD Instinct MI355X data sheet"),
    Accelerator("MI350X", 2300.0, 288, 8.0, "AMD Instinct MI350X data sheet"),
    Accelerator("MI325X", 1307.4, 256, 6.0, "AMD Instinct MI325X data sheet", 843.0, _MAF),
    Accelerator("MI300X", 1307.4, 192, 5.3, "AMD Instinct MI300X data sheet", 708.0, _MAF),
    Accelerator("MI250X", 191.5, 64, 1.6, "AMD Instinct MI250X data sheet"),
    Accelerator("MI210", 181.0, 64, 1.6, "AMD Instinct MI210 data sheet"),
    Accelerator("B200", 2250.0, 180, 8.0, "NVIDIA DGX B200 data sheet"),
    Accelerator("GH200", 989.4, 96, 4.0, "NVIDIA GH200 data sheet"),
    Accelerator("H200", 989.4, 141, 4.8, "NVIDIA H200 data sheet"),
    Accelerator("H100 PCIe", 756.0, 80, 2.0, "NVIDIA H100 data sheet"),
    Accelerator("H100 NVL", 835.0, 94, 3.9, "NVIDIA H100 NVL data sheet"),
    Accelerator("H100", 989.4, 80, 3.35, "NVIDIA H100 data sheet"),
    Accelerator("A100", 312.0, 80, 2.039, "NVIDIA A100 80GB data sheet"),
    Accelerator("L40S", 362.0, 48, 0.864, "NVIDIA L40S data sheet"),
    Accelerator("L4", 121.0, 24, 0.3, "NVIDIA L4 data sheet"),
    Accelerator("RTX 4090", 165.2, 24, 1.008, "NVIDIA Ada GPU architecture white paper"),
    Accelerator("RTX 3090", 71.0, 24, 0.936, "NVIDIA Ampere GA102 architecture white paper"),
)
# fmt: on


def find_accelerator(name: str) -> Accelerator | None:
    """The entry for a driver's or a person's name of a device (`mi300x`), None if unknown."""
    for accelerator in ACCELERATORS:
        if re.search(rf"(?<![A-Z0-9]){accelerator.name}(?![0-9])", name, re.IGNORECASE):
            return accelerator
    return None


_GPU_NODES: Final = {"an AMD GPU": Path("/dev/kfd"), "an NVIDIA GPU": Path("/dev/nvidiactl")}


def unused_gpu() -> str:
    """Why torch does not use the GPU that this machine has; empty where it does, or has none."""
    there = next((name for name, node in _GPU_NODES.items() if node.exists()), "")
    if not there or torch.cuda.is_available():
        return ""
    if _built_for_cpu():
        return f"torch {torch.__version__} is built for the CPU and cannot use {there} that is here"
    return (
        f"torch {torch.__version__} does not see {there} that is here: look at its driver, at who "
        "may open /dev/kfd or /dev/nvidia*, and at CUDA_ and HIP_VISIBLE_DEVICES"
    )


def _built_for_cpu() -> bool:
    return torch.version.cuda is None and torch.version.hip is None


def pick_device(requested: str) -> str:
    """The type of device to use: the one requested, or for `auto` the best that is there.

    SummerError for one that is not there.
    """
    there = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    best = next(kind for kind, is_there in there.items() if is_there)
    if not there.get(requested, True):
        reason = f"torch {torch.__version__} sees none here"
        if requested == "cuda" and _built_for_cpu():
            reason = (
                f"torch {torch.__version__} is built for the CPU: install its CUDA or ROCm build"
            )
        raise SummerError(f"device {requested}: {reason}; leave it out, and {best} is taken")
    return best if requested == "auto" else requested


def emulates_bf16() -> bool:
    """Whether this CPU has no bf16 arithmetic that torch would use (AVX-512 on x86).

    On AVX2 alone a product of 256 x 256 then takes 72 times as long as in fp32.
    """
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    return not supported()


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


def keep_freed_memory() -> bool:
    """Whether the C library was made to keep what tensors free for the next ones.

    glibc gives every large block back when it is freed, mallopt(3), and the kernel zeroes each page
    of the next. Without that a compiled step of 2,048 tokens with 6 layers of 384 channels took
    20 % less CPU time, ours and Hugging Face's alike. A process stays as large as it ever was.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, -1))
