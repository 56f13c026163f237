"""The errors of the tools. A message names the thing, the value and the fix."""

from __future__ import annotations

from shards.errors import SummerError


class ToolError(SummerError):
    """Something that a tool cannot do, or cannot find."""


class LoadingError(ToolError):
    """No model where one was named, or a tokenizer that does not fit its weights."""


class EvaluationError(ToolError):
    """A text, a protocol or a model that cannot be scored."""


class GenerationError(ToolError):
    """A prompt or a way of sampling that cannot be."""


class ConversionError(ToolError):
    """A model that the target format cannot express, or an incomplete folder."""


class TraceError(ToolError):
    """A step, a rank or a document that a run does not have."""


class PlanError(ToolError):
    """A request for a plan that is impossible."""


class RehearsalError(ToolError):
    """A run that failed, or lacks what the rehearsal needs."""


class ReportError(ToolError):
    """A folder from which no report can be made."""
