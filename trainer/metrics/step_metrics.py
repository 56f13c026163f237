"""The numbers of a step: added up over ranks in one reduction, read one step late.

A number read at once makes the processor wait for the device, and the device for the processor.
So each step sends a few to the host and goes on; a step later they have long arrived. Wishes travel
with them (one rank was asked to stop, the main rank's clock says checkpoint), so that all ranks act
on the same wish at the same step.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from model.loss import IGNORED
from trainer.distributed.world import World


class Wishes(NamedTuple):
    """What a rank knows at a step and the others do not."""

    stop: bool  # it was asked to stop
    checkpoint: bool  # its clock says so
    refuse: bool  # the update was refused when this step was made before
    damaged: bool  # a row of this step, or of one before, could not be read
    budget: int  # what the main rank's purse asks for (trainer/session/budget.py)


class Reading(NamedTuple):
    """A step's numbers, on the host. `loss` is the mean over the step's targets, in nats."""

    loss: float
    n_targets: int
    grad_norm: float
    refused: bool  # the optimizer made no update
    first_index: int  # the sample that the step began with
    wished: Wishes  # by some rank


class Tally:
    """Sums of one step, on the device."""

    def __init__(self, device: torch.device) -> None:
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self._sums = torch.zeros(2 + len(Wishes._fields), dtype=dtype, device=device)

    def add(self, loss_sum: Tensor, targets: Tensor) -> None:
        """Count one micro-batch."""
        self._sums[0] += loss_sum.detach()
        self._sums[1] += (targets != IGNORED).sum()

    def reduce(self, world: World, wishes: Wishes) -> Tensor:
        """[7] over all ranks: loss sum, targets, and how many have each wish."""
        for place, wish in enumerate(wishes, start=2):
            if wish:  # a kernel less for each that is not
                self._sums[place] = float(wish)
        return world.all_reduce(self._sums)


def refusal_wished(sums: Tensor) -> Tensor:
    """[]: above 0 where some rank's wishes are a reason to make no update."""
    return sums[4] + sums[5]


class Late:
    """A step's numbers on their way to the host."""

    def __init__(self, sums: Tensor, grad_norm: Tensor, refused: Tensor, first_index: int) -> None:
        values = torch.cat([sums, torch.stack([grad_norm, refused]).to(sums.dtype)])
        self._first_index = first_index
        self._host = values.to("cpu", non_blocking=True)  # into pinned memory
        self._arrived = torch.cuda.Event() if values.is_cuda else None  # type: ignore[no-untyped-call]
        if self._arrived is not None:
            self._arrived.record()

    def read(self) -> Reading:
        """The numbers, waiting for them if they are still under way."""
        if self._arrived is not None:
            self._arrived.synchronize()
        loss_sum, n_targets, *wishes, grad_norm, refused = self._host.tolist()
        stop, checkpoint, refuse, damaged, budget = wishes
        return Reading(
            loss=loss_sum / n_targets if n_targets else float("nan"),
            n_targets=int(n_targets),
            grad_norm=grad_norm,
            refused=refused > 0,
            first_index=self._first_index,
            wished=Wishes(stop > 0, checkpoint > 0, refuse > 0, damaged > 0, int(budget)),
        )
