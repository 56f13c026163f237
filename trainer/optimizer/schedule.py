"""The learning rate: a pure function of the step, so that there is nothing to save.

A schedule is a row of SCHEDULES. No torch here: a mistake in a command is reported at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, NamedTuple

from trainer.errors import ConfigError, at_least, one_of

SCHEDULES: Final[dict[str, Callable[[float], float]]] = {
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
    "linear": lambda done: 1 - done,
    "wsd": lambda done: 1 - done,
    "constant": lambda done: 1.0,
}
"""What `optim.schedule` may be: done (0 where the decay begins, 1 at the last step) -> how far the
rate is above `min_lr`, from 1 to 0. Cosine: Loshchilov & Hutter, SGDR (2017), without restarts.
wsd (warmup, stable, decay: Hu et al., MiniCPM, 2024) is linear over the last tenth."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer, a row of OPTIMIZERS in optimizer.py, and its schedule, a row of SCHEDULES."""

    schedule: str = "cosine"
    lr: float = 3e-4
    min_lr: float | None = None  # a tenth of `lr`
    warmup_steps: int = 2000
    decay_steps: int = 0  # in which the rate falls, the last; 0: all after warmup, wsd a tenth
    name: str = "adamw"
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    grad_clip: float = 1.0  # 0: none

    def __post_init__(self) -> None:
        one_of("optim.", self, schedule=SCHEDULES)
        if not 0 < self.lr < math.inf:
            raise ConfigError(f"optim.lr={self.lr}: must be a number above 0")
        if self.min_lr is not None and not 0 <= self.min_lr <= self.lr:
            raise ConfigError(f"optim.min_lr={self.min_lr}: must lie between 0 and lr={self.lr}")
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            raise ConfigError(f"optim.beta1={self.beta1}, beta2={self.beta2}: must lie in [0, 1)")
        at_least("optim.", self, warmup_steps=0, decay_steps=0)
        at_least("optim.", self, weight_decay=0, eps=0, grad_clip=0)


class Anneal(NamedTuple):
    """An end before `max_steps`: from `first_step` on, `n_steps` lead down to `min_lr`."""

    first_step: int
    n_steps: int

    @property
    def last_step(self) -> int:
        """The step after which the run is complete."""
        return self.first_step + self.n_steps


def lr_at(step: int, optim: OptimConfig, max_steps: int, anneal: Anneal | None = None) -> float:
    """Learning rate of the update after `step` updates: linear warmup, then the schedule.

    The first update already moves (1/warmup of `lr`); the rate stays until the last `decay_steps`,
    so that a run may be extended or branched before them without a jump. The schedule would reach
    `min_lr` at `max_steps`. Annealing is a straight line from the rate at its first step, as in
    Hu et al., MiniCPM (2024).
    """
    min_lr = optim.lr / 10 if optim.min_lr is None else optim.min_lr
    if anneal is not None and step >= anneal.first_step:
        start = lr_at(anneal.first_step, optim, max_steps)
        left = max(0.0, 1 - (step - anneal.first_step) / max(1, anneal.n_steps))
        return min(start, min_lr + (start - min_lr) * left)
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    decay_steps = optim.decay_steps or (max_steps // 10 if optim.schedule == "wsd" else max_steps)
    first = max(optim.warmup_steps, max_steps - decay_steps)
    done = min(1.0, max(0, step - first) / max(1, max_steps - first))
    return min_lr + (optim.lr - min_lr) * SCHEDULES[optim.schedule](done)
