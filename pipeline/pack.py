"""Ids -> rows: the stream of documents, cut every seq_len tokens, with where each row comes from.

Worked example, seq_len 4, two documents of five and four tokens:

    stream   B a b c E | B d e E      rows   [B a b c] [E B d e] [E 0 0 0]
    origin of each row's first token:        doc 0     doc 0     doc 1

The rest of a stream waits for the next one; the last row of a unit is filled with padding.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pipeline.encode import Encoded
from shards.format import Facts, Split
from shards.writer import ShardWriter

Ordinals = npt.NDArray[np.uint32]


class Packer:
    """Packs the stream of one split of a unit and hands whole rows to the writer."""

    def __init__(self, writer: ShardWriter, split: Split, facts: Facts) -> None:
        self._writer, self._split, self._facts = writer, split, facts
        self._tokens = np.empty(0, np.dtype(facts.dtype))  # of a row that is not full yet
        self._targets = np.empty(0, np.bool_)
        self._origin = (0, 0)  # part and record of its first token

    def add(self, encoded: Encoded, part: int, records: Ordinals) -> None:
        """Append documents of a part; records [n] says which record each one is."""
        if not len(encoded.tokens):
            return
        seq_len, carried = self._facts.seq_len, len(self._tokens)
        tokens = np.concatenate([self._tokens, encoded.tokens])
        n_rows, rest = divmod(len(tokens), seq_len)
        # where, in this call's stream, each row and then the rest begins; below zero: carried
        begins = np.arange(n_rows + 1) * seq_len - carried
        documents = np.searchsorted(encoded.starts, begins, side="right") - 1
        parts = np.where(begins < 0, self._origin[0], part).astype(np.uint32)
        origins = np.where(begins < 0, self._origin[1], records[np.maximum(documents, 0)])
        origins = origins.astype(np.uint32)
        masks = None
        if self._facts.masked and encoded.targets is not None:
            targets = np.concatenate([self._targets, encoded.targets])
            masks = _packed(targets[: n_rows * seq_len].reshape(n_rows, seq_len))
            self._targets = targets[n_rows * seq_len :]
        if n_rows:
            rows = tokens[: n_rows * seq_len].reshape(n_rows, seq_len)
            self._writer.add(self._split, rows, parts[:-1], origins[:-1], masks)
        self._tokens = tokens[len(tokens) - rest :].copy()
        self._origin = (int(parts[-1]), int(origins[-1]))

    def finish(self) -> None:
        """Fill up and hand over the last row, if there is one."""
        if not len(self._tokens):
            return
        empty = self._facts.seq_len - len(self._tokens)
        row = np.pad(self._tokens, (0, empty), constant_values=self._facts.tokenizer.pad_id)
        masks = None
        if self._facts.masked:
            masks = _packed(np.pad(self._targets, (0, empty))[None])
        part, record = self._origin
        origin = np.array([part], np.uint32), np.array([record], np.uint32)
        self._writer.add(self._split, row[None], *origin, masks)
        self._tokens = self._tokens[:0]


def _packed(targets: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint8]:
    return np.packbits(targets, axis=1, bitorder="little")
