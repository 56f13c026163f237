"""The learning rate, a pure function of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, NamedTuple

from trainer.errors import ConfigError, at_least, one_of

SCHEDULES: Final[dict[str, Callable[[float], float]]] = {
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
    "linear": lambda done: 1 - done,
}
"""What `optim.schedule` may be: done (0 after warmup, 1 at the last step) -> how far the rate is
above `min_lr`, from 1 to 0. Cosine: Loshchilov & Hutter, SGDR (2017), without restarts."""


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The learning rate over a run. `min_lr` defaults to a tenth of `lr`."""

    schedule: str = "cosine"
    lr: float = 3e-4
    min_lr: float | None = None
    warmup_steps: int = 2000

    def __post_init__(self) -> None:
        one_of("optim.", self, schedule=SCHEDULES)
        if not 0 < self.lr < math.inf:
            raise ConfigError(f"optim.lr={self.lr}: must be a number above 0")
        if self.min_lr is not None and not 0 <= self.min_lr <= self.lr:
            raise ConfigError(f"optim.min_lr={self.min_lr}: must lie between 0 and lr={self.lr}")
        at_least("optim.", self, warmup_steps=0)


class Anneal(NamedTuple):
    """An end before `max_steps`: from `first_step` on, `n_steps` lead down to `min_lr`."""

    first_step: int
    n_steps: int

    @property
    def last_step(self) -> int:
        """The step after which the run is complete."""
        return self.first_step + self.n_steps


def lr_at(step: int, optim: ScheduleConfig, max_steps: int, anneal: Anneal | None = None) -> float:
    """Learning rate of the update after `step` updates: linear warmup, then the schedule.

    The first update already moves (1/warmup of `lr`); the schedule would reach `min_lr` at
    `max_steps`. Annealing is a straight line from the rate at its first step, as in Hu et al.,
    MiniCPM (2024).
    """
    min_lr = optim.lr / 10 if optim.min_lr is None else optim.min_lr
    if anneal is not None and step >= anneal.first_step:
        start = lr_at(anneal.first_step, optim, max_steps)
        left = max(0.0, 1 - (step - anneal.first_step) / max(1, anneal.n_steps))
        return min(start, min_lr + (start - min_lr) * left)
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    done = min(1.0, (step - optim.warmup_steps) / max(1, max_steps - optim.warmup_steps))
    return min_lr + (optim.lr - min_lr) * SCHEDULES[optim.schedule](done)
