"""Positions: the tables of RoPE and ALiBi, made once and shared by all layers.

ALiBi needs no mask: its bias `m (j - i)` is six head dims in front of q and k.
A causal softmax ignores what is constant in a row, so the bias of query i and key j splits into a
key part `m j` and a query part `-m i`. With j = 64a + b and i = 64c + d, and m' the slope in units
of q.k, the six products below add up to m' (j - i):

    q' = [ m',  m', hi(-64 c m'), lo(-64 c m'), hi(-d m'), lo(-d m') ]
    k' = [ 64a, b,  1,            1,            1,         1         ]

bf16 has 8 significant bits: 64a is exact for a <= 256, so up to position 16,447; a slope (8 bits)
times c or d (8 bits) has 16, which is exactly two bf16 numbers, hi and lo. Each product and each
partial sum then fits in the 24 bits of an fp32 accumulator, and the error is that of j - i, not
of j: with emulated GPU arithmetic 6.5e-7 nats at 4096 tokens, where an explicit bf16 mask has
1.6e-2 and a single extra dim 12. k' is the same for every head, so grouped-query heads share it.
"""

from math import sqrt
from typing import NamedTuple

import torch
from torch import Tensor

from model.config import MAX_ALIBI_CONTEXT, ModelConfig, ModelError
from model.layers import DerivedBuffers

BLOCK = 64


class Positions(NamedTuple):
    """The tables' entries for T positions, fp32; None where a kind is switched off.

    Positions that differ from one sequence of the batch to another have [B, T] for [T]. `mask`
    (bool, [B, 1, T, S]) names the keys that a query sees where padding makes that less than all
    up to itself.
    """

    cos: Tensor | None  # [T, head_dim / 2]
    sin: Tensor | None
    alibi_q: Tensor | None  # [T, H, 6]
    alibi_k: Tensor | None  # [T, 6]
    mask: Tensor | None = None


TABLES = Positions._fields[:4]


class PositionTables(DerivedBuffers):
    """Hands out `Positions` from tables that grow with the longest context seen."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.length = config.seq_len
        self.make_buffers(torch.get_default_device())

    def make_buffers(self, device: torch.device) -> None:
        """Register the tables of the first `self.length` positions."""
        config = self.config
        tables: dict[str, Tensor | None] = dict.fromkeys(TABLES)
        with torch.inference_mode(False):  # tables that an evaluation grew serve training too
            if config.rope:
                rotary = rotary_tables(config.head_dim, config.rope_theta, self.length)
                tables["cos"], tables["sin"] = rotary
            if config.alibi:
                alibi = alibi_tables(config.n_heads, config.head_dim, self.length)
                tables["alibi_q"], tables["alibi_k"] = alibi
            for name, table in tables.items():
                on_device = None if table is None else table.to(device)
                self.register_buffer(name, on_device, persistent=False)

    def forward(self, start: int, length: int) -> Positions:
        """Entries start..start+length-1; raises ModelError beyond the exact range of ALiBi."""
        end = start + length
        if end > self.length:
            self._grow(end)
        tables = (self._buffers[name] for name in TABLES)
        return Positions(*(None if table is None else table[start:end] for table in tables))

    def _grow(self, end: int) -> None:
        length = max(end, 2 * self.length)
        if self.config.alibi:
            check_context(end)
            length = min(length, MAX_ALIBI_CONTEXT)
        self.length = length
        table = next(self.buffers(), None)
        if table is not None:
            self.make_buffers(table.device)


def rotary_tables(head_dim: int, theta: float, length: int) -> tuple[Tensor, Tensor]:
    """cos and sin [T, head_dim / 2] of positions 0..length-1, fp32 on the CPU.

    Angles are position * theta^(-2c / head_dim) (Su et al. 2021), taken in fp64: in fp32 they are
    off by up to 2e-4 rad within 4096 positions.
    """
    channel = torch.arange(0, head_dim, 2, dtype=torch.float64, device="cpu")
    position = torch.arange(length, dtype=torch.float64, device="cpu")
    angle = position[:, None] * theta ** (-channel / head_dim)
    return angle.cos().float(), angle.sin().float()


def alibi_slopes(n_heads: int, head_dim: int) -> Tensor:
    """[H] slopes in units of q.k: bf16(m * sqrt(head_dim)), held in fp32.

    m = 2^(-8 h / n_heads) for h = 1..n_heads. Where n_heads is no power of two, the slopes of the
    next lower power come first and every other slope of the next higher one follows
    (Press, Smith & Lewis 2022, and their published code). The model is defined with the rounded
    slopes; for heads of 96 rounding moves m by 0.23 % at most.
    """
    lower = 1 << (n_heads.bit_length() - 1)
    exponents = [8 * h / lower for h in range(1, lower + 1)]
    exponents += [8 * h / (2 * lower) for h in range(1, 2 * lower + 1, 2)][: n_heads - lower]
    m = torch.exp2(-torch.tensor(exponents, dtype=torch.float64, device="cpu"))
    return (m * sqrt(head_dim)).to(torch.bfloat16).float()


def alibi_tables(n_heads: int, head_dim: int, length: int) -> tuple[Tensor, Tensor]:
    """The query side [T, H, 6] and the key side [T, 6] of positions 0..length-1, fp32 on the CPU.

    Every entry is exact in bf16. Raises ModelError where that ends.
    """
    check_context(length)
    slopes = alibi_slopes(n_heads, head_dim)  # [H]
    position = torch.arange(length, device="cpu")
    block, offset = (position // BLOCK).float(), (position % BLOCK).float()  # [T]
    far = _two_pieces(-BLOCK * block[:, None] * slopes)  # 2 x [T, H]
    near = _two_pieces(-offset[:, None] * slopes)
    both = slopes.expand(length, n_heads)
    query_side = torch.stack([both, both, *far, *near], dim=-1)
    one = torch.ones_like(block)
    return query_side, torch.stack([BLOCK * block, offset, one, one, one, one], dim=-1)


def check_context(length: int) -> None:
    """Raise ModelError if ALiBi is not exact for `length` tokens."""
    if length > MAX_ALIBI_CONTEXT:
        raise ModelError(
            f"a context of {length} tokens is beyond {MAX_ALIBI_CONTEXT}, where ALiBi in bf16 stops"
            " being exact: use a shorter context"
        )


def _two_pieces(value: Tensor) -> tuple[Tensor, Tensor]:
    high = value.to(torch.bfloat16).float()
    return high, value - high
