"""Bits per byte on the held-out documents of prepared sources, with simpler coders to compare.

Every document is taken complete from the held-out sequences, from its BOS to the next, and scored
alone from its BOS: windows of the model's context, each token once, the EOS that ends it included.
The baselines on the same text are a unigram of tokens, counted in the training sequences and
scored on the same tokens, and gzip and xz, which read a source's documents as one piece (their
best case). All are divided by the UTF-8 bytes of the documents' text.
"""

import gzip
import lzma
import math
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from shards.format import Manifest
from shards.reader import ShardReader, find_sources
from tools.errors import EvaluationError
from tools.evaluation.cards import Result
from tools.evaluation.perplexity import perplexity
from tools.evaluation.protocols import Ids, Window, document_windows
from tools.evaluation.scoring import Progress, Scorer, check_context, score
from tools.evaluation.tasks import TaskOptions
from tools.models.loading import LoadedModel
from tools.models.tokenizers import Vocabulary
from trainer.checkpoint.runs import CONFIG
from trainer.checkpoint.storage import read_record
from trainer.config.config import load_config

_ROWS_AT_ONCE: Final = 256
_COMPRESSORS_SEE: Final = "the documents of a source run together"
_COLUMNS: Final = ("documents", "tokens", "bytes", "model", "unigram", "gzip", "xz")


class _HeldOut(NamedTuple):
    """What one source, or several together, give to the evaluation.

    `counts` are documents, tokens to score, and UTF-8 bytes as they are and as `gzip -9` and
    `xz -9e` make them. [5]
    """

    source: str
    windows: list[Window]
    counts: npt.NDArray[np.int64]
    unigram_nats: float

    def figures(self, nats: npt.NDArray[np.float64]) -> dict[str, Any]:
        """Counts, and bits per byte of each coder, given the model's nats of each window."""
        documents, tokens, n_bytes, n_gzip, n_xz = self.counts.tolist()
        total = float(nats.sum())
        return {
            "source": self.source,
            "documents": documents,
            "tokens": tokens,
            "bytes": n_bytes,
            "model": total / math.log(2) / n_bytes,
            "unigram": self.unigram_nats / math.log(2) / n_bytes,
            "gzip": 8 * n_gzip / n_bytes,
            "xz": 8 * n_xz / n_bytes,
            "token_perplexity": perplexity(total, tokens),
        }


def evaluate_heldout(
    loaded: LoadedModel, options: TaskOptions, progress: Progress | None = None
) -> Result:
    """The model's score on the held-out documents of every source in a folder of shards.

    `limit` takes the first documents of each source; `context` is the training length by default.
    EvaluationError where nothing is held out or the shards' tokenizer is not the model's.
    """
    shards, context = options.shards, options.context or loaded.trained_context
    check_context(loaded, context)
    started = time.monotonic()
    manifests = find_sources(shards)
    held_out = [
        _collect(loaded.vocabulary, shards / name, manifest, context, options.limit)
        for name, manifest in manifests.items()
        if manifest.n_val_rows
    ]
    if not held_out:
        raise EvaluationError(
            f"{shards}: no document is held out in {', '.join(manifests)}: prepare them again "
            "with a larger --val-fraction"
        )
    unknown = not_known_unseen(loaded.checkpoint, shards)
    together = _HeldOut(
        source="all",
        windows=[window for each in held_out for window in each.windows],
        counts=np.sum([each.counts for each in held_out], axis=0),
        unigram_nats=sum(each.unigram_nats for each in held_out),
    )
    scored = score(
        Scorer.of(loaded),
        together.windows,
        batch_tokens=options.batch_tokens,
        progress=progress,
    )
    parts = np.split(scored.nats, np.cumsum([len(source.windows) for source in held_out])[:-1])
    sources = [each.figures(part) for each, part in zip(held_out, parts, strict=True)]
    total = together.figures(scored.nats)
    settings = {
        "sources": sources,
        "total": total,
        "not_known_unseen": unknown,
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


def shards_of(checkpoint: Path | None) -> Path:
    """The shards that a checkpoint's run was trained on, if it says so and they are there."""
    run = checkpoint.resolve().parents[1] if checkpoint else None
    if run is not None and (run / CONFIG).exists():
        named = Path(load_config(run).shards)
        for folder in (named, run.parent / named.name, run.parent.parent / named.name):
            if folder.is_dir():
                return folder
    return Path("shards")


def not_known_unseen(checkpoint: Path | None, shards: Path) -> list[str]:
    """The sources whose held-out documents the model may have been trained on.

    Known to be unseen is what the very preparation held out that the run has read (its dataset
    hash is in the checkpoint's record), and a source of the run's own shards that is all held out.
    """
    data = read_record(checkpoint).get("data", {}) if checkpoint else {}
    read = {facts["root"] for facts in data.values()}
    own = shards.resolve() == shards_of(checkpoint).resolve() and bool(data)
    return [
        name
        for name, manifest in find_sources(shards).items()
        if manifest.n_val_rows
        and manifest.root not in read
        and not (own and manifest.n_rows == manifest.n_val_rows)
    ]


def held_out_documents(folder: Path, manifest: Manifest) -> Iterator[Ids]:
    """The held-out documents of a source, each from its BOS to the next, without padding."""
    reader = ShardReader(folder, "val", manifest)
    tokenizer = manifest.facts.tokenizer
    begun = np.empty(0, np.int64)
    for begin in range(0, reader.n_rows, _ROWS_AT_ONCE):
        indices = np.arange(begin, min(begin + _ROWS_AT_ONCE, reader.n_rows))
        ids = np.concatenate([begun, reader.rows(indices)[0].ravel()], dtype=np.int64)
        ids = ids[ids != tokenizer.pad_id]
        *complete, begun = np.split(ids, np.flatnonzero(ids == tokenizer.bos_id))
        yield from filter(len, complete)
    if len(begun):
        yield begun


def unigram_nats(counts: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Nats of each token by itself, from how often each was counted; none is impossible. [V]

    Witten and Bell's estimate (1991, method C of Bell, Cleary and Witten's book): as many counts
    as there are different tokens are set aside for the unseen, which share them. On small sources
    it is a harder baseline than adding one to every count (by 1.5 % for pydoc's topics).
    """
    found = np.array(counts, dtype=np.float64)
    n_seen = int(np.count_nonzero(found))
    n_unseen = len(found) - n_seen
    if not n_seen:
        return np.full(len(found), math.log(len(found)))
    found[found == 0] = n_seen / max(1, n_unseen)
    return np.asarray(math.log(found.sum()) - np.log(found))


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
    text = b"".join(texts)
    xz = lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)
    return np.array([len(text), len(gzip.compress(text, compresslevel=9)), len(xz)])


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
    nats = unigram_nats(count_training_ids(folder, manifest, len(vocabulary)))
    sizes = compressed_sizes(vocabulary.decode(ids.tolist()).encode() for ids in documents)
    n_tokens = sum(len(ids) - 1 for ids in documents)
    return _HeldOut(
        source=manifest.facts.source,
        windows=[window for ids in documents for window in document_windows(ids, context)],
        counts=np.array([len(documents), n_tokens, *sizes]),
        unigram_nats=sum(float(nats[ids[1:]].sum()) for ids in documents),
    )


def _table(scores: list[dict[str, Any]]) -> list[list[str]]:
    counts, rates = _COLUMNS[:3], _COLUMNS[3:]
    return [["held out", *_COLUMNS]] + [
        [each["source"], *(f"{each[n]:,}" for n in counts), *(f"{each[n]:.3f}" for n in rates)]
        for each in scores
    ]


def _notes(below_unigram: float, found: dict[str, Any]) -> list[str]:
    side = "below" if below_unigram >= 0 else "ABOVE"
    without = [f"Nothing is held out of {', '.join(found['without'])}."] if found["without"] else []
    return [
        f"The model is {abs(below_unigram):.1%} {side} the unigram. It scores each document from "
        f"its BOS, context {found['context']:,}; gzip -9 and xz -9e see {_COMPRESSORS_SEE}.",
        *(
            f"! {name} is NOT known to be unseen: it is no preparation that this model's run has "
            "read, so its documents may have been trained on."
            for name in found["not_known_unseen"]
        ),
        *without,
    ]
