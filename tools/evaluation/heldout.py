"""Bits per byte on the held-out documents of prepared sources, with simpler coders to compare.

Every document is taken complete from the held-out sequences, from its BOS to the next, and scored
alone from its BOS: windows of the model's context, each token once, the EOS that ends it included.
The baselines on the same text are a unigram of tokens, counted in the training sequences and
scored on the same tokens, and gzip and xz, which read a source's documents as one piece (their
best case). All are divided by the UTF-8 bytes of the documents' text.
"""

from __future__ import annotations

import functools
import lzma
import math
import operator
import time
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from shards.format import Manifest
from shards.reader import ShardReader, find_sources
from tools.errors import EvaluationError
from tools.evaluation.perplexity import perplexity
from tools.evaluation.protocols import Ids, Window, document_windows
from tools.evaluation.results import Result
from tools.evaluation.scoring import Progress, Scorer, check_context, score
from tools.models.loading import LoadedModel
from tools.models.vocabulary import Vocabulary

_ROWS_AT_ONCE: Final = 256
_GZIP_WINDOW: Final = 16 + zlib.MAX_WBITS
"""zlib's code for a gzip header and trailer around its largest window."""
_COMPRESSORS_SEE: Final = "the documents of a source run together"
_COLUMNS: Final = ("documents", "tokens", "bytes", "model", "unigram", "gzip", "xz")


@dataclass(frozen=True)
class Unigram:
    """A model of single tokens: the nats of each, whatever is before it. [V]"""

    nats: npt.NDArray[np.float64]

    @classmethod
    def from_counts(cls, counts: npt.ArrayLike) -> Unigram:
        """The counted frequencies, smoothed so that no token is impossible.

        Witten and Bell's estimate (1991, method C of Bell, Cleary and Witten's book): as many
        counts as there are different tokens are set aside for the unseen, which share them. On
        small sources it is a harder baseline than adding one to every count (by 1.5 % for pydoc's
        topics).
        """
        found = np.array(counts, dtype=np.float64)
        n_seen = int(np.count_nonzero(found))
        n_unseen = len(found) - n_seen
        if not n_seen:
            return cls(np.full(len(found), math.log(len(found))))
        set_aside = n_seen if n_unseen else 0
        found[found == 0] = set_aside / max(1, n_unseen)
        return cls(math.log(found.sum()) - np.log(found))

    def total_nats(self, ids: npt.ArrayLike) -> float:
        """Nats of a sequence of tokens."""
        return float(self.nats[np.asarray(ids, dtype=np.int64)].sum())


@dataclass(frozen=True)
class _HeldOut:
    """What one source, or several together, give to the evaluation.

    Its documents' windows, their UTF-8 bytes as they are and as `gzip -9` and `xz -9e` make them,
    and the unigram's nats.
    """

    source: str
    n_documents: int
    windows: list[Window]
    sizes: npt.NDArray[np.int64]
    unigram_nats: float

    def __add__(self, other: _HeldOut) -> _HeldOut:
        return _HeldOut(
            "all",
            self.n_documents + other.n_documents,
            self.windows + other.windows,
            self.sizes + other.sizes,
            self.unigram_nats + other.unigram_nats,
        )

    def figures(self, nats: npt.NDArray[np.float64]) -> dict[str, Any]:
        """Counts, and bits per byte of each coder, given the model's nats of each window."""
        n_bytes, gzip, xz = self.sizes.tolist()
        tokens = sum(len(window.targets) for window in self.windows)
        total = float(nats.sum())
        return {
            "source": self.source,
            "documents": self.n_documents,
            "tokens": tokens,
            "bytes": n_bytes,
            "model": total / math.log(2) / n_bytes,
            "unigram": self.unigram_nats / math.log(2) / n_bytes,
            "gzip": 8 * gzip / n_bytes,
            "xz": 8 * xz / n_bytes,
            "token_perplexity": perplexity(total, tokens),
        }


def evaluate_heldout(
    loaded: LoadedModel,
    shards: Path,
    *,
    context: int | None = None,
    limit: int | None = None,
    batch_tokens: int | None = None,
    progress: Progress | None = None,
) -> Result:
    """The model's score on the held-out documents of every source in a folder of shards.

    `limit` takes the first documents of each source; `context` is the training length by default.
    EvaluationError where nothing is held out or the shards' tokenizer is not the model's.
    """
    context = loaded.trained_context if context is None else context
    check_context(loaded, context)
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
    scorer = Scorer.of(loaded)
    nats = score(scorer, together.windows, batch_tokens=batch_tokens, progress=progress).nats
    ends = np.cumsum([len(source.windows) for source in held_out])[:-1]
    nats_a_source = np.split(nats, ends)
    sources = [each.figures(part) for each, part in zip(held_out, nats_a_source, strict=True)]
    total = together.figures(nats)
    settings = {
        "sources": sources,
        "total": total,
        "without": [name for name, manifest in manifests.items() if not manifest.n_val_rows],
        "context": context,
        "compressors_see": _COMPRESSORS_SEE,
        "time_s": time.monotonic() - started,
    }
    below = 1 - total["model"] / total["unigram"]
    return Result(
        task="heldout",
        metrics={"below_unigram": below},
        settings=settings,
        model=loaded.describe(),
        about="bits per byte, smaller is better",
        table=_table(sources if len(sources) == 1 else [*sources, total]),
        notes=_notes(below, settings),
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


def count_training_ids(
    folder: Path, manifest: Manifest, vocab_size: int, max_rows: int = 1 << 16
) -> npt.NDArray[np.int64]:
    """How often each token that is a target occurs in a source's training rows. [vocab_size]

    BOS and padding are left out, for neither is ever scored in a document. Of a source with more
    than `max_rows` rows, that many are counted, evenly spaced (65,536 of 4,096 are 268 M tokens).
    """
    reader = ShardReader(folder, "train", manifest)
    chosen = np.linspace(0, reader.n_rows, min(max_rows, reader.n_rows), endpoint=False)
    indices = chosen.astype(np.int64)
    counts = np.zeros(vocab_size, np.int64)
    for begin in range(0, len(indices), _ROWS_AT_ONCE):
        rows, _ = reader.rows(indices[begin : begin + _ROWS_AT_ONCE])
        counts += np.bincount(rows.ravel(), minlength=vocab_size)
    counts[[manifest.facts.tokenizer.bos_id, manifest.facts.tokenizer.pad_id]] = 0
    return counts


def compressed_sizes(texts: Iterable[bytes]) -> npt.NDArray[np.int64]:
    """Bytes of all texts run together: as they are, by `gzip -9` and by `xz -9e`. [3]"""
    gzip = zlib.compressobj(9, zlib.DEFLATED, _GZIP_WINDOW)
    xz = lzma.LZMACompressor(preset=9 | lzma.PRESET_EXTREME)
    sizes = np.zeros(3, np.int64)
    for text in texts:
        sizes += (len(text), len(gzip.compress(text)), len(xz.compress(text)))
    sizes += (0, len(gzip.flush()), len(xz.flush()))
    return sizes


def _collect(
    vocabulary: Vocabulary, folder: Path, manifest: Manifest, context: int, limit: int | None
) -> _HeldOut:
    """A source's held-out documents in windows, and what the baselines need of them."""
    info = manifest.facts.tokenizer
    if info.sha256 != vocabulary.sha256:
        raise EvaluationError(
            f"{folder}: made with the tokenizer {info.name} ({info.sha256[:12]}), the model reads "
            f"{vocabulary.name} ({vocabulary.sha256[:12]}): name the shards that it was trained on"
        )
    documents = list(islice(held_out_documents(folder, manifest), limit))
    unigram = Unigram.from_counts(count_training_ids(folder, manifest, len(vocabulary)))
    return _HeldOut(
        source=manifest.facts.source,
        n_documents=len(documents),
        windows=[window for ids in documents for window in document_windows(ids, context)],
        sizes=compressed_sizes(vocabulary.decode(ids.tolist()).encode() for ids in documents),
        unigram_nats=sum(unigram.total_nats(ids[1:]) for ids in documents),
    )


def _table(scores: list[dict[str, Any]]) -> list[list[str]]:
    rows = [
        [f"{each[name]:,}" if isinstance(each[name], int) else f"{each[name]:.3f}"
         for name in _COLUMNS]
        for each in scores
    ]  # fmt: skip
    names = [each["source"] for each in scores]
    return [["held out", *_COLUMNS], *([name, *row] for name, row in zip(names, rows, strict=True))]


def _notes(below_unigram: float, found: dict[str, Any]) -> list[str]:
    side = "below" if below_unigram >= 0 else "ABOVE"
    without = [f"Nothing is held out of {', '.join(found['without'])}."] if found["without"] else []
    return [
        f"The model is {abs(below_unigram):.1%} {side} the unigram. It scores each document from "
        f"its BOS, context {found['context']:,}; gzip -9 and xz -9e see {_COMPRESSORS_SEE}.",
        *without,
    ]
