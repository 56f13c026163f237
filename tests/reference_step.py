"""The whole training of a few steps as plain formulas in fp64, to compare the trainer with.

Nothing of model/ or trainer/ is imported: each formula is written down a second time, in the
shortest way, without chunks, fused kernels, folded dims, micro-batches or ranks. Gradients are
autograd's. A weight has the name under which a checkpoint stores it.
"""

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Words = npt.NDArray[np.uint64]
IGNORED = -100
WORD = np.uint64(2**32 - 1)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The model, by the names of its configuration; no number is the default."""

    seq_len: int = 80  # more than one block of 64 positions, by which ALiBi is folded
    vocab_size: int = 512
    n_layers: int = 2
    d_model: int = 48
    n_heads: int = 6  # no power of two: both halves of the rule for slopes
    n_kv_heads: int = 2
    d_ff: int = 40
    rope: bool = True
    rope_theta: float = 50.0
    alibi: bool = True
    layer_scale: bool = True
    dropout: float = 0.2
    tie_embeddings: bool = True
    norm_eps: float = 0.03
    z_loss: float = 0.01


@dataclass(frozen=True, kw_only=True)
class Optim:
    """AdamW and its schedule, by the names of their configuration."""

    lr: float = 0.02
    min_lr: float = 0.006
    warmup_steps: int = 2
    weight_decay: float = 0.5
    beta1: float = 0.8
    beta2: float = 0.9
    eps: float = 1e-3  # a tenth of a typical gradient: it counts
    grad_clip: float = 1.65


class Batch(NamedTuple):
    """A step's samples: numbers [n], rows of tokens [n, T], which tokens are targets [n, T]."""

    samples: list[int]
    tokens: Tensor
    is_target: Tensor


class Step(NamedTuple):
    """What a step measures: mean loss, valid targets, rate, norm before clipping."""

    loss: float
    n_targets: int
    lr: float
    grad_norm: float


@dataclass(kw_only=True)
class Learner:
    """Weights and moments; `updates` counts those that were made."""

    weights: dict[str, Tensor]
    exp_avg: dict[str, Tensor] = field(default_factory=dict)
    exp_avg_sq: dict[str, Tensor] = field(default_factory=dict)
    updates: int = 0


def shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """The shape of every weight."""
    channels, head_dim = shape.d_model, shape.d_model // shape.n_heads
    qkv = (shape.n_heads + 2 * shape.n_kv_heads) * head_dim
    sizes: dict[str, tuple[int, ...]] = {"embedding.weight": (shape.vocab_size, channels)}
    for layer in range(shape.n_layers):
        block: dict[str, tuple[int, ...]] = {
            "attention_norm.weight": (channels,),
            "attention.qkv.weight": (qkv, channels),
            "attention.out.weight": (channels, channels),
            "ffn_norm.weight": (channels,),
            "ffn.gate_up.weight": (2 * shape.d_ff, channels),
            "ffn.down.weight": (channels, shape.d_ff),
        }
        if shape.layer_scale:
            block |= {"attention_scale": (channels,), "ffn_scale": (channels,)}
        sizes |= {f"blocks.{layer}.{name}": size for name, size in block.items()}
    sizes["norm.weight"] = (channels,)
    if not shape.tie_embeddings:
        sizes["head.weight"] = (shape.vocab_size, channels)
    return sizes


def train(
    learner: Learner, shape: Shape, optim: Optim, batches: list[Batch], seed: int, poisoned: int
) -> list[Step]:
    """One step for each batch, in place; in step number `poisoned` the gradient is NaN."""
    steps = []
    for done, batch in enumerate(batches):
        weights = {name: w.detach().requires_grad_() for name, w in learner.weights.items()}
        targets = targets_of(batch)
        total, n_targets = loss_sum(weights, shape, batch, targets, seed), int((targets >= 0).sum())
        gradients = torch.autograd.grad(total / n_targets, list(weights.values()))
        scale = math.nan if done + 1 == poisoned else 1.0
        grads = {name: g * scale for name, g in zip(weights, gradients, strict=True)}
        norm = math.sqrt(sum(float(g.square().sum()) for g in grads.values()))
        lr = rate(done, optim, len(batches))
        steps.append(Step(total.item() / n_targets, n_targets, lr, norm))
        if math.isfinite(norm):
            adamw(learner, grads, min(1.0, optim.grad_clip / (norm + 1e-6)), lr, optim)
    return steps


def rate(done: int, optim: Optim, n_steps: int) -> float:
    """Linear warmup whose first step is lr / warmup_steps, then half a cosine down to min_lr."""
    if done < optim.warmup_steps:
        return optim.lr * (done + 1) / optim.warmup_steps
    share = (done - optim.warmup_steps) / (n_steps - optim.warmup_steps)
    return optim.min_lr + (optim.lr - optim.min_lr) * 0.5 * (1 + math.cos(math.pi * share))


def adamw(
    learner: Learner, grads: dict[str, Tensor], factor: float, lr: float, optim: Optim
) -> None:
    """Loshchilov & Hutter (2019), algorithm 2, with decay scaled by lr; vectors do not decay."""
    learner.updates += 1
    unbias1 = 1 - optim.beta1**learner.updates
    unbias2 = 1 - optim.beta2**learner.updates
    for name, w in learner.weights.items():
        g, decay = grads[name] * factor, optim.weight_decay if w.ndim == 2 else 0.0
        m = optim.beta1 * learner.exp_avg.get(name, 0 * w) + (1 - optim.beta1) * g
        v = optim.beta2 * learner.exp_avg_sq.get(name, 0 * w) + (1 - optim.beta2) * g * g
        learner.exp_avg[name], learner.exp_avg_sq[name] = m, v
        move = (m / unbias1) / ((v / unbias2).sqrt() + optim.eps)
        learner.weights[name] = w - lr * decay * w - lr * move


def targets_of(batch: Batch) -> Tensor:
    """[n, T]: the next token, or -100 where there is none, or it is no target."""
    targets = torch.full_like(batch.tokens, IGNORED)
    targets[:, :-1] = torch.where(batch.is_target[:, 1:], batch.tokens[:, 1:], IGNORED)
    return targets


def loss_sum(
    w: dict[str, Tensor], shape: Shape, batch: Batch, targets: Tensor, seed: int
) -> Tensor:
    """Of -log softmax at each valid target, and z_loss times log(Z)^2."""
    keys = [dropout_key(seed, sample) for sample in batch.samples]

    def drop(x: Tensor, site: int) -> Tensor:
        return dropped(x, keys, site, shape.dropout)

    x = drop(w["embedding.weight"][batch.tokens], 0)
    for layer in range(shape.n_layers):
        part = {n.split(".", 2)[2]: t for n, t in w.items() if n.startswith(f"blocks.{layer}.")}
        branch = attention(part, shape, norm(x, part["attention_norm.weight"], shape.norm_eps))
        x = x + drop(branch * part.get("attention_scale", 1.0), 2 * layer + 1)
        branch = swiglu(part, norm(x, part["ffn_norm.weight"], shape.norm_eps))
        x = x + drop(branch * part.get("ffn_scale", 1.0), 2 * layer + 2)
    head = w["embedding.weight"] if shape.tie_embeddings else w["head.weight"]
    logits = norm(x, w["norm.weight"], shape.norm_eps) @ head.T
    log_z = logits.logsumexp(dim=-1)
    valid = targets >= 0
    chosen = logits[valid].gather(1, targets[valid][:, None])[:, 0]
    return (log_z[valid] - chosen + shape.z_loss * log_z[valid] ** 2).sum()


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm."""
    return x / (x.square().mean(dim=-1, keepdim=True) + eps).sqrt() * weight


def swiglu(w: dict[str, Tensor], x: Tensor) -> Tensor:
    """The gate is the first half of the matrix."""
    gate, up = (x @ w["ffn.gate_up.weight"].T).chunk(2, dim=-1)
    return (gate * torch.sigmoid(gate) * up) @ w["ffn.down.weight"].T


def attention(w: dict[str, Tensor], shape: Shape, x: Tensor) -> Tensor:
    """Head h reads the keys and values of group h * n_kv_heads // n_heads."""
    n, T, channels = x.shape
    head_dim = channels // shape.n_heads
    heads = (x @ w["attention.qkv.weight"].T).view(n, T, -1, head_dim)
    position = torch.arange(T)
    distance = position[:, None] - position  # i - j
    out = []
    for head in range(shape.n_heads):
        group = shape.n_heads + head * shape.n_kv_heads // shape.n_heads
        q, k, v = heads[:, :, head], heads[:, :, group], heads[:, :, group + shape.n_kv_heads]
        if shape.rope:
            q, k = turned(q, shape.rope_theta), turned(k, shape.rope_theta)
        scores = q @ k.transpose(1, 2)
        if shape.alibi:
            scores = scores - slope(head, shape.n_heads, head_dim) * distance
        scores = (scores / math.sqrt(head_dim)).masked_fill(distance < 0, -math.inf)
        out.append(scores.softmax(dim=-1) @ v)
    return torch.cat(out, dim=-1) @ w["attention.out.weight"].T


def turned(x: Tensor, theta: float) -> Tensor:
    """RoPE: channels c and c + D/2 are a complex number, turned by position * theta^(-2c / D)."""
    half = x.shape[-1] // 2
    frequency = theta ** (-torch.arange(half, dtype=x.dtype) / half)
    angle = torch.arange(x.shape[1], dtype=x.dtype)[:, None] * frequency
    z = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([z.real, z.imag], dim=-1)


def slope(head: int, n_heads: int, head_dim: int) -> float:
    """ALiBi's, in units of q.k, rounded to the 8 significant bits of bf16."""
    lower = 2 ** math.floor(math.log2(n_heads))
    steps = [8 / lower * (h + 1) for h in range(lower)]
    steps += [4 / lower * (2 * h + 1) for h in range(n_heads - lower)]
    fraction, exponent = math.frexp(2 ** -steps[head] * math.sqrt(head_dim))
    return math.ldexp(round(fraction * 256), exponent - 8)


def dropped(x: Tensor, keys: Iterable[tuple[int, int]], site: int, share: float) -> Tensor:
    """`x` [n, T, C] with what the hash of (key, site, position, channel) says set to 0."""
    _, T, channels = x.shape
    kept = np.stack([kept_elements(key, site, T, channels, share) for key in keys])
    return x * torch.from_numpy(kept) / (1 - share)


def kept_elements(
    key: tuple[int, int], site: int, length: int, channels: int, share: float
) -> npt.NDArray[np.bool_]:
    """[T, C]: the 32-bit hash, its top bit turned over, is not among the lowest `share`."""
    golden = np.uint64(0x9E3779B9)
    position = np.arange(length, dtype=np.uint64)[:, None]
    channel = np.arange(channels, dtype=np.uint64)
    first = mix((mix(np.uint64(key[0])) + position * golden) & WORD)
    second = mix(mix(np.uint64(key[1])) ^ first)
    counter = (channel + np.uint64(site * 2**16)) * golden & WORD
    bits = mix(first ^ counter, second)
    return np.asarray((bits ^ np.uint64(2**31)) >= round(share * 2**32))


def mix(x: Words | np.uint64, between: Words | np.uint64 = np.uint64(0)) -> Words:  # noqa: B008
    """Wellons' lowbias32, of 32-bit numbers, with a number added after the first product."""
    x = x ^ (x >> np.uint64(16))
    x = (x * np.uint64(0x7FEB352D) + between) & WORD
    x = x ^ (x >> np.uint64(15))
    x = x * np.uint64(0x846CA68B) & WORD
    return np.asarray(x ^ (x >> np.uint64(16)))


def dropout_key(seed: int, sample: int) -> tuple[int, int]:
    """The halves of splitmix64 (Steele, Lea & Flood 2014) of a sample's number and the seed."""
    z = ((sample ^ digest_of(f"{seed}/dropout")) + 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    z ^= z >> 31
    return z % 2**32, z >> 32


def attention_seed(seed: int, step: int, micro_step: int, rank: int) -> int:
    """Of the kernel that drops attention probabilities: 63 bits."""
    return digest_of(f"{seed}/attention/{step}/{micro_step}/{rank}") // 2


def digest_of(text: str) -> int:
    """64 bits of BLAKE2b."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
