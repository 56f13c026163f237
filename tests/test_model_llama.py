"""The same weights in a Llama of transformers give the same logits: the architecture is right."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from model.config import ModelConfig
from model.transformer import Transformer
from tools.models.llama import (
    config_from_llama,
    config_to_llama,
    is_llama,
    weights_from_llama,
    weights_to_llama,
)

transformers = pytest.importorskip("transformers")


def random_llama(**changes: object) -> Any:
    """A Llama with weights large enough for every part to matter."""
    shape = {
        "vocab_size": 120, "hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 6,
        "num_key_value_heads": 2, "intermediate_size": 160, "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5, "initializer_range": 0.15, "tie_word_embeddings": False,
    }  # fmt: skip
    torch.manual_seed(0)
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**(shape | changes))).eval()
    with torch.no_grad():
        for parameter in llama.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)
    return llama


TOKENS = torch.randint(0, 120, (2, 200), generator=torch.Generator().manual_seed(1))


ROPE = {"rope_theta": 5e5, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}


@pytest.mark.parametrize(
    ("kv_heads", "tied", "rope"), [(1, True, ROPE), (2, False, {}), (2, True, {}), (6, False, {})]
)
def test_our_transformer_computes_a_llama(kv_heads: int, tied: bool, rope: dict[str, Any]) -> None:
    llama = random_llama(num_key_value_heads=kv_heads, tie_word_embeddings=tied, **rope)
    config = config_from_llama(llama.config.to_dict())
    assert (config.kv_heads, config.tie_embeddings) == (kv_heads, tied)
    assert config.rope_theta == (5e5 if rope else 1e4)
    model = Transformer(config).eval()
    model.load_state_dict(weights_from_llama(config, llama.state_dict()))
    with torch.no_grad():
        expected = llama(TOKENS).logits
        logits = model.logits(TOKENS)
    assert expected.std() > 0.5
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_a_llama_computes_our_transformer_with_layer_scale_folded_in(
    tied: bool, tmp_path: Path
) -> None:
    config = ModelConfig(
        vocab_size=120, seq_len=64, n_layers=3, d_model=96, n_heads=6, n_kv_heads=3, d_ff=160,
        alibi=False, tie_embeddings=tied, init_std=0.15,
    )  # fmt: skip
    model = Transformer(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_scale"):
                parameter.uniform_(0.2, 1.0)
    described = config_to_llama(config)
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**described)).eval()
    theirs = weights_to_llama(config, model.state_dict())
    missing, unexpected = llama.load_state_dict(theirs, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"} if tied else not missing
    with torch.no_grad():
        torch.testing.assert_close(model.logits(TOKENS), llama(TOKENS).logits, rtol=0, atol=1e-4)


def test_an_option_that_a_llama_does_not_have_makes_it_none() -> None:
    @dataclass(frozen=True, kw_only=True)
    class LaterConfig(ModelConfig):
        later_option: bool = False

    assert is_llama(LaterConfig(alibi=False))
    assert not is_llama(LaterConfig(alibi=False, later_option=True))
    assert not is_llama(LaterConfig()) and not is_llama(LaterConfig(alibi=False, rope=False))
