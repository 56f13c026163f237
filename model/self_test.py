"""Does this device's attention kernel compute the model that is named?

Tried out on the kernel that trains: with gradients and attention dropout SDPA may take another
than without (on an H100 with torch 2.11 it does). Three things are compared with fp32 math: the
scores, the gradients, and what dropout keeps.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from model.attention import attend, fold
from model.config import ModelConfig, ModelError
from model.positions import PositionTables, alibi_slopes

LIMIT_NATS = 1e-3
LIMIT_GRADIENT = {torch.bfloat16: 2e-2, torch.float32: 2e-3}
LIMIT_KEPT = 0.01
DROPPED = 50_000
GROUP_ROWS = 512
LEAST_PROBABILITY = 1e-6


class KernelTest(NamedTuple):
    """What was found: the kernel by SDPA's name for it, and how far off it is."""

    kernel: str
    error_nats: float  # of the scores, in nats
    gradient_error: float  # |g - g'| / |g'|, the largest of q's, k's and v's
    kept: float | None  # share of the probabilities that dropout kept; None: it is off

    def __str__(self) -> str:
        kept = "" if self.kept is None else f", dropout keeps {self.kept:.1%}"
        return (
            f"{self.kernel}, within {self.error_nats:.1e} nats of fp32 math (limit {LIMIT_NATS:g})"
            f", gradients within {self.gradient_error:.1e}{kept}"
        )


def self_test(device: torch.device | str, dtype: torch.dtype, config: ModelConfig) -> KernelTest:
    """The errors of the kernel that a training step takes in `dtype` on `device`.

    ModelError if it would train another model than the one that is named: scores further than 1e-3
    nats from fp32 math, gradients further than 2 % (bf16; fp32: 0.2 %), or a dropout that keeps
    another share, another mask in the backward pass, or another one in a recomputation.
    """
    device = torch.device(device)
    T = max(GROUP_ROWS, min(config.seq_len, 4096) // GROUP_ROWS * GROUP_ROWS)
    heads = _random_heads(device, dtype, config, T)
    with torch.no_grad():
        folded = fold(*heads, _positions(device, config, T), config)
    kernel = _kernel_of(*folded, config)
    with sdpa_kernel(kernel):
        nats = _score_error(heads, config)
        gradient_error = _gradient_error(heads, config)
    where = f"attention in {dtype} on {device} ({kernel.name})"
    advice = "use another build of torch, or model.alibi=false"
    if not nats <= LIMIT_NATS:  # so that NaN fails too
        raise ModelError(
            f"{where} is off by {nats:.2g} nats from fp32 math, more than {LIMIT_NATS}: {advice}"
        )
    if not gradient_error <= LIMIT_GRADIENT[dtype]:
        raise ModelError(
            f"the gradients of {where} are off by {gradient_error:.2g} of fp32 math's, more than"
            f" {LIMIT_GRADIENT[dtype]}: {advice}"
        )
    kept = _kept_by_dropout(device, dtype, config) if config.attention_dropout > 0 else None
    if kept is not None and not abs(kept - 1 + config.attention_dropout) <= LIMIT_KEPT:
        raise ModelError(
            f"dropout {config.attention_dropout} of {where} keeps {kept:.2%}, or not the same mask"
            " twice: use another build of torch, or model.attention_dropout=0"
        )
    return KernelTest(kernel.name, nats, gradient_error, kept)


def _random_heads(
    device: torch.device, dtype: torch.dtype, config: ModelConfig, T: int
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v [1, T, H, head_dim]; v[j] has its one in channel j mod head_dim."""
    generator = torch.Generator().manual_seed(0)
    q, k = (
        torch.randn(1, T, heads, config.head_dim, generator=generator).to(device, dtype)
        for heads in (config.n_heads, config.kv_heads)
    )
    one_hot = F.one_hot(torch.arange(T, device=device) % config.head_dim, config.head_dim)
    return q, k, one_hot.to(dtype)[None, :, None].expand_as(k)


def _positions(device: torch.device, config: ModelConfig, T: int) -> Any:
    """ALiBi's dims of T positions; RoPE is our own arithmetic, not the kernel's."""
    return PositionTables(config).to(device)(0, T)._replace(cos=None, sin=None)


def _kernel_of(q: Tensor, k: Tensor, v: Tensor, config: ModelConfig) -> SDPBackend:
    """The kernel that SDPA takes where gradients are wanted and the run's dropout is on."""
    q, k, v = (part.detach().requires_grad_() for part in (q, k, v))
    chosen = torch._fused_sdp_choice(
        q,
        k,
        v,
        dropout_p=config.attention_dropout,
        is_causal=True,
        scale=config.head_dim**-0.5,
        enable_gqa=config.kv_heads != config.n_heads,
    )
    return SDPBackend(chosen)


def _score_error(heads: tuple[Tensor, Tensor, Tensor], config: ModelConfig) -> float:
    """The largest error of the scores, in nats.

    With one-hot values each output is a probability, and the log of its ratio to the true one is
    an error in nats. A single bf16 output is rounded by 2e-3 at random; hence the ratio's mean
    over 512 rows with the same distance to the key, and of those the largest.
    """
    q, k, v = heads
    q = q.detach().requires_grad_()  # with gradients, as in training
    positions = _positions(q.device, config, q.shape[1])
    out = attend(*fold(q, k, v, positions, config), config)[0].detach()  # [H, T, D']
    errors = []
    for head in range(config.n_heads):
        key_head = head * config.kv_heads // config.n_heads
        true = _true_probabilities(q.detach()[0, :, head], k[0, :, key_head], _slope(config, head))
        errors.append(_largest_mean_error(out[head, :, : config.head_dim].float(), true))
    return float(torch.stack(errors).max())


def _slope(config: ModelConfig, head: int) -> float:
    slopes = alibi_slopes(config.n_heads, config.head_dim) * config.head_dim**-0.5
    return slopes[head].item() if config.alibi else 0.0


def _scores(q: Tensor, k: Tensor, slope: float) -> Tensor:
    """[T, T] in fp32, the causal triangle at -inf, of one head's q and k [T, head_dim]."""
    position = torch.arange(q.shape[0], device=q.device)
    distance = position[:, None] - position
    scores = q.float() @ k.float().T * q.shape[1] ** -0.5 - slope * distance
    causal: Tensor = scores.masked_fill(distance < 0, -torch.inf)
    return causal


@torch.no_grad()
def _true_probabilities(q: Tensor, k: Tensor, slope: float) -> Tensor:
    """[T, head_dim] in fp32: the share of the keys with the same position modulo head_dim."""
    T, head_dim = q.shape
    probabilities = _scores(q, k, slope).softmax(dim=-1)
    laps = -(-T // head_dim)
    padded = F.pad(probabilities, (0, laps * head_dim - T))
    return padded.view(T, laps, head_dim).sum(dim=1)


def _largest_mean_error(measured: Tensor, true: Tensor) -> Tensor:
    """Largest |mean of log(measured / true)| over 512 rows at one distance, modulo head_dim."""
    T, head_dim = true.shape
    counted = true > LEAST_PROBABILITY
    error = torch.where(counted, (measured / true).log(), 0.0)
    row = torch.arange(T, device=true.device)[:, None]
    channel_at_distance = (row - torch.arange(head_dim, device=true.device)) % head_dim
    groups = (T // GROUP_ROWS, GROUP_ROWS, head_dim)
    total = error.gather(1, channel_at_distance).view(groups).sum(dim=1)
    count = counted.gather(1, channel_at_distance).view(groups).sum(dim=1)
    means = torch.where(count >= GROUP_ROWS // 2, total / count.clamp(min=1), 0.0)
    return means.abs().max()


def _gradient_error(heads: tuple[Tensor, Tensor, Tensor], config: ModelConfig) -> float:
    """The largest relative error of the gradients, by the norm, of q, k and v.

    Of the first and the last group of heads that share keys: their slopes are the extreme ones.
    """
    generator = torch.Generator().manual_seed(1)
    q, k, _ = (part.detach().requires_grad_() for part in heads)
    v = torch.randn(k.shape, generator=generator).to(k.device, k.dtype).requires_grad_()
    positions = _positions(q.device, config, q.shape[1])
    out = attend(*fold(q, k, v, positions, config), config)[0, :, :, : config.head_dim]
    weight = torch.randn(out.shape, generator=generator).to(out.device, out.dtype)
    measured = torch.autograd.grad(out, (q, k, v), weight)
    shared = config.n_heads // config.kv_heads
    errors = []
    for key_head in {0, config.kv_heads - 1}:
        group = range(key_head * shared, (key_head + 1) * shared)
        leaves = [part.detach().float().requires_grad_() for part in (q, k, v)]
        outs = []
        for head in group:
            scores = _scores(leaves[0][0, :, head], leaves[1][0, :, key_head], _slope(config, head))
            outs.append(scores.softmax(dim=-1) @ leaves[2][0, :, key_head])
        weights = weight[group.start : group.stop].float()
        true = torch.autograd.grad(torch.stack(outs), leaves, weights)
        for found, expected, heads_of in zip(
            measured, true, (group, [key_head], [key_head]), strict=True
        ):
            ours, fp32 = (part[:, :, list(heads_of)].float() for part in (found, expected))
            errors.append((ours - fp32).norm() / fp32.norm())
    return float(torch.stack(errors).max())


def _kept_by_dropout(device: torch.device, dtype: torch.dtype, config: ModelConfig) -> float:
    """The share of the attention probabilities that dropout keeps; NaN if a mask is not repeated.

    head_dim tokens with the unit matrix as values: each output is a probability, or 0 where it was
    dropped, and the gradient of v for unit vectors is the output transposed: the backward pass has
    to drop the same ones, and so does a second pass from the same seed.
    """
    T = config.head_dim
    rows = 1 + 2 * DROPPED // (config.n_heads * T * T)  # so that the share has no noise to speak of
    q, k, v = (part.expand(rows, -1, -1, -1) for part in _random_heads(device, dtype, config, T))
    positions = _positions(device, config, T)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        runs = []
        for _ in range(2):
            torch.manual_seed(2)
            leaf = v.detach().clone().requires_grad_()
            folded = fold(q, k, leaf, positions, config)
            out = attend(*folded, config, dropout=config.attention_dropout)[..., :T]
            unit = torch.eye(T, device=device, dtype=dtype).expand_as(out)
            (grad,) = torch.autograd.grad(out, leaf, unit)
            runs.append((out.detach(), grad.transpose(1, 2)))
    (out, grad), again = runs
    shared = config.n_heads // config.kv_heads
    by_key_head = out.view(rows, config.kv_heads, shared, T, T).float().sum(dim=2)
    same = torch.equal(out, again[0]) and torch.allclose(
        by_key_head.mT, grad.float(), rtol=2e-2, atol=1e-5
    )
    probabilities = [
        _true_probabilities(q[0, :, head], k[0, :, head // shared], _slope(config, head))
        for head in range(config.n_heads)
    ]
    likely = torch.stack(probabilities) > LEAST_PROBABILITY
    return float((out[:, likely] != 0).float().mean()) if same else float("nan")
