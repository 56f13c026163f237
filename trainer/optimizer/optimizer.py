"""Optimizers, gradients in which every token weighs the same, and updates skipped.

A new optimizer is a function and its row in OPTIMIZERS: `--set optim.name=` then trains with it,
the guard skips its updates, checkpoints hold its state, and the plan counts its bytes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm, parameters_to_vector, vector_to_parameters
from torch.optim import AdamW, Optimizer

from model.layers import Linear
from trainer.distributed.world import local_tensor
from trainer.errors import ConfigError, one_of
from trainer.optimizer.muon import Muon
from trainer.optimizer.schedule import OptimConfig

Groups = list[dict[str, Any]]
"""Parameters with their `weight_decay` (only matrices decay) and, for each one, `projections`: how
many rows each of those has that make up a block's matrix; none for all other parameters."""


def _adamw(groups: Groups, config: OptimConfig) -> Optimizer:
    """Loshchilov & Hutter, Decoupled weight decay regularization (2019)."""
    betas = (config.beta1, config.beta2)
    return AdamW(groups, lr=config.lr, betas=betas, eps=config.eps, fused=True)


def _muon(groups: Groups, config: OptimConfig) -> Optimizer:
    """See muon.py."""
    matrices, *rest = groups
    split: Groups = []
    for of_block in (True, False):
        pairs = zip(matrices["params"], matrices["projections"], strict=True)
        chosen = [(matrix, rows) for matrix, rows in pairs if bool(rows) == of_block]
        params, rows = [matrix for matrix, _ in chosen], [rows for _, rows in chosen]
        split.append({**matrices, "params": params, "projections": rows if of_block else []})
    rest = [{**group, "projections": []} for group in rest]
    betas = (config.beta1, config.beta2)
    return Muon([*split, *rest], lr=config.lr, betas=betas, eps=config.eps, fused=True)


OPTIMIZERS: Final[dict[str, Callable[[Groups, OptimConfig], Optimizer]]] = {
    "adamw": _adamw,
    "muon": _muon,
}
"""What `optim.name` may be. The state of each consists of tensors that begin as zeros, and its
step passes over parameters without a gradient, as those of torch do."""


def make_optimizer(model: nn.Module, config: OptimConfig) -> Optimizer:
    """The optimizer, its state allocated; ConfigError if that is not of tensors that begin as 0."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in parameters if parameter.ndim >= 2]
    vectors = [parameter for parameter in parameters if parameter.ndim < 2]  # norms, LayerScale
    modules = {name: each for name, each in model.named_modules() if isinstance(each, Linear)}
    rows = {each.weight: each.rows for name, each in modules.items() if name != "head"}
    projections = [rows.get(matrix, ()) for matrix in matrices]
    groups: Groups = [
        {"params": matrices, "weight_decay": config.weight_decay, "projections": projections},
        {"params": vectors, "weight_decay": 0.0, "projections": [() for _ in vectors]},
    ]
    one_of("optim.", config, name=OPTIMIZERS)
    optimizer = OPTIMIZERS[config.name](groups, config)
    _allocate_state(optimizer, config.name)
    return optimizer


def _allocate_state(optimizer: Optimizer, name: str) -> None:
    """Have an optimizer make its state now, by a skipped update, for a checkpoint to fill."""
    parameters, groups = _parameters(optimizer), optimizer.param_groups
    decays, grads = [group["weight_decay"] for group in groups], [p.grad for p in parameters]
    for group in groups:
        group["weight_decay"] = 0.0
    optimizer.zero_grad()
    for parameter in parameters:  # one by one: a second set of gradients might not fit
        parameter.grad = torch.zeros_like(parameter)
        update(optimizer, torch.ones((), dtype=torch.float32, device=parameter.device))
    for group, decay in zip(groups, decays, strict=True):
        group["weight_decay"] = decay
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = grad
    for state in optimizer.state.values():
        for key, value in state.items():
            fits = isinstance(value, Tensor)
            if fits and key != "step" and not _skips_by_itself(optimizer):
                fits = not local_tensor(value).any()
            if not fits:
                raise ConfigError(
                    f"optim.name={name}: its state {key!r} must be a tensor that begins as zeros, "
                    "or checkpoints and the guard could not handle it"
                )
            value.zero_()


@functools.cache
def optimizer_bytes(config: OptimConfig, of_block: bool = False) -> int:
    """Bytes for each parameter in addition to itself and its gradient, by trying one.

    It is one of a block's matrices, or another.
    """
    with torch.device("cpu"):
        one = Linear(1, 1) if of_block else nn.ParameterList([nn.Parameter(torch.zeros(1, 1))])
    optimizer = make_optimizer(one, config)
    [state] = optimizer.state.values()
    held = sum(int(tensor.nbytes) for tensor in state.values() if tensor.ndim)
    return held if _skips_by_itself(optimizer) else 2 * held + 4  # and the copies of `update`


def set_lr(optimizer: Optimizer, lr: float) -> float:
    """The learning rate, now that of every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr


def finish_gradients(
    optimizer: Optimizer, expected: int, n_targets: Tensor, config: OptimConfig
) -> Tensor:
    """The global gradient norm, a tensor []; gradients end clipped and per true target.

    They come in divided by `expected` = G T, the targets a step has when none is ignored;
    `n_targets` [] says how many it had. Both factors are applied in one pass.
    """
    grads = [p.grad for p in _parameters(optimizer) if p.grad is not None]
    correction = (expected / n_targets).float()
    norm = _total_norm(grads) * correction
    factor = correction
    if config.grad_clip > 0:
        factor = correction * (config.grad_clip / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_([local_tensor(grad) for grad in grads], factor)
    return norm


def _total_norm(grads: list[Tensor]) -> Tensor:
    """The norm of all gradients, the same bits on every rank; those of vectors end averaged.

    `fully_shard` leaves vectors to us. Parts of the norm are gathered, not reduced: the order of a
    reduction may differ between replicas.
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


def update(optimizer: Optimizer, skip: Tensor, *, keep_gradients: bool = False) -> None:
    """Make the update, unless `skip` [] is 1.0: then weights and state stay, bit for bit.

    Gradients are dropped after it, or with `keep_gradients` zeroed where they are.

    The device decides; nothing waits to find out. torch's fused optimizers do so by themselves; of
    any other, weights and state are copied before the step and selected after it.
    """
    if _skips_by_itself(optimizer):
        optimizer.found_inf = skip  # type: ignore[attr-defined]
        optimizer.step()
        del optimizer.found_inf  # type: ignore[attr-defined]
    else:
        changing = [p for p in _parameters(optimizer) if p.grad is not None]
        states = [value for p in changing for value in optimizer.state[p].values()]
        changing = [local_tensor(t) for t in (*changing, *states) if isinstance(t, Tensor)]
        before = [(tensor, tensor.detach().clone()) for tensor in changing]
        optimizer.step()
        with torch.no_grad():
            for tensor, old in before:
                tensor.copy_(torch.where(skip > 0, old, tensor))
    optimizer.zero_grad(set_to_none=not keep_gradients)


def _skips_by_itself(optimizer: Optimizer) -> bool:
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
