"""Which sources a run draws from, and how many samples of each: shares -> integer weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Final

from trainer.errors import ConfigError, did_you_mean

REFERENCE_SHARES: Final = {"fineweb": 60, "the-stack": 20, "books3": 10, "arxiv": 5, "slimorca": 5}
"""The mixture of the reference run, in percent of samples."""

SUBSTITUTES: Final = {"books3": "pg19", "arxiv": "arxiv-papers"}
"""Which source takes the share of one that is not prepared."""

_MAX_PERIOD: Final = 10**6
_BY_SIZE_PERIOD: Final = 1000  # shares by size are no finer than this: the pattern stays short


def choose_weights(
    preset: Mapping[str, float], explicit: Mapping[str, float], rows: Mapping[str, int]
) -> tuple[dict[str, int], tuple[str, ...]]:
    """Integer weights of the sources to draw, and notes on how they were chosen.

    `preset` shares adapt: an absent source is replaced by its substitute, or else the others are
    renormalised. `explicit` ones (--set mixture.x=) do not: ConfigError if absent. `rows` are the
    training rows of each prepared source; without any share for one, they are drawn by size.
    """
    present = {name for name, n_rows in rows.items() if n_rows > 0}
    _check_explicit(explicit, present)
    notes: list[str] = []
    shares: dict[str, float] = {}
    absent: list[str] = []
    for name, share in preset.items():
        substitute = SUBSTITUTES.get(name)
        if name in explicit or share == 0:
            continue
        if name in present:
            shares[name] = shares.get(name, 0) + share
        elif substitute in present and substitute not in explicit:
            shares[substitute] = shares.get(substitute, 0) + share
            notes.append(f"{name} is not prepared: its share goes to its substitute, {substitute}")
        else:
            absent.append(name)
    shares = {name: share for name, share in {**shares, **explicit}.items() if share > 0}
    if shares:
        weights = integer_weights(shares)
    elif explicit:
        raise ConfigError("mixture: every share is 0; give at least one source a share above 0")
    elif not present:
        raise ConfigError(
            "no prepared source has a training sequence: prepare more text, "
            "or with a smaller --val-fraction or --seq-len"
        )
    else:
        sizes = {name: Fraction(rows[name]) for name in sorted(present)}
        weights = _coprime(_largest_remainder(sizes, _BY_SIZE_PERIOD))
    if absent:
        how = "the others are renormalised" if shares else "what is there is drawn by size"
        parts = [f"{n} {100 * w / sum(weights.values()):.4g} %" for n, w in weights.items()]
        notes.append(f"not prepared: {', '.join(absent)}; {how}: {', '.join(parts)}")
    if left := sorted(present - weights.keys() - {n for n, share in explicit.items() if not share}):
        notes.append(
            f"prepared but not drawn: {', '.join(left)} (--set mixture.{left[0]}=SHARE draws it)"
        )
    return dict(sorted(weights.items())), tuple(notes)


def integer_weights(shares: Mapping[str, float]) -> dict[str, int]:
    """Coprime integer weights in the ratio of `shares`: 60, 20, 10, 5, 5 -> 12, 4, 2, 1, 1.

    Where the exact ratio needs a total above a million, the largest remainders are rounded up to
    a total of a million, and every source gets at least 1.
    """
    exact = {name: Fraction(str(share)) for name, share in shares.items()}
    denominator = math.lcm(*(share.denominator for share in exact.values()))
    weights = _coprime({name: int(share * denominator) for name, share in exact.items()})
    if sum(weights.values()) > _MAX_PERIOD:
        weights = _coprime(_largest_remainder(exact, _MAX_PERIOD))
    return weights


def _coprime(weights: Mapping[str, int]) -> dict[str, int]:
    divisor = math.gcd(*weights.values())
    return {name: weight // divisor for name, weight in weights.items()}


def _largest_remainder(shares: Mapping[str, Fraction], total: int) -> dict[str, int]:
    """Integers in the ratio of `shares`, each at least 1 (Hamilton's method)."""
    scale = total / sum(shares.values())
    quotas = {name: share * scale for name, share in shares.items()}
    weights = {name: max(1, int(quota)) for name, quota in quotas.items()}
    by_remainder = sorted(quotas, key=lambda name: (int(quotas[name]) - quotas[name], name))
    for name in by_remainder[: max(0, total - sum(weights.values()))]:
        weights[name] += 1
    return weights


def _check_explicit(explicit: Mapping[str, float], present: set[str]) -> None:
    for name, share in explicit.items():
        if not 0 <= share < math.inf:
            raise ConfigError(f"mixture.{name}={share}: a share is a number of at least 0")
        if share > 0 and name not in present:
            there = ", ".join(sorted(present)) or "none with training sequences"
            raise ConfigError(
                f"mixture.{name}={share}: that source is not prepared; "
                f"{did_you_mean(name, present)}there are: {there} "
                f"(`summer-prep tokenize --source {name}` prepares it)"
            )
