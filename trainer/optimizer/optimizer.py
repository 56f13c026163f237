"""AdamW with every token weighted the same, and updates that skip themselves."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm, parameters_to_vector, vector_to_parameters
from torch.optim import AdamW

from trainer.distributed.world import own_part
from trainer.optimizer.schedule import OptimConfig


def make_optimizer(model: nn.Module, config: OptimConfig) -> AdamW:
    """Fused AdamW over the parameters, its moments allocated; only matrices decay.

    Loshchilov & Hutter, Decoupled weight decay regularization (2019).
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in parameters if parameter.ndim >= 2]
    vectors = [parameter for parameter in parameters if parameter.ndim < 2]  # norms, LayerScale
    optimizer = AdamW(
        [
            {"params": matrices, "weight_decay": config.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )
    for parameter in parameters:  # now, so that a lack of memory shows before the first step
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


def set_lr(optimizer: AdamW, lr: float) -> float:
    """The learning rate, now that of every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr


def finish_gradients(
    optimizer: AdamW, expected: int, n_targets: Tensor, config: OptimConfig
) -> Tensor:
    """The global gradient norm, a tensor []; gradients end clipped and per true target.

    They come in divided by `expected` = G T, the targets a step has when none is ignored;
    `n_targets` [] says how many it had. Both factors are applied in one pass.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    grads = [p.grad for p in parameters if p.grad is not None]
    correction = (expected / n_targets).float()
    norm = _total_norm(grads) * correction
    factor = correction
    if config.grad_clip > 0:
        factor = correction * (config.grad_clip / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_([own_part(grad) for grad in grads], factor)
    return norm


def _total_norm(grads: list[Tensor]) -> Tensor:
    """The norm of all gradients, the same bits on every rank; those of vectors end averaged.

    `fully_shard` leaves vectors to us. The ranks' parts of the norm are gathered, not reduced: in
    what order a reduction adds up may differ from one replica to the next.
    """
    slices = [grad for grad in grads if isinstance(grad, DTensor)]
    if not slices:
        return get_total_norm(grads)
    vectors = [grad for grad in grads if not isinstance(grad, DTensor)]
    flat = parameters_to_vector(vectors)
    dist.all_reduce(flat)
    vector_to_parameters(flat.div_(dist.get_world_size()), vectors)
    mesh, own = slices[0].device_mesh, get_total_norm([grad.to_local() for grad in slices])
    parts = [torch.empty_like(own) for _ in range(mesh.size(mesh.ndim - 1))]
    dist.all_gather(parts, own, group=mesh.get_group(mesh.ndim - 1))
    return get_total_norm([*parts, get_total_norm(vectors)])


def update(optimizer: AdamW, refused: Tensor) -> None:
    """Make the update, unless `refused` [] is 1.0: then weights, moments and their count stay.

    The device decides; nothing waits to find out.
    """
    optimizer.found_inf = refused  # type: ignore[attr-defined]
    optimizer.step()
    optimizer.zero_grad()
