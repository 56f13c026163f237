"""What every benchmark prints: the machine, and a median with its spread."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path


def machine(*packages: str) -> str:
    """One line that tells what this was measured on."""
    cpu = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    memory_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    versions = "".join(f", {name} {version(name)}" for name in packages)
    return (
        f"{cpu}, {os.cpu_count()} cores, {memory_gb:.0f} GB; "
        f"Python {platform.python_version()}{versions}"
    )


def spread(values: Sequence[float], unit: str) -> str:
    """Median and range, in three digits."""
    figures = (statistics.median(values), min(values), max(values))
    middle, low, high = (f"{v:,.0f}" if v >= 100 else f"{v:.3g}" for v in figures)
    return f"{middle} ({low} .. {high}) {unit}".rstrip()
