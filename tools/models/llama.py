"""Our names and shapes <-> those of a Hugging Face Llama. Pure functions; no file is touched.

A Llama is our model with ALiBi, LayerScale and dropout off. Queries, keys and values are one
matrix here and three there, and so are gate and up; RoPE turns the same two halves of a head, so
that joining and cutting is all there is to it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any, Final

import torch
from torch import Tensor

from model.config import ModelConfig, ModelError
from shards.shape import check_shape
from tools.errors import ConversionError

FAMILY: Final = ("llama", "mistral")
_DEFAULT_THETA: Final = 10_000.0

_SHAPE: Final = {
    "vocab_size": "vocab_size",
    "seq_len": "max_position_embeddings",
    "n_layers": "num_hidden_layers",
    "d_model": "hidden_size",
    "n_heads": "num_attention_heads",
    "d_ff": "intermediate_size",
}
_OPTIONS: Final[dict[str, tuple[str, Any]]] = {  # with the default of a Llama's config.json
    "n_kv_heads": ("num_key_value_heads", None),
    "tie_embeddings": ("tie_word_embeddings", False),
    "norm_eps": ("rms_norm_eps", 1e-6),
    "init_std": ("initializer_range", 0.02),
}
_KNOWN: Final = {
    *_SHAPE, *_OPTIONS, "rope", "rope_theta", "alibi", "layer_scale", "dropout",
    "attention_dropout", "z_loss",
}  # fmt: skip
_TABLE: Final = frozenset({dict, type(None)})
_THEIR_SHAPE: Final = {
    "hidden_size": int, "num_attention_heads": int,
    "rope_scaling": _TABLE, "rope_parameters": _TABLE,
}  # fmt: skip
_LAYER: Final = {  # a matrix of ours, and theirs that it is made of, one below the other
    "attention_norm.weight": ("input_layernorm.weight",),
    "ffn_norm.weight": ("post_attention_layernorm.weight",),
    "attention.qkv.weight": tuple(f"self_attn.{part}_proj.weight" for part in "qkv"),
    "attention.out.weight": ("self_attn.o_proj.weight",),
    "ffn.gate_up.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "ffn.down.weight": ("mlp.down_proj.weight",),
}
_SCALED: Final = (".out.weight", ".down.weight")  # what LayerScale follows


def config_from_llama(theirs: Mapping[str, Any]) -> ModelConfig:
    """Our shape for a config.json; ConversionError for what this model cannot compute."""
    try:
        check_shape(theirs, _THEIR_SHAPE, "config.json")
    except ValueError as error:
        raise ConversionError(f"{error}, which cannot be: fetch it again") from error
    _check_computable(theirs)
    try:
        given = {our: theirs[their] for our, their in _SHAPE.items()}
        given |= {our: theirs.get(their, default) for our, (their, default) in _OPTIONS.items()}
        return ModelConfig(
            **given,
            rope_theta=_rope(theirs).get("rope_theta", _DEFAULT_THETA),
            alibi=False,
            layer_scale=False,
            dropout=0.0,
            attention_dropout=0.0,
        )
    except KeyError as error:
        raise ConversionError(
            f"config.json has no {error}, so it describes no Llama: name another folder"
        ) from error
    except ModelError as error:
        raise ConversionError(f"config.json describes a model that cannot be: {error}") from error


def is_llama(ours: ModelConfig) -> bool:
    """Whether a LlamaForCausalLM computes the same: it has RoPE, no ALiBi, and no later option."""
    later = [each for each in fields(ours) if each.name not in _KNOWN]
    return ours.rope and not ours.alibi and all(getattr(ours, o.name) == o.default for o in later)


def config_to_llama(ours: ModelConfig) -> dict[str, Any]:
    """The config.json of a LlamaForCausalLM of our shape."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{their: getattr(ours, our) for our, their in _SHAPE.items()},
        **{their: getattr(ours, our) for our, (their, _) in _OPTIONS.items()},
        "num_key_value_heads": ours.kv_heads,
        "head_dim": ours.head_dim,
        "hidden_act": "silu",
        "rope_theta": ours.rope_theta,  # where transformers < 5 looks, and llama.cpp
        "rope_parameters": {"rope_type": "default", "rope_theta": ours.rope_theta},
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
    }


def weights_from_llama(config: ModelConfig, theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict, fp32, from theirs; ConversionError names a tensor missing or left over."""
    left = {n: t for n, t in theirs.items() if not n.endswith("rotary_emb.inv_freq")}
    head = left.pop("lm_head.weight", None) if config.tie_embeddings else None
    if head is not None and not torch.equal(head, left.get("model.embed_tokens.weight", head)):
        raise ConversionError(
            "config.json says tie_word_embeddings, and lm_head.weight is not the embedding: "
            "set it to false there, or remove that tensor"
        )

    def take(name: str) -> Tensor:
        if (tensor := left.pop(name, None)) is None:
            raise ConversionError(
                f"the weights have no {name}: the folder is incomplete, or no Llama"
            )
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            raise ConversionError(f"{name} holds whole numbers, NaN or infinity: fetch it again")
        return tensor.float()

    ours = {our: torch.cat([*map(take, parts)]) for our, parts in _names(config)}
    if left:
        raise ConversionError(
            f"the weights hold {next(iter(left))}, which a Llama does not have: this model cannot"
            " be computed here"
        )
    return ours


def weights_to_llama(config: ModelConfig, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their state dict from ours; LayerScale goes into the matrices that it follows."""
    heads = [config.n_heads * config.head_dim] + 2 * [config.kv_heads * config.head_dim]
    rows = {2: 2 * [config.d_ff], 3: heads}
    theirs: dict[str, Tensor] = {}
    for our, parts in _names(config):
        weight = ours[our]
        if config.layer_scale and our.endswith(_SCALED):
            branch = our.removesuffix(".out.weight").removesuffix(".down.weight")
            weight = ours[f"{branch}_scale"][:, None] * weight
        pieces = torch.split(weight, rows[len(parts)]) if len(parts) > 1 else [weight]
        theirs |= {part: piece.clone() for part, piece in zip(parts, pieces, strict=True)}
    return theirs


def _names(config: ModelConfig) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Each of our tensors with those of theirs that it is made of, one below the other."""
    yield "embedding.weight", ("model.embed_tokens.weight",)
    yield "norm.weight", ("model.norm.weight",)
    if not config.tie_embeddings:
        yield "head.weight", ("lm_head.weight",)
    for layer in range(config.n_layers):
        for our, parts in _LAYER.items():
            yield f"blocks.{layer}.{our}", tuple(f"model.layers.{layer}.{part}" for part in parts)


def _rope(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """What is said of RoPE: `rope_parameters` since transformers 5, two separate keys before."""
    scaling = theirs.get("rope_scaling") or {}
    before = {"rope_theta": theirs["rope_theta"]} if "rope_theta" in theirs else {}
    return before | scaling | (theirs.get("rope_parameters") or {})


def _check_computable(theirs: Mapping[str, Any]) -> None:
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
