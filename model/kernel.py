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
    halves_q: tuple[Tensor, ...] = (q,)
    halves_k: tuple[Tensor, ...] = (k,)
    if positions.cos is not None and positions.sin is not None:
        halves_q, halves_k = (rotate(part, positions.cos, positions.sin) for part in (q, k))
    alibi_q, alibi_k = positions.alibi_q, positions.alibi_k  # [T, H, 6], [T, 6]
    q = _join(alibi_q, halves_q, width)
    k = _join(None if alibi_k is None else alibi_k[:, None, :], halves_k, width)
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
