"""What can go wrong while training, each with the thing, the value and the mend in its message."""

from __future__ import annotations

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
    """Refuse, with ConfigError, a key of a configuration that is below its minimum."""
    for key, minimum in minima.items():
        value = getattr(config, key)
        if not value >= minimum:
            raise ConfigError(f"{section}{key}={value}: must be at least {minimum}")
