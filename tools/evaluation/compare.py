"""Models side by side on the same items or windows: the difference, with its paired error.

Two models find the same items hard, so the error of a difference is far smaller than what the
errors of two scores suggest. It is that of a sum of paired differences (a paired t-test's, Student
1908); the first model is what the others are compared with.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from tools.errors import EvaluationError
from tools.evaluation.cards import Metric, Result
from tools.models.hf_folder import is_hub_folder
from tools.models.loading import ModelSpec
from trainer.checkpoint.runs import is_checkpoint

_SAME: Final = (
    "items_sha256", "text_sha256", "num_fewshot", "protocol", "context", "stride", "bos",
)  # fmt: skip


def spec_of(folder: Path, **where: Any) -> ModelSpec:
    """The model in a folder: a run, a checkpoint or a Hugging Face folder."""
    if is_hub_folder(folder):
        return ModelSpec(hf=folder, **where)
    if is_checkpoint(folder):
        return ModelSpec(checkpoint=folder, **where)
    return ModelSpec(run=folder, **where)


def compare(results: Sequence[Result]) -> Result:
    """How far the other models are from the first on a task, each metric with its paired error.

    EvaluationError where they were not scored on the same items, or in other windows.
    """
    first = results[0]
    metrics: dict[str, Metric] = {}
    rows = [("", *first.samples, *(f"{name} - first" for name in first.samples))]
    for number, other in enumerate(results):
        _check_same(first, other)
        differences = dict(_differences(first, other)) if number else {}
        metrics |= {f"{name}_{number}": found for name, found in differences.items()}
        rows.append((
            str(other.model["model"]),
            *(f"{other[name]:.4f}" for name in first.samples),
            *(str(differences.get(name, "")) for name in first.samples),
        ))  # fmt: skip
    n = len(next(iter(first.samples.values())))
    settings = {key: first.settings[key] for key in _SAME if key in first.settings}
    scores = [{name: each[name] for name in first.samples} for each in results]
    models = [dict(each.model) for each in results]
    return Result(
        task=f"compare {first.task}",
        metrics=metrics,
        settings={**settings, "pairs": n, "scores": scores, "models": models},
        model={},
        about=f"each against {results[0].model['model']}",
        table=rows,
        notes=[f"paired over {n:,} {'windows' if 'protocol' in settings else 'items'}; beyond two "
               "standard errors a difference is more than chance in 19 of 20 cases"],
    )  # fmt: skip


def _differences(first: Result, other: Result) -> Iterator[tuple[str, Metric]]:
    """Of each metric the sum of the items' differences, and its standard error."""
    for name, values in first.samples.items():
        each = np.asarray(other.samples[name]) - np.asarray(values)
        error = float(np.std(each, ddof=1)) * math.sqrt(len(each)) if len(each) > 1 else None
        yield name, Metric(float(each.sum()), error)


def _check_same(first: Result, other: Result) -> None:
    names = f"{first.model['model']} and {other.model['model']}"
    if not first.samples:
        raise EvaluationError(f"compare: {first.task} has no items of its own: choose another task")
    for key in _SAME:
        if first.settings.get(key) != other.settings.get(key):
            raise EvaluationError(
                f"compare: {names} were scored with {key} {first.settings.get(key)} and "
                f"{other.settings.get(key)}: give it, so that it is the same (--context, --bos)"
            )
    of_windows, key = "protocol" in first.settings, "tokenizer_sha256"
    if of_windows and first.model[key] != other.model[key]:
        raise EvaluationError(
            f"compare: {names} have other tokenizers, so their windows hold other text: compare "
            "them on questions, as lambada"
        )
