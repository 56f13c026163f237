"""Rows -> micro-batches on the device, read ahead by worker processes.

Worker w of K builds micro-batches w, w+K, w+2K, ... of its rank, and torch hands them out in turn:
the sequence is the same for any number of workers. Each is gathered, checked against its rows'
digests and stacked in one go; it travels as the uint16 of the shards (a quarter of int64) from one
pinned buffer, and is widened on the device.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Final, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from model.loss import IGNORED
from shards.errors import ShardError, SummerError
from shards.reader import ShardReader
from trainer.errors import TrainingError, at_least
from trainer.mixture import (
    BatchShape,
    DataOrder,
    Indices,
    Located,
    dropout_keys,
    leave_out,
    micro_batch_indices,
)

_PR_SET_PDEATHSIG: Final = 1  # prctl(2)
_LIVES: Final = 3  # sets of workers that may die in a row without having read anything
_LOCATED_AT_ONCE: Final = 64  # micro-batches; one alone takes 0.2 ms, however few its rows


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """Reading rows: worker processes of each rank (0: in the training process), and how far ahead.

    `prefetch` is in micro-batches a worker.
    """

    num_workers: int = 2
    prefetch: int = 4

    def __post_init__(self) -> None:
        at_least("loader.", self, num_workers=0, prefetch=1)


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


class Refused(NamedTuple):
    """A worker's error. As an exception it would arrive with a traceback for a message."""

    error: SummerError


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """The steps that a loader serves: from `first_index` on, dealt out by `shape`, to one rank.

    Samples in `skipped`, stretches [begin, end), are left out. `done` micro-batches are behind it.
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
        indices = micro_batch_indices(seed, start, self.shape, micro_step, self.rank)
        return leave_out(start, indices - start, self.skipped)


class MicroBatches(IterableDataset[HostBatch | Refused]):
    """The micro-batches of one rank, in order, shared out over the loader's workers."""

    def __init__(
        self, order: DataOrder, readers: Mapping[str, ShardReader], stretch: Stretch
    ) -> None:
        self._order, self._stretch = order, stretch
        self._readers = [readers.get(name) for name in order.sources]
        there = [reader for reader in self._readers if reader is not None]
        self._seq_len = there[0].seq_len
        self._dtype = np.dtype(there[0].manifest.facts.dtype)
        self._masked = any(reader.manifest.facts.masked for reader in there)

    def __iter__(self) -> Iterator[HostBatch | Refused]:
        worker = get_worker_info()
        first, stride = (0, 1) if worker is None else (worker.id, worker.num_workers)
        numbers = self._stretch.numbers[first::stride]
        for start in range(0, len(numbers), _LOCATED_AT_ONCE):
            ahead = numbers[start : start + _LOCATED_AT_ONCE]
            indices = np.stack([self._stretch.indices(self._order.seed, n) for n in ahead])
            located = self._order.locate(indices.reshape(-1))
            columns = [column.reshape(indices.shape) for column in located]
            for place, batch in enumerate(indices):
                yield self._gather_or_refuse(batch, Located(*(col[place] for col in columns)))

    def _gather_or_refuse(self, indices: Indices, located: Located) -> HostBatch | Refused:
        try:
            return self.gather(indices, located)
        except SummerError as error:
            return Refused(error)
        except OSError as error:
            return Refused(ShardError(f"a shard cannot be read: {error}"))

    def going_on(self, done: int) -> MicroBatches:
        """The same micro-batches without the first `done`."""
        rest = copy.copy(self)
        rest._stretch = replace(self._stretch, done=done)
        return rest

    def nothing(self) -> HostBatch:
        """A micro-batch without a target, for steps that will not count."""
        size = self._stretch.shape.micro_batch_size
        tokens = torch.from_numpy(np.zeros((size, self._seq_len), self._dtype))
        is_target = torch.zeros(tokens.shape, dtype=torch.bool)
        return HostBatch(tokens, is_target, torch.zeros(size, 2, dtype=torch.int32))

    def gather(self, indices: Indices, located: Located) -> HostBatch:
        """The rows of these samples, checked; ShardError for one that is damaged."""
        tokens = np.empty((len(indices), self._seq_len), self._dtype)
        is_target = np.ones(tokens.shape, np.bool_) if self._masked else None
        for number in np.unique(located.source):
            places = np.flatnonzero(located.source == number)
            reader = self._readers[number]
            if reader is None:
                raise ShardError(f"{self._order.sources[number]} was retired and is drawn again")
            tokens[places], masks = reader.rows(located.row[places])
            if masks is not None and is_target is not None:
                is_target[places] = np.unpackbits(masks, axis=1, bitorder="little").astype(bool)
        return HostBatch(
            torch.from_numpy(tokens),
            None if is_target is None else torch.from_numpy(is_target),
            torch.from_numpy(dropout_keys(self._order.seed, indices)),
        )


class Loader:
    """Hands out micro-batches on the device, and counts the time spent waiting for them."""

    def __init__(
        self,
        batches: MicroBatches,
        config: LoaderConfig,
        device: torch.device,
        pad_id: int,
        tell: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._all, self._config, self._device, self._pad_id = batches, config, device, pad_id
        self._tell = tell
        self._served = 0
        self.waited_s = 0.0
        self.damage: SummerError | None = None
        self._batches = self._open()

    def next(self) -> MicroBatch:
        """The next micro-batch; without a target from the first row on that is damaged.

        An error here would be this rank's alone, and the others would wait for it in the next
        reduction: `damage` says what is wrong, and the loop tells everyone (trainer/train.py).
        """
        start = time.perf_counter()
        host = self._fetch() if self.damage is None else self._all.nothing()
        self.waited_s += time.perf_counter() - start
        if isinstance(host, Refused):
            self.damage, host = host.error, self._all.nothing()
        return to_device(host, self._device, self._pad_id)

    def worker_pids(self) -> list[int]:
        """The workers' process numbers."""
        return [worker.pid for worker in getattr(self._batches, "_workers", [])]

    def close(self) -> None:
        """End the workers now, not when Python gets to it.

        They are killed: they write nothing, and one that waits for a lock which a dead one held
        would be waited for at exit.
        """
        for worker in getattr(self._batches, "_workers", []):
            worker.kill()
        shutdown = getattr(self._batches, "_shutdown_workers", None)
        if shutdown is not None:
            shutdown()

    def _fetch(self) -> HostBatch | Refused:
        """What the workers made; new ones go on, at the same place, where one has died."""
        for _ in range(_LIVES):
            try:
                host = next(self._batches)
            except (RuntimeError, OSError, EOFError) as error:  # the last two: while it sends
                if isinstance(error, RuntimeError) and "exited unexpectedly" not in str(error):
                    raise
                died = str(error).partition("\n")[0]
                self._tell(f"! a loader worker died ({died}); new ones read on from the same row")
                self.close()
                self._batches = self._open()
            else:
                self._served += 1
                return host
        raise TrainingError(
            f"{_LIVES} times a loader worker died before it had read a row ({died}); the last "
            "commit stands: run the same command with a smaller loader.num_workers"
        )

    def _open(self) -> Iterator[HostBatch | Refused]:
        """Workers that read on from the first micro-batch that has not been handed out."""
        many = self._config.num_workers > 0
        fork = many and sys.platform == "linux"  # elsewhere each worker imports torch anew
        with warnings.catch_warnings(), _own_child_handler():
            # 3.12 warns of any fork beside threads (ours run numpy), torch of more workers than
            # cores (ours mostly sleep)
            warnings.simplefilter("ignore")
            loader = DataLoader(
                self._all.going_on(self._served),
                batch_size=None,
                num_workers=self._config.num_workers,
                prefetch_factor=self._config.prefetch if many else None,
                pin_memory=self._device.type == "cuda",
                multiprocessing_context="fork" if fork else None,
                worker_init_fn=_live_and_die_with_the_parent if many else None,
            )
            return iter(loader)


@contextlib.contextmanager
def _own_child_handler() -> Iterator[None]:
    """Keep torch from raising for a dead worker out of a signal handler, in whatever line runs.

    It is noticed where a batch is waited for, within five seconds, and there it can be mended.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before)


def to_device(host: HostBatch, device: torch.device, pad_id: int) -> MicroBatch:
    """The micro-batch on the device, with targets: the row shifted left.

    Ignored (-100) are the last place, targets that are padding, and those the loss mask leaves out.
    """
    tokens = host.tokens.to(device, non_blocking=True).long()
    targets = torch.full_like(tokens, IGNORED)
    targets[:, :-1] = tokens[:, 1:].masked_fill(tokens[:, 1:] == pad_id, IGNORED)
    if host.is_target is not None:
        is_target = host.is_target.to(device, non_blocking=True)
        targets[:, :-1].masked_fill_(~is_target[:, 1:], IGNORED)
    return MicroBatch(tokens, targets, host.dropout_key.to(device, non_blocking=True))


def _live_and_die_with_the_parent(worker: int) -> None:
    """Ctrl-C and a scheduler's SIGTERM reach the whole group: a worker must serve on to the commit.

    A parent that is killed cannot end its workers; the kernel can (torch's own watchdog takes five
    seconds and leaves a traceback).
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
