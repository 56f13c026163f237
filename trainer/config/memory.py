"""Bytes that training needs on one device, by part: arithmetic, nothing is allocated."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

from model.config import CHUNK_ELEMENTS, ModelConfig, count_params, padded_head_dim
from trainer.config.config import RunConfig
from trainer.optimizer.schedule import OptimConfig

USABLE: Final = 0.92  # of a device's memory; the rest is the driver's, the libraries' and gaps
_CPU_TOKENS: Final = 8192  # from 2048 to 8192 tokens at a time a CPU gained 7 %


def memory_by_part(config: RunConfig, micro_batch_size: int, device: str) -> dict[str, int]:
    """Bytes of each part on one device, in micro-batches of this many sequences.

    `device` is cpu, mps, cuda or rocm: each pads heads and cuts logits in its own way.
    What sharding gathers for a moment is an upper bound, read off the buffers that fully_shard
    keeps and not measured. A block's activations are within 0.3 % of what autograd saves, compiled
    and not, in bf16 and fp32.
    """
    model, bf16 = config.model, config.precision == "bf16"
    n_params, slices = count_params(model), config.shard_degree
    tokens = micro_batch_size * model.seq_len
    ends = model.vocab_size * model.d_model * (1 if model.tie_embeddings else 2)
    block = (n_params - ends) // model.n_layers
    # embedding and head; a block, its buffer and the next one's, its gradients; two rounds of sums
    gathered = 3 * 4 * ends + (4 * (2 if bf16 else 4) + 2 * 4) * block
    chunk = min(tokens * model.vocab_size, CHUNK_ELEMENTS[device])
    # its logits and their exponentials; step by step, three more of them in fp32
    chunk_bytes = chunk * (2 * (2 if bf16 else 4) + (0 if config.compile else 12))
    return {
        "weights": 4 * n_params // slices,
        "gradients": 4 * n_params // slices,
        "moments": _moment_bytes(config.optim, n_params, model.n_layers * block) // slices,
        "bf16 copies": 2 * n_params if bf16 and slices == 1 else 0,
        "gathered": 0 if slices == 1 else gathered,
        "activations": tokens * _activation_bytes_per_token(config, device),
        # gradients of the head and of its input made ahead, and a chunk of logits
        "loss": 4 * model.d_model * (model.vocab_size + 2 * tokens) + chunk_bytes,
    }


def _moment_bytes(config: OptimConfig, n_params: int, n_in_blocks: int) -> int:
    """Bytes of all that the optimizer keeps; a block's few vectors count as its matrices do."""
    if config.name == "adamw":  # known without the seconds that torch takes to be imported
        return 8 * n_params
    from trainer.optimizer.optimizer import optimizer_bytes

    of_blocks = optimizer_bytes(config, of_block=True) * n_in_blocks
    return of_blocks + optimizer_bytes(config) * (n_params - n_in_blocks)


def _activation_bytes_per_token(config: RunConfig, device: str) -> int:
    """What all blocks keep for the backward pass."""
    model, size = config.model, 2 if config.precision == "bf16" else 4
    d, ff = model.d_model, model.d_ff
    query_width = model.n_heads * padded_head_dim(model, rocm=device == "rocm")
    key_width = query_width * model.kv_heads // model.n_heads
    attention = 2 * query_width + 2 * key_width  # q', the output, k' and v'
    if config.compile:
        full = 5 * d + size * (5 * d + attention + 3 * ff)
    else:
        full = 26 * d + size * (3 * d + attention + 4 * ff)
    if config.activation_checkpointing == "none":
        return model.n_layers * full
    kept = 4 * d  # a block's input; the block at work keeps all
    if config.activation_checkpointing == "selective":
        kept += size * (3 * d + 2 * model.kv_heads * model.head_dim + 2 * ff + query_width)
    return model.n_layers * kept + full


def largest_micro_batch(config: RunConfig, rows: int, device: str, limit_bytes: int) -> int | None:
    """The largest power of two that divides `rows` (of one rank) and fits; None if not even 1."""
    if not fits(memory_by_part(config, 1, device), limit_bytes):
        return None
    most_tokens = _CPU_TOKENS if device == "cpu" else math.inf
    size = 1
    while (
        rows % (2 * size) == 0
        and 2 * size * config.model.seq_len <= most_tokens
        and fits(memory_by_part(config, 2 * size, device), limit_bytes)
    ):
        size *= 2
    return size


def checkpoint_bytes(model: ModelConfig) -> int:
    """Bytes of one checkpoint: weights and two moments in fp32."""
    return 12 * count_params(model)


def fits(parts: Mapping[str, int], limit_bytes: int) -> bool:
    """Whether the parts fit into a device with this much memory."""
    return sum(parts.values()) <= USABLE * limit_bytes
