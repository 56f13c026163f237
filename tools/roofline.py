"""The time of a step by part, from counted FLOPs and bytes at stated rates: arithmetic, a range.

Bytes of the pointwise kernels were counted in Inductor's own kernels for SummerLM-4B's block (8,192
tokens: 6.58 GB, of which 1.64 cast weights and gradients) and are scaled by width. The rates lie
around what one H100 and one H200 reached (tools/benchmarks/RESULTS.md); for a device whose maker
measured matrix products, the faster one is the maker's. Nothing of it was measured on an MI300X.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from model.config import ModelConfig, count_matmul_params, count_params, padded_head_dim
from trainer.config.accelerators import Accelerator
from trainer.config.config import RunConfig

GEMM: Final = (0.55, 0.80)  # of the bf16 peak, slower and faster
ATTENTION: Final = (0.10, 0.25)  # strict kernels with dropout .. fast ones without
MEMORY: Final = (0.55, 0.85)  # of the bandwidth
LINK_BYTES_S: Final = (2e11, 4e11)  # bus bandwidth of an all-reduce within a box
_STREAM, _FFN, _CASTS = 35 * 4, 8 * 2, 14.5  # bytes: a channel, a channel of d_ff, a parameter
_UPDATE: Final = 44  # bytes a parameter: clipping, fused AdamW, zeroed gradients


class StepPart(NamedTuple):
    """One part of an optimizer step on one device, in seconds."""

    name: str
    slow_s: float
    fast_s: float


def step_parts(
    config: RunConfig, device: Accelerator, devices: int, micro_batch: int
) -> list[StepPart]:
    """All parts of a step; the faster exchange is hidden by all but the first third of the rest."""
    model, kind = config.model, config.activation_checkpointing
    tokens = config.global_batch_tokens / devices
    micro_batches = tokens / (micro_batch * model.seq_len)
    again = 1.0 if kind == "full" else 0.0  # a second forward pass
    ends = model.vocab_size * model.d_model
    blocks = count_matmul_params(model) - ends
    head_dim = padded_head_dim(model, rocm=device.kind == "rocm")
    scores = model.n_layers * model.seq_len * model.n_heads * head_dim  # of a token, causal
    traffic = 1.0 * model.n_layers * (_STREAM * model.d_model + _FFN * model.d_ff)
    traffic *= 1.0 if kind == "none" else 4 / 3
    peak, memory = device.bf16_tflops * 1e12, device.memory_tb_s * 1e12
    products = tuple(share * peak for share in GEMM)
    if device.gemm_tflops:
        products = (0.75 * device.gemm_tflops * 1e12, device.gemm_tflops * 1e12)
    attention = tuple(share * peak for share in ATTENTION)
    bandwidth = tuple(share * memory for share in MEMORY)
    logits = 8.0 * model.vocab_size * tokens
    parts = [
        _part("GEMM", (6 + 2 * again) * tokens * blocks, products),
        _part("attention", (7 + 2 * again) * tokens * scores, attention),
        _part("pointwise", tokens * traffic + micro_batches * _CASTS * blocks, bandwidth),
        _part("loss", 6 * tokens * ends, products, logits, bandwidth),
        _part("optimizer", _UPDATE * count_params(model) / config.shard_degree, bandwidth),
    ]
    sent = _exchanged(model, config.shard_degree, devices, micro_batches)
    slow, fast = (sent / rate for rate in LINK_BYTES_S)
    hidden = sum(part.fast_s for part in parts) * 2 / 3
    return [*parts, StepPart("exchange", slow, max(0.0, fast - hidden))]


def _part(
    name: str,
    work: float,
    rates: tuple[float, ...],
    also: float = 0.0,
    also_at: tuple[float, ...] = (1.0, 1.0),
) -> StepPart:
    return StepPart(name, *(work / a + also / b for a, b in zip(rates, also_at, strict=True)))


def _exchanged(model: ModelConfig, degree: int, devices: int, micro_batches: float) -> float:
    """Bytes that a device sends in a step: DDP's all-reduce, or FSDP2's gathers and scatters."""
    n_params = count_params(model)
    if degree == 1:
        return 2 * 4 * n_params * (devices - 1) / devices
    replicas = devices // degree
    inside = (2 * 2 + 4) * n_params * micro_batches * (degree - 1) / degree
    return inside + 2 * 4 * n_params / degree * (replicas - 1) / replicas
