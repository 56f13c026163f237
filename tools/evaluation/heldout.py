"""Held-out documents of prepared sources: the model's bits per byte beside simpler coders'.

Every document is taken whole out of the held-out rows, from its BOS to the next, and scored alone
from its BOS: windows of the model's context, each id once, the EOS that ends it included. Beside
the model stand a unigram of tokens, counted in the training rows and charged for the same ids, and
gzip and xz on the same text, a source's documents run together (their best case). All are divided
by the UTF-8 bytes of the documents' text.
"""

from __future__ import annotations

import functools
import math
import operator
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from shards.format import Manifest
from shards.reader import ShardReader, find_sources
from tools.errors import EvaluationError
from tools.evaluation.baselines import (
    CompressedSizes,
    Unigram,
    compressed_sizes,
    count_training_ids,
)
from tools.evaluation.perplexity import perplexity, refuse_context
from tools.evaluation.protocols import Ids, Window, document_windows
from tools.evaluation.scoring import Progress, Scorer, score
from tools.models.loading import LoadedModel
from tools.models.vocabulary import Vocabulary

_ROWS_AT_ONCE: Final = 256


@dataclass(frozen=True, kw_only=True)
class SourceScore:
    """One source's held-out documents. Bits per byte of each coder; tokens are those scored."""

    source: str
    documents: int
    tokens: int
    bytes: int
    model: float
    unigram: float
    gzip: float
    xz: float
    token_perplexity: float | None


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """The held-out score of a model: `sources` in order of name, and `total` over all of them.

    `without` names prepared sources of which nothing is held out.
    """

    sources: tuple[SourceScore, ...]
    total: SourceScore
    without: tuple[str, ...]
    context: int
    compressors_see: str
    model: dict[str, object]
    time_s: float

    @property
    def below_unigram(self) -> float:
        """How far the model's bits per byte are below the unigram's, as a share of those."""
        return 1 - self.total.model / self.total.unigram

    def to_json(self) -> dict[str, object]:
        """All figures under their names."""
        return {"task": "heldout", **asdict(self), "below_unigram": self.below_unigram}


@dataclass(frozen=True, kw_only=True)
class _Collected:
    """What one source, or several together, give to the evaluation; nats are the unigram's."""

    source: str
    n_documents: int
    windows: list[Window]
    sizes: CompressedSizes
    unigram_nats: float

    def __add__(self, other: _Collected) -> _Collected:
        return _Collected(
            source="all",
            n_documents=self.n_documents + other.n_documents,
            windows=self.windows + other.windows,
            sizes=self.sizes + other.sizes,
            unigram_nats=self.unigram_nats + other.unigram_nats,
        )


def evaluate_heldout(
    loaded: LoadedModel,
    shards: Path,
    *,
    context: int | None = None,
    limit: int | None = None,
    batch_tokens: int = 8192,
    progress: Progress | None = None,
) -> HeldOut:
    """The model's score on the held-out documents of every source in a folder of shards.

    `limit` takes the first documents of each source; `context` is the training length by default.
    EvaluationError where nothing is held out or the shards' tokenizer is another than the model's.
    """
    context = loaded.trained_context if context is None else context
    refuse_context(loaded, context)
    started = time.monotonic()
    manifests = find_sources(shards)
    held_out = [
        _collect(loaded.vocabulary, shards / name, manifest, context, limit)
        for name, manifest in manifests.items()
        if manifest.n_val_rows
    ]
    if not held_out:
        raise EvaluationError(
            f"{shards}: no document is held out in {', '.join(manifests)}: prepare them again "
            "with a larger --val-fraction"
        )
    together = functools.reduce(operator.add, held_out)
    scored = score(
        Scorer.of(loaded), together.windows, batch_tokens=batch_tokens, progress=progress
    )
    nats = scored.nats
    ends = np.cumsum([len(source.windows) for source in held_out])
    nats_a_source = np.split(nats, ends[:-1])
    return HeldOut(
        sources=tuple(map(_source_score, held_out, nats_a_source)),
        total=_source_score(together, nats),
        without=tuple(name for name, manifest in manifests.items() if not manifest.n_val_rows),
        context=context,
        compressors_see="the documents of a source run together",
        model=loaded.describe(),
        time_s=time.monotonic() - started,
    )


def held_out_documents(folder: Path, manifest: Manifest) -> Iterator[Ids]:
    """The held-out documents of a source, each from its BOS to the next, without padding."""
    reader = ShardReader(folder, "val", manifest)
    tokenizer = manifest.facts.tokenizer
    begun: list[Ids] = []
    for begin in range(0, reader.n_rows, _ROWS_AT_ONCE):
        indices = np.arange(begin, min(begin + _ROWS_AT_ONCE, reader.n_rows))
        ids = reader.rows(indices)[0].ravel().astype(np.int64)
        ids = ids[ids != tokenizer.pad_id]
        pieces = np.split(ids, np.flatnonzero(ids == tokenizer.bos_id))
        begun.append(pieces[0])
        for piece in pieces[1:]:
            if document := [part for part in begun if len(part)]:
                yield np.concatenate(document)
            begun = [piece]
    if document := [part for part in begun if len(part)]:
        yield np.concatenate(document)


def _collect(
    vocabulary: Vocabulary, folder: Path, manifest: Manifest, context: int, limit: int | None
) -> _Collected:
    """A source's held-out documents in windows, and what simpler coders make of them."""
    info = manifest.facts.tokenizer
    if info.sha256 != vocabulary.sha256:
        raise EvaluationError(
            f"{folder}: made with the tokenizer {info.name} ({info.sha256[:12]}), the model reads "
            f"{vocabulary.name} ({vocabulary.sha256[:12]}): name the shards that it was trained on"
        )
    documents = list(islice(held_out_documents(folder, manifest), limit))
    unigram = Unigram.from_counts(count_training_ids(folder, manifest, len(vocabulary)))
    return _Collected(
        source=manifest.facts.source,
        n_documents=len(documents),
        windows=[window for ids in documents for window in document_windows(ids, context)],
        sizes=compressed_sizes(vocabulary.decode(ids.tolist()).encode() for ids in documents),
        unigram_nats=sum(unigram.total_nats(ids[1:]) for ids in documents),
    )


def _source_score(held_out: _Collected, nats: npt.NDArray[np.float64]) -> SourceScore:
    """The figures of one source, or of all together, given the model's nats of each window."""
    sizes = held_out.sizes
    tokens = sum(len(window.targets) for window in held_out.windows)
    total = float(nats.sum())
    return SourceScore(
        source=held_out.source,
        documents=held_out.n_documents,
        tokens=tokens,
        bytes=sizes.raw,
        model=total / math.log(2) / sizes.raw,
        unigram=held_out.unigram_nats / math.log(2) / sizes.raw,
        gzip=8 * sizes.gzip / sizes.raw,
        xz=8 * sizes.xz / sizes.raw,
        token_perplexity=perplexity(total, tokens),
    )
