"""Freed memory that stays with the process: on a CPU, a fifth of a step."""

from __future__ import annotations

import ctypes
from typing import Final

M_TRIM_THRESHOLD: Final = -1  # malloc.h
M_MMAP_MAX: Final = -4


def keep_freed_memory() -> bool:
    """Tell the C library to keep what tensors free for the next ones; False where it cannot be.

    glibc maps every large block anew and gives it back when it is freed: mallopt(3). The kernel
    then zeroes each page again at its first touch. Without that a compiled step of 2,048 tokens
    with 6 layers of 384 channels took 20 % less CPU time, ours and Hugging Face's alike (255,000
    page faults a step before, none after). The price: a process stays as large as it ever was.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, -1))
