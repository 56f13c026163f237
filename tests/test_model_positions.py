"""The tables of RoPE and ALiBi: exact numbers, which survive what is done to a model."""

import pytest
import torch

from model.config import FOLDED_DIMS, MAX_ALIBI_CONTEXT, ModelConfig, ModelError
from model.layers import rotate
from model.positions import PositionTables, alibi_slopes, alibi_tables, rotary_tables

CONFIG = ModelConfig(n_heads=2, d_model=32, seq_len=16)


def test_a_turn_is_a_complex_rotation_of_the_two_halves() -> None:
    cos, sin = rotary_tables(8, 10_000.0, 50)
    x = torch.randn(2, 50, 3, 8)
    turned = torch.complex(*(half.double() for half in rotate(x, cos, sin)))
    angle = torch.arange(50)[:, None] * 10_000.0 ** (-torch.arange(4, dtype=torch.float64) / 4)
    expected = torch.complex(*x.double().chunk(2, dim=-1)) * torch.exp(1j * angle)[:, None]
    torch.testing.assert_close(turned, expected, rtol=0, atol=1e-6)


def test_products_depend_on_the_distance_alone() -> None:
    cos, sin = rotary_tables(16, 10_000.0, 4096)
    q, k = torch.randn(2, 1, 1, 1, 16)

    def product(i: int, j: int) -> float:
        rows = (slice(i, i + 1), slice(j, j + 1))
        turned_q, turned_k = (
            torch.cat(rotate(x, cos[r], sin[r]), -1) for x, r in zip((q, k), rows, strict=True)
        )
        return (turned_q * turned_k).sum().item()

    assert product(4000, 3990) == pytest.approx(product(17, 7), abs=1e-5)
    assert product(17, 7) != pytest.approx(product(17, 8), abs=1e-3)


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


def test_one_token_further_is_rejected() -> None:
    with pytest.raises(ModelError, match="16449 tokens is beyond 16448"):
        alibi_tables(4, 64, MAX_ALIBI_CONTEXT + 1)


def test_tables_grow_when_asked_and_rows_stay_the_same() -> None:
    tables = PositionTables(CONFIG)
    short = tables(0, 16)
    long = tables(3, 40)
    for before, after in zip(short[:4], long[:4], strict=True):
        assert torch.equal(before[3:16], after[:13])
        assert len(after) == 40


def test_tables_grown_under_inference_mode_serve_training() -> None:
    tables = PositionTables(CONFIG)
    with torch.inference_mode():
        tables(0, 100)
    scale = torch.ones(8, requires_grad=True)
    (tables(0, 100).cos * scale).sum().backward()
    assert scale.grad is not None


def test_the_exact_limit_of_alibi_is_reached_and_not_passed() -> None:
    tables = PositionTables(CONFIG)
    assert len(tables(MAX_ALIBI_CONTEXT - 1, 1).alibi_q) == 1
    for _ in range(2):  # a refusal leaves nothing behind that a second try would fall for
        with pytest.raises(ModelError, match="16449"):
            tables(MAX_ALIBI_CONTEXT, 1)
    fresh = PositionTables(CONFIG)
    with pytest.raises(ModelError, match="16449"):
        fresh(MAX_ALIBI_CONTEXT, 1)
    assert len(fresh(0, 17).cos) == 17
    free = PositionTables(ModelConfig(n_heads=2, d_model=32, seq_len=16, alibi=False))
    assert len(free(MAX_ALIBI_CONTEXT, 1).cos) == 1


def test_a_move_to_bf16_or_out_of_meta_makes_the_tables_again() -> None:
    expected = PositionTables(CONFIG)(0, 16)
    with torch.device("meta"):
        from_meta = PositionTables(CONFIG)
    assert from_meta.cos.is_meta
    for moved in (PositionTables(CONFIG).to(torch.bfloat16), from_meta.to_empty(device="cpu")):
        for table, same in zip(moved(0, 16)[:4], expected[:4], strict=True):
            assert table.dtype == torch.float32
            assert torch.equal(table, same)


def test_what_is_switched_off_has_no_table() -> None:
    neither = ModelConfig(n_heads=2, d_model=32, seq_len=16, rope=False, alibi=False)
    tables = PositionTables(neither)
    assert not list(tables.buffers())
    assert tables(0, 40) == (None,) * 5
    assert not PositionTables(CONFIG).state_dict()


def test_angles_are_exact_to_the_end_of_a_long_context() -> None:
    """fp32 angles would be off by up to 2e-4 rad."""
    cos, sin = rotary_tables(96, 500_000.0, 4096)
    frequency = torch.logspace(0, -47 / 48, 48, base=500_000.0, dtype=torch.float64)
    angle = torch.arange(4096)[:, None] * frequency
    torch.testing.assert_close(cos.double(), angle.cos(), rtol=0, atol=1e-7)
    torch.testing.assert_close(sin.double(), angle.sin(), rtol=0, atol=1e-7)


def test_tables_are_made_on_the_cpu_and_moved_to_the_device_asked_for() -> None:
    with torch.device("meta"):
        tables = (*rotary_tables(8, 10_000.0, 4), *alibi_tables(3, 8, 4))
        positions = PositionTables(CONFIG)
        positions.make_buffers(torch.device("cpu"))
    assert all(table.device.type == "cpu" for table in (*tables, *positions.buffers()))
    assert tables[2].shape[-1] == tables[3].shape[-1] == FOLDED_DIMS


def test_tables_double_when_they_are_too_short_and_only_then() -> None:
    tables = PositionTables(CONFIG)
    for end, length in ((16, 16), (17, 32), (32, 32), (100, 100)):
        tables(end - 1, 1)
        assert [len(table) for table in tables.buffers()] == [length] * 4
