"""What can go wrong while training, each with the thing, the value and the fix in its message."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from shards.errors import SummerError


class ConfigError(SummerError):
    """A key, a preset, a mixture or a machine that does not fit what was asked for."""


class CheckpointError(SummerError):
    """A checkpoint that cannot be written, or none that can be loaded."""


class TrainingError(SummerError):
    """A run that cannot go on."""


class LostRankError(TrainingError):
    """A run that goes on when all its ranks are started again."""


def at_least(section: str, config: object, **minima: float) -> None:
    """ConfigError for a key of a configuration that is below its minimum."""
    for key, minimum in minima.items():
        value = getattr(config, key)
        if not value >= minimum:
            raise ConfigError(f"{section}{key}={value}: must be at least {minimum}")


def one_of(section: str, config: object, **choices: Iterable[str]) -> None:
    """ConfigError for a key of a configuration whose value is not among its choices."""
    for key, names in choices.items():
        if (value := getattr(config, key)) not in names:
            raise ConfigError(
                f"{section}{key}={value}: {did_you_mean(value, names)}there are: {', '.join(names)}"
            )


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """`did you mean ...? ` for the name most like this one, or nothing."""
    near = difflib.get_close_matches(name, list(names), 1)
    return f"did you mean {near[0]}? " if near else ""
