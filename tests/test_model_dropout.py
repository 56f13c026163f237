"""Dropout whose mask is a function of key, site, position and channel."""

from math import sqrt

import numpy as np
import pytest
import torch
from torch import Tensor

from model.dropout import CounterDropout, keep_mask, row_state
from trainer.data.mixture import dropout_keys

B, T, C, RATE = 32, 256, 256, 0.1


def keys(n_samples: int = B, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31, (n_samples, 2), generator=generator).to(torch.int32)


def mask(
    key: Tensor, site: int = 0, length: int = T, channels: int = C, rate: float = RATE
) -> Tensor:
    return keep_mask(row_state(key, length), torch.tensor(site, dtype=torch.int32), channels, rate)


def correlation(a: Tensor, b: Tensor) -> float:
    """Of two boolean masks, in standard deviations of what independent ones would have."""
    a, b = (part.float() - (1 - RATE) for part in (a, b))
    return float((a * b).mean()) / (RATE * (1 - RATE)) * sqrt(a.numel())


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5, 0.9])
def test_the_rate_is_kept_overall_and_in_every_row_and_channel(rate: float) -> None:
    kept = mask(keys(), rate=rate).float()
    deviation = (rate * (1 - rate)) ** 0.5
    assert abs(kept.mean() - (1 - rate)) < 4 * deviation / kept.numel() ** 0.5
    for dim in range(3):  # sums over one dimension scatter as binomials do
        z = (kept.mean(dim) - (1 - rate)) / (deviation / kept.shape[dim] ** 0.5)
        assert z.std().item() == pytest.approx(1.0, abs=0.03)


def test_neighbours_in_every_direction_are_independent() -> None:
    kept = mask(keys())
    for step in (1, 2, 64):
        assert abs(correlation(kept[step:], kept[:-step])) < 4.5 or step >= B
        assert abs(correlation(kept[:, step:], kept[:, :-step])) < 4.5
        assert abs(correlation(kept[:, :, step:], kept[:, :, :-step])) < 4.5
    for site in (1, 2, 64):
        assert abs(correlation(kept, mask(keys(), site=site))) < 4.5


def test_samples_and_seeds_of_a_run_are_independent() -> None:
    """Keys as the trainer makes them, of neighbouring samples and seeds."""
    key, other = (torch.from_numpy(dropout_keys(seed, np.arange(B))) for seed in (0, 1))
    assert abs(correlation(mask(key)[1:], mask(key)[:-1])) < 4.5
    assert abs(correlation(mask(key), mask(other))) < 4.5
    assert abs(correlation(mask(key)[1:], mask(other)[:-1])) < 4.5


def test_a_poor_hash_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """No finaliser at all: neighbouring channels and sites show it."""
    monkeypatch.setattr("model.dropout._mix", lambda x, between=0: x + between)
    kept = mask(keys())
    assert abs(correlation(kept[:, :, 1:], kept[:, :, :-1])) > 4.5
    assert abs(correlation(kept, mask(keys(), site=1))) > 4.5


@pytest.mark.parametrize("column", [0, 1])
def test_keys_that_differ_in_one_bit_give_independent_masks(column: int) -> None:
    key = keys()
    for bit in (0, 15, 31):
        other = key.clone()
        other[:, column] ^= torch.tensor(1 << bit).to(torch.int32)
        assert abs(correlation(mask(key), mask(other))) < 4.5


def test_a_sample_s_mask_does_not_depend_on_its_batch_or_length() -> None:
    key = keys()
    assert torch.equal(mask(key)[5:6], mask(key[5:6]))
    assert torch.equal(mask(key)[:, :100], mask(key, length=100))
    assert torch.equal(mask(key)[:, :, :100], mask(key, channels=100))


def test_kept_elements_are_scaled_and_the_mean_stays() -> None:
    x = torch.ones(B, T, C)
    out = CounterDropout(RATE, site=3)(x, row_state(keys(), T))
    assert out.unique().tolist() == [0.0, pytest.approx(1 / (1 - RATE))]
    assert out.mean().item() == pytest.approx(1.0, abs=2e-3)


def test_without_key_or_rate_nothing_is_done() -> None:
    x = torch.randn(2, 4, 8)
    assert CounterDropout(RATE, site=0)(x, None) is x
    assert CounterDropout(0.0, site=0)(x, row_state(keys(2), 4)) is x


def test_the_site_survives_meta_and_dtype_moves_and_stays_out_of_checkpoints() -> None:
    with torch.device("meta"):
        drop = CounterDropout(RATE, site=7)
    drop.to_empty(device="cpu").to(torch.bfloat16)
    assert drop.site.dtype == torch.int32
    assert drop.site.item() == 7
    assert not drop.state_dict()


def test_the_site_is_on_the_device_asked_for() -> None:
    drop = CounterDropout(RATE, site=7)
    drop.make_buffers(torch.device("meta"))
    assert drop.site.is_meta
