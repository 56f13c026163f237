"""A model of ours inside `transformers`: this file travels with the weights, as custom code.

    AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)

summer-convert copies it into each folder whose model no architecture of the library computes (RoPE
and ALiBi together). It needs torch and transformers alone, and keeps the names of the weights.
Dropout is left out. ALiBi is six more head dims in front of queries and keys, each exact in bf16,
so that the library's usual attention computes it without a mask; the model is exact that way up
to 16,448 tokens. The cache holds keys and values as the attention reads them.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

MAX_ALIBI_CONTEXT = 16_448
ALIBI_DIMS = 6
ALIBI_BLOCK = 64


class SummerLMConfig(PretrainedConfig):  # type: ignore[misc, no-untyped-call, unused-ignore]
    """The shape of a model, under the names of the project that trained it."""

    model_type = "summerlm"
    keys_to_ignore_at_inference = ("past_key_values",)
    attribute_map = {  # noqa: RUF012  # the library's own names, read by it as they are
        "hidden_size": "d_model",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
        "intermediate_size": "d_ff",
        "max_position_embeddings": "seq_len",
        "initializer_range": "init_std",
    }

    def __init__(
        self,
        vocab_size: int = 32_768,
        seq_len: int = 4096,
        n_layers: int = 32,
        d_model: int = 3072,
        n_heads: int = 32,
        n_kv_heads: int | None = None,
        d_ff: int = 10_752,
        rope: bool = True,
        rope_theta: float = 10_000.0,
        alibi: bool = True,
        layer_scale: bool = True,
        tie_embeddings: bool = True,
        norm_eps: float = 1e-5,
        init_std: float = 0.02,
        **kwargs: Any,
    ) -> None:
        self.vocab_size, self.seq_len, self.n_layers = vocab_size, seq_len, n_layers
        self.d_model, self.d_ff, self.n_heads = d_model, d_ff, n_heads
        self.n_kv_heads = n_heads if n_kv_heads is None else n_kv_heads
        self.rope, self.rope_theta, self.alibi = rope, rope_theta, alibi
        self.layer_scale, self.tie_embeddings = layer_scale, tie_embeddings
        self.norm_eps, self.init_std = norm_eps, init_std
        # tied weights are one tensor here, so there is nothing left for the library to tie
        super().__init__(**(kwargs | {"tie_word_embeddings": False}))


class Tables(NamedTuple):
    """What positions 0..L-1 add to queries and keys, fp32."""

    cos: Tensor  # [L, head_dim / 2]
    sin: Tensor
    alibi_q: Tensor  # [L, H, 6]
    alibi_k: Tensor  # [L, 1, 6]

    def at(self, positions: Tensor) -> Tables:
        """The rows of `positions` [B, T], each [B, T, ...]."""
        return Tables(*(table[positions] for table in self))


class RMSNorm(nn.Module):
    """Root-mean-square normalisation, computed in fp32."""

    def __init__(self, config: SummerLMConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.d_model))
        self.eps = config.norm_eps

    def forward(self, x: Tensor) -> Tensor:
        """`x` normalised, in the weight's dtype."""
        weight = self.weight
        return F.rms_norm(x.float(), weight.shape, weight.float(), self.eps).to(weight.dtype)


class Attention(nn.Module):
    """Grouped-query attention with RoPE and ALiBi."""

    def __init__(self, config: SummerLMConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        self.head_dim = config.d_model // config.n_heads
        heads = config.n_heads + 2 * config.n_kv_heads
        self.qkv = nn.Linear(config.d_model, heads * self.head_dim, bias=False)
        self.out = nn.Linear(config.d_model, config.d_model, bias=False)

    def forward(
        self, x: Tensor, tables: Tables, mask: Tensor | None, cache: DynamicCache | None
    ) -> Tensor:
        """`x` [B, T, d_model], to the same; `mask` [B, 1, T, S], None for the plain triangle."""
        config, (B, T, _) = self.config, x.shape
        qkv = self.qkv(x).view(B, T, -1, self.head_dim)
        q, k, v = qkv.split([config.n_heads, config.n_kv_heads, config.n_kv_heads], dim=2)
        if config.rope:
            q, k = rotate(q, tables), rotate(k, tables)
        width = self.head_dim
        if config.alibi:
            q, k = in_front(tables.alibi_q, q), in_front(tables.alibi_k, k)
            width = -(-(width + ALIBI_DIMS) // 8) * 8  # a size that the kernels are made for
        q, k, v = (F.pad(part, (0, width - part.shape[-1])).transpose(1, 2) for part in (q, k, v))
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        attended = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=mask is None and T > 1,
            scale=self.head_dim**-0.5,
            enable_gqa=config.n_kv_heads != config.n_heads,
        )
        out: Tensor = self.out(attended[..., : self.head_dim].transpose(1, 2).reshape(B, T, -1))
        return out


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)); gate and up are one matrix, gate first."""

    def __init__(self, config: SummerLMConfig) -> None:
        super().__init__()
        self.gate_up = nn.Linear(config.d_model, 2 * config.d_ff, bias=False)
        self.down = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., d_model] to [..., d_model]."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        out: Tensor = self.down(F.silu(gate) * up)
        return out


class SummerLMBlock(nn.Module):
    """One layer; the residual stream stays fp32 whatever the weights are in."""

    def __init__(self, config: SummerLMConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm, self.attention = RMSNorm(config), Attention(config, layer)
        self.ffn_norm, self.ffn = RMSNorm(config), SwiGLU(config)
        self.attention_scale = self.ffn_scale = None
        if config.layer_scale:
            scale = torch.full((config.d_model,), (2 * config.n_layers) ** -0.5)
            self.attention_scale = nn.Parameter(scale)
            self.ffn_scale = nn.Parameter(scale.clone())

    def forward(
        self, x: Tensor, tables: Tables, mask: Tensor | None, cache: DynamicCache | None
    ) -> Tensor:
        """`x` [B, T, d_model] fp32, to the same."""
        branch = self.attention(self.attention_norm(x), tables, mask, cache)
        x = x + scaled(branch, self.attention_scale)
        return x + scaled(self.ffn(self.ffn_norm(x)), self.ffn_scale)


class SummerLMForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[no-untyped-call]
    """The whole network, with the library's generation."""

    config_class = SummerLMConfig
    config: SummerLMConfig
    _no_split_modules = ["SummerLMBlock"]  # noqa: RUF012  # the library wants a list
    _supports_sdpa = True

    def __init__(self, config: SummerLMConfig) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(SummerLMBlock(config, n) for n in range(config.n_layers))
        self.norm = RMSNorm(config)
        if not config.tie_embeddings:
            self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.tables: Tables | None = None  # no buffers: the library would load them empty
        self.post_init()  # type: ignore[no-untyped-call]

    def get_input_embeddings(self) -> nn.Module:
        """The table of token vectors."""
        return self.embedding

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B, T, V] fp32, with the mean loss where there are labels.

        `attention_mask` [B, S] marks what is padding, on either side. Of `position_ids` only the
        differences count.
        """
        if past_key_values is None and (use_cache or (use_cache is None and not self.training)):
            past_key_values = DynamicCache()
        start = 0 if past_key_values is None else past_key_values.get_seq_length()
        end = start + input_ids.shape[1]
        if position_ids is None:
            position_ids = torch.arange(start, end, device=input_ids.device)[None]
        tables = self.tables_of(end, input_ids.device).at(position_ids)
        mask = causal_mask(start, input_ids, attention_mask)
        x = self.embedding(input_ids).float()
        for block in self.blocks:
            x = block(x, tables, mask, past_key_values)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        head = self.embedding if self.config.tie_embeddings else self.head
        logits = F.linear(self.norm(x)[:, kept], head.weight).float()
        loss = None
        if labels is not None:
            size = self.config.vocab_size
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)

    def tables_of(self, length: int, device: torch.device) -> Tables:
        """The tables of at least `length` positions; ValueError where ALiBi is not exact."""
        if self.config.alibi and length > MAX_ALIBI_CONTEXT:
            raise ValueError(
                f"a context of {length} tokens is beyond {MAX_ALIBI_CONTEXT}, where ALiBi in bf16"
                " stops being exact: use a shorter one"
            )
        tables = self.tables
        if tables is None or len(tables.cos) < length or tables.cos.device != device:
            with torch.inference_mode(False):  # or what generation made would be lost to training
                made = make_tables(self.config, max(length, self.config.seq_len))
                tables = self.tables = Tables(*(table.to(device) for table in made))
        return tables


def causal_mask(start: int, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor | None:
    """[B, 1, T, S], True where a query may look; None for the plain triangle.

    Padding looks at itself, so that it has a softmax: its NaN would reach the others' sums.
    """
    T = input_ids.shape[1]
    S = start + T
    triangle = torch.ones(T, S, dtype=torch.bool, device=input_ids.device).tril(start)
    if attention_mask is not None and attention_mask.dim() != 2:
        raise ValueError("attention_mask: give [batch, length], 0 for padding, and no static cache")
    if attention_mask is not None and not attention_mask.all():
        itself = triangle ^ triangle.tril(start - 1)
        return (triangle & attention_mask[:, None, None, :S].bool()) | itself
    return triangle[None, None] if start and T > 1 else None


def make_tables(config: SummerLMConfig, length: int) -> Tables:
    """The tables of positions 0..length-1, made on the CPU (angles in fp64).

    With j = 64a + b and i = 64c + d, ALiBi's m (j - i) is the product of
    [m, m, hi(-64cm), lo(-64cm), hi(-dm), lo(-dm)] and [64a, b, 1, 1, 1, 1], all exact in bf16.
    """
    head_dim = config.d_model // config.n_heads
    position = torch.arange(length, dtype=torch.float64, device="cpu")
    channel = torch.arange(0, head_dim, 2, dtype=torch.float64, device="cpu")
    angle = position[:, None] * config.rope_theta ** (-channel / head_dim)
    slopes = alibi_slopes(config.n_heads, head_dim)
    block, offset = (position // ALIBI_BLOCK).float(), (position % ALIBI_BLOCK).float()
    far = two_pieces(-ALIBI_BLOCK * block[:, None] * slopes)
    near = two_pieces(-offset[:, None] * slopes)
    both = slopes.expand(length, config.n_heads)
    one = torch.ones_like(block)
    alibi_q = torch.stack([both, both, *far, *near], dim=-1)
    alibi_k = torch.stack([ALIBI_BLOCK * block, offset, one, one, one, one], dim=-1)
    return Tables(angle.cos().float(), angle.sin().float(), alibi_q, alibi_k[:, None])


def alibi_slopes(n_heads: int, head_dim: int) -> Tensor:
    """[H]: 2^(-8 h / H) times sqrt(head_dim), rounded to bf16, as the model is defined."""
    lower = 1 << (n_heads.bit_length() - 1)
    exponents = [8 * h / lower for h in range(1, lower + 1)]
    exponents += [8 * h / (2 * lower) for h in range(1, 2 * lower + 1, 2)][: n_heads - lower]
    m = torch.exp2(-torch.tensor(exponents, dtype=torch.float64, device="cpu"))
    return (m * math.sqrt(head_dim)).to(torch.bfloat16).float()


def two_pieces(value: Tensor) -> tuple[Tensor, Tensor]:
    """The two bf16 numbers whose sum is the value."""
    high = value.to(torch.bfloat16).float()
    return high, value - high


def in_front(front: Tensor, part: Tensor) -> Tensor:
    """[front, part] along the last dim."""
    return torch.cat([front.to(part.dtype).expand(*part.shape[:-1], ALIBI_DIMS), part], dim=-1)


def rotate(x: Tensor, tables: Tables) -> Tensor:
    """`x` [B, T, H, head_dim] turned by RoPE: channel c with channel c + head_dim / 2."""
    cos, sin = tables.cos[:, :, None], tables.sin[:, :, None]
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def scaled(branch: Tensor, scale: Tensor | None) -> Tensor:
    """LayerScale, in fp32."""
    return branch.float() if scale is None else branch.float() * scale
