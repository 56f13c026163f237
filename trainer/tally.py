"""The numbers of a step: added up over ranks in one reduction, read one step late.

A number read at once makes the processor wait for the device, and the device for the processor.
So each step sends a few to the host and goes on; a step later they have long arrived. Wishes travel
with them (one rank was asked to stop, the main rank's clock says commit), so that all ranks act on
the same wish at the same step.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from model.loss import IGNORED
from trainer.distributed import World


class Reading(NamedTuple):
    """A step's numbers, on the host. `loss` is the mean over the step's targets, in nats."""

    loss: float
    n_targets: int
    grad_norm: float
    stop_wished: bool
    commit_wished: bool
    budget_wish: int

    @property
    def refused(self) -> bool:
        """Whether the optimizer refused this update: the gradient was not finite."""
        return not math.isfinite(self.grad_norm)


class Tally:
    """Sums of one step, on the device."""

    def __init__(self, device: torch.device) -> None:
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self._sums = torch.zeros(5, dtype=dtype, device=device)

    def add(self, loss_sum: Tensor, targets: Tensor) -> None:
        """Count one micro-batch."""
        self._sums[0] += loss_sum.detach()
        self._sums[1] += (targets != IGNORED).sum()

    def reduce(self, world: World, *, stop: bool, commit: bool, budget: int) -> Tensor:
        """[5] over all ranks: loss sum, targets, how many wish to stop, to commit; the budget's."""
        self._sums[2], self._sums[3], self._sums[4] = float(stop), float(commit), float(budget)
        return world.all_reduce(self._sums)


class Late:
    """A step's numbers on their way to the host."""

    def __init__(self, sums: Tensor, grad_norm: Tensor) -> None:
        values = torch.cat([sums, grad_norm.to(sums.dtype).view(1)])
        self._host = values.to("cpu", non_blocking=True)  # into pinned memory
        self._arrived = torch.cuda.Event() if values.is_cuda else None  # type: ignore[no-untyped-call]
        if self._arrived is not None:
            self._arrived.record()

    def read(self) -> Reading:
        """The numbers, waiting for them if they are still under way."""
        if self._arrived is not None:
            self._arrived.synchronize()
        loss_sum, n_targets, stop, commit, budget, grad_norm = self._host.tolist()
        loss = loss_sum / n_targets if n_targets else float("nan")
        return Reading(loss, int(n_targets), grad_norm, stop > 0, commit > 0, int(budget))
