"""How fast this machine really is: products, memory, disk and proven rows.

What is short is timed in rounds, of which the median counts and one interruption does not.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np
import torch

from shards.files import publish
from shards.reader import ShardReader

_SECONDS: Final = 0.5
_ROUNDS: Final = 5
_READ_AT_ONCE: Final = 64


def waiter(device: str) -> Callable[[], None]:
    """What waits for the device to have done all it was given."""
    if device == "cuda":
        return torch.cuda.synchronize
    return torch.mps.synchronize if device == "mps" else lambda: None


def time_of(act: Callable[[], object], device: str, seconds: float = _SECONDS) -> float:
    """Seconds that `act` takes on the device when it is warm: the median round, or its one run."""
    wait = waiter(device)
    act()
    wait()
    start = time.perf_counter()
    act()
    wait()
    once = time.perf_counter() - start
    if once > seconds:
        return once
    count = max(1, int(seconds / _ROUNDS / max(1e-6, once)))
    rounds: list[float] = []
    began = time.perf_counter()
    # a first run in a lucky moment must not make the others long
    while len(rounds) < _ROUNDS and time.perf_counter() - began < 2 * seconds:
        rounds.append(_round(act, wait, count, seconds))
    return statistics.median(rounds)


def _round(act: Callable[[], object], wait: Callable[[], None], count: int, limit: float) -> float:
    """Seconds of one `act`, of up to `count` in a row."""
    start, done = time.perf_counter(), 0
    while done < count and time.perf_counter() - start < limit:
        act()
        done += 1
    wait()
    return (time.perf_counter() - start) / done


def product_rate(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of square products."""
    n = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return float(2 * n**3 / time_of(lambda: torch.mm(a, b), device))


def memory_rate(device: str) -> float:
    """Bytes a second of a copy within the device's memory, read and written bytes both counted."""
    source = torch.ones(
        (1 << 30) if device == "cuda" else (1 << 28), dtype=torch.uint8, device=device
    )
    target = torch.empty_like(source)
    return 2 * source.numel() / time_of(lambda: target.copy_(source), device)


def write_rate(folder: Path, n_bytes: int) -> float:
    """Bytes a second of a file that is really on the disk."""
    block = os.urandom(1 << 20)
    path = folder / f".doctor-{os.getpid()}"
    start = time.perf_counter()
    try:
        with publish(path) as file:
            for _ in range(n_bytes // len(block)):
                file.write(block)
        return n_bytes / (time.perf_counter() - start)
    finally:
        path.unlink(missing_ok=True)


def read_rate(reader: ShardReader, seconds: float = _SECONDS) -> float:
    """Tokens a second of random rows, each proven by its digest.

    Files are opened as they are needed, as in training. ShardError where a row is damaged.
    """
    generator = np.random.default_rng(0)
    n_rows, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        reader.rows(generator.integers(0, reader.n_rows, _READ_AT_ONCE))
        n_rows += _READ_AT_ONCE
    return n_rows * reader.seq_len / (time.perf_counter() - start)
