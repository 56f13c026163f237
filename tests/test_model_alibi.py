"""ALiBi as six head dims: exact numbers, and the same attention as with an explicit mask."""

import pytest
import torch
from torch import Tensor

from model.alibi import alibi_slopes, alibi_tables
from model.config import MAX_ALIBI_CONTEXT, ModelConfig, ModelError
from model.kernel import attend, fold, kernel_head_dim
from model.positions import PositionTables


def test_slopes_are_the_paper_s_to_a_quarter_percent() -> None:
    for n_heads in (1, 4, 8, 32):
        head = torch.arange(1, n_heads + 1, dtype=torch.float64)
        ratio = alibi_slopes(n_heads, 96).double() / 96**0.5 / 2 ** (-8 * head / n_heads)
        assert (ratio - 1).abs().max() < 0.0025


def test_slopes_of_twenty_heads_are_sixteen_and_every_other_of_thirty_two() -> None:
    sixteen, thirty_two = alibi_slopes(16, 96), alibi_slopes(32, 96)
    assert torch.equal(alibi_slopes(20, 96), torch.cat([sixteen, thirty_two[::2][:4]]))


@pytest.mark.parametrize(("n_heads", "head_dim"), [(32, 96), (20, 96), (4, 64), (1, 128)])
def test_every_entry_is_exact_in_bf16_and_the_sum_is_relative(n_heads: int, head_dim: int) -> None:
    query_side, key_side = alibi_tables(n_heads, head_dim, MAX_ALIBI_CONTEXT)
    for table in (query_side, key_side):
        assert torch.equal(table.bfloat16().float(), table)
    slopes = alibi_slopes(n_heads, head_dim).double()
    i = torch.tensor([0, 63, 64, 4095, 4096, 16_383, MAX_ALIBI_CONTEXT - 1])
    j = torch.arange(0, MAX_ALIBI_CONTEXT, 61)
    folded = torch.einsum("ihe,je->hij", query_side[i].double(), key_side[j].double())
    assert torch.equal(folded, slopes[:, None, None] * (j - i[:, None]).double())


def test_one_token_further_is_refused() -> None:
    with pytest.raises(ModelError, match="16449 tokens is beyond 16448"):
        alibi_tables(4, 64, MAX_ALIBI_CONTEXT + 1)


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


@pytest.mark.parametrize("n_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("head_dim", [16, 18])
def test_folded_attention_equals_a_mask_in_output_and_gradients(
    n_kv_heads: int, head_dim: int
) -> None:
    config = ModelConfig(
        n_heads=4, n_kv_heads=n_kv_heads, d_model=4 * head_dim, seq_len=200, rope=False
    )
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 200, heads, head_dim) for heads in (4, n_kv_heads, n_kv_heads))
    for part in (q, k, v):
        part.requires_grad_()
    positions = PositionTables(config)(0, 200)
    out = attend(*fold(q, k, v, positions, config), config)[..., :head_dim]
    expected = explicit_mask_attention(q.double(), k.double(), v.double(), config)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-6)

    weight = torch.randn_like(out)
    grads = torch.autograd.grad((out * weight).sum(), (q, k, v))
    expected_grads = torch.autograd.grad((expected * weight).sum(), (q, k, v))
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=0, atol=2e-5)


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
    out = attend(folded_q[:, :, -1:], folded_k, folded_v, config, start=T - 1)[0, :, 0, :16]
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
