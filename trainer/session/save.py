"""When a run checkpoints, and what becomes of its checkpoints, all of it beside training.

    on the step     each rank copies its share of the tensors to host memory, and the record
    in a thread     the share is written and proven, the mark set; older checkpoints are purged
    in another      the checkpoint is copied to the mirror, if there is one

The first thread speaks to the other ranks' on a group of its own. A checkpoint that is due while
one is under way waits for it; a stop, and the end of the run, wait for everything.
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from trainer.background import run_in_background
from trainer.checkpoint import retention, storage
from trainer.checkpoint.runs import checkpoint_path, checkpoints, is_checkpoint, step_of
from trainer.checkpoint.storage import Record
from trainer.distributed.devices import available_memory_bytes
from trainer.distributed.world import World, local_tensor, shard_count
from trainer.errors import CheckpointError
from trainer.metrics.metrics import RunEvent
from trainer.session.session import Session
from trainer.session.state import State

_STAGED: Final = 3
"""Host memory of a checkpoint in sizes of the share: the copy, and safetensors' two of a file."""

_GRACE_S: Final = 60.0  # for a checkpoint under way when training fails: a rank may be gone


class News(NamedTuple):
    """What a thread has to tell; the main thread does."""

    text: str
    event: str
    facts: dict[str, Any]


@contextlib.contextmanager
def open_saver(session: Session, state: State) -> Iterator[CheckpointSaver]:
    """The saver of a session. What is under way when the block ends badly is not given up."""
    saver = CheckpointSaver(session, state)
    with storage.no_single_process_warning():
        try:
            yield saver
        finally:
            saver.close()


def tensors_to_save(tensors: Mapping[str, Tensor], world: World) -> dict[str, Tensor]:
    """What this rank writes of what several ranks hold alike: as many bytes as any other.

    Of sharded tensors it writes its slices, unless another replica writes that tensor.
    """
    loads = [0] * world.world_size
    share = {}
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].nbytes, item[0])):
        width = shard_count(tensor)
        first = min(range(0, world.world_size, width), key=loads.__getitem__)
        for rank in range(first, first + width):
            loads[rank] += tensor.nbytes // width
        if first <= world.rank < first + width:
            share[name] = tensor
    return share


class CheckpointSaver:
    """Says when a checkpoint is due, writes it, and keeps what must be kept."""

    def __init__(self, session: Session, state: State) -> None:
        self._session, self._state = session, state
        self._config = session.plan.config.checkpoint
        self._mirror = retention.mirror_of(session.run, self._config)
        self._saved_at = time.monotonic()
        here = checkpoint_path(session.run, state.step) in session.saved  # or from elsewhere
        self._saved_step = state.step if here else None
        self._world = session.world.with_own_group()
        self._news: deque[News] = deque()
        self._under_way: tuple[int, Future[CheckpointError | None]] | None = None
        self._mirroring: Future[None] | None = None
        self._mirrored: Path | None = None
        self._staging = self._make_staging() if self._config.asynchronous else None
        if session.saved and self._mirror is not None and self._world.is_main:
            newest = session.saved[-1]  # a kill may have kept it from being copied
            if not is_checkpoint(checkpoint_path(self._mirror, step_of(newest))):
                self._mirroring = run_in_background("checkpoint", lambda: self._copy(newest))

    def clock_wishes(self) -> bool:
        """Whether this rank, if it is the main one, finds that enough time has passed."""
        minutes = (time.monotonic() - self._saved_at) / 60
        interval = self._config.interval_minutes
        return self._session.world.is_main and 0 < interval <= minutes

    def due(self) -> bool:
        """Whether a checkpoint is due by the number of steps. What became of the last one is
        told."""
        self._tell_news()
        interval = self._config.interval_steps
        return interval > 0 and self._state.step % interval == 0

    def checkpoint(self, *, last: bool = False) -> None:
        """Checkpoint the state, unless it is. A failure is told; only that of the last is fatal.

        Returns when the values of this step are safe from the next; with `last`, when all is done.
        """
        self.wait()
        step = self._state.step
        if step != self._saved_step:
            self._saved_at = time.monotonic()  # a failure too: the next try is an interval away
            share = self._tensors()
            record = copy.deepcopy(self._state.record(self._session.plan))
            if self._staging is None or last:
                failure = self._write(step, share, record)
                self._settle(step, failure)
                if failure is not None and last:
                    raise failure
            else:
                staged = self._staging.hold(share)
                self._under_way = (
                    step,
                    run_in_background("checkpoint", lambda: self._write(step, staged, record)),
                )
        if last:
            self.finish()
            self._complete_mirror()

    def finish(self) -> None:
        """Wait for all that is under way."""
        self.wait()
        if self._mirroring is not None:
            self._mirroring.result()
        self._tell_news()

    def wait(self) -> None:
        """Wait for the checkpoint under way, if there is one, and tell what became of it."""
        if self._under_way is not None:
            step, future = self._under_way
            failure = future.result()
            self._under_way = None
            self._settle(step, failure)

    def close(self) -> None:
        """Let what is under way end, within bounds, and tell what became of it."""
        deadline = time.monotonic() + _GRACE_S
        jobs: list[Future[Any]] = [] if self._under_way is None else [self._under_way[1]]
        wait(jobs, deadline - time.monotonic())
        wait([] if self._mirroring is None else [self._mirroring], deadline - time.monotonic())
        self._tell_news()

    def _settle(self, step: int, failure: CheckpointError | None) -> None:
        if failure is None:
            self._saved_step = step
        self._tell_news()

    def _tensors(self) -> dict[str, Tensor]:
        tensors = storage.tensors_of(self._session.network.bare, self._session.optimizer)
        return tensors_to_save(tensors, self._session.world)

    def _make_staging(self) -> _Staging | None:
        """Host memory for this rank's share, on all ranks or on none."""
        session, share = self._session, self._tensors()
        size = _STAGED * storage.share_bytes(share)
        free = available_memory_bytes()
        needed = size * session.world.local_world_size
        fits = session.world.gather(free is None or needed <= free)
        amount = f"{needed / 1e9:.3g} GB of host memory"
        if not all(fits):
            there = f"{(free or 0) / 1e9:.3g} GB are free"
            session.display.print(f"! asynchronous checkpoints need {amount}, and {there}"
                               ": training waits for each")  # fmt: skip
            return None
        session.display.print(f"checkpoints are asynchronous, with {amount}")
        return _Staging(share)

    def _write(
        self, step: int, share: Mapping[str, Tensor], record: Record
    ) -> CheckpointError | None:
        """Write a checkpoint, and see to the others; what it failed for, the same on every rank."""
        run, started = self._session.run, time.monotonic()
        try:
            folder = storage.save_from_any_thread(run, share, record, self._world)
        except CheckpointError as error:
            facts = {"step": step, "reason": str(error)}
            self._news.append(
                News(f"! {error}; TRAINING GOES ON", RunEvent.CHECKPOINT_FAILED, facts)
            )
            return error
        seconds = round(time.monotonic() - started, 3)
        text = f"saved {folder} in {seconds:.1f} s"
        self._news.append(News(text, RunEvent.CHECKPOINT, {"step": step, "took_s": seconds}))
        if self._world.is_main:
            self._purge(run)
            if self._mirror is not None and (self._mirroring is None or self._mirroring.done()):
                self._mirroring = run_in_background("checkpoint", lambda: self._copy(folder))
        return None

    def _purge(self, run: Path) -> None:
        try:
            retention.purge(run, self._config)
        except OSError as error:
            text = (
                f"! an older checkpoint of {run} could not be removed ({error}); TRAINING GOES ON"
            )
            self._news.append(News(text, RunEvent.PURGE_FAILED, {"reason": str(error)}))

    def _copy(self, checkpoint: Path) -> None:
        """Copy a checkpoint to the mirror. Whatever happens there is told and harms nothing
        here."""
        assert self._mirror is not None
        started = time.monotonic()
        try:
            folder = retention.copy_checkpoint(checkpoint, self._mirror)
        except (OSError, CheckpointError) as error:
            text = (
                f"! {checkpoint.name} was not copied to {self._mirror} ({error}); TRAINING GOES ON"
            )
            self._news.append(News(text, RunEvent.MIRROR_FAILED, {"reason": str(error)}))
            return
        self._mirrored = checkpoint
        seconds = round(time.monotonic() - started, 3)
        text = f"copied to {folder} in {seconds:.1f} s"
        self._news.append(News(text, RunEvent.MIRRORED, {"commit": str(folder), "took_s": seconds}))
        self._purge(self._mirror)

    def _complete_mirror(self) -> None:
        """Copy the last checkpoint too, if it came while the mirror was busy."""
        if self._mirroring is not None:
            newest = checkpoints(self._session.run)[-1]
            if newest != self._mirrored:
                self._copy(newest)
                self._tell_news()

    def _tell_news(self) -> None:
        while self._news:
            news = self._news.popleft()
            self._session.log(news.text, news.event, **news.facts)


class _Staging:
    """Host memory with room for a share, kept from one checkpoint to the next."""

    def __init__(self, share: Mapping[str, Tensor]) -> None:
        self._copies = {
            name: torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
            for name, tensor in share.items()
        }

    def hold(self, share: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies of the values as they are now."""
        for name, tensor in share.items():
            local_tensor(self._copies[name]).copy_(local_tensor(tensor), non_blocking=True)
        if any(tensor.is_cuda for tensor in share.values()):
            torch.cuda.current_stream().synchronize()
        return self._copies
