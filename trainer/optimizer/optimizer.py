"""Optimizers, schedules, gradients in which every token weighs the same, and updates skipped.

A new optimizer is a function and its row in OPTIMIZERS: `--set optim.name=` then trains with it,
the guard skips its updates, checkpoints hold its state, and the plan counts its bytes. A schedule
is a row of SCHEDULES: a pure function of the step, so there is nothing to save.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm, parameters_to_vector, vector_to_parameters
from torch.optim import AdamW, Optimizer

from trainer.distributed.world import local_tensor
from trainer.errors import ConfigError, at_least, one_of

Groups = list[dict[str, Any]]
"""Parameters with their `weight_decay`: only matrices decay."""


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
    """The optimizer, a row of OPTIMIZERS, and its schedule, a row of SCHEDULES."""

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
        one_of("optim.", self, schedule=SCHEDULES, name=OPTIMIZERS)
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


def _adamw(groups: Groups, config: OptimConfig) -> Optimizer:
    """Loshchilov & Hutter, Decoupled weight decay regularization (2019)."""
    betas = (config.beta1, config.beta2)
    return AdamW(groups, lr=config.lr, betas=betas, eps=config.eps, fused=True)


OPTIMIZERS: Final[dict[str, Callable[[Groups, OptimConfig], Optimizer]]] = {"adamw": _adamw}
"""What `optim.name` may be. The state of each consists of tensors that begin as zeros, and its
step passes over parameters without a gradient, as those of torch do."""


def make_optimizer(model: nn.Module, config: OptimConfig) -> Optimizer:
    """The optimizer, its state allocated; ConfigError if that is not of tensors that begin as 0."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in parameters if parameter.ndim >= 2]
    vectors = [parameter for parameter in parameters if parameter.ndim < 2]  # norms, LayerScale
    groups: Groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
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
def optimizer_bytes(config: OptimConfig) -> int:
    """Bytes for each parameter in addition to itself and its gradient, by trying one."""
    one = nn.ParameterList([nn.Parameter(torch.zeros(1, 1, device="cpu"))])
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
