"""RoPE, ALiBi and the causal triangle in one plain flash-attention call.

ALiBi rides in six head dims put in front of q and k (model/alibi.py), so the kernel needs no mask:
a bf16 mask would take 1 GiB a layer for 32 heads at 4096 tokens, and rule the flash kernels out.
The head is padded with zeros to a size that the device's kernel takes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from model.alibi import FOLDED_DIMS
from model.config import ModelConfig
from model.layers import rotate
from model.positions import Positions


def fold(
    q: Tensor, k: Tensor, v: Tensor, positions: Positions, config: ModelConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """q', k', v' as the kernel takes them: [B, T, H, head_dim] each, to [B, H, T, D'].

    ALiBi's dims go first, so that its products are summed while the accumulator is still exact.
    """
    width = kernel_head_dim(config, q.device)
    if positions.cos is not None and positions.sin is not None:
        q, k = (rotate(part, positions.cos, positions.sin) for part in (q, k))
    alibi_q, alibi_k = positions.alibi_q, positions.alibi_k  # [T, H, 6], [T, 6]
    q = _widen(q, alibi_q, width)
    k = _widen(k, None if alibi_k is None else alibi_k[:, None, :], width)
    v = _widen(v, None, width)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def _widen(part: Tensor, front: Tensor | None, width: int) -> Tensor:
    """[front, part, zeros] along the last dim, `width` in all; front is shared by the batch."""
    if front is not None:
        shape = (*part.shape[:-1], front.shape[-1])
        part = torch.cat([front.to(part.dtype).expand(shape), part], dim=-1)
    return F.pad(part, (0, width - part.shape[-1]))


def attend(
    q: Tensor, k: Tensor, v: Tensor, config: ModelConfig, start: int = 0, dropout: float = 0.0
) -> Tensor:
    """Causal attention of q' [B, H, T, D'] at positions from `start`, over keys [B, Hkv, S, D'].

    is_causal aligns the triangle to the upper left, which is right only while nothing is cached.
    """
    T, S = q.shape[2], k.shape[2]
    mask, is_causal = None, False  # a single query sees every key
    if start == 0:
        is_causal = True
    elif T > 1:
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(diagonal=S - T)
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=is_causal,
        scale=config.head_dim**-0.5,
        enable_gqa=config.kv_heads != config.n_heads,
    )


def kernel_head_dim(config: ModelConfig, device: torch.device) -> int:
    """D': head_dim, ALiBi's dims, and zeros up to a size that the device's kernels are made for.

    CUDA's flash kernels take multiples of 8. ROCm's (AOTriton) are built for multiples of 16 up to
    96, for 128, and for multiples of 32 beyond.
    """
    width = config.head_dim + (FOLDED_DIMS if config.alibi else 0)
    if device.type == "cuda" and torch.version.hip is not None:
        step = 16 if width <= 96 else 32
    else:
        step = 8
    return -(-width // step) * step
