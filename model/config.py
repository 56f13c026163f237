"""The shape of a model, and what that shape costs in parameters and FLOPs.

The defaults are SummerLM-4B. No tensor is made here, and torch is not imported.
"""

from dataclasses import dataclass, fields
from math import isfinite

FOLDED_DIMS = 6  # of a head, for ALiBi
CHUNK_ELEMENTS = {"cpu": 3 * 2**25, "cuda": 2**27, "rocm": 2**27, "mps": 2**24}
"""Logits that the loss makes at a time: 192, 256 and 32 MiB in bf16."""
MAX_ALIBI_CONTEXT = 16_448  # 64 * 257: the last position whose block number is exact in bf16


_MOST = {
    "vocab_size": 1 << 24, "seq_len": 1 << 24, "n_layers": 4096, "d_model": 1 << 20,
    "n_heads": 1 << 14, "d_ff": 1 << 22,
}  # fmt: skip
"""No model so far comes near; beyond, a file is damaged or means harm, and memory would run out."""


class ModelError(ValueError):
    """A model that cannot be: the message names the field, its value and the fix."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One decoder-only transformer; with ALiBi, LayerScale and dropout off it is a Llama."""

    vocab_size: int = 32_768
    seq_len: int = 4096  # the context of training; evaluation may go beyond it
    n_layers: int = 32
    d_model: int = 3072
    n_heads: int = 32
    n_kv_heads: int | None = None  # None: as many as n_heads
    d_ff: int = 10_752
    rope: bool = True
    rope_theta: float = 10_000.0
    alibi: bool = True
    layer_scale: bool = True
    dropout: float = 0.1  # of the embedding and of every residual branch
    attention_dropout: float = 0.1  # of the attention probabilities, drawn by the kernel
    tie_embeddings: bool = True
    norm_eps: float = 1e-5
    init_std: float = 0.02
    z_loss: float = 0.0  # weight of log(Z)^2 in the loss (PaLM, 2022, uses 1e-4)

    @property
    def head_dim(self) -> int:
        """Channels of one head."""
        return self.d_model // self.n_heads

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values, each shared by n_heads / kv_heads query heads."""
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    def __post_init__(self) -> None:
        for field in fields(self):
            _require_type(field.name, getattr(self, field.name), field.default)
        for name, most in _MOST.items():
            value = getattr(self, name)
            _require(1 <= value <= most, name, value, f"give at least 1, at most {most:,}")
        exact_alibi = f"ALiBi is exact up to {MAX_ALIBI_CONTEXT}: stay below, or set alibi=false"
        for name, holds, fix in (
            ("d_model", self.d_model % self.n_heads == 0,
             f"give a multiple of n_heads ({self.n_heads})"),
            ("n_kv_heads", self.kv_heads >= 1 and self.n_heads % self.kv_heads == 0,
             f"give a divisor of n_heads ({self.n_heads})"),
            ("head_dim", not self.rope or self.head_dim % 2 == 0,
             "RoPE turns pairs of channels: make d_model / n_heads even"),
            ("seq_len", not self.alibi or self.seq_len <= MAX_ALIBI_CONTEXT, exact_alibi),
            ("z_loss", isfinite(self.z_loss) and self.z_loss >= 0.0, "give at least 0"),
        ):  # fmt: skip
            _require(holds, name, getattr(self, name), fix)
        for name in ("dropout", "attention_dropout"):
            value = getattr(self, name)
            _require(0.0 <= value < 1.0, name, value, "give a rate from 0 up to, not including, 1")
        for name in ("rope_theta", "norm_eps", "init_std"):
            value = getattr(self, name)
            _require(isfinite(value) and value > 0.0, name, value, "give a number above 0")


def _require_type(name: str, value: object, default: object) -> None:
    """ModelError unless a value, perhaps from a stranger's file, is of its default's type."""
    number = type(value) in (int, float) and abs(value) < 1e300  # type: ignore[arg-type]
    holds, fix = {
        bool: (type(value) is bool, "give true or false"),
        float: (number, "give a number"),
        int: (type(value) is int, "give a whole number"),
        type(None): (value is None or type(value) is int, "give a whole number, or auto"),
    }[type(default)]
    _require(holds, name, value if number else repr(value), fix)


def _require(holds: bool, name: str, value: object, fix: str) -> None:
    if not holds:
        raise ModelError(f"model.{name} = {value} cannot be: {fix}")


def padded_head_dim(config: ModelConfig, *, rocm: bool) -> int:
    """D': head_dim, ALiBi's dims, and zeros up to a size that the device's kernels are made for.

    CUDA's flash kernels take multiples of 8. ROCm's (AOTriton) are built for multiples of 16 up to
    96, for 128, and for multiples of 32 beyond.
    """
    width = config.head_dim + (FOLDED_DIMS if config.alibi else 0)
    step = 8 if not rocm else 16 if width <= 96 else 32
    return -(-width // step) * step


def count_matmul_params(config: ModelConfig) -> int:
    """Parameters that multiply every token: all matrices of the blocks, and the head."""
    queries_and_output = 2 * config.d_model * config.d_model
    keys_and_values = 2 * config.d_model * config.kv_heads * config.head_dim
    gate_up_down = 3 * config.d_model * config.d_ff
    block = queries_and_output + keys_and_values + gate_up_down
    return config.n_layers * block + config.vocab_size * config.d_model


def count_params(config: ModelConfig) -> int:
    """All trainable parameters; a tied head counts once."""
    vectors_a_block = 4 if config.layer_scale else 2
    vectors = (config.n_layers * vectors_a_block + 1) * config.d_model
    second_embedding = 0 if config.tie_embeddings else config.vocab_size * config.d_model
    return count_matmul_params(config) + vectors + second_embedding


def flops_per_token(config: ModelConfig, seq_len: int, *, causal: bool = True) -> float:
    """FLOPs of forward and backward for one token of a sequence of `seq_len`, nothing recomputed.

    Six for each multiplying parameter, and 12 * d_model * seq_len a layer for the attention scores
    and their use (Chowdhery et al. 2022, PaLM, appendix B). `causal` counts the lower triangle
    that a causal kernel computes; the full square, twice that, is the older convention.
    """
    attention = 12 * config.n_layers * config.d_model * seq_len
    return float(6 * count_matmul_params(config) + (attention // 2 if causal else attention))
