"""The perplexity of a model on a text under a named protocol, with everything it depends on.

Four metrics say one thing, the nats (negative log-likelihood) of all scored tokens, divided by
different counts:

    token perplexity   exp(nats / scored tokens)       compares models of one tokenizer only
    word perplexity    exp(nats / words)
    byte perplexity    exp(nats / bytes)
    bits per byte      nats / ln 2 / bytes             compares any two models

Words and bytes are those of the raw text (tools/evaluation/wikitext.py). Where a protocol leaves
tokens out (a dropped tail, the first one of a window, `--limit`), both are scaled by the scored
tokens' share of the text, in the bytes that tokens stand for. The standard errors say how far a
metric would move on other windows of the same kind of text.
"""

import math
import time
from typing import Any, Final, cast

import numpy as np

from tools.errors import EvaluationError
from tools.evaluation.cards import Metric, Result
from tools.evaluation.protocols import (
    PLANS,
    BosPolicy,
    Protocol,
    ProtocolName,
    WindowPlan,
    plan_windows,
)
from tools.evaluation.scoring import Progress, Scorer, check_context, score
from tools.evaluation.tasks import TaskOptions
from tools.evaluation.wikitext import OFFICIAL_SHA256, READ_AS, EvaluationText, read_text
from tools.models.loading import LoadedModel
from tools.models.tokenizers import Vocabulary

_LARGEST_EXPONENT: Final = 709.0


def evaluate_corpus(
    loaded: LoadedModel, name: str, options: TaskOptions, progress: Progress | None = None
) -> list[Result]:
    """The perplexity of a model on a corpus under the chosen protocol, or under each of them."""
    every = options.all_protocols
    if every and (options.stride or options.bos or options.protocol != "disjoint"):
        raise EvaluationError("--all-protocols takes each as it is: leave the others' options out")
    text = read_text(options.data, name)
    given = {each: getattr(options, each) for each in ("limit", "batch_tokens")}
    return [
        measure_perplexity(
            loaded, text, _protocol(each, loaded, options), task=name, **given, progress=progress
        )
        for each in (PLANS if every else [options.protocol])
    ]


def measure_perplexity(
    loaded: LoadedModel,
    text: EvaluationText,
    protocol: Protocol,
    *,
    task: str = "wikitext2",
    limit: int | None = None,
    batch_tokens: int | None = None,
    progress: Progress | None = None,
) -> Result:
    """The model's perplexity on a text, over its first `limit` windows or pages (None: all)."""
    check_context(loaded, protocol.context)
    started = time.monotonic()
    pieces = text.pieces(protocol.name)
    by_page = protocol.name == "lm-eval"
    chosen = pieces[:limit] if by_page else pieces
    ids = [np.asarray(loaded.vocabulary.encode(piece.text), np.int64) for piece in chosen]
    if not any(map(len, ids)):
        raise EvaluationError("the text is empty: name another file with --data")
    all_windows = plan_windows(ids, protocol)
    plan = all_windows if by_page else all_windows[:limit]
    scored = score(Scorer.of(loaded), plan, batch_tokens=batch_tokens, progress=progress)
    share = scored_share(plan, loaded.vocabulary)
    n_bytes = share * sum(piece.n_bytes for piece in chosen)
    n_words = share * sum(piece.n_words for piece in chosen)
    nats, n_scored, stderr = scored.total_nats, scored.total_targets, scored.standard_error
    by_token = perplexity(nats, n_scored)
    settings = {
        "nats": nats,
        "protocol": protocol.name,
        "context": protocol.context,
        "stride": protocol.resolved_stride,
        "bos": protocol.resolved_bos,
        "read_as": READ_AS[protocol.name],
        "text_sha256": text.sha256,
        "official_text": text.sha256 == OFFICIAL_SHA256,
        "text_bytes": text.n_bytes,
        "text_words": text.n_words,
        "text_tokens": len(plan.ids),
        "limit": limit,
        "windows": len(plan),
        "scored_tokens": n_scored,
        "tail_dropped": all_windows.tail_dropped,
        "scored_share": share,
        "scored_bytes": n_bytes,
        "scored_words": n_words,
        "beyond_training": protocol.context > loaded.trained_context,
        "time_s": time.monotonic() - started,
    }
    return Result(
        task=task,
        metrics={
            "token_perplexity": Metric(by_token, _times(stderr, by_token)),
            "word_perplexity": perplexity(nats, n_words),
            "byte_perplexity": perplexity(nats, n_bytes),
            "bits_per_byte": Metric(
                nats / math.log(2) / n_bytes, _times(stderr, n_scored / math.log(2) / n_bytes)
            ),
        },
        settings=settings,
        model=loaded.describe(),
        notes=_notes(settings, loaded.trained_context),
        samples={"bits_per_byte": (scored.nats / math.log(2) / n_bytes).tolist()},
    )


def scored_share(plan: WindowPlan, vocabulary: Vocabulary) -> float:
    """The scored tokens' share of the text, in bytes that tokens stand for."""
    sizes = np.array([len(piece) for piece in vocabulary.pieces])[plan.ids]
    return float(sizes[plan.scored_places()].sum() / sizes.sum())


def perplexity(nats: float, count: float) -> float | None:
    """exp(nats / count); None where nothing was counted or the result is beyond any float."""
    if not count or nats / count > _LARGEST_EXPONENT:
        return None
    return math.exp(nats / count)


def _times(error: float | None, factor: float | None) -> float | None:
    """A standard error of x as one of f(x), given f's derivative."""
    return None if error is None or factor is None else error * factor


def _protocol(name: str, loaded: LoadedModel, options: TaskOptions) -> Protocol:
    """The protocol as asked for. Like its harness, `lm-eval` takes EOS where there is no BOS."""
    vocabulary, bos_id = loaded.vocabulary, loaded.vocabulary.bos_id
    return Protocol(
        name=cast(ProtocolName, name),
        context=options.context or loaded.trained_context,
        stride=options.stride,
        bos=cast("BosPolicy | None", options.bos),
        bos_id=vocabulary.eos_id if bos_id is None and name == "lm-eval" else bos_id,
    )


def _notes(found: dict[str, Any], trained_context: int) -> list[str]:
    notes = [
        f"text      {found['text_bytes']:,} bytes, {found['text_words']:,} words; "
        f"sha256 {found['text_sha256']}",
        f"protocol  {found['protocol']}, context {found['context']:,}, stride "
        f"{found['stride']:,}, BOS {found['bos']}, {found['read_as']}",
        f"scored    {found['scored_tokens']:,} of {found['text_tokens']:,} tokens in "
        f"{found['windows']:,} windows{' (a limit)' if found['limit'] else ''}, "
        f"{found['scored_share']:.4%} of the text's bytes; "
        f"tail of {found['tail_dropped']:,} tokens dropped",
    ]
    if not found["official_text"]:
        notes.append("note      this is NOT WikiText's raw test split: compare no published figure")
    if found["limit"]:
        notes.append("note      with a limit each protocol scores another stretch of the text")
    if found["beyond_training"]:
        notes.append(
            f"note      context {found['context']:,} is beyond training, where sequences had "
            f"{trained_context:,} tokens"
        )
    return notes
