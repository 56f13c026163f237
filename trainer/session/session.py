"""What a process holds while it trains: the run's folder, the model, the data it reads."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.optim import AdamW

from shards.format import TOKENIZER
from shards.reader import ShardReader
from trainer.config.plan import TrainPlan
from trainer.data.batches import MicroBatches, Stretch
from trainer.data.loader import Loader
from trainer.distributed.world import World
from trainer.errors import ConfigError
from trainer.faults.faults import alarm
from trainer.faults.guard import Recorded
from trainer.faults.inject import Faults, flip_a_bit
from trainer.metrics.display import Screen
from trainer.metrics.metrics import Journal
from trainer.session.network import Network
from trainer.session.state import State
from trainer.validation.text_bytes import read_text_bytes
from trainer.validation.validation import HeldOut


@dataclass(frozen=True, kw_only=True)
class Session:
    """One process's hold on a run."""

    plan: TrainPlan
    run: Path
    world: World
    screen: Screen
    journal: Journal
    network: Network
    optimizer: AdamW
    recorded: Recorded
    first_index: int  # where it began or was resumed
    saved: list[Path]  # the checkpoints that the run had then, oldest first

    def tell(self, text: str, event: str, **facts: Any) -> None:
        """Show a line and write the event down."""
        self.screen.say(text)
        self.journal.event(event, **facts)


@contextlib.contextmanager
def claim(run: Path, world: World) -> Iterator[None]:
    """The run's folder, made and held by this job alone until it ends, however it ends."""
    with contextlib.ExitStack() as stack:

        def lock() -> None:
            run.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context((run / ".lock").open("w"))
            try:
                # of the process: a lock of the file handle would be inherited by loader workers
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise ConfigError(
                    f"{run} is being trained by another process: wait for it, stop it, "
                    "or give another --out"
                ) from None

        world.on_main(lock)
        yield


@contextlib.contextmanager
def open_loader(session: Session, state: State, faults: Faults) -> Iterator[Loader]:
    """The loader of the steps that are left, its workers ended with the block."""
    plan, rank = session.plan, session.world.rank
    stretch = Stretch(
        first_index=state.next_index,
        n_steps=max(0, plan.config.max_steps - state.step),
        shape=plan.shape,
        rank=rank,
        skipped=state.skipped,
    )
    readers = {name: ShardReader(folder) for name, folder in plan.folders.items()}
    order = state.order
    for step in faults.rotten():
        number = (step - 1 - state.step) * plan.shape.grad_accum_steps
        located = order.locate(stretch.indices(order.seed, number)[:1])
        flip_a_bit(readers[order.sources[int(located.source[0])]], int(located.row[0]))
    batches = MicroBatches(order, readers, stretch)

    def tell(text: str) -> None:
        alarm(session.run, f"rank {rank}: {text}", "loader", rank=rank)

    loader = Loader(batches, plan.config.loader, session.world.device, plan.pad_id, tell)
    with contextlib.closing(loader):
        yield loader


def open_held_out(plan: TrainPlan, world: World) -> HeldOut | None:
    """What the run scores while it trains; None if it scores nothing."""
    if not plan.config.validation.interval:
        return None
    opened: list[HeldOut] = []

    def read() -> None:
        opened.append(_read_held_out(plan, world))

    world.on_all(read)  # a damaged row stops all ranks: alone, one would leave the others waiting
    return opened[0] if opened[0].sources else None


def _read_held_out(plan: TrainPlan, world: World) -> HeldOut:
    shards = Path(plan.config.shards)
    tokenizer = shards / next(iter(plan.sources)) / TOKENIZER
    return HeldOut(
        {name: shards / name for name in (*plan.sources, *plan.evaluated)},
        rows=plan.config.validation.rows,
        batch_size=plan.shape.micro_batch_size,
        pad_id=plan.pad_id,
        text_bytes=read_text_bytes(tokenizer, plan.tokenizer_sha256),
        world=world,
    )
