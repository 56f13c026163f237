"""The perplexity of a model on a text under a named protocol, with everything it depends on.

Four figures say one thing, the nats of all scored ids, divided by different counts:

    token perplexity   exp(nats / scored ids)          compares models of one tokenizer only
    word perplexity    exp(nats / words)
    byte perplexity    exp(nats / bytes)
    bits per byte      nats / ln 2 / bytes             compares any two models

Words and bytes are those of the raw text (tools/evaluation/wikitext.py). Where a protocol leaves
ids out (a dropped tail, the first id of a window, `--limit`), both are scaled by the scored ids'
share of the text: the bytes that the scored ids stand for over the bytes that all ids stand for,
exactly. The standard errors say how far the figures would move on other windows of the same kind of
text.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Final

import numpy as np

from tools.errors import EvaluationError
from tools.evaluation.protocols import Ids, Plan, Protocol, plan_texts
from tools.evaluation.scoring import Progress, Scorer, score
from tools.evaluation.wikitext import READ_AS, EvaluationText, Piece
from tools.models.loading import LoadedModel, max_context
from tools.models.vocabulary import Vocabulary

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
    token_perplexity_error: float | None
    bits_per_byte_error: float | None
    protocol: str
    context: int
    stride: int
    bos: str
    read_as: str
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
    """The model's perplexity on a text, over its first `limit` windows or pages (None: all)."""
    refuse_context(loaded, protocol.context)
    started = time.monotonic()
    pieces = text.pieces(protocol.name)
    by_page = protocol.name == "lm-eval"
    chosen = pieces[:limit] if by_page else pieces
    whole = plan_texts(encode(loaded.vocabulary, chosen), protocol)
    plan = whole if by_page else whole[:limit]
    scored = score(Scorer.of(loaded), plan, batch_tokens=batch_tokens, progress=progress)
    share = scored_share(plan, loaded.vocabulary)
    n_bytes = share * sum(piece.n_bytes for piece in chosen)
    n_words = share * sum(piece.n_words for piece in chosen)
    nats, error = scored.total_nats, scored.standard_error
    token_perplexity = perplexity(nats, scored.total_targets)
    return Perplexity(
        task=task,
        token_perplexity=token_perplexity,
        word_perplexity=perplexity(nats, n_words),
        byte_perplexity=perplexity(nats, n_bytes),
        bits_per_byte=nats / math.log(2) / n_bytes,
        nats=nats,
        token_perplexity_error=_times(error, token_perplexity),
        bits_per_byte_error=_times(error, scored.total_targets / math.log(2) / n_bytes),
        protocol=protocol.name,
        context=protocol.context,
        stride=protocol.resolved_stride,
        bos=protocol.resolved_bos,
        read_as=READ_AS[protocol.name],
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


def encode(vocabulary: Vocabulary, pieces: Sequence[Piece]) -> list[Ids]:
    """The ids of each text, without BOS."""
    ids = [np.asarray(vocabulary.encode(piece.text), dtype=np.int64) for piece in pieces]
    if not sum(map(len, ids)):
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


def _times(error: float | None, factor: float | None) -> float | None:
    """A standard error carried on by a figure's derivative."""
    return None if error is None or factor is None else error * factor
