"""Our names and shapes <-> those of a Hugging Face Llama. Pure functions; no file is touched.

A Llama is our model with ALiBi, LayerScale and dropout off. Queries, keys and values are one
matrix here and three there, and so are gate and up; RoPE turns the same two halves of a head, so
that joining and cutting is all there is to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from model.config import ModelConfig, ModelError
from tools.errors import ConversionError

FAMILY: Final = ("llama", "mistral")
_DEFAULT_THETA: Final = 10_000.0

_SAME: Final = {
    "attention_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "attention.out.weight": "self_attn.o_proj.weight",
    "ffn.down.weight": "mlp.down_proj.weight",
}
_JOINED: Final = {
    "attention.qkv.weight": tuple(f"self_attn.{part}_proj.weight" for part in "qkv"),
    "ffn.gate_up.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
}
_SCALES: Final = {"attention.out.weight": "attention_scale", "ffn.down.weight": "ffn_scale"}


def config_from_llama(theirs: Mapping[str, Any]) -> ModelConfig:
    """Our shape for a config.json; ConversionError for what this model cannot compute."""
    _refuse_what_differs(theirs)
    try:
        return ModelConfig(
            vocab_size=theirs["vocab_size"],
            seq_len=theirs["max_position_embeddings"],
            n_layers=theirs["num_hidden_layers"],
            d_model=theirs["hidden_size"],
            n_heads=theirs["num_attention_heads"],
            n_kv_heads=theirs.get("num_key_value_heads"),
            d_ff=theirs["intermediate_size"],
            rope_theta=float(_rope(theirs).get("rope_theta", _DEFAULT_THETA)),
            alibi=False,
            layer_scale=False,
            dropout=0.0,
            attention_dropout=0.0,
            tie_embeddings=theirs.get("tie_word_embeddings", False),
            norm_eps=theirs.get("rms_norm_eps", 1e-6),
            init_std=theirs.get("initializer_range", 0.02),
        )
    except KeyError as error:
        raise ConversionError(
            f"config.json has no {error}, so it describes no Llama: name another folder"
        ) from error
    except ModelError as error:
        raise ConversionError(f"config.json describes a model that cannot be: {error}") from error


def is_llama(ours: ModelConfig) -> bool:
    """Whether a LlamaForCausalLM computes the same: it always has RoPE, and never ALiBi."""
    return ours.rope and not ours.alibi


def config_to_llama(ours: ModelConfig) -> dict[str, Any]:
    """The config.json of a LlamaForCausalLM of our shape."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": ours.vocab_size,
        "max_position_embeddings": ours.seq_len,
        "num_hidden_layers": ours.n_layers,
        "hidden_size": ours.d_model,
        "num_attention_heads": ours.n_heads,
        "num_key_value_heads": ours.kv_heads,
        "head_dim": ours.head_dim,
        "intermediate_size": ours.d_ff,
        "hidden_act": "silu",
        "rope_theta": ours.rope_theta,  # where transformers < 5 looks, and llama.cpp
        "rope_parameters": {"rope_type": "default", "rope_theta": ours.rope_theta},
        "rms_norm_eps": ours.norm_eps,
        "initializer_range": ours.init_std,
        "tie_word_embeddings": ours.tie_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
    }


def weights_from_llama(config: ModelConfig, theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict, fp32, from theirs; ConversionError names a tensor missing or left over."""
    left = {n: t for n, t in theirs.items() if not n.endswith("rotary_emb.inv_freq")}
    if config.tie_embeddings:
        left.pop("lm_head.weight", None)

    def take(name: str) -> Tensor:
        try:
            return left.pop(name).float()
        except KeyError:
            raise ConversionError(
                f"the weights have no {name}: the folder is incomplete, or no Llama"
            ) from None

    ours = {our: take(their) for our, their in _outer_names(config).items()}
    for layer in range(config.n_layers):
        prefix, their_prefix = f"blocks.{layer}.", f"model.layers.{layer}."
        for our, their in _SAME.items():
            ours[prefix + our] = take(their_prefix + their)
        for our, parts in _JOINED.items():
            ours[prefix + our] = torch.cat([take(their_prefix + part) for part in parts])
    if left:
        raise ConversionError(
            f"the weights hold {next(iter(left))}, which a Llama does not have: this model cannot"
            " be computed here"
        )
    return ours


def weights_to_llama(config: ModelConfig, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their state dict from ours; LayerScale goes into the matrices that it follows."""
    heads = [config.n_heads * config.head_dim] + 2 * [config.kv_heads * config.head_dim]
    rows = {"attention.qkv.weight": heads, "ffn.gate_up.weight": 2 * [config.d_ff]}
    theirs = {their: ours[our] for our, their in _outer_names(config).items()}
    for layer in range(config.n_layers):
        prefix, their_prefix = f"blocks.{layer}.", f"model.layers.{layer}."
        for our, their in _SAME.items():
            weight = ours[prefix + our]
            if config.layer_scale and our in _SCALES:
                weight = ours[prefix + _SCALES[our]][:, None] * weight
            theirs[their_prefix + their] = weight
        for our, parts in _JOINED.items():
            pieces = torch.split(ours[prefix + our], rows[our])
            theirs |= {
                their_prefix + part: w.clone() for part, w in zip(parts, pieces, strict=True)
            }
    return theirs


def _outer_names(config: ModelConfig) -> dict[str, str]:
    names = {"embedding.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight"}
    return names if config.tie_embeddings else names | {"head.weight": "lm_head.weight"}


def _rope(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """What is said of RoPE: `rope_parameters` since transformers 5, two separate keys before."""
    scaling = theirs.get("rope_scaling") or {}
    before = {"rope_theta": theirs["rope_theta"]} if "rope_theta" in theirs else {}
    return before | scaling | (theirs.get("rope_parameters") or {})


def _refuse_what_differs(theirs: Mapping[str, Any]) -> None:
    """ConversionError for a setting under which our model would compute something else."""
    rope = _rope(theirs)
    kind = rope.get("rope_type", rope.get("type", "default"))
    plain_head = theirs.get("hidden_size", 0) // max(1, theirs.get("num_attention_heads", 1))
    window = theirs.get("sliding_window")
    wanted = (
        ("model_type", theirs.get("model_type") in FAMILY, f"one of {', '.join(FAMILY)}"),
        ("hidden_act", theirs.get("hidden_act", "silu") == "silu", "silu"),
        ("attention_bias", not theirs.get("attention_bias"), "false"),
        ("mlp_bias", not theirs.get("mlp_bias"), "false"),
        ("head_dim", theirs.get("head_dim") in (None, plain_head), f"{plain_head}"),
        ("sliding_window", window is None, "null (full attention)"),
        ("quantization_config", not theirs.get("quantization_config"), "absent"),
        ("partial_rotary_factor", theirs.get("partial_rotary_factor", 1.0) == 1.0, "1.0"),
    )
    if kind != "default":
        raise ConversionError(
            f"config.json has RoPE scaling of type {kind!r}: only unscaled RoPE (type 'default') is"
            " computed here"
        )
    for key, fits, needed in wanted:
        if not fits:
            raise ConversionError(
                f"config.json has {key} = {theirs.get(key)!r} and this model needs {needed}:"
                " name a folder of a plain Llama"
            )
