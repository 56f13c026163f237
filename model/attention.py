"""Grouped-query attention: RoPE, ALiBi and the causal triangle in one plain flash-attention call.

ALiBi rides in six head dims put in front of q and k (model/positions.py), so the kernel needs no
mask: a bf16 mask would take 1 GiB a layer for 32 heads at 4096 tokens, and rule the flash kernels
out. The head is padded with zeros to a size that the device's kernel takes. model/self_test.py
checks that a device's kernel computes the model that is named.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig, ModelError, padded_head_dim
from model.layers import Linear, rotate
from model.positions import (
    Positions,
    check_context,
)


class LayerCache:
    """One layer's keys and values of the tokens already read: two of [B, Hkv, max_len, D']."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values
        self.length = 0

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v [B, Hkv, T, D'] of the next tokens; all keys and values so far."""
        start, self.length = self.length, self.length + k.shape[2]
        self.keys[:, :, start : self.length] = k
        self.values[:, :, start : self.length] = v
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]


class KVCache:
    """Room for `max_len` tokens of `batch_size` sequences; `length` of them are filled.

    Keys are stored turned by RoPE, with ALiBi's dims in front and the kernel's padding behind.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        max_len: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if config.alibi:
            check_context(max_len)
        device = torch.device(device)
        shape = (batch_size, config.kv_heads, max_len, kernel_head_dim(config, device))
        self.layers = [
            LayerCache(*(torch.zeros(shape, device=device, dtype=dtype) for _ in range(2)))
            for _ in range(config.n_layers)
        ]
        self.max_len = max_len

    @property
    def length(self) -> int:
        """Tokens read so far."""
        return self.layers[0].length

    def start_of(self, n_tokens: int) -> int:
        """The position at which the next `n_tokens` start; ModelError without room for them."""
        start, end = self.length, self.length + n_tokens
        if end > self.max_len:
            raise ModelError(
                f"the KV cache has room for {self.max_len} tokens and {end} are needed:"
                " make it with a larger max_len, or generate less"
            )
        return start


class Attention(nn.Module):
    """Causal self-attention; queries, keys and values come from one matrix, in that order."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        heads = (config.n_heads, config.kv_heads, config.kv_heads)
        self.qkv = Linear(config.d_model, *(n * config.head_dim for n in heads))
        self.out = Linear(config.d_model, config.d_model)

    def forward(
        self, x: Tensor, positions: Positions, cache: LayerCache | None, dropout: float
    ) -> Tensor:
        """`x` [B, T, d_model] to [B, T, d_model]; with a cache it follows what that holds."""
        config = self.config
        B, T, _ = x.shape
        qkv = self.qkv(x).view(B, T, -1, config.head_dim)
        q, k, v = qkv.split([config.n_heads, config.kv_heads, config.kv_heads], dim=2)
        q, k, v = fold(q, k, v, positions, config)  # [B, H, T, D'], [B, Hkv, T, D'] twice
        if cache is not None:
            k, v = cache.append(k, v)
        attended = attend(q, k, v, config, positions.mask, dropout)[..., : config.head_dim]
        out: Tensor = self.out(attended.transpose(1, 2).reshape(B, T, -1))
        return out


def fold(
    q: Tensor, k: Tensor, v: Tensor, positions: Positions, config: ModelConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """q', k', v' as the kernel takes them: [B, T, H, head_dim] each, to [B, H, T, D'].

    ALiBi's dims go first, so that its products are summed while the accumulator is still exact.
    """
    width = kernel_head_dim(config, q.device)
    halves_q: tuple[Tensor, ...] = (q,)
    halves_k: tuple[Tensor, ...] = (k,)
    if positions.cos is not None and positions.sin is not None:
        halves_q, halves_k = (rotate(part, positions.cos, positions.sin) for part in (q, k))
    alibi_q, alibi_k = positions.alibi_q, positions.alibi_k  # [T, H, 6], [T, 6]
    q = _join(alibi_q, halves_q, width)
    k = _join(None if alibi_k is None else alibi_k[..., None, :], halves_k, width)
    v = _join(None, (v,), width)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def _join(front: Tensor | None, parts: tuple[Tensor, ...], width: int) -> Tensor:
    """[front, *parts, zeros] along the last dim, `width` in all; front is shared by the batch.

    In a single concatenation, which compiles into one pass: turned, put behind ALiBi's dims and
    padded one after the other it took three and a half times as long on a CPU.
    """
    B, T, H, _ = parts[0].shape
    pieces = list(parts)
    if front is not None:
        pieces.insert(0, front.to(parts[0].dtype).expand(B, T, H, -1))
    missing = width - sum(piece.shape[-1] for piece in pieces)
    if missing:
        pieces.append(parts[0].new_zeros(()).expand(B, T, H, missing))
    return torch.cat(pieces, dim=-1)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: ModelConfig,
    mask: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Causal attention of q' [B, H, T, D'], the last of those whose k' and v' [B, Hkv, S, D'] are.

    `mask` (bool, [B, 1, T, S]) stands in for the triangle. is_causal aligns the triangle to the
    upper left, which is right only while nothing is cached.
    """
    T, S = q.shape[2], k.shape[2]
    if mask is None and 1 < T < S:  # a single query sees every key
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(diagonal=S - T)
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=mask is None and T == S,
        scale=config.head_dim**-0.5,
        enable_gqa=config.kv_heads != config.n_heads,
    )


def kernel_head_dim(config: ModelConfig, device: torch.device) -> int:
    """D': the head padded for this device's kernels."""
    return padded_head_dim(config, rocm=device.type == "cuda" and torch.version.hip is not None)
