"""The sides of attention.py: ALiBi folded into heads (ours), left out, as a mask, FlexAttention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from model.attention import attend, fold
from model.config import ModelConfig
from model.positions import PositionTables, alibi_slopes

Heads = tuple[Tensor, Tensor, Tensor]
"""q, k and v [B, T, H, head_dim]."""

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
BASE = "without ALiBi"


@dataclass(frozen=True)
class AttentionBench:
    """What to compare: heads of a preset, lengths, and how often."""

    config: ModelConfig
    device: torch.device
    lengths: Sequence[int]
    turns: int
    tokens: int  # of a batch; at least one row
    compiled: bool
    dropout: float


def folded(bench: AttentionBench, config: ModelConfig) -> Attention:
    """Ours."""
    positions = PositionTables(config).to(bench.device)(0, config.seq_len)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = attend(*fold(q, k, v, positions, config), config, dropout=bench.dropout)
        return out[..., : config.head_dim]

    return maybe_compiled(bench, attention)


def without_alibi(bench: AttentionBench, config: ModelConfig) -> Attention:
    """The same call for a model with RoPE alone."""
    return folded(bench, replace(config, alibi=False))


def masked(bench: AttentionBench, config: ModelConfig) -> Attention:
    """ALiBi and the triangle as a bf16 mask [H, T, T], made beforehand."""
    turn, kernel = turner(bench, config), masked_kernel(config, bench.device, bench.dropout)
    return maybe_compiled(bench, lambda q, k, v: kernel(*turn(q, k, v)))


def flexible(bench: AttentionBench, config: ModelConfig) -> Attention:
    """FlexAttention with ALiBi in score_mod and a causal block mask; it has no dropout."""
    if bench.dropout:
        raise NotImplementedError("FlexAttention has no dropout")
    turn, kernel = turner(bench, config), flexible_kernel(config, bench.device)
    return torch.compile(lambda q, k, v: kernel(*turn(q, k, v)), dynamic=False)


def masked_kernel(config: ModelConfig, device: torch.device, dropout: float = 0.0) -> Attention:
    """SDPA of heads [B, H, T, D] with an explicit mask."""
    mask, gqa = alibi_mask(config, device), config.kv_heads != config.n_heads

    def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scale = config.head_dim**-0.5
        return F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=scale, enable_gqa=gqa)

    return kernel


def flexible_kernel(config: ModelConfig, device: torch.device) -> Attention:
    """FlexAttention of heads [B, H, T, D]: compiled, as without it makes all scores."""
    scale, gqa = config.head_dim**-0.5, config.kv_heads != config.n_heads
    slopes = alibi_slopes(config.n_heads, config.head_dim).to(device) * scale
    T = config.seq_len
    block_mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, T, T, device=device.type)

    def alibi(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        biased: Tensor = score + slopes[h] * (j - i)
        return biased

    def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = flex_attention(q, k, v, alibi, block_mask, scale=scale, enable_gqa=gqa)
        assert isinstance(out, Tensor)
        return out

    compiled: Attention = torch.compile(kernel, dynamic=False)
    return compiled


def turner(bench: AttentionBench, config: ModelConfig) -> Callable[[Tensor, Tensor, Tensor], Heads]:
    """A function that applies RoPE to q and k, and puts heads before positions."""
    config = replace(config, alibi=False)
    positions = PositionTables(config).to(bench.device)(0, config.seq_len)
    return lambda q, k, v: fold(q, k, v, positions, config)


def alibi_mask(config: ModelConfig, device: torch.device) -> Tensor:
    """[1, H, T, T] in bf16, made head by head: all at once in fp32 would take twice the memory."""
    slopes = (alibi_slopes(config.n_heads, config.head_dim) * config.head_dim**-0.5).tolist()
    position = torch.arange(config.seq_len, device=device)
    distance = (position - position[:, None]).float()
    distance = distance.masked_fill(distance > 0, -torch.inf)
    return torch.stack([(slope * distance).bfloat16() for slope in slopes])[None]


def maybe_compiled(bench: AttentionBench, attention: Attention) -> Attention:
    """As training has it, unless asked otherwise."""
    return torch.compile(attention, dynamic=False) if bench.compiled else attention


SIDES: dict[str, Callable[[AttentionBench, ModelConfig], Attention]] = {
    BASE: without_alibi,
    "folded": folded,
    "bf16 mask": masked,
    "FlexAttention": flexible,
}
