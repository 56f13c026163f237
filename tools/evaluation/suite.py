"""Every task by its name: what `summer-eval TASK...` does, without the command."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from shards.files import json_bytes, publish_bytes
from tools.errors import EvaluationError
from tools.evaluation.cards import heldout_card, perplexity_card, protocols_card, task_card
from tools.evaluation.contamination import Contamination, contamination
from tools.evaluation.heldout import evaluate_heldout
from tools.evaluation.multiple_choice import Setting, evaluate_task
from tools.evaluation.perplexity import Perplexity, measure
from tools.evaluation.protocols import PLANS, BosPolicy, Protocol, ProtocolName
from tools.evaluation.scoring import Progress
from tools.evaluation.tasks import find_task
from tools.evaluation.wikitext import CONFIGS, read_text
from tools.models.loading import LoadedModel


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command's options say; each task takes what concerns it.

    `batch_tokens` None is 32,768 on a GPU and 8,192 elsewhere. With `contamination` a card also
    tells the overlap with `shards`, and with what the run had seen at `checkpoint`.
    """

    data: Path | None = None
    shards: Path = Path("shards")
    protocol: str = "disjoint"
    all_protocols: bool = False
    context: int | None = None
    stride: int | None = None
    bos: str | None = None
    limit: int | None = None
    num_fewshot: int = 0
    fewshot_data: Path | None = None
    batch_tokens: int | None = None
    contamination: bool = False
    checkpoint: Path | None = None


@dataclass(frozen=True)
class Outcome:
    """A task's figures, one record for each way of scoring, its card, and its items if any."""

    task: str
    figures: Sequence[dict[str, object]]
    card: Sequence[str]
    items: Sequence[dict[str, object]] = ()


def run_task(name: str, loaded: LoadedModel, options: Options, progress: Progress) -> Outcome:
    """The score of a model on the task of that name."""
    if name == "heldout":
        return _heldout(loaded, options, progress)
    run = _perplexity if name in CONFIGS else _questions
    outcome = run(name, loaded, options, progress)
    if not options.contamination:
        return outcome
    overlap = search_contamination(name, options, progress)
    figures = [{**record, "contamination": overlap.to_json()} for record in outcome.figures]
    line = f"overlap   {overlap.in_a_line}"
    return Outcome(name, figures, [*outcome.card, line], outcome.items)


def search_contamination(name: str, options: Options, progress: Progress) -> Contamination:
    """The overlap of a task's items with the shards, and with what a run has seen."""
    return contamination(
        name,
        options.shards,
        data=options.data,
        checkpoint=options.checkpoint,
        limit=options.limit,
        progress=progress,
    )


def _questions(name: str, loaded: LoadedModel, options: Options, progress: Progress) -> Outcome:
    setting = Setting(
        data=options.data,
        examples=options.fewshot_data,
        num_fewshot=options.num_fewshot,
        limit=options.limit,
        context=options.context,
        with_bos=options.bos in ("start", "window"),
    )
    result, answers = evaluate_task(
        loaded,
        find_task(name),
        setting,
        batch_tokens=_batch_tokens(loaded, options),
        progress=progress,
    )
    items = [{"item": number, **answer.to_json()} for number, answer in enumerate(answers)]
    return Outcome(name, [result.to_json()], task_card(result), items)


def write_card(path: Path, outcomes: Sequence[Outcome]) -> None:
    """Publish the cards of some tasks: every figure in a .json, or a page in an .md."""
    if path.suffix == ".json":
        publish_bytes(path, json_bytes([record for each in outcomes for record in each.figures]))
    elif path.suffix == ".md":
        pages = (
            "\n".join([f"## {each.task}", "", "```", *each.card, "```", ""]) for each in outcomes
        )
        publish_bytes(path, "\n".join(pages).encode())
    else:
        raise EvaluationError(f"--card {path}: a card is a .md or a .json file")


def _perplexity(name: str, loaded: LoadedModel, options: Options, progress: Progress) -> Outcome:
    if options.all_protocols and (options.stride or options.bos or options.protocol != "disjoint"):
        raise EvaluationError("--all-protocols takes each as it is: leave the others' options out")
    names = list(PLANS) if options.all_protocols else [options.protocol]
    text = read_text(options.data, name)
    results = [
        measure(
            loaded,
            text,
            _protocol(each, loaded, options),
            task=name,
            limit=options.limit,
            batch_tokens=_batch_tokens(loaded, options),
            progress=progress,
        )
        for each in names
    ]
    card = protocols_card(results) if options.all_protocols else perplexity_card(results[0])
    return Outcome(name, list(map(Perplexity.to_json, results)), card)


def _protocol(name: str, loaded: LoadedModel, options: Options) -> Protocol:
    """The protocol as asked for. Like its harness, `lm-eval` puts EOS where there is no BOS."""
    vocabulary, bos_id = loaded.vocabulary, loaded.vocabulary.bos_id
    return Protocol(
        name=cast(ProtocolName, name),
        context=options.context or loaded.trained_context,
        stride=options.stride,
        bos=cast("BosPolicy | None", options.bos),
        bos_id=vocabulary.eos_id if bos_id is None and name == "lm-eval" else bos_id,
    )


def _heldout(loaded: LoadedModel, options: Options, progress: Progress) -> Outcome:
    result = evaluate_heldout(
        loaded,
        options.shards,
        context=options.context,
        limit=options.limit,
        batch_tokens=_batch_tokens(loaded, options),
        progress=progress,
    )
    return Outcome("heldout", [result.to_json()], heldout_card(result))


def _batch_tokens(loaded: LoadedModel, options: Options) -> int:
    if options.batch_tokens is not None:
        return options.batch_tokens
    return 32_768 if loaded.device.type == "cuda" else 8192
