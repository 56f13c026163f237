"""The model card of an exported model: what it is, what it was made from, what is not known."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from model.config import count_params
from shards.errors import one_line
from shards.files import read_json
from shards.versions import VERSION
from tools.errors import ConversionError
from tools.models.llama import is_llama
from tools.models.loading import LoadedModel, has_conversed
from trainer.checkpoint.runs import EVALUATIONS

_TEMPLATE: Final = Path(__file__).with_name("model_card.jinja")
_HUB_NAME: Final = re.compile(r"[\w.-]+/[\w.-]+")
_METRICS: Final = ("acc", "acc_norm", "token_perplexity", "word_perplexity", "bits_per_byte")
"""Those that the head of the card carries, for the Hub's tables."""


@dataclass(frozen=True, kw_only=True)
class Export:
    """How a run becomes a Hugging Face folder, and what only its publisher knows."""

    dtype: Literal["bf16", "fp16", "fp32"] = "bf16"
    license: str = "other"
    language: tuple[str, ...] = ()


def model_card(
    checkpoint: Path, loaded: LoadedModel, record: Mapping[str, Any], export: Export
) -> str:
    """The README.md of a folder with the checkpoint's weights: model_card.jinja, filled in."""
    run = checkpoint.resolve().parents[1]
    kept = run / EVALUATIONS / checkpoint.name
    pages = [
        path.read_text("utf-8").strip()
        for path in (*sorted(kept.glob("*.md")), *sorted(run.glob("*.md")))
    ]
    named = (facts.get("dataset", "") for facts in record.get("data", {}).values())
    results = list(_eval_results(kept))
    head = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["summerlm"],
        license=export.license,
        language=list(export.language) or None,
        datasets=sorted({name for name in named if _HUB_NAME.fullmatch(name)}) or None,
        model_name=run.name if results else None,
        eval_results=results or None,
    )
    card = ModelCard.from_template(
        head,
        template_path=str(_TEMPLATE),
        name=run.name,
        parameters=count_params(loaded.model.config),
        shape=asdict(loaded.model.config),
        code="" if is_llama(loaded.model.config) else ", trust_remote_code=True",
        loaded=loaded,
        chat=loaded.vocabulary.chat is not None and has_conversed(checkpoint),
        record=record,
        dtype=export.dtype,
        left_out=[name for name, facts in record.get("data", {}).items() if facts.get("excluded")],
        exported_by=f"summerlm {VERSION}",
        results=[page.replace("## ", "### ", 1) for page in pages],
    )
    return str(card)


def _eval_results(kept: Path) -> Iterator[EvalResult]:
    """The figures of a checkpoint's evaluations, each with the protocol that it was made by."""
    for path in sorted(kept.glob("*.json")):
        try:
            found = [row for score in read_json(path) for row in _figures(score)]
        except (ValueError, TypeError, AttributeError) as error:
            raise ConversionError(
                f"{path} is no result of summer-eval ({one_line(error)}): remove it"
            ) from error
        for task, how, name, value in found:
            yield EvalResult(
                task_type="text-generation", dataset_type=task, dataset_name=task,
                metric_type=name, metric_value=value, metric_name=f"{name} ({how})",
            )  # fmt: skip


def _figures(score: Mapping[str, Any]) -> Iterator[tuple[str, str, str, float]]:
    """Task, protocol, metric and value; questions have their metrics in an object of their own."""
    how = score.get("protocol", f"{score.get('num_fewshot', 0)}-shot")
    for name, metric in score.get("metrics", score).items():
        value = metric.get("value") if isinstance(metric, Mapping) else metric
        if name in _METRICS and isinstance(value, int | float):
            yield str(score.get("task")), str(how), name, value
