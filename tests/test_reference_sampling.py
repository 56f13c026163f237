"""Drawn ids against a second reading of temperature, top-k and top-p: plain Python floats."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tools.generation.generation import Generation, Sampling, draw


def shares(logits: list[float], temperature: float, top_k: int, top_p: float) -> dict[int, float]:
    """The ids that may be drawn, likeliest first, and the probability of each among them."""
    ranked = sorted(range(len(logits)), key=lambda at: -logits[at])  # of equals the first first
    if top_k > 0:
        ranked = ranked[:top_k]
    weights = [math.exp((logits[at] - logits[ranked[0]]) / temperature) for at in ranked]
    kept, reached = [], 0.0
    for at, weight in zip(ranked, weights, strict=True):
        kept.append((at, weight))
        reached += weight / sum(weights)
        if reached >= top_p:  # the nucleus: the fewest that reach it
            break
    total = sum(weight for _, weight in kept)
    return {at: weight / total for at, weight in kept}


@given(
    st.lists(st.integers(-5, 5), min_size=2, max_size=12),
    st.sampled_from([0.3, 1.0, 2.5]),
    st.integers(0, 13),
    st.sampled_from([0.05, 0.37, 0.81, 1.0]),
    st.integers(0, 1 << 30),
)
def test_each_uniform_number_gives_the_id_whose_share_it_falls_in(
    tenths: list[int], temperature: float, top_k: int, top_p: float, seed: int
) -> None:
    logits = [number * 0.41 for number in tenths]
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    uniform = torch.rand(
        (), dtype=torch.float64, generator=torch.Generator("cpu").manual_seed(seed)
    )
    expected, below = -1, 0.0
    for at, share in shares(logits, temperature, top_k, top_p).items():
        expected, below = at, below + share
        if float(uniform) < below:
            break
    drawn = draw(torch.tensor(logits, dtype=torch.float64), sampling, sampling.generator())
    assert drawn == expected


@pytest.mark.parametrize("top_p", [0.5, 0.75, 1.0])
def test_a_sum_that_equals_top_p_reaches_it(top_p: float) -> None:
    """Four equal logits: probabilities and their sums are exact."""
    sampling = Sampling(temperature=1.0, top_p=top_p)
    generator = sampling.generator()
    drawn = {draw(torch.zeros(4), sampling, generator) for _ in range(300)}
    assert drawn == set(range(int(4 * top_p)))


def test_of_equal_logits_greedy_takes_the_first() -> None:
    sampling = Sampling(temperature=0.0)
    assert draw(torch.tensor([1.0, 3.0, 3.0]), sampling, sampling.generator()) == 1


@pytest.mark.parametrize(("uniform", "expected"), [(0.0, 0), (0.25, 1), (0.2499, 0), (0.9999, 3)])
def test_a_uniform_number_on_the_border_takes_the_next_id(
    monkeypatch: pytest.MonkeyPatch, uniform: float, expected: int
) -> None:
    """A share is the half-open interval [below, below + share)."""
    exactly = torch.tensor(uniform, dtype=torch.float64)
    monkeypatch.setattr(torch, "rand", lambda *_, **__: exactly)
    sampling = Sampling(temperature=1.0)
    assert draw(torch.zeros(4), sampling, sampling.generator()) == expected


def test_without_options_a_text_is_drawn_at_0_8_from_all_ids() -> None:
    assert Sampling() == Sampling(temperature=0.8, top_k=0, top_p=1.0, seed=0)


def test_a_text_has_256_tokens_at_most_if_nothing_is_said_and_one_at_least() -> None:
    assert Generation() == Generation(max_tokens=256, sampling=Sampling(), use_cache=True)
    assert Generation(max_tokens=1).max_tokens == 1
