"""What the benchmarks share: options, turns, ratios, the machine, processes, made-up shards."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

_RUN = """
import ctypes, json, os, resource, subprocess, sys, time
cores = json.loads(sys.argv[1])
if cores and hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(36, 1)  # become the parent of orphans: a fork server's work counts too
start = time.perf_counter()
done = subprocess.run(sys.argv[2:], capture_output=True, text=True)
wall_s = time.perf_counter() - start
try:
    while True:
        os.wait()
except ChildProcessError:
    pass
use = resource.getrusage(resource.RUSAGE_CHILDREN)
if done.returncode:
    sys.exit(done.stderr[-2000:] or done.stdout[-2000:])
print(json.dumps([wall_s, use.ru_utime + use.ru_stime, use.ru_maxrss / 1024, done.stdout]))
"""


@dataclass(frozen=True)
class Done:
    """What a finished process and its children cost; the memory is that of the largest one."""

    wall_s: float
    cpu_s: float
    peak_mb: float
    output: str


def parse(doc: str | None, **options: Any) -> argparse.Namespace:
    """The command line's values: an option a keyword, its default there or in argparse's settings.

    A default gives the type; a list's is that of its items.
    """
    parser = argparse.ArgumentParser(
        description=(doc or "").splitlines()[0],
        epilog=(doc or "").partition("\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name, given in options.items():
        settings: dict[str, Any] = given if isinstance(given, dict) else {"default": given}
        default = settings.get("default")
        if isinstance(default, bool):
            settings["action"] = "store_true"
        elif isinstance(default, list):
            settings = {"nargs": "+", "type": type(next(iter(default), "")), **settings}
        elif default is not None:
            settings = {"type": type(default), **settings}
        parser.add_argument(f"--{name.replace('_', '-')}", **settings)
    return parser.parse_args()


def in_turns(calls: Mapping[str, Callable[[], T]], turns: int) -> dict[str, list[T]]:
    """What each call gives in each turn; every second turn goes the other way round."""
    found: dict[str, list[T]] = {name: [] for name in calls}
    for turn in range(turns):
        for name in calls if turn % 2 else reversed(list(calls)):
            found[name].append(calls[name]())
    return found


def cpu_seconds(call: Callable[[], object]) -> float:
    """CPU seconds of one call."""
    start = time.process_time()
    call()
    return time.process_time() - start


def ratios(over: Iterable[float], under: Iterable[float]) -> str:
    """The spread of one side's figures over another's, turn by turn."""
    return spread([a / b for a, b in zip(over, under, strict=True)], "x")


def run(command: Sequence[str], cores: int = 0) -> Done:
    """Run a command, on the first `cores` cores if that is not 0, in the hands of a small parent.

    The parent has no other child: what the system reports of its children is about this command.
    """
    started = [sys.executable, "-c", _RUN, str(cores), *command]
    done = subprocess.run(started, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
    return Done(*json.loads(done.stdout))


def machine(*packages: str) -> str:
    """One line: what this was measured on, with the versions of packages that are installed."""
    memory_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return (
        f"{cpu_name()}, {os.cpu_count()} cores, {memory_gb:.0f} GB, load {os.getloadavg()[0]:.1f}; "
        f"Python {platform.python_version()}{''.join(map(_version, packages))}"
    )


def cpu_name() -> str:
    """The processor's name, as Linux gives it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _version(package: str) -> str:
    try:
        return f", {package} {version(package)}"
    except PackageNotFoundError:
        return ""


def spread(values: Sequence[float], unit: str) -> str:
    """Median and range, in three digits."""
    figures = (statistics.median(values), min(values), max(values))
    middle, low, high = (f"{v:,.0f}" if v >= 100 else f"{v:.3g}" for v in figures)
    return f"{middle} ({low} .. {high}) {unit}".rstrip()
