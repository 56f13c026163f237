"""Cross-entropy of a linear head over a large vocabulary; the logits are never all in memory.

Rows are taken in chunks: a chunk's logits are made, turned into its part of the loss and of both
gradients, and dropped. The gradients are made in the forward pass, which saves the fourth matrix
product that recomputing the logits in the backward pass would take. Compiled, a chunk's logits
are read twice and written once; step by step they would be moved nine times. torch's own
F.linear_cross_entropy is not used: in 2.13 its chunked bf16 result on the CPU is wrong (9.81 for
10.43).
"""

from collections.abc import Callable
from functools import cache
from re import sub
from typing import Any

import torch
from torch import Tensor

from model.config import CHUNK_ELEMENTS

IGNORED = -100


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    z_loss: float = 0.0,
    chunk_rows: int | None = None,
    compiled: bool = False,
) -> Tensor:
    """Sum over valid targets of -log softmax(hidden @ weight.T)[target] + z_loss * logsumexp^2.

    `hidden` [N, d_model], `weight` [V, d_model], `targets` [N] int64 with -100 where ignored; the
    sum is fp32 (fp64 for fp64 inputs). Matrix products run in autocast's dtype; log-sum-exp,
    softmax and the sum of the weight's gradient over chunks are fp32. `compiled` fuses what is
    between the products.
    """
    device = hidden.device.type
    matmul_dtype = hidden.dtype
    if torch.is_autocast_enabled(device) and hidden.dtype == torch.float32:
        matmul_dtype = torch.get_autocast_dtype(device)
    if chunk_rows is None:
        chunk_rows = max(1, CHUNK_ELEMENTS.get(device, 2**24) // weight.shape[0])
    with_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    loss: Tensor = _cross_entropy(
        hidden, weight, targets, z_loss, chunk_rows, matmul_dtype, with_grad, compiled
    )[0]
    return loss


# A custom operator, so that torch.compile sees one opaque call where it would unroll the chunks.
# It is named after this module: a model exported with its code brings a copy with an own operator.
@torch.library.custom_op(sub(r"\W", "_", __name__) + "::linear_cross_entropy", mutates_args=())
def _cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    z_loss: float,
    chunk_rows: int,
    matmul_dtype: torch.dtype,
    with_grad: bool,
    compiled: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss and, `with_grad`, its gradients with respect to hidden and weight (else empty)."""
    measure, accumulate = _compiled() if compiled else (_measure, _accumulate)
    loss, d_hidden, d_weight = _zero_results(hidden, weight, with_grad)
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        head = weight.to(matmul_dtype)
        row = torch.arange(chunk_rows, device=hidden.device)
        for first in range(0, hidden.shape[0], chunk_rows):
            rows = slice(first, first + chunk_rows)
            h, target = hidden[rows].to(matmul_dtype), targets[rows]
            part, d_logits, at_target, scale = measure(h @ head.T, target, z_loss)
            loss += part
            if with_grad:
                d_logits[row[: len(h)], target.clamp(min=0)] = at_target
                d_hidden[rows] = (d_logits @ head) * scale
                accumulate(d_weight, d_logits.T @ (h * scale).to(matmul_dtype))
    return loss, d_hidden, d_weight


def _measure(logits: Tensor, targets: Tensor, z_loss: float) -> tuple[Tensor, ...]:
    """A chunk's part of the loss, and its gradient in three pieces.

    That is softmax * (1 + 2 z lse) - onehot(target), or 0 where ignored: a row's exponentials
    [n, V], what stands for them at its target [n], and the factor of both [n, 1]. The factor is
    left to the products, where it meets d_model numbers in place of V: so each logit is
    exponentiated once.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    peak = logits.amax(dim=-1, keepdim=True).to(wide)
    exponentials = (logits.to(wide) - peak).exp()
    total = exponentials.sum(dim=-1, keepdim=True)
    lse = peak + total.log()  # [n, 1]
    chosen = logits.gather(1, targets.clamp(min=0)[:, None]).to(wide)
    valid = (targets != IGNORED)[:, None].to(wide)
    factor = 1 + 2 * z_loss * lse
    at_target = (chosen - peak).exp() - total / factor
    part = ((lse - chosen + z_loss * lse.square()) * valid).sum()
    dtype = logits.dtype
    return part, exponentials.to(dtype), at_target[:, 0].to(dtype), valid * factor / total


@cache
def _compiled() -> tuple[Callable[..., tuple[Tensor, ...]], Callable[..., Tensor]]:
    """Both; an addition by itself first copies a bf16 product into fp32.

    For any number of rows, so that a shorter last chunk is not compiled again.
    """
    return torch.compile(_measure, dynamic=True), torch.compile(_accumulate, dynamic=False)


def _accumulate(total: Tensor, part: Tensor) -> Tensor:
    return total.add_(part)


def _zero_results(hidden: Tensor, weight: Tensor, with_grad: bool) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(hidden.dtype, torch.float32)
    loss = hidden.new_zeros((), dtype=wide)
    if not with_grad:
        return loss, hidden.new_empty(0), weight.new_empty(0)
    return loss, torch.empty_like(hidden), weight.new_zeros(weight.shape, dtype=wide)


@_cross_entropy.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    z_loss: float,
    chunk_rows: int,
    matmul_dtype: torch.dtype,
    with_grad: bool,
    compiled: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _zero_results(hidden, weight, with_grad)


def _keep_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)  # zeros for the gradients' own gradients, which nobody needs
    _, d_hidden, d_weight = output
    ctx.save_for_backward(d_hidden, d_weight)
    ctx.weight_dtype = inputs[1].dtype


def _scale_gradients(ctx: Any, d_loss: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    d_hidden, d_weight = ctx.saved_tensors
    d_hidden = (d_loss * d_hidden).to(d_hidden.dtype)
    d_weight = (d_loss * d_weight).to(ctx.weight_dtype)
    return d_hidden, d_weight, None, None, None, None, None, None


_cross_entropy.register_autograd(_scale_gradients, setup_context=_keep_gradients)
