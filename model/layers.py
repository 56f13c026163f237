"""The small parts: matrices that start empty, derived buffers, RMSNorm, SwiGLU, rotation."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """A matrix without bias, left empty: `Transformer.init_weights` fills it, once.

    `rows` are those of its projections, one below the other: what an optimizer takes for matrices.
    """

    def __init__(self, n_in: int, *rows: int) -> None:
        super().__init__(n_in, sum(rows), bias=False)
        self.rows = rows

    def reset_parameters(self) -> None:
        """Leave the values to `Transformer.init_weights`."""


class Embedding(nn.Embedding):
    """A table of vectors, left empty like `Linear`."""

    def reset_parameters(self) -> None:
        """Leave the values to `Transformer.init_weights`."""


class DerivedBuffers(nn.Module):
    """A module whose buffers follow from its configuration.

    They are recomputed whenever the module moves: out of the meta device, where they had no values,
    or into another dtype, in which rounded values would be wrong.
    """

    def make_buffers(self, device: torch.device) -> None:
        """Register every buffer, non-persistent, on `device`."""
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "DerivedBuffers":
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        moved = next(self.buffers(), None)
        if moved is not None:
            self.make_buffers(moved.device)
        return self


class RMSNorm(nn.Module):
    """Root-mean-square normalisation (Zhang & Sennrich 2019), computed in fp32."""

    def __init__(self, channels: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """`x` [..., C] over its root mean square, times the weight, in the weight's dtype."""
        weight = self.weight
        return F.rms_norm(x.float(), weight.shape, weight.float(), self.eps).to(weight.dtype)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020); gate and up are one matrix, gate first."""

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.gate_up = Linear(d_model, d_ff, d_ff)
        self.down = Linear(d_ff, d_model)

    def forward(self, x: Tensor) -> Tensor:
        """[..., d_model] to [..., d_model]."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        out: Tensor = self.down(F.silu(gate) * up)
        return out


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Both halves of `x` [B, T, H, head_dim] turned by its position's angles (RoPE), in its dtype.

    Channel c turns with channel c + head_dim / 2, the two halves of a head, as in Hugging Face's
    Llama; the paper's (and Meta's) interleaved pairs are the same up to a permutation.
    """
    cos, sin = cos[..., None, :], sin[..., None, :]  # [T, 1, head_dim / 2]
    first, second = x.float().chunk(2, dim=-1)
    turned = first * cos - second * sin, second * cos + first * sin
    return turned[0].to(x.dtype), turned[1].to(x.dtype)
