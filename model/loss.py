"""Cross-entropy of a linear head over a large vocabulary, with the logits never whole.

Rows are taken in chunks: a chunk's logits are made, turned into its part of the loss and of both
gradients, and dropped. The gradients are made in the forward pass, which saves the fourth matrix
product that recomputing the logits in the backward pass would take. torch's own
F.linear_cross_entropy is not used: in 2.13 its chunked bf16 result on the CPU is wrong (9.81 for
10.43).
"""

from typing import Any

import torch
from torch import Tensor

IGNORED = -100
CHUNK_ELEMENTS = {"cpu": 2**24, "cuda": 2**27}  # logits alive at a time: 64 and 512 MiB in fp32


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    z_loss: float = 0.0,
    chunk_rows: int | None = None,
) -> Tensor:
    """Sum over valid targets of -log softmax(hidden @ weight.T)[target] + z_loss * logsumexp^2.

    `hidden` [N, d_model], `weight` [V, d_model], `targets` [N] int64 with -100 where ignored; the
    sum is fp32 (fp64 for fp64 inputs). Matrix products run in autocast's dtype; log-sum-exp,
    softmax and the sum of the weight's gradient over chunks are fp32.
    """
    device = hidden.device.type
    matmul_dtype = hidden.dtype
    if torch.is_autocast_enabled(device) and hidden.dtype == torch.float32:
        matmul_dtype = torch.get_autocast_dtype(device)
    if chunk_rows is None:
        chunk_rows = max(1, CHUNK_ELEMENTS.get(device, 2**24) // weight.shape[0])
    with_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    loss: Tensor = _cross_entropy(
        hidden, weight, targets, z_loss, chunk_rows, matmul_dtype, with_grad
    )[0]
    return loss


# A custom operator, so that torch.compile sees one opaque call where it would unroll the chunks.
@torch.library.custom_op("summerlm::linear_cross_entropy", mutates_args=())
def _cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    z_loss: float,
    chunk_rows: int,
    matmul_dtype: torch.dtype,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss and, if asked for, its gradients with respect to hidden and weight (else empty)."""
    loss, d_hidden, d_weight = _zero_results(hidden, weight, with_grad)
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        head = weight.to(matmul_dtype)
        for first in range(0, hidden.shape[0], chunk_rows):
            rows = slice(first, first + chunk_rows)
            h = hidden[rows].to(matmul_dtype)
            logits = (h @ head.T).to(loss.dtype)  # [n, V]
            valid = (targets[rows, None] != IGNORED).to(loss.dtype)  # [n, 1]
            target = targets[rows, None].clamp(min=0)
            chosen, peak = logits.gather(1, target), logits.amax(dim=-1, keepdim=True)
            total = logits.sub_(peak).exp_().sum(dim=-1, keepdim=True)
            lse = peak + total.log()  # [n, 1]; the exponentials are needed again below
            loss += ((lse - chosen + z_loss * lse.square()) * valid).sum()
            if with_grad:
                # d/dlogits = softmax * (1 + 2 z lse) - onehot(target), and 0 where ignored
                logits.mul_(valid * (1 + 2 * z_loss * lse) / total)
                d_logits = logits.scatter_add_(1, target, -valid).to(matmul_dtype)
                d_hidden[rows] = d_logits @ head
                d_weight += d_logits.T @ h
    return loss, d_hidden, d_weight


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
) -> tuple[Tensor, Tensor, Tensor]:
    return _zero_results(hidden, weight, with_grad)


def _keep_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)  # zeros for the gradients' own gradients: nobody asks
    _, d_hidden, d_weight = output
    ctx.save_for_backward(d_hidden, d_weight)
    ctx.weight_dtype = inputs[1].dtype


def _scale_gradients(ctx: Any, d_loss: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    d_hidden, d_weight = ctx.saved_tensors
    d_hidden = (d_loss * d_hidden).to(d_hidden.dtype)
    d_weight = (d_loss * d_weight).to(ctx.weight_dtype)
    return d_hidden, d_weight, None, None, None, None, None


_cross_entropy.register_autograd(_scale_gradients, setup_context=_keep_gradients)
