"""When a run checkpoints, and what becomes of its checkpoints.

    on the step     each rank copies its share of the tensors to host memory, and the record
    in a thread     the share is written and verified, the record last; older ones are purged
    in another      the newest checkpoint is copied to the mirror, if there is one

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
from typing import Any, Final

import torch
from torch import Tensor

from trainer.background import BackgroundThread
from trainer.checkpoint import retention, storage
from trainer.checkpoint.runs import checkpoint_path, checkpoints
from trainer.checkpoint.storage import Record
from trainer.distributed.devices import available_memory_bytes
from trainer.distributed.world import World, local_tensor, shard_count
from trainer.errors import CheckpointError
from trainer.metrics.metrics import RunEvent
from trainer.session.state import Session, State

_COPIES: Final = 3
"""Host memory of a checkpoint in sizes of the share: the copy, and safetensors' two of a file."""

_GRACE_S: Final = 60.0  # for a checkpoint under way when training fails: a rank may be gone


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
    """What this rank writes of what several ranks (or replicas) hold alike: an even share."""
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
        self._saved_at = time.monotonic()
        here = checkpoint_path(session.run, state.step) in session.saved  # or from elsewhere
        self._saved_step = state.step if here else None
        self._world = session.world.with_own_group()
        self._events: deque[tuple[str, str, dict[str, Any]]] = deque()  # the main thread logs them
        self._thread = BackgroundThread("checkpoint")
        self._under_way: tuple[int, Future[CheckpointError | None]] | None = None
        mirror = retention.mirror_of(session.run, self._config)
        self._mirror = mirror if self._world.is_main else None
        self._mirror_thread = BackgroundThread("mirror")
        self._mirroring = self._mirror_thread.submit(self._mirror_newest)  # a kill may have kept it
        self._copies = self._checkpoint_buffers() if self._config.asynchronous else None

    def due_by_clock(self) -> bool:
        """Whether this rank, if it is the main one, finds that enough time has passed."""
        minutes = (time.monotonic() - self._saved_at) / 60
        return self._world.is_main and 0 < self._config.interval_minutes <= minutes

    def due_by_steps(self) -> bool:
        """Whether a checkpoint is due by the number of steps. Reports on the last one, too."""
        self._log_events()
        interval = self._config.interval_steps
        return interval > 0 and self._state.step % interval == 0

    def checkpoint(self, *, last: bool = False) -> None:
        """Checkpoint the state, unless it is. A failure is logged; only that of the last is fatal.

        Returns when the values of this step are safe from the next; with `last`, when all is done.
        """
        self.wait()
        step, failure = self._state.step, None
        if step != self._saved_step:
            self._saved_at = time.monotonic()  # a failure too: the next try is an interval away
            share = self._tensors()
            record = copy.deepcopy(self._state.record(self._session.plan))
            record["bit_exact"] = self._session.network.repeatable
            if self._copies is None or last:
                written: Future[CheckpointError | None] = Future()
                written.set_result(self._write(step, share, record))
                self._under_way = step, written
                failure = self.wait()
            else:
                held = _copy_values(share, self._copies)
                written = self._thread.submit(lambda: self._write(step, held, record))
                self._under_way = step, written
        if last:
            if failure is not None:
                raise failure
            self.finish()

    def finish(self) -> None:
        """Wait for all that is under way."""
        self.wait()
        self._mirroring.result()
        self._log_events()

    def wait(self) -> CheckpointError | None:
        """Wait for the checkpoint under way, if there is one; why it failed, if it did."""
        failure = None
        if self._under_way is not None:
            (step, written), self._under_way = self._under_way, None
            failure = written.result()
            self._saved_step = step if failure is None else self._saved_step
        self._log_events()
        return failure

    def close(self) -> None:
        """Let what is under way end, within bounds."""
        if self._under_way is not None:
            wait([self._under_way[1]], _GRACE_S)
        wait([self._mirroring], _GRACE_S)
        self._log_events()
        self._thread.end(0)
        self._mirror_thread.end(0)

    def _tensors(self) -> dict[str, Tensor]:
        tensors = storage.tensors_of(self._session.network.bare, self._session.optimizer)
        return tensors_to_save(tensors, self._world)

    def _checkpoint_buffers(self) -> dict[str, Tensor] | None:
        """Host memory for this rank's share, kept between checkpoints; on all ranks or on none."""
        session, share = self._session, self._tensors()
        free = available_memory_bytes()
        needed = _COPIES * storage.share_bytes(share) * session.world.local_world_size
        amount = f"{needed / 1e9:.3g} GB of host memory"
        if not all(session.world.gather(free is None or needed <= free)):
            session.display.print(
                f"! asynchronous checkpoints need {amount}, and {(free or 0) / 1e9:.3g} GB are "
                "free: training waits for each"
            )
            return None
        session.display.print(f"checkpoints are asynchronous, with {amount}")
        return {
            name: torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
            for name, tensor in share.items()
        }

    def _write(
        self, step: int, share: Mapping[str, Tensor], record: Record
    ) -> CheckpointError | None:
        """Write a checkpoint, and see to the others; what it failed for, the same on every rank."""
        run, started = self._session.run, time.monotonic()
        try:
            folder = storage.save(run, share, record, self._world)
        except CheckpointError as error:
            self._failed(RunEvent.CHECKPOINT_FAILED, str(error), error, step=step)
            return error
        took_s = round(time.monotonic() - started, 3)
        facts = {"step": step, "took_s": took_s}
        self._events.append((f"saved {folder} in {took_s:.1f} s", RunEvent.CHECKPOINT, facts))
        if self._world.is_main:
            self._purge(run)
            self._mirroring = self._mirror_thread.submit(self._mirror_newest)
        return None

    def _mirror_newest(self) -> None:
        """Copy the newest checkpoint to the mirror, unless it is there; a failure harms nothing."""
        found, started = checkpoints(self._session.run), time.monotonic()
        if self._mirror is None or not found:
            return
        try:
            if retention.is_copied(found[-1], self._mirror):
                return
            folder = retention.copy_checkpoint(found[-1], self._mirror)
        except (OSError, CheckpointError) as error:
            text = f"{found[-1].name} was not copied to {self._mirror} ({error})"
            self._failed(RunEvent.MIRROR_FAILED, text, error)
            return
        took_s = round(time.monotonic() - started, 3)
        facts = {"commit": str(folder), "took_s": took_s}
        self._events.append((f"copied to {folder} in {took_s:.1f} s", RunEvent.MIRRORED, facts))
        self._purge(self._mirror)

    def _purge(self, run: Path) -> None:
        try:
            retention.purge(run, self._config)
        except OSError as error:
            text = f"an older checkpoint of {run} could not be removed ({error})"
            self._failed(RunEvent.PURGE_FAILED, text, error)

    def _failed(self, event: str, text: str, error: Exception, **facts: Any) -> None:
        reason = {**facts, "reason": str(error)}
        self._events.append((f"! {text}; TRAINING GOES ON", event, reason))

    def _log_events(self) -> None:
        while self._events:
            text, event, facts = self._events.popleft()
            self._session.log(text, event, **facts)


def _copy_values(share: Mapping[str, Tensor], copies: dict[str, Tensor]) -> dict[str, Tensor]:
    """The copies, which now have the values of the share."""
    for name, tensor in share.items():
        local_tensor(copies[name]).copy_(local_tensor(tensor), non_blocking=True)
    if any(tensor.is_cuda for tensor in share.values()):
        torch.cuda.current_stream().synchronize()
    return copies
