"""What a model must beat on the same text: a unigram of tokens, gzip and xz, in bits per byte.

The unigram knows how often each id occurs in the training rows and nothing else. The compressors
read all documents as one piece, which is their best case: a model scores each document alone.
"""

from __future__ import annotations

import lzma
import math
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from shards.format import Manifest
from shards.reader import ShardReader

_ROWS_AT_ONCE: Final = 1024
_GZIP_WINDOW: Final = 16 + zlib.MAX_WBITS
"""zlib's code for a gzip header and trailer around its largest window."""


@dataclass(frozen=True)
class Unigram:
    """A model of single ids: each one's surprise in nats, whatever stands before it. [V]"""

    nats: npt.NDArray[np.float64]

    @classmethod
    def from_counts(cls, counts: npt.ArrayLike) -> Unigram:
        """The counted frequencies, smoothed so that no id is impossible.

        Witten and Bell's estimate (1991, method C of Bell, Cleary and Witten's book): as many ids
        as were ever new are set aside for the unseen, which share them equally. On small sources
        it is a harder baseline than adding one to every count (by 1.5 % for pydoc's topics).
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
        """Nats of a sequence of ids."""
        return float(self.nats[np.asarray(ids, dtype=np.int64)].sum())


def count_training_ids(
    folder: Path, manifest: Manifest, vocab_size: int, max_rows: int = 1 << 16
) -> npt.NDArray[np.int64]:
    """How often each id that is a target occurs in a source's training rows. [vocab_size]

    BOS and padding are left out, for neither is ever scored in a document. Of a source with more
    than `max_rows` rows, that many are counted, evenly spaced (65,536 rows of 4,096 are 268 M ids).
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


@dataclass(frozen=True)
class CompressedSizes:
    """Bytes of a text, and of the same text compressed at the highest settings."""

    raw: int
    gzip: int
    xz: int

    def __add__(self, other: CompressedSizes) -> CompressedSizes:
        """Both texts, each compressed by itself."""
        return CompressedSizes(self.raw + other.raw, self.gzip + other.gzip, self.xz + other.xz)


def compressed_sizes(texts: Iterable[bytes]) -> CompressedSizes:
    """Sizes of all texts run together, by `gzip -9` and `xz -9e`."""
    gzip = zlib.compressobj(9, zlib.DEFLATED, _GZIP_WINDOW)
    xz = lzma.LZMACompressor(preset=9 | lzma.PRESET_EXTREME)
    n_raw = n_gzip = n_xz = 0
    for text in texts:
        n_raw += len(text)
        n_gzip += len(gzip.compress(text))
        n_xz += len(xz.compress(text))
    return CompressedSizes(n_raw, n_gzip + len(gzip.flush()), n_xz + len(xz.flush()))
