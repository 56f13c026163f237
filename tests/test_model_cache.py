"""Reading with a cache gives what reading without one gives."""

from dataclasses import replace

import pytest
import torch

from model.attention import KVCache
from model.config import ModelConfig, ModelError
from model.transformer import Transformer

CONFIG = ModelConfig(
    vocab_size=61, seq_len=24, n_layers=3, d_model=64, n_heads=4, n_kv_heads=2, d_ff=96
)


@pytest.fixture(scope="module")
def model() -> Transformer:
    """Attention that matters: larger weights than at the start of a training."""
    model = Transformer(CONFIG).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and name != "embedding.weight":
                parameter.mul_(8)
    return model


TOKENS = torch.randint(0, 61, (2, 40), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "chunks",
    [[40], [1] * 40, [13] + [1] * 27, [10, 10, 20], [1, 39], [39, 1], [7, 1, 1, 16, 1, 14]],
    ids=["prefill", "steps", "prefill+steps", "chunks", "step+rest", "rest+step", "mixed"],
)
def test_any_cut_of_the_text_gives_the_same_logits(model: Transformer, chunks: list[int]) -> None:
    with torch.no_grad():
        expected = model.logits(TOKENS)  # 40 tokens: beyond the context of training
        cache = KVCache(CONFIG, batch_size=2, max_len=40)
        parts = [model.logits(part, cache) for part in torch.split(TOKENS, chunks, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=0, atol=1e-5)
    assert cache.length == 40


def test_the_cached_past_matters(model: Transformer) -> None:
    with torch.no_grad():
        alone = model.logits(TOKENS[:, 20:])
        at_once = model.logits(TOKENS)[:, 20:]
    assert (alone - at_once).abs().max() > 0.1


def test_bf16_cache_under_autocast(model: Transformer) -> None:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model.logits(TOKENS)
        cache = KVCache(CONFIG, batch_size=2, max_len=64, dtype=torch.bfloat16)
        parts = [model.logits(part, cache) for part in torch.split(TOKENS, [30, 1, 9], dim=1)]
    error = (torch.cat(parts, dim=1) - expected).abs().max()
    assert error < 0.05 * expected.abs().max()


def test_a_full_cache_is_rejected_and_stays_as_it_was(model: Transformer) -> None:
    cache = KVCache(CONFIG, batch_size=2, max_len=30)
    with torch.no_grad():
        model.logits(TOKENS[:, :25], cache)
        with pytest.raises(ModelError, match="room for 30 tokens and 40 are needed"):
            model.logits(TOKENS[:, 25:], cache)
    assert cache.length == 25


def test_a_cache_beyond_the_exact_context_is_rejected() -> None:
    with pytest.raises(ModelError, match="16449 tokens is beyond 16448"):
        KVCache(CONFIG, batch_size=1, max_len=16_449)


def test_a_cache_of_one_layer_has_the_device_and_precision_asked_for() -> None:
    cache = KVCache(replace(CONFIG, n_layers=1), 2, 8, "meta", torch.bfloat16)
    [layer] = cache.layers
    for held in (layer.keys, layer.values):
        assert held.is_meta and held.dtype == torch.bfloat16
    assert cache.length == 0 and KVCache(CONFIG, 2, 8).layers[0].keys.device.type == "cpu"
