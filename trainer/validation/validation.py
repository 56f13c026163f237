"""Held-out loss of each source, in nats a token and bits a byte, without any effect on training.

Sources of which everything is held out (evaluation texts such as wikitext2) are scored too; they
have no weight in the mean. The blocks run uncompiled: a forward pass without gradients would be
compiled once more, which took 16 s where validation took 0.2 s.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from model.loss import IGNORED
from model.transformer import Transformer
from shards.format import TOKEN_BYTES, tokenizer_path
from shards.reader import ShardReader
from trainer.data.batches import HostBatch, targets_in, to_device
from trainer.distributed.world import World

Ids = npt.NDArray[np.int64]


class Score(NamedTuple):
    """A source's held-out loss in nats a token, and in bits a byte where its text's are known."""

    loss: float
    bits_per_byte: float | None


class HeldOutScorer:
    """This rank's share of the held-out rows, read once and cut into batches of a fixed shape.

    `token_bytes` [vocab_size, 2] is what `read_token_bytes` gives; None: no bits a byte.
    """

    def __init__(
        self,
        folders: Mapping[str, Path],
        *,
        rows: int,
        batch_size: int,
        pad_id: int,
        token_bytes: Ids | None,
        world: World,
    ) -> None:
        self._pad_id, self._world = pad_id, world
        self._batches: list[tuple[int, int, HostBatch]] = []  # source, bytes, rows
        readers = {name: ShardReader(folder, "val") for name, folder in folders.items()}
        self.sources = tuple(name for name, reader in readers.items() if reader.n_rows)
        number = 0
        for source, name in enumerate(self.sources):
            reader = readers[name]
            spread = np.linspace(0, reader.n_rows - 1, min(rows, reader.n_rows))
            chosen = np.unique(spread.astype(np.int64))
            for first in range(0, len(chosen), batch_size):
                if number % world.world_size == world.rank:
                    batch = _filled(reader, chosen[first : first + batch_size], batch_size, pad_id)
                    n_bytes = 0
                    if token_bytes is not None:  # of the text that the batch's targets spell
                        _, targets, _ = to_device(batch, torch.device("cpu"), pad_id)
                        kept = targets != IGNORED
                        ids, before = targets[kept].numpy(), batch.tokens.long()[kept].numpy()
                        n_bytes = int(count_bytes(token_bytes, ids, before).sum())
                    self._batches.append((source, n_bytes, batch))
                number += 1
        while number % world.world_size:  # a sharded model must be called as often by every rank
            if number % world.world_size == world.rank:
                self._batches.append((0, 0, _filled(reader, chosen[:0], batch_size, pad_id)))
            number += 1

    def scores(self, model: Transformer, autocast: torch.autocast) -> dict[str, Score]:
        """The score of each source that has held-out rows."""
        device = self._world.device
        dtype = torch.float32 if device.type == "mps" else torch.float64
        sums = torch.zeros(len(self.sources), 3, dtype=dtype, device=device)
        for source, n_bytes, batch in self._batches:
            tokens, targets, _ = to_device(batch, device, self._pad_id)
            with torch.no_grad(), autocast, torch.compiler.set_stance("force_eager"):
                loss_sum = model(tokens, targets)
            sums[source, 0] += loss_sum
            sums[source, 1] += (targets != IGNORED).sum()
            sums[source, 2] += n_bytes
        totals = self._world.all_reduce(sums).tolist()
        return {
            name: Score(loss / n_targets, loss / math.log(2) / n_bytes if n_bytes else None)
            for name, (loss, n_targets, n_bytes) in zip(self.sources, totals, strict=True)
            if n_targets
        }


def count_bytes(token_bytes: Ids, ids: Ids, before: Ids) -> Ids:
    """Bytes of text that each of `ids` adds, which follow `before`. [...] -> [...]"""
    return np.asarray(token_bytes[ids, (token_bytes[before, 0] == 0) * 1])


def read_token_bytes(source: Path, tokenizer_sha256: str) -> Ids | None:
    """[vocab_size, 2] (shards/format.py), from a source's folder; None if of another tokenizer."""
    path = tokenizer_path(source)
    model = path.read_bytes() if path.exists() else b""
    if hashlib.sha256(model).hexdigest() != tokenizer_sha256:
        return None
    with contextlib.suppress(OSError, ValueError):
        return np.asarray(np.load(source / TOKEN_BYTES), np.int64)
    if path.suffix == ".json":
        return None
    return token_bytes_of(model)  # a folder of version 0.1


def token_bytes_of(model: bytes) -> Ids:
    """The same, read off a SentencePiece model (sentencepiece_model.proto, Apache-2.0).

    Field 1, repeated, is a piece with its spelling (1) and kind (3: 2 unknown, 3 control, 6 byte);
    field 3, the normaliser, says in its field 3 whether a space is put before each text.
    """
    fields, space, table = list(_fields(model)), "\u2581".encode(), []
    adds_space = [dict(_fields(data)).get(3, 1) for field, data in fields if field == 3] != [0]
    for piece in (dict(_fields(data)) for field, data in fields if field == 1):
        length = len(piece[1].replace(space, b" "))
        n_bytes = {2: 0, 3: 0, 6: 1}.get(piece.get(3, 1), length)
        table.append((n_bytes, n_bytes - (n_bytes > 0 and adds_space and piece[1][:3] == space)))
    return np.array(table, np.int64)


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Number and value of each field of a protobuf message (protobuf.dev, Encoding)."""
    stream = iter(message)

    def varint(low: int) -> int:
        return low if low < 128 else low - 128 + (varint(next(stream)) << 7)

    for first in stream:
        field, wire = divmod(varint(first), 8)
        size = {1: 8, 5: 4}.get(wire) or varint(next(stream))  # of wire type 0 it is the value
        yield field, size if wire == 0 else bytes(islice(stream, size))


def _filled(reader: ShardReader, indices: Ids, size: int, pad_id: int) -> HostBatch:
    """The rows, filled up to `size` with padding, which no loss counts."""
    rows, masks = reader.rows(indices)
    tokens = np.full((size, reader.seq_len), pad_id, rows.dtype)
    tokens[: len(rows)] = rows
    is_target: Tensor | None = None
    if masks is not None:
        is_target = torch.zeros(tokens.shape, dtype=torch.bool)
        is_target[: len(rows)] = targets_in(masks)
    return HostBatch(torch.from_numpy(tokens), is_target, torch.zeros(size, 2, dtype=torch.int32))
