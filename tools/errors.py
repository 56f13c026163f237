"""What can go wrong when a model is looked at. A message names the thing, the value, the mend."""

from __future__ import annotations

from shards.errors import SummerError


class ToolError(SummerError):
    """A tool was asked for something that cannot be had."""


class LoadingError(ToolError):
    """No model where one was named, or a tokenizer that does not fit its weights."""


class EvaluationError(ToolError):
    """A text, a protocol or a model that gives no score."""


class GenerationError(ToolError):
    """A prompt or a way of sampling that cannot be."""


class ConversionError(ToolError):
    """A model that the other side cannot compute, or a folder that does not hold it whole."""


class TraceError(ToolError):
    """A step, a rank or a document that a run does not have."""


class PlanError(ToolError):
    """A plan for a machine or a budget that does not add up."""


class RehearsalError(ToolError):
    """A run that did not do what the rehearsal needs of it."""


class ReportError(ToolError):
    """A report without anything to show, or without the means to draw it."""
