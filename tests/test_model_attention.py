"""The start-up test of the kernel: right kernels pass, subtly wrong ones do not."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import model.attention
from model.alibi import alibi_slopes
from model.attention import self_test
from model.config import ModelConfig, ModelError

CONFIG = ModelConfig(n_heads=8, n_kv_heads=4, d_model=8 * 96, seq_len=1024)


@pytest.mark.parametrize("alibi", [True, False])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-3)])
def test_this_machine_s_kernel_passes(alibi: bool, dtype: torch.dtype, limit: float) -> None:
    config = ModelConfig(n_heads=4, n_kv_heads=2, d_model=128, seq_len=1024, alibi=alibi)
    assert 0 < self_test("cpu", dtype, config) <= limit


def test_a_short_training_context_is_tested_as_well() -> None:
    assert self_test("cpu", torch.bfloat16, ModelConfig(n_heads=2, d_model=64, seq_len=16)) < 1e-3


def mask_in_bf16(q: Tensor, k: Tensor, v: Tensor, config: ModelConfig) -> Tensor:
    position = torch.arange(q.shape[2])
    slopes = alibi_slopes(config.n_heads, config.head_dim) * config.head_dim**-0.5
    bias = slopes[:, None, None] * (position - position[:, None])
    bias = bias.masked_fill(position > position[:, None], -torch.inf).to(q.dtype)
    q = q.clone()
    q[..., :6] = 0
    scale = config.head_dim**-0.5
    return F.scaled_dot_product_attention(q, k, v, bias[None], scale=scale, enable_gqa=True)


def query_scaled_beforehand(q: Tensor, k: Tensor, v: Tensor, config: ModelConfig) -> Tensor:
    q = q * (config.head_dim**-0.5 * 1.442695)
    return F.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=1 / 1.442695, enable_gqa=True
    )


def scale_of_the_padded_head(q: Tensor, k: Tensor, v: Tensor, config: ModelConfig) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def not_a_number(q: Tensor, k: Tensor, v: Tensor, config: ModelConfig) -> Tensor:
    return torch.full_like(q, torch.nan)


@pytest.mark.parametrize(
    "kernel", [mask_in_bf16, query_scaled_beforehand, scale_of_the_padded_head, not_a_number]
)
def test_a_kernel_that_computes_another_model_is_refused(
    monkeypatch: pytest.MonkeyPatch, kernel: Callable[..., Tensor]
) -> None:
    monkeypatch.setattr(model.attention, "attend", kernel)
    with pytest.raises(ModelError, match=r"bfloat16 on cpu is off by .+ use another build"):
        self_test("cpu", torch.bfloat16, CONFIG)


def test_the_global_random_state_is_left_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    self_test("cpu", torch.float32, ModelConfig(n_heads=2, d_model=64, seq_len=16))
    assert torch.equal(torch.rand(3), expected)
