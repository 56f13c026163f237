"""The numbers of a step: added up over ranks in one reduction, read one step late.

A number read at once makes the processor wait for the device, and the device for the processor.
So each step sends a few to the host and goes on; a step later they have long arrived. Flags travel
with them (one rank was asked to stop, the main rank's clock says checkpoint), so that all ranks act
on the same flag at the same step.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from model.loss import IGNORED
from trainer.distributed.world import World


class StepFlags(NamedTuple):
    """What a rank knows at a step and the others do not."""

    stop: bool  # it was asked to stop
    checkpoint: bool  # its clock says so
    skip: bool  # the update was skipped when this step was made before
    damaged: bool  # a row of this step, or of one before, could not be read
    budget: int  # what the main rank's budget asks for (trainer/session/budget.py)


class StepMetrics(NamedTuple):
    """A step's numbers, on the host. `loss` is the mean over the step's targets, in nats."""

    loss: float
    n_targets: int
    first_index: int  # the sample that the step began with
    flags: StepFlags  # of any rank
    skipped: bool  # the optimizer made no update
    logged: dict[str, float]  # `grad_norm`, and whatever else the loop wants in metrics.jsonl

    @property
    def grad_norm(self) -> float:
        """The norm of the full gradient before clipping."""
        return self.logged["grad_norm"]


class StepSums:
    """Sums of one step, on the device."""

    def __init__(self, device: torch.device) -> None:
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self._sums = torch.zeros(2 + len(StepFlags._fields), dtype=dtype, device=device)

    def add(self, loss_sum: Tensor, targets: Tensor) -> None:
        """Count one micro-batch."""
        self._sums[0] += loss_sum.detach()
        self._sums[1] += (targets != IGNORED).sum()

    def reduce(self, world: World, flags: StepFlags) -> Tensor:
        """[7] over all ranks: loss sum, targets, and how many have each flag."""
        for place, flag in enumerate(flags, start=2):
            if flag:  # a kernel less for each that is not
                self._sums[place] = float(flag)
        return world.all_reduce(self._sums)


def skip_flagged(sums: Tensor) -> Tensor:
    """[]: above 0 where some rank's flags are a reason to make no update."""
    return sums[4] + sums[5]


class PendingMetrics:
    """A step's numbers on their way to the host.

    `logged` are scalars on the device, the same on every rank: each becomes a field of
    metrics.jsonl under its name.
    """

    def __init__(self, sums: Tensor, skip: Tensor, first_index: int, **logged: Tensor) -> None:
        values = torch.cat([sums, torch.stack([skip, *logged.values()]).to(sums.dtype)])
        self._first_index, self._names = first_index, tuple(logged)
        self._host = values.to("cpu", non_blocking=True)  # into pinned memory
        self._arrived = torch.cuda.Event() if values.is_cuda else None  # type: ignore[no-untyped-call]
        if self._arrived is not None:
            self._arrived.record()

    def read(self) -> StepMetrics:
        """The numbers, waiting for them if they are still under way."""
        if self._arrived is not None:
            self._arrived.synchronize()
        loss_sum, n_targets, stop, checkpoint, skip, damaged, budget, skipped, *logged = (
            self._host.tolist()
        )
        return StepMetrics(
            loss=loss_sum / n_targets if n_targets else float("nan"),
            n_targets=int(n_targets),
            first_index=self._first_index,
            flags=StepFlags(stop > 0, checkpoint > 0, skip > 0, damaged > 0, int(budget)),
            skipped=skipped > 0,
            logged=dict(zip(self._names, logged, strict=True)),
        )
