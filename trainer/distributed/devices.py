"""The devices of this machine, as torch sees them."""

from __future__ import annotations

import contextlib
import ctypes
import os
from pathlib import Path
from typing import Final

import torch

from shards.errors import SummerError

_M_TRIM_THRESHOLD: Final = -1  # malloc.h
_M_MMAP_MAX: Final = -4


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


def check_devices(kind: str, processes: int) -> None:
    """SummerError unless each of this machine's processes has a device to itself."""
    if kind == "cuda" and processes > (there := torch.cuda.device_count()):
        raise SummerError(f"{processes} processes, {there} devices here: give --nproc {there}")


def kernel_kind(device: str) -> str:
    """`cuda` is two kinds of device to the arithmetic of memory: rocm pads heads otherwise."""
    return "rocm" if device == "cuda" and torch.version.hip is not None else device


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
