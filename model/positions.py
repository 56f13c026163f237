"""Where a token stands: the tables of RoPE and ALiBi, made once and shared by all layers."""

from typing import NamedTuple

import torch
from torch import Tensor

from model.alibi import alibi_tables, check_context
from model.config import MAX_ALIBI_CONTEXT, ModelConfig
from model.layers import DerivedBuffers


class Positions(NamedTuple):
    """The tables' rows for T consecutive positions, fp32; None where a kind is switched off."""

    cos: Tensor | None  # [T, head_dim / 2]
    sin: Tensor | None
    alibi_q: Tensor | None  # [T, H, 6]
    alibi_k: Tensor | None  # [T, 6]


def rotary_tables(head_dim: int, theta: float, length: int) -> tuple[Tensor, Tensor]:
    """cos and sin [T, head_dim / 2] of positions 0..length-1, fp32 on the CPU.

    Angles are position * theta^(-2c / head_dim) (Su et al. 2021), taken in fp64: in fp32 they are
    off by up to 2e-4 rad within 4096 positions.
    """
    channel = torch.arange(0, head_dim, 2, dtype=torch.float64, device="cpu")
    position = torch.arange(length, dtype=torch.float64, device="cpu")
    angle = position[:, None] * theta ** (-channel / head_dim)
    return angle.cos().float(), angle.sin().float()


class PositionTables(DerivedBuffers):
    """Hands out `Positions` from tables that grow when a longer context asks for it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.length = config.seq_len
        self.make_buffers(torch.get_default_device())

    def make_buffers(self, device: torch.device) -> None:
        """Register the tables of the first `self.length` positions."""
        config = self.config
        tables: dict[str, Tensor | None] = dict.fromkeys(Positions._fields)
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
        """Rows start..start+length-1; raises ModelError beyond the exact range of ALiBi."""
        end = start + length
        if end > self.length:
            self._grow(end)
        tables = (self._buffers[name] for name in Positions._fields)
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
