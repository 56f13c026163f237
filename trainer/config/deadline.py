"""When a job must have saved: its `stop_after`, or what is left of its Slurm allocation."""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Mapping
from typing import Final

from trainer.errors import ConfigError

STARTED: Final = "SUMMER_START_UNIX_S"
"""Variable with the time at which the job began: its ranks, and restarts, count from there."""

_SLURM_END: Final = "SLURM_JOB_END_TIME"  # Unix seconds
SLOW_DISK: Final = 100e6  # bytes a second, of a state that is saved before the end
_UNITS: Final = {"d": 86_400, "h": 3600, "m": 60, "s": 1}


def parse_duration(text: str) -> float:
    """Seconds of "23h50m", "90m" or "1d12h"; infinity for an empty text; else ConfigError."""
    found = re.findall(r"(\d{1,6})([dhms])", text)
    if "".join(number + unit for number, unit in found) != text:
        raise ConfigError(f"stop_after={text}: write it as 23h50m, 90m or 1d12h")
    return sum(int(number) * _UNITS[unit] for number, unit in found) if text else math.inf


def stop_time(
    stop_after: str, state_bytes: int, environment: Mapping[str, str] = os.environ
) -> float:
    """Unix seconds after which no further step is begun; infinity without a limit.

    Of a Slurm allocation a minute stays, and what `state_bytes` take on a slow disk.
    """
    started = float(environment.get(STARTED, time.time()))
    end = environment.get(_SLURM_END, "")
    slurm = float(end) - 60 - state_bytes / SLOW_DISK if end.isdigit() else math.inf
    return min(started + parse_duration(stop_after), slurm)
