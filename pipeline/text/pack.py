"""Ids -> rows: the stream of documents, cut every seq_len tokens, with where each row comes from.

Worked example, seq_len 4, two documents of five and four tokens:

    stream   B a b c E | B d e E      rows   [B a b c] [E B d e] [E 0 0 0]
    origin of each row's first token:        doc 0     doc 0     doc 1

The rest of a stream waits for the next one; the last row of a unit is filled with padding.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pipeline.text.chat import Encoded
from shards.format import Facts, Flags, Ordinals, Split
from shards.writer import ShardWriter


class Packer:
    """Packs the stream of one split of a unit and hands full rows to the writer."""

    def __init__(self, writer: ShardWriter, split: Split, facts: Facts) -> None:
        self._writer, self._split, self._facts = writer, split, facts
        self._tokens = np.empty(0, np.dtype(facts.dtype))  # of a row that is not full yet
        self._targets = np.empty(0, np.bool_)
        self._origin = (0, 0)  # part and record of its first token

    def add(self, encoded: Encoded, parts: Ordinals, records: Ordinals) -> None:
        """Append documents; parts [n] and records [n] say where each one is from."""
        if not len(encoded.tokens):
            return
        seq_len, carried = self._facts.seq_len, len(self._tokens)
        tokens = np.concatenate([self._tokens, encoded.tokens])
        n_rows, rest = divmod(len(tokens), seq_len)
        # where each row, and then the rest, begins in this call's stream; below zero: it is carried
        begins = np.arange(n_rows + 1) * seq_len - carried
        origins = np.maximum(np.searchsorted(encoded.starts, begins, side="right") - 1, 0)
        row_parts, row_records = parts[origins], records[origins]
        if carried:
            row_parts[0], row_records[0] = self._origin
        masks = None
        if self._facts.masked and encoded.targets is not None:
            targets = np.concatenate([self._targets, encoded.targets])
            masks = _packed(targets[: n_rows * seq_len].reshape(n_rows, seq_len))
            self._targets = targets[n_rows * seq_len :]
        if n_rows:
            rows = tokens[: n_rows * seq_len].reshape(n_rows, seq_len)
            self._writer.add(self._split, rows, row_parts[:-1], row_records[:-1], masks)
        self._tokens = tokens[len(tokens) - rest :].copy()
        self._origin = (int(row_parts[-1]), int(row_records[-1]))

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


def _packed(targets: Flags) -> npt.NDArray[np.uint8]:
    return np.packbits(targets, axis=1, bitorder="little")
