"""Micro-batches on the device, read ahead by worker processes that may die."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing.util
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from typing import Final

import torch
from torch.utils.data import DataLoader

from shards.errors import SummerError
from trainer.background import BackgroundThread
from trainer.config.sections import LoaderConfig
from trainer.data.batches import HostBatch, MicroBatch, MicroBatches, ReadFailure, to_device
from trainer.errors import TrainingError

_PR_SET_PDEATHSIG: Final = 1  # prctl(2)
_LIVES: Final = 3  # sets of workers that may die in a row without having read anything
_NOTICED_S: Final = 10.0  # torch looks every five seconds whether its workers live


class Loader:
    """Hands out micro-batches on the device, and counts the time spent waiting for them."""

    def __init__(
        self,
        batches: MicroBatches,
        config: LoaderConfig,
        device: torch.device,
        pad_id: int,
        log: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._all, self._config, self._device, self._pad_id = batches, config, device, pad_id
        self._log = log
        self._served = 0
        self.waited_s = 0.0
        self.damage: SummerError | None = None
        self._start()

    def next(self) -> MicroBatch:
        """The next micro-batch; without a target from the first row on that is damaged.

        An error here would leave the other ranks waiting in the next reduction: `damage` says what
        is wrong, and a flag of the step informs the others (trainer/train.py).
        """
        start = time.perf_counter()
        host = self._next_batch() if self.damage is None else self._all.empty()
        self.waited_s += time.perf_counter() - start
        if isinstance(host, ReadFailure):
            self.damage, host = host.error, self._all.empty()
        return to_device(host, self._device, self._pad_id)

    def worker_pids(self) -> list[int]:
        """The workers' process numbers."""
        return [worker.pid for worker in getattr(self._batches, "_workers", [])]

    def close(self) -> None:
        """End the workers now. They are killed: one that waits for a dead one's lock never ends.

        A micro-batch on its way is waited for on both sides of that: a worker forked while it is
        taken over would hang, and after its shutdown torch does not look for dead workers.
        """
        if self._coming:
            wait([self._coming], timeout=1)
        for worker in getattr(self._batches, "_workers", []):
            worker.kill()
        if self._thread is not None:
            self._thread.end(_NOTICED_S)
        shutdown = getattr(self._batches, "_shutdown_workers", None)
        if shutdown is not None:
            shutdown()

    def _next_batch(self) -> HostBatch | ReadFailure:
        """What the workers made; new ones go on, at the same place, where one has died."""
        died = ""
        for _ in range(_LIVES):
            if died:
                self._log(f"a loader worker died ({died}); new ones continue from the same row")
                self._start()
            try:
                host = self._coming.result() if self._coming else next(self._batches)
            except (RuntimeError, OSError, EOFError) as error:  # the last two: while it sends
                if isinstance(error, RuntimeError) and "exited unexpectedly" not in str(error):
                    raise
                died = str(error).partition("\n")[0]
                self.close()
            else:
                self._served += 1
                self._read_ahead()
                return host
        raise TrainingError(
            f"{_LIVES} times a loader worker died before it had read a row ({died}); the last "
            "checkpoint is intact: run the same command with a smaller loader.num_workers"
        )

    def _start(self) -> None:
        self._batches = self._open()  # here: the kernel ends workers with the thread they are of
        self._thread = BackgroundThread("loader") if self._config.num_workers else None
        self._read_ahead()

    def _read_ahead(self) -> None:
        """Have the next micro-batch taken over in the background: 64 KiB take a millisecond."""
        self._coming: Future[HostBatch | ReadFailure] | None = None
        if self._thread is not None:
            self._coming = self._thread.submit(self._batches.__next__)

    def _open(self) -> Iterator[HostBatch | ReadFailure]:
        """Workers that continue from the first micro-batch that has not been handed out."""
        many = self._config.num_workers > 0
        fork = many and sys.platform == "linux"  # elsewhere each worker imports torch itself
        if many:  # theirs too: killed, each would leave its own behind
            multiprocessing.util.get_temp_dir()
        with warnings.catch_warnings(), _own_child_handler():
            # 3.12 warns of any fork of a process with threads (ours run numpy), torch of more
            # workers than cores (ours mostly sleep)
            warnings.simplefilter("ignore")
            loader = DataLoader(
                self._all.without_first(self._served),
                batch_size=None,
                num_workers=self._config.num_workers,
                prefetch_factor=self._config.prefetch if many else None,
                pin_memory=self._device.type == "cuda",
                multiprocessing_context="fork" if fork else None,
                worker_init_fn=_follow_the_parent if many else None,
            )
            return iter(loader)


@contextlib.contextmanager
def _own_child_handler() -> Iterator[None]:
    """Keep torch from raising for a dead worker in whatever line runs: `_next_batch` notices it."""
    before = signal.getsignal(signal.SIGCHLD)
    yield
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, before)


def _follow_the_parent(worker: int) -> None:
    """Ignore what Ctrl-C and a scheduler send to the group, and have the kernel end it with the
    parent (torch's own watchdog takes five seconds and leaves a traceback)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
