"""The perplexity of a model on a text under a named protocol, with everything it depends on.

Four figures say one thing, the nats of all scored ids, divided by different counts:

    token perplexity   exp(nats / scored ids)          compares models of one tokenizer only
    word perplexity    exp(nats / words)
    byte perplexity    exp(nats / bytes)
    bits per byte      nats / ln 2 / bytes             compares any two models

Words and bytes are those of the raw text (tools/wikitext.py). Where a protocol leaves ids out (a
dropped tail, the first id of a window, `--limit`), both are scaled by the scored ids' share of the
text: the bytes that the scored ids stand for over the bytes that all ids stand for, exactly.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from typing import Final

import numpy as np

from tools.errors import EvaluationError
from tools.loading import LoadedModel, max_context
from tools.protocols import Ids, Plan, Protocol, make_plan
from tools.scoring import Progress, score
from tools.vocabulary import Vocabulary
from tools.wikitext import EvaluationText

_LARGEST_EXPONENT: Final = 709.0


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """One model's score on one text. Counts of the text are whole; `scored_*` are what counted."""

    task: str
    token_perplexity: float | None
    word_perplexity: float | None
    byte_perplexity: float | None
    bits_per_byte: float
    nats: float
    protocol: str
    context: int
    stride: int
    bos: str
    join: str
    text_sha256: str
    text_bytes: int
    text_words: int
    text_tokens: int
    limit: int | None
    windows: int
    scored_tokens: int
    tail_dropped: int
    scored_share: float
    scored_bytes: float
    scored_words: float
    beyond_training: bool
    model: dict[str, object]
    time_s: float

    def to_json(self) -> dict[str, object]:
        """All figures under their names."""
        return asdict(self)


def measure(
    loaded: LoadedModel,
    text: EvaluationText,
    protocol: Protocol,
    *,
    task: str = "wikitext2",
    limit: int | None = None,
    batch_tokens: int = 8192,
    progress: Progress | None = None,
) -> Perplexity:
    """The model's perplexity on a text, over the first `limit` windows (None: all)."""
    refuse_context(loaded, protocol.context)
    started = time.monotonic()
    whole = make_plan(encode(loaded.vocabulary, text), protocol)
    plan = whole[:limit]
    scored = score(loaded.scorer, plan, batch_tokens=batch_tokens, progress=progress)
    share = scored_share(plan, loaded.vocabulary)
    n_bytes, n_words = share * text.n_bytes, share * text.n_words
    nats = scored.total_nats
    return Perplexity(
        task=task,
        token_perplexity=perplexity(nats, scored.total_targets),
        word_perplexity=perplexity(nats, n_words),
        byte_perplexity=perplexity(nats, n_bytes),
        bits_per_byte=nats / math.log(2) / n_bytes,
        nats=nats,
        protocol=protocol.name,
        context=protocol.context,
        stride=protocol.resolved_stride,
        bos=protocol.bos,
        join=text.join,
        text_sha256=text.sha256,
        text_bytes=text.n_bytes,
        text_words=text.n_words,
        text_tokens=len(plan.ids),
        limit=limit,
        windows=len(plan),
        scored_tokens=scored.total_targets,
        tail_dropped=whole.tail_dropped,
        scored_share=share,
        scored_bytes=n_bytes,
        scored_words=n_words,
        beyond_training=protocol.context > loaded.trained_context,
        model=loaded.describe(),
        time_s=time.monotonic() - started,
    )


def encode(vocabulary: Vocabulary, text: EvaluationText) -> Ids:
    """The ids of the joined text, as one piece. [T]"""
    ids = np.asarray(vocabulary.encode(text.joined), dtype=np.int64)
    if not len(ids):
        raise EvaluationError("the text is empty: name another file with --data")
    return ids


def scored_share(plan: Plan, vocabulary: Vocabulary) -> float:
    """The scored ids' share of the text, in bytes that ids stand for."""
    sizes = vocabulary.n_bytes()[plan.ids]
    return float(sizes[plan.scored_places()].sum() / sizes.sum())


def refuse_context(loaded: LoadedModel, context: int) -> None:
    """EvaluationError beyond the context that the model computes exactly."""
    limit = max_context(loaded.model.config)
    if limit is not None and context > limit:
        raise EvaluationError(
            f"context {context:,}: with ALiBi this model is exact up to {limit:,} tokens; "
            f"choose --context {limit} or less"
        )


def perplexity(nats: float, count: float) -> float | None:
    """exp(nats / count); None where nothing was counted or the result is beyond any float."""
    if not count or nats / count > _LARGEST_EXPONENT:
        return None
    return math.exp(nats / count)
