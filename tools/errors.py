"""The errors of the tools. A message names the thing, the value and the fix."""

from __future__ import annotations

from shards.errors import SummerError


class ToolError(SummerError):
    """Something that a tool cannot do, or cannot find."""


class EvaluationError(ToolError):
    """A text, a protocol or a model that cannot be scored."""


class ConversionError(ToolError):
    """A model that the target format cannot express, or an incomplete folder."""
