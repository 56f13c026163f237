"""Rows -> micro-batches of one rank, in order: located, read, verified and stacked.

Worker w of K builds micro-batches w, w+K, w+2K, ... of its rank, and torch hands them out in turn:
the sequence is the same for any number of workers. It travels as the uint16 of the shards (a
quarter of int64) and is widened on the device.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from model.loss import IGNORED
from shards.errors import ShardError, SummerError
from shards.format import Masks, Tokens
from shards.reader import ShardReader
from trainer.data import mixture
from trainer.data.mixture import BatchShape, DataOrder, Indices, Keys, leave_out

_LOCATED_AT_ONCE: Final = 64  # micro-batches; one alone takes 0.2 ms, however few its rows


class MicroBatch(NamedTuple):
    """What the model is fed: tokens and targets [B, T] int64, dropout_key [B, 2] int32."""

    tokens: Tensor
    targets: Tensor
    dropout_key: Tensor


class HostBatch(NamedTuple):
    """A micro-batch before it is moved: tokens [B, T] as stored, is_target [B, T] bool or None."""

    tokens: Tensor
    is_target: Tensor | None
    dropout_key: Tensor

    def __reduce__(self) -> tuple[Any, ...]:
        """Through the workers' pipe as bytes; torch would open a socket for each tensor (1 ms)."""
        mask = None if self.is_target is None else self.is_target.numpy()
        return _host_batch, (self.tokens.numpy(), mask, self.dropout_key.numpy())


def _host_batch(tokens: Tokens, is_target: npt.NDArray[np.bool_] | None, keys: Keys) -> HostBatch:
    mask = None if is_target is None else torch.from_numpy(is_target)
    return HostBatch(torch.from_numpy(tokens), mask, torch.from_numpy(keys))


class ReadFailure(NamedTuple):
    """A worker's error; as an exception it would arrive with a traceback for a message."""

    error: SummerError


@dataclass(frozen=True, kw_only=True)
class StepRange:
    """The steps that a loader serves: from `first_index` on, dealt out by `shape`, to one rank.

    Samples in `skipped`, ranges [begin, end), are left out. `done` micro-batches are behind it.
    """

    first_index: int
    n_steps: int
    shape: BatchShape
    rank: int
    skipped: tuple[tuple[int, int], ...] = ()
    done: int = 0

    @property
    def numbers(self) -> range:
        """The micro-batches that are left."""
        return range(self.done, self.n_steps * self.shape.grad_accum_steps)

    def indices(self, seed: int, number: int) -> Indices:
        """[M]: the samples of the rank's micro-batch `number`, counted from the first step."""
        step, micro_step = divmod(number, self.shape.grad_accum_steps)
        places = np.array(step * self.shape.global_batch_size)
        start = int(leave_out(self.first_index, places, self.skipped))
        indices = mixture.micro_batch_indices(seed, start, self.shape, micro_step, self.rank)
        return leave_out(start, indices - start, self.skipped)


class MicroBatches(IterableDataset[HostBatch | ReadFailure]):
    """The micro-batches of one rank, in order, shared out over the loader's workers."""

    def __init__(
        self, order: DataOrder, readers: Mapping[str, ShardReader], steps: StepRange
    ) -> None:
        self._order, self._steps = order, steps
        self._readers = [readers.get(name) for name in order.sources]
        there = [reader for reader in self._readers if reader is not None]
        self._seq_len = there[0].seq_len
        self._dtype = np.dtype(there[0].manifest.facts.dtype)
        self._masked = any(reader.manifest.facts.masked for reader in there)

    def __iter__(self) -> Iterator[HostBatch | ReadFailure]:
        worker = get_worker_info()
        first, stride = (0, 1) if worker is None else (worker.id, worker.num_workers)
        numbers = self._steps.numbers[first::stride]
        for start in range(0, len(numbers), _LOCATED_AT_ONCE):
            ahead = numbers[start : start + _LOCATED_AT_ONCE]
            indices = np.stack([self._steps.indices(self._order.seed, n) for n in ahead])
            located = self._order.locate(indices.reshape(-1))
            keys = mixture.dropout_keys(self._order.seed, indices).reshape(*indices.shape, 2)
            sources = located.source.reshape(indices.shape)
            rows = located.row.reshape(indices.shape)
            for place, of_rows in enumerate(keys):
                try:
                    yield self.gather(sources[place].tolist(), rows[place].tolist(), of_rows)
                except SummerError as error:
                    yield ReadFailure(error)
                except OSError as error:
                    yield ReadFailure(ShardError(f"a shard cannot be read: {error}"))

    def without_first(self, done: int) -> MicroBatches:
        """The same micro-batches without the first `done`."""
        rest = copy.copy(self)
        rest._steps = replace(self._steps, done=done)
        return rest

    def empty(self) -> HostBatch:
        """A micro-batch without a target, for steps that will not count."""
        size = self._steps.shape.micro_batch_size
        tokens = torch.from_numpy(np.zeros((size, self._seq_len), self._dtype))
        is_target = torch.zeros(tokens.shape, dtype=torch.bool)
        return HostBatch(tokens, is_target, torch.zeros(size, 2, dtype=torch.int32))

    def gather(self, sources: list[int], rows: list[int], keys: Keys) -> HostBatch:
        """The rows of these sources, checked; ShardError for one that is damaged."""
        tokens = np.empty((len(keys), self._seq_len), self._dtype)
        masks = np.full((len(keys), self._seq_len // 8), 255, np.uint8) if self._masked else None
        for place, (number, row) in enumerate(zip(sources, rows, strict=True)):
            reader = self._readers[number]
            if reader is None:
                raise ShardError(
                    f"{self._order.sources[number]} was removed from the mixture and is drawn again"
                )
            mask = masks[place] if masks is not None and reader.manifest.facts.masked else None
            reader.read(row, tokens[place], mask)
        is_target = None if masks is None else targets_in(masks)
        return HostBatch(torch.from_numpy(tokens), is_target, torch.from_numpy(keys))


def targets_in(masks: Masks) -> Tensor:
    """[n, T] bool: what packed loss masks [n, T / 8] say."""
    return torch.from_numpy(np.unpackbits(masks, axis=1, bitorder="little").view(np.bool_))


def to_device(host: HostBatch, device: torch.device, pad_id: int) -> MicroBatch:
    """The micro-batch on the device; no targets are the last place, padding, and what is masked."""
    tokens = host.tokens.to(device, non_blocking=True).long()
    targets = torch.full_like(tokens, IGNORED)
    targets[:, :-1] = tokens[:, 1:].masked_fill(tokens[:, 1:] == pad_id, IGNORED)
    if host.is_target is not None:
        is_target = host.is_target.to(device, non_blocking=True)
        targets[:, :-1].masked_fill_(~is_target[:, 1:], IGNORED)
    return MicroBatch(tokens, targets, host.dropout_key.to(device, non_blocking=True))
