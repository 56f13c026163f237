"""Failures of preparation that a user can fix."""

from shards.errors import SummerError


class SourceError(SummerError):
    """A source that is unknown, cannot be had, or does not hold what it should."""


class TokenizerError(SummerError):
    """A tokenizer that cannot be loaded, trained or used for this source."""


class PrepareError(SummerError):
    """Work that cannot start, or cannot go on, as it was asked for."""
