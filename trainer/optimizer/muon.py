"""Muon for the blocks' matrices, AdamW for all else.

Jordan, Muon: an optimizer for hidden layers in neural networks (2024); scale and weight decay of
Liu et al., Muon is scalable for LLM training (2025), so that AdamW's learning rates carry over.
torch.optim.Muon is not used: it does not look at `found_inf`, takes q, k and v for one matrix, and
knows neither slices nor other ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import AdamW

from trainer.distributed.world import local_tensor

MOMENTUM: Final = 0.95
_A, _B, _C = 3.4445, -4.7750, 2.0315  # Jordan's quintic
_ITERATIONS: Final = 5


class Muon(AdamW):
    """AdamW, but for groups whose matrices have `projections`: how many rows each one has."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One update; none, bit for bit, where `found_inf` [] is set and above 0."""
        groups, skip = self.param_groups, getattr(self, "found_inf", None)
        for group in groups:
            if group["projections"]:
                _update_matrices(self, group, skip)
        self.param_groups = [group for group in groups if not group["projections"]]
        try:
            super().step(closure)
        finally:
            self.param_groups = groups


def _update_matrices(optimizer: Muon, group: dict[str, Any], skip: Tensor | None) -> None:
    """Update a group's matrices; each rank works out every n-th of n ranks' and sends it around.

    With eight ranks and summer-1b's batch that is 0.6 % of a step's FLOPs; all on every rank, 5 %.
    """
    ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    pairs = zip(group["params"], group["projections"], strict=True)
    due = [(matrix, rows) for matrix, rows in pairs if matrix.grad is not None]
    for first in range(0, len(due), ranks):
        updates, sent = [], []
        for owner, (matrix, rows) in enumerate(due[first : first + ranks]):
            whole = _direction(optimizer.state[matrix], matrix, skip)
            updates.append(_of_projections(whole, rows) if owner == rank else whole)
        if ranks > 1:
            sent = [dist.broadcast(one, owner, async_op=True) for owner, one in enumerate(updates)]
        for work in sent:
            work.wait()
        for (matrix, _), update in zip(due[first:], updates, strict=False):
            moved = local_tensor(matrix) * (1 - group["lr"] * group["weight_decay"])
            moved.sub_(_own_rows(update, matrix), alpha=group["lr"])
            _assign(local_tensor(matrix), moved, skip)


def _direction(state: dict[str, Tensor], matrix: Tensor, skip: Tensor | None) -> Tensor:
    """Nesterov's momentum after this gradient, whole on every rank, as matrices are multiplied."""
    grad = matrix.grad
    assert grad is not None
    if "momentum" not in state:
        state["momentum"] = torch.zeros_like(matrix)
    own = local_tensor(state["momentum"])
    _assign(own, local_tensor(grad).add(own, alpha=MOMENTUM), skip)
    # a CPU without bf16 arithmetic would take a hundred times as long in it
    dtype = torch.bfloat16 if matrix.is_cuda else torch.float32
    ahead = grad.add(state["momentum"], alpha=MOMENTUM).to(dtype)
    return ahead.full_tensor() if isinstance(ahead, DTensor) else ahead


def _of_projections(direction: Tensor, rows: Sequence[int]) -> Tensor:
    """The update of a matrix [out, in] whose projections, by `rows`, lie one below the other.

    Its root mean square is about 0.2, as AdamW's.
    """
    parts = map(orthogonalize, torch.split(direction, list(rows)))
    return torch.cat([part * (0.2 * math.sqrt(max(part.shape))) for part in parts])


def orthogonalize(matrix: Tensor) -> Tensor:
    """U V' of the matrix's U S V', roughly: singular values end between 0.7 and 1.2.

    The Newton-Schulz iteration of Jordan (2024).
    """
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT
    x: Tensor = wide / (wide.norm() + 1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return x if wide is matrix else x.mT


def _own_rows(update: Tensor, matrix: Tensor) -> Tensor:
    if not isinstance(matrix, DTensor):
        return update
    mesh, placements = matrix.device_mesh, matrix.placements
    spread: Tensor = distribute_tensor(update, mesh, placements, src_data_rank=None)
    return local_tensor(spread)


def _assign(target: Tensor, value: Tensor, skip: Tensor | None) -> None:
    """What the device decides: without a look at it, which would wait for it."""
    target.copy_(value if skip is None else torch.where(skip > 0, target, value))
