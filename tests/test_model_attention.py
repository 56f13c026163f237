"""The folded attention on each kernel that this machine has, and the test before training.

Right kernels pass that test, subtly wrong ones do not.
"""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import model.self_test
from model.attention import attend, fold, kernel_head_dim
from model.config import MAX_ALIBI_CONTEXT, ModelConfig, ModelError
from model.positions import PositionTables, alibi_slopes
from model.self_test import self_test

CONFIG = ModelConfig(n_heads=8, n_kv_heads=4, d_model=8 * 96, seq_len=1024)


KERNELS = pytest.mark.parametrize(
    "kernel", [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH], ids=lambda kernel: kernel.name
)


@KERNELS
@pytest.mark.parametrize("alibi", [True, False])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-3)])
def test_this_machine_s_kernels_pass(
    kernel: SDPBackend, alibi: bool, dtype: torch.dtype, limit: float
) -> None:
    config = ModelConfig(n_heads=4, n_kv_heads=2, d_model=128, seq_len=1024, alibi=alibi)
    with sdpa_kernel(kernel):
        test = self_test("cpu", dtype, replace(config, attention_dropout=0.0))
        assert 0 < test.error_nats <= limit
        assert 0 < test.gradient_error <= (5e-3 if dtype == torch.bfloat16 else 1e-5)


def explicit_mask_attention(q: Tensor, k: Tensor, v: Tensor, config: ModelConfig) -> Tensor:
    """The textbook: fp64 scores, an explicit bias, and key heads repeated."""
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    k, v = (part.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for part in (k, v))
    position = torch.arange(q.shape[2])
    distance = position[:, None] - position
    slopes = alibi_slopes(config.n_heads, config.head_dim).to(q.dtype)
    scores = (q @ k.mT - slopes[:, None, None] * distance) * config.head_dim**-0.5
    out: Tensor = scores.masked_fill(distance < 0, -torch.inf).softmax(-1) @ v
    return out


@KERNELS
@pytest.mark.parametrize("n_kv_heads", [6, 2, 1])
@pytest.mark.parametrize("head_dim", [16, 18])  # padded to 24, and 24 as it is
def test_each_kernel_gives_the_textbook_s_output_and_gradients(
    kernel: SDPBackend, n_kv_heads: int, head_dim: int
) -> None:
    config = ModelConfig(
        n_heads=6, n_kv_heads=n_kv_heads, d_model=6 * head_dim, seq_len=100, rope=False
    )
    q, k, v = random_heads(config)
    with sdpa_kernel(kernel):
        folded = fold(q, k, v, PositionTables(config)(0, 100), config)
        out = attend(*folded, config)[..., :head_dim]
        weight = torch.randn_like(out)
        grads = torch.autograd.grad((out * weight).sum(), (q, k, v))
    expected = explicit_mask_attention(q.double(), k.double(), v.double(), config)
    expected_grads = torch.autograd.grad((expected * weight).sum(), (q, k, v))
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-6)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=0, atol=2e-5)


@KERNELS
@pytest.mark.parametrize("n_kv_heads", [6, 2])
@pytest.mark.parametrize("cuts", [[1] * 5 + [95], [37, 1, 40, 21, 1], [100]], ids=str)
def test_each_kernel_reads_a_text_in_any_cuts(
    kernel: SDPBackend, n_kv_heads: int, cuts: list[int]
) -> None:
    """Decoding and prefilling in chunks: queries from `start` on, over all keys up to their end."""
    config = ModelConfig(n_heads=6, n_kv_heads=n_kv_heads, d_model=6 * 18, seq_len=100)
    with torch.no_grad(), sdpa_kernel(kernel):
        q, k, v = random_heads(config)
        q, k, v = fold(q, k, v, PositionTables(config)(0, 100), config)
        q, k, v = (part.double() for part in (q, k, v))  # the order of sums must not matter
        parts, start = [], 0
        for part in torch.split(q, cuts, dim=2):
            end = start + part.shape[2]
            parts.append(attend(part, k[:, :, :end], v[:, :, :end], config))
            start = end
        at_once = attend(q, k, v, config)
    torch.testing.assert_close(torch.cat(parts, dim=2), at_once, rtol=0, atol=1e-12)


def test_the_flash_kernel_reads_the_longest_context() -> None:
    """All 16,448 queries in one call; the last eight, to which the terms are largest, are compared.

    In fp64, so that a difference is the fold's and not the order of sums.
    """
    T = MAX_ALIBI_CONTEXT
    config = ModelConfig(n_heads=2, n_kv_heads=1, d_model=2 * 18, seq_len=T, rope=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        q, k, v = (part[:1].double() for part in random_heads(config))
        out = attend(*fold(q, k, v, PositionTables(config)(0, T), config), config)
    distance = torch.arange(T - 8, T)[:, None] - torch.arange(T)
    scores = torch.einsum("ihd,jd->hij", q[0, -8:], k[0, :, 0])
    scores -= alibi_slopes(2, 18).double()[:, None, None] * distance
    scores = scores.masked_fill(distance < 0, -torch.inf) * 18**-0.5
    expected = scores.softmax(-1) @ v[0, :, 0]
    torch.testing.assert_close(out[0, :, -8:, :18], expected, rtol=0, atol=1e-9)


def test_probabilities_are_dropped_at_the_rate_and_the_rest_scaled() -> None:
    """Values are one-hot, so that each output is the probability of one key."""
    config = ModelConfig(n_heads=2, n_kv_heads=1, d_model=2 * 64, seq_len=64)
    q, k, _ = random_heads(config)
    v = torch.eye(64).view(1, 64, 1, 64).expand_as(k)
    q, k, v = fold(q, k, v, PositionTables(config)(0, 64), config)
    whole = attend(q, k, v, config)[..., :64]
    ratio = (attend(q, k, v, config, dropout=0.3)[..., :64] / whole)[whole > 1e-6]
    kept = ratio > 0
    torch.testing.assert_close(ratio[kept], torch.full_like(ratio[kept], 1 / 0.7))
    deviation = (0.3 * 0.7 / kept.numel()) ** 0.5
    assert abs(kept.float().mean() - 0.7) < 4 * deviation


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 2e-6), (torch.float32, 1e-3)])
def test_the_last_query_of_the_longest_context(dtype: torch.dtype, bound: float) -> None:
    """What is folded is exact; in fp32 the order in which a processor adds it up decides.

    The large terms cancel: a kernel that adds them first is within 2e-6, one that adds sixteen
    lanes at a time (AVX-512) is 5e-4 off. The bound is that of the test before training.
    """
    config = ModelConfig(n_heads=4, n_kv_heads=2, d_model=64, seq_len=32, rope=False)
    torch.manual_seed(0)
    T = MAX_ALIBI_CONTEXT
    q, k, v = torch.randn(1, T, 4, 16), torch.randn(1, T, 2, 16), torch.randn(1, T, 2, 16)
    folded_q, folded_k, folded_v = fold(q, k, v, PositionTables(config)(0, T), config)
    folded_q, folded_k, folded_v = (x.to(dtype) for x in (folded_q, folded_k, folded_v))
    out = attend(folded_q[:, :, -1:], folded_k, folded_v, config)[0, :, 0, :16]
    distance = torch.arange(T - 1, -1, -1)
    slopes = alibi_slopes(4, 16).double()
    keys, values = (part[0].repeat_interleave(2, dim=1).double() for part in (k, v))
    scores = torch.einsum("hd,jhd->hj", q[0, -1].double(), keys) - slopes[:, None] * distance
    expected = torch.einsum("hj,jhd->hd", (scores / 4).softmax(-1), values)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=bound)


def test_the_key_side_is_common_to_all_heads_and_padding_is_zero() -> None:
    config = ModelConfig(n_heads=4, n_kv_heads=2, d_model=64, seq_len=32)
    width = kernel_head_dim(config, torch.device("cpu"))
    assert width == 24  # 16 + 6, to a multiple of 8
    q, k, v = (torch.randn(1, 32, heads, 16) for heads in (4, 2, 2))
    q, k, v = fold(q, k, v, PositionTables(config)(0, 32), config)
    assert torch.equal(k[:, 0, :, :6], k[:, 1, :, :6])
    assert not torch.equal(q[:, 0, :, :6], q[:, 1, :, :6])
    assert all(not part[..., 22:].any() for part in (q, k))
    assert not v[..., 16:].any()
    assert q.shape == (1, 4, 32, 24)
    assert k.shape == v.shape == (1, 2, 32, 24)


@pytest.mark.parametrize(
    ("hip", "alibi", "head_dim", "expected"),
    [(None, True, 96, 104), (None, False, 96, 96), (None, True, 64, 72),
     ("6.4", True, 96, 128), ("6.4", True, 64, 80), ("6.4", False, 128, 128)],
)  # fmt: skip
def test_the_head_is_padded_to_the_device_s_next_kernel(
    monkeypatch: pytest.MonkeyPatch, hip: str | None, alibi: bool, head_dim: int, expected: int
) -> None:
    monkeypatch.setattr(torch.version, "hip", hip)
    config = ModelConfig(n_heads=2, d_model=2 * head_dim, alibi=alibi)
    assert kernel_head_dim(config, torch.device("cuda")) == expected


def random_heads(config: ModelConfig) -> list[Tensor]:
    """q, k and v [2, T, H, head_dim], with gradients."""
    torch.manual_seed(0)
    heads = (config.n_heads, config.kv_heads, config.kv_heads)
    return [torch.randn(2, config.seq_len, n, config.head_dim).requires_grad_() for n in heads]


def test_a_short_training_context_is_tested_as_well() -> None:
    config = ModelConfig(n_heads=2, d_model=64, seq_len=16)
    assert self_test("cpu", torch.bfloat16, config).error_nats < 1e-3


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
    return attend(q, k, v, config) * torch.nan


@pytest.mark.parametrize(
    "kernel", [mask_in_bf16, query_scaled_beforehand, scale_of_the_padded_head, not_a_number]
)
def test_a_kernel_that_computes_another_model_is_rejected(
    monkeypatch: pytest.MonkeyPatch, kernel: Callable[..., Tensor]
) -> None:
    monkeypatch.setattr(model.self_test, "attend", kernel)
    with pytest.raises(ModelError, match=r"bfloat16 on cpu \(\w+\) is off by .+ use another build"):
        self_test("cpu", torch.bfloat16, CONFIG)


def half_the_gradient(q: Tensor, k: Tensor, v: Tensor, config: ModelConfig) -> Tensor:
    return attend(q, (k + k.detach()) / 2, v, config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_kernel_with_a_wrong_gradient_is_rejected(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """Its scores are right."""
    monkeypatch.setattr(model.self_test, "attend", half_the_gradient)
    with pytest.raises(ModelError, match=r"gradients of attention .* are off by 0\.5 of fp32"):
        self_test("cpu", dtype, CONFIG)


def dropping(rate: float, *, again: bool = False, backward: bool = True) -> Callable[..., Tensor]:
    """Attention that drops at this rate: another mask each time, or none in the backward pass."""
    masks = torch.Generator().manual_seed(9)

    def kernel(
        q: Tensor, k: Tensor, v: Tensor, config: ModelConfig, mask: None = None, dropout: float = 0
    ) -> Tensor:
        if not dropout:
            return attend(q, k, v, config)
        if not backward:
            dropped = attend(q, k, v.detach(), config, dropout=rate)
            return dropped + attend(q, k, v - v.detach(), config)
        if again:
            torch.manual_seed(int(torch.randint(1000, (1,), generator=masks)))
        return attend(q, k, v, config, dropout=rate)

    return kernel


@pytest.mark.parametrize(
    "kernel",
    [dropping(0.0), dropping(0.9), dropping(0.1, again=True), dropping(0.1, backward=False)],
    ids=["none", "the rest", "another mask in recomputation", "another mask backward"],
)
def test_a_wrong_dropout_is_rejected(
    monkeypatch: pytest.MonkeyPatch, kernel: Callable[..., Tensor]
) -> None:
    monkeypatch.setattr(model.self_test, "attend", kernel)
    with pytest.raises(ModelError, match=r"dropout 0\.1 of .* use another build"):
        self_test("cpu", torch.float32, CONFIG)


def test_the_kernel_of_the_run_s_dropout_is_tested() -> None:
    """On the CPU flash has no dropout, so SDPA takes another kernel with it."""
    with_it = self_test("cpu", torch.float32, CONFIG)
    without = self_test("cpu", torch.float32, replace(CONFIG, attention_dropout=0.0))
    assert (with_it.kernel, without.kernel) == ("MATH", "FLASH_ATTENTION")
    assert with_it.kept == pytest.approx(0.9, abs=0.005) and without.kept is None
    assert "dropout keeps 90" in str(with_it) and "dropout" not in str(without)


def test_the_global_random_state_is_left_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    self_test("cpu", torch.float32, ModelConfig(n_heads=2, d_model=64, seq_len=16))
    assert torch.equal(torch.rand(3), expected)


def test_the_expected_probabilities_are_made_on_the_queries_device() -> None:
    q = k = torch.zeros(12, 8)
    with torch.device("meta"):
        uniform = model.self_test._true_probabilities(q, k, 0.0)
    assert uniform[0].tolist() == [1.0] + [0.0] * 7
    torch.testing.assert_close(uniform[11], torch.tensor([2.0] * 4 + [1.0] * 4) / 12)
