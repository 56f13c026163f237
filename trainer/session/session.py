"""What a process holds while it trains: the run's folder, the model, the data it reads."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.optim import Optimizer

from trainer.config.plan import TrainPlan
from trainer.distributed.world import World
from trainer.errors import ConfigError
from trainer.faults.history import GuardHistory
from trainer.metrics.display import Display
from trainer.metrics.metrics import Journal
from trainer.session.network import Network


@dataclass(frozen=True, kw_only=True)
class Session:
    """One process's hold on a run."""

    plan: TrainPlan
    run: Path
    world: World
    display: Display
    journal: Journal
    network: Network
    optimizer: Optimizer
    history: GuardHistory
    first_index: int  # where it began or was resumed
    saved: list[Path]  # the checkpoints that the run had then, oldest first

    def log(self, text: str, event: str, **facts: Any) -> None:
        """Show a line and write the event down."""
        self.display.print(text)
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
