"""Sections of a run's configuration that belong to one part of the trainer each.

They stand here and not with those parts because a mistake in a command should not take the seconds
that importing torch does.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from trainer.errors import ConfigError, at_least


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to checkpoint, by steps or by minutes (0: not by that), and what to keep.

    The last `keep_last` stay, and those whose step is a multiple of `keep_every` (0: none). A copy
    of each goes to the folder `mirror`, on another disk or machine (empty: nowhere).
    """

    interval_steps: int = 0
    interval_minutes: float = 30.0
    keep_last: int = 2
    keep_every: int = 0
    asynchronous: bool = True  # written while training goes on, from a copy in host memory
    mirror: str = ""

    def __post_init__(self) -> None:
        at_least("checkpoint.", self, interval_steps=0, interval_minutes=0, keep_every=0)
        at_least("checkpoint.", self, keep_last=2)


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """Worker processes of each rank (0: none), and the micro-batches that each reads ahead."""

    num_workers: int = 2
    prefetch: int = 4

    def __post_init__(self) -> None:
        at_least("loader.", self, num_workers=0, prefetch=1)


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """When an update is skipped, and what follows when that does not end.

    `sigma=0` skips only what is not finite. `max_rollbacks` counts over the whole run. A rank
    that shows no sign of life for `hang_timeout_s` is taken for lost (0: never).
    """

    window: int = 128
    sigma: float = 6.0
    ratio: float = 2.0
    patience: int = 20
    max_rollbacks: int = 3
    hang_timeout_s: float = 600.0

    def __post_init__(self) -> None:
        at_least("guard.", self, window=8, sigma=0, ratio=1, patience=1, max_rollbacks=0)
        at_least("guard.", self, hang_timeout_s=0)


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """Held-out loss inside training: every `interval` steps (0: never), `rows` of each source."""

    interval: int = 0
    rows: int = 32

    def __post_init__(self) -> None:
        at_least("validation.", self, interval=0, rows=1)


def parse_steps(text: str) -> range:
    """The steps that `profile_steps` names, counted from 1; empty for an empty text."""
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    if text and match is None:
        raise ConfigError(f"profile_steps={text}: write a step, 10, or first and last, 10-12")
    steps = range(int(match[1]), int(match[2] or match[1]) + 1) if match else range(0)
    if match and not (steps and steps[0]):
        raise ConfigError(f"profile_steps={text}: steps count from 1, the first one first: 10-12")
    return steps
