"""What a shape costs, and which shapes are rejected."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from model.config import ModelConfig, ModelError, count_params, flops_per_token
from model.transformer import Transformer

SUMMER_4B = ModelConfig()
SUMMER_1B = ModelConfig(n_layers=20, d_model=1920, n_heads=20, d_ff=6720)
SUMMER_125M = ModelConfig(n_layers=12, d_model=768, n_heads=8, d_ff=2688)
TINY = ModelConfig(n_layers=4, d_model=256, n_heads=4, d_ff=896)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (SUMMER_4B, 4_479_912_960),
        (replace(SUMMER_4B, tie_embeddings=False), 4_580_576_256),
        (SUMMER_1B, 1_132_126_080),
        (SUMMER_125M, 127_832_832),
        (TINY, 12_194_048),
        (replace(TINY, n_kv_heads=2, layer_scale=False), 12_194_048 - 4 * (256 * 256 + 2 * 256)),
    ],
)
def test_the_count_is_that_of_the_modules(config: ModelConfig, expected: int) -> None:
    with torch.device("meta"):
        model = Transformer(config)
    assert sum(p.numel() for p in model.parameters()) == expected
    assert count_params(config) == expected


def test_the_reference_run_block_and_body() -> None:
    with torch.device("meta"):
        model = Transformer(SUMMER_4B)
    assert {sum(p.numel() for p in block.parameters()) for block in model.blocks} == {136_851_456}
    total = sum(p.numel() for p in model.parameters())
    assert total - model.embedding.weight.numel() == 4_379_249_664


def test_flops_of_the_reference_run() -> None:
    assert flops_per_token(SUMMER_4B, 4096) == pytest.approx(29.29e9, rel=2e-4)
    assert flops_per_token(SUMMER_4B, 4096, causal=False) == pytest.approx(31.71e9, rel=2e-4)


def test_flops_follow_the_matrices_a_token_passes() -> None:
    shared = replace(TINY, n_kv_heads=1)
    dropped = 6 * TINY.n_layers * 2 * TINY.d_model * (TINY.d_model - TINY.head_dim)
    assert flops_per_token(TINY, 128) - flops_per_token(shared, 128) == dropped
    untied = replace(TINY, tie_embeddings=False)
    assert flops_per_token(untied, 128) == flops_per_token(TINY, 128)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"n_layers": 0}, "n_layers = 0"),
        ({"d_model": 100, "n_heads": 3}, "d_model = 100"),
        ({"n_kv_heads": 5}, "n_kv_heads = 5"),
        ({"d_model": 36, "n_heads": 4}, "head_dim = 9"),
        ({"seq_len": 16_449}, "seq_len = 16449"),
        ({"dropout": 1.0}, "dropout = 1.0"),
        ({"attention_dropout": -0.1}, "attention_dropout = -0.1"),
        ({"rope_theta": 0.0}, "rope_theta = 0.0"),
        ({"norm_eps": float("nan")}, "norm_eps = nan"),
        ({"z_loss": -1.0}, "z_loss = -1.0"),
    ],
)
def test_an_impossible_shape_names_field_value_and_fix(change: dict[str, Any], names: str) -> None:
    with pytest.raises(ModelError, match=rf"model\.{names} cannot be: .+"):
        replace(TINY, **change)


def test_without_alibi_the_context_is_free() -> None:
    assert replace(TINY, alibi=False, seq_len=131_072).seq_len == 131_072
