"""Shares asked for, and the weights that the prepared sources allow."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.config.shares import REFERENCE_SHARES, choose_weights, integer_weights
from trainer.errors import ConfigError

ALL = dict.fromkeys(REFERENCE_SHARES, 1000)


def test_the_reference_mixture() -> None:
    weights, notes = choose_weights(REFERENCE_SHARES, {}, ALL)
    assert weights == {"arxiv": 1, "books3": 2, "fineweb": 12, "slimorca": 1, "the-stack": 4}
    assert notes == ()


def test_a_substitute_takes_the_share() -> None:
    there = {"fineweb": 10, "the-stack": 10, "pg19": 10, "arxiv-papers": 10, "slimorca": 10}
    weights, notes = choose_weights(REFERENCE_SHARES, {}, there)
    assert weights == {
        "arxiv-papers": 1, "fineweb": 12, "pg19": 2, "slimorca": 1, "the-stack": 4
    }  # fmt: skip
    assert "books3 is not prepared: its share goes to its substitute, pg19" in notes


def test_a_substitute_of_a_prepared_source_is_not_drawn() -> None:
    weights, notes = choose_weights(REFERENCE_SHARES, {}, {**ALL, "pg19": 10})
    assert "pg19" not in weights
    assert notes == ("prepared but not drawn: pg19 (--set mixture.pg19=SHARE draws it)",)


def test_without_a_substitute_the_others_are_renormalised() -> None:
    weights, notes = choose_weights(REFERENCE_SHARES, {}, {"fineweb": 10, "the-stack": 10})
    assert weights == {"fineweb": 3, "the-stack": 1}
    assert notes == (
        "not prepared: books3, arxiv, slimorca; the others are renormalised: "
        "fineweb 75 %, the-stack 25 %",
    )


def test_other_sources_only_are_drawn_by_size() -> None:
    weights, notes = choose_weights(REFERENCE_SHARES, {}, {"python-code": 300, "python-docs": 100})
    assert weights == {"python-code": 3, "python-docs": 1}
    assert "drawn by size: python-code 75 %, python-docs 25 %" in notes[0]


def test_explicit_shares_hold() -> None:
    there = {"python-code": 300, "python-docs": 100}
    weights, _ = choose_weights(REFERENCE_SHARES, {"python-code": 70, "python-docs": 30}, there)
    assert weights == {"python-code": 7, "python-docs": 3}
    there = {**ALL, "pg19": 9}
    weights, _ = choose_weights(REFERENCE_SHARES, {"fineweb": 0, "pg19": 20}, there)
    assert weights == {"arxiv": 1, "books3": 2, "pg19": 4, "slimorca": 1, "the-stack": 4}


@pytest.mark.parametrize(
    ("explicit", "rows", "message"),
    [
        (
            {"finewep": 5},
            ALL,
            r"mixture\.finewep=5: that source is not prepared; did you mean fine",
        ),
        ({"pg19": 5}, ALL, r"mixture\.pg19=5: that source is not prepared; there are: arxiv, boo"),
        ({"fineweb": 5}, {"fineweb": 0, "a": 3}, r"mixture\.fineweb=5: that source is not prep"),
        ({"fineweb": -1}, ALL, r"mixture\.fineweb=-1: a share is a number of at least 0"),
        ({"fineweb": float("nan")}, ALL, "a share is a number"),
        ({"fineweb": float("inf")}, ALL, "a share is a number"),
        (dict.fromkeys(ALL, 0), ALL, "every share is 0"),
        ({}, {"fineweb": 0}, "no prepared source has a training sequence"),
    ],
)
def test_shares_that_cannot_be(
    explicit: dict[str, float], rows: dict[str, int], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        choose_weights(REFERENCE_SHARES, explicit, rows)


def test_weights_are_integers_and_coprime() -> None:
    assert integer_weights({"a": 60, "b": 20, "c": 10, "d": 5, "e": 5}) == {
        "a": 12, "b": 4, "c": 2, "d": 1, "e": 1
    }  # fmt: skip
    assert integer_weights({"a": 0.7, "b": 0.3}) == {"a": 7, "b": 3}
    assert integer_weights({"a": 0.1234567, "b": 0.7654321}) == {"a": 138_889, "b": 861_111}
    assert integer_weights({"a": 1.0, "b": 1e-9}) == {"a": 999_999, "b": 1}


@given(st.lists(st.floats(1e-9, 1e9), min_size=1, max_size=8))
def test_weights_are_near_the_shares(values: list[float]) -> None:
    shares = {str(number): value for number, value in enumerate(values)}
    weights = integer_weights(shares)
    total = sum(weights.values())
    assert total <= 10**6 + len(values)
    total_share = sum(Fraction(str(value)) for value in values)
    for name, weight in weights.items():
        assert weight >= 1
        assert abs(Fraction(weight, total) - Fraction(str(shares[name])) / total_share) < 1e-5
