"""Ids -> rows: nothing lost, padding at the end alone, every row's origin."""

import itertools
from dataclasses import replace
from typing import Any, cast

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.text.chat import Encoded
from pipeline.text.pack import Packer
from shards.writer import ShardWriter
from shards_samples import sample_facts

BOS, EOS, PAD = 1, 2, 98


class Kept:
    """Takes the writer's place and keeps what it is given."""

    def __init__(self) -> None:
        self.rows: list[Any] = []
        self.origins: list[Any] = []
        self.masks: list[Any] = []

    def add(self, split: Any, rows: Any, parts: Any, records: Any, masks: Any = None) -> None:
        assert split == "train" and len(rows) == len(parts) == len(records)
        self.rows += rows.tolist()
        self.origins += zip(parts.tolist(), records.tolist(), strict=True)
        self.masks += [] if masks is None else masks.tolist()


def encoded(lengths: list[int], masked: bool, seed: int) -> Any:
    documents = [[BOS, *range(3, 3 + n), EOS] for n in lengths]
    tokens = np.array([*itertools.chain.from_iterable(documents)], np.uint16)
    starts = np.cumsum([0, *map(len, documents)])[:-1].astype(np.int64)
    targets = np.random.default_rng(seed).random(len(tokens)) < 0.5 if masked else None
    return Encoded(tokens, starts, targets)


@settings(deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 40), max_size=6), max_size=6),
    st.sampled_from([8, 16, 24]),
    st.booleans(),
)
def test_rows_are_the_stream_cut_and_padded(
    batches: list[list[int]], seq_len: int, masked: bool
) -> None:
    kept = Kept()
    facts = sample_facts(seq_len=seq_len, masked=masked)
    facts = replace(facts, tokenizer=replace(facts.tokenizer, pad_id=PAD))
    packer = Packer(cast(ShardWriter, kept), "train", facts)
    stream: list[int] = []
    origins: list[tuple[int, int]] = []
    targets: list[bool] = []
    for number, lengths in enumerate(batches):
        batch = encoded(lengths, masked, number)
        records = np.arange(len(lengths), dtype=np.uint32) * 3
        parts = np.full(len(lengths), number, np.uint32)
        packer.add(batch, parts, records)
        stream += batch.tokens.tolist()
        targets += batch.targets.tolist() if masked else []
        for record, length in zip(records.tolist(), lengths, strict=True):
            origins += [(number, record)] * (length + 2)
    packer.finish()
    padding = -len(stream) % seq_len
    flat = [token for row in kept.rows for token in row]
    assert flat == stream + [PAD] * padding
    assert kept.origins == origins[::seq_len]
    if masked:
        bits = np.unpackbits(np.array(kept.masks, np.uint8).reshape(-1), bitorder="little")
        assert bits.tolist() == [*map(int, targets), *[0] * padding]


@settings(deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.data())
def test_choosing_documents_keeps_them_complete(lengths: list[int], data: Any) -> None:
    chosen = np.array(data.draw(st.lists(st.booleans(), min_size=len(lengths),
                                         max_size=len(lengths))))  # fmt: skip
    complete = encoded(lengths, True, 0)
    part = complete.choose(chosen)
    pieces = np.split(complete.tokens, complete.starts[1:])
    wanted = [piece.tolist() for piece, kept in zip(pieces, chosen, strict=True) if kept]
    found = np.split(part.tokens, part.starts[1:]) if len(part.starts) else []
    assert [piece.tolist() for piece in found] == wanted
    assert len(part.targets) == len(part.tokens) == part.lengths.sum()
