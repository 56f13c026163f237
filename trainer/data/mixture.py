"""The data order: which row is sample number `index`? A pure function, so nothing has to be saved.

    order = DataOrder(seed=0, rows={"a": 1000, "b": 10}, phases=[Phase(0, {"a": 3, "b": 1})])
    order.locate(np.arange(8))     # sources, epochs and rows of the first eight samples

A sample is found in two steps. *Which source?* Integer weights 3:1 make a period of 4 samples, here
a a b a: after any n samples a source has been drawn n times its share, give or take less than one.
*Which row?* Draw k of a source with n rows is row `permutation(seed, source, epoch)(k mod n)` of
epoch `k div n`: with 10 rows of b, samples 2, 6, 10, ..., 38 show each of them once.

A step of G samples takes the indices [s, s + G). Rank r of W ranks with M rows a micro-batch takes,
at accumulation a and place b, the index `s + pi((a W + r) M + b)`, where `pi` permutes range(G).
With G=8, W=2, M=2 rank 0 takes pi(0), pi(1), then pi(4), pi(5); rank 1 the rest. The set is
[s, s + 8) for every W and M; without pi only 2 of 8 ranks would see the rarest reference source.

A **phase** is a range of samples with the same weights. Each goes on from the counts that the one
before left, so weights can change, and sources come or go, without a row repeated or skipped.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]
Keys = npt.NDArray[np.int32]
Words = npt.NDArray[np.uint64]

_ROUNDS: Final = 8
_SORTED: Final = 4096  # up to here a permutation is a sort: a Feistel network on n=3 has 3 orders


def splitmix64(values: Words) -> Words:
    """64 well-mixed bits for each value. Steele, Lea & Flood, OOPSLA 2014."""
    z = values + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(z ^ (z >> np.uint64(31)), np.uint64)


@functools.lru_cache(maxsize=4096)
def key_of(*parts: int | str) -> int:
    """A 64-bit key that depends on each part and on their order."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def dropout_keys(seed: int, indices: Indices) -> Keys:
    """[n, 2] int32: what each sample's dropout depends on, whichever rank or place it has."""
    words = splitmix64(indices.astype(np.uint64) ^ np.uint64(key_of(seed, "dropout")))
    return words.astype("<u8").view("<i4").reshape(-1, 2)


@dataclass(frozen=True)
class Permutation:
    """A keyed bijection of range(n), and its inverse, computed where it is asked for.

    Up to 4096 elements: a sort of keyed hashes. Above: a Feistel network on an a x b grid with
    modular addition (Black & Rogaway, CT-RSA 2002, FE1), walked until it lands inside range(n).
    """

    n: int
    key: int

    def __call__(self, places: Indices) -> Indices:
        """The elements at these places."""
        if self.n <= _SORTED:
            return _sorted_order(self.n, self.key)[0][places]
        return self._walk(places, self._network)

    def inverse(self, elements: Indices) -> Indices:
        """The places of these elements."""
        if self.n <= _SORTED:
            return _sorted_order(self.n, self.key)[1][elements]
        return self._walk(elements, self._network_inverse)

    @property
    def _grid(self) -> tuple[np.uint64, np.uint64]:
        a = math.isqrt(self.n)
        return np.uint64(a), np.uint64(-(-self.n // a))

    def _walk(self, start: Indices, network: Callable[[Words], Words]) -> Indices:
        out = network(start.astype(np.uint64))
        outside = np.flatnonzero(out >= np.uint64(self.n))
        while len(outside):
            out[outside] = network(out[outside])
            outside = outside[out[outside] >= np.uint64(self.n)]
        return out.astype(np.int64)

    def _network(self, x: Words) -> Words:
        a, b = self._grid
        right, left = np.divmod(x, a)
        for number in range(0, _ROUNDS, 2):
            left = (left + self._round(number, right) % a) % a
            right = (right + self._round(number + 1, left) % b) % b
        return np.asarray(right * a + left)

    def _network_inverse(self, x: Words) -> Words:
        a, b = self._grid
        right, left = np.divmod(x, a)
        for number in reversed(range(0, _ROUNDS, 2)):
            right = (right + b - self._round(number + 1, left) % b) % b
            left = (left + a - self._round(number, right) % a) % a
        return np.asarray(right * a + left)

    def _round(self, number: int, half: Words) -> Words:
        return splitmix64(half ^ np.uint64(key_of(self.key, number)))


@functools.lru_cache(maxsize=256)
def _sorted_order(n: int, key: int) -> tuple[Indices, Indices]:
    """The elements in keyed order, and the place of each."""
    order = np.argsort(splitmix64(np.arange(n, dtype=np.uint64) ^ np.uint64(key)), kind="stable")
    return order, np.argsort(order)


def balanced_pattern(weights: Sequence[int]) -> Indices:
    """[sum(weights)]: which source each place of a period draws.

    For every prefix of n places, |count_s - n w_s / period| < 1 (at most 1 - 1/(2k-2) for k
    sources). Among the sources whose next draw is due, the one with the earliest deadline is
    taken. Tijdeman, The chairman assignment problem, Discrete Mathematics 32 (1980).
    """
    period, k = sum(weights), len(weights)
    if k == 1:
        return np.zeros(period, np.int64)
    scale = 2 * k - 2
    pattern = np.empty(period, np.int64)
    lead = [0] * k  # scale * (n w_s - period * count_s): how far a source is behind its share
    for place in range(period):
        lead = [value + scale * weight for value, weight in zip(lead, weights, strict=True)]
        due = [s for s in range(k) if lead[s] >= period]
        chosen = min(due, key=lambda s: ((scale - 1) * period - lead[s]) / weights[s])
        pattern[place] = chosen
        lead[chosen] -= scale * period
    return pattern


class Phase(NamedTuple):
    """From sample `first_index` on, sources are drawn in the ratio of `weights`."""

    first_index: int
    weights: Mapping[str, int]


class Located(NamedTuple):
    """Of each sample: the number of its source in `DataOrder.sources`, its epoch, its row. [n]"""

    source: Indices
    epoch: Indices
    row: Indices


class DataOrder:
    """Sample number -> source, epoch and row, and back; a pure function of its arguments."""

    def __init__(self, *, seed: int, rows: Mapping[str, int], phases: Sequence[Phase]) -> None:
        self.seed, self.phases = seed, tuple(phases)
        self.sources = tuple(sorted({name for phase in phases for name in phase.weights}))
        self.rows = tuple(rows[name] for name in self.sources)
        self._patterns: list[_PhasePattern] = []
        counts = np.zeros(len(self.sources), np.int64)
        for phase in self.phases:
            if self._patterns:
                counts = self._patterns[-1].counts(phase.first_index)
            weights = [phase.weights.get(name, 0) for name in self.sources]
            self._patterns.append(_PhasePattern(phase.first_index, weights, counts))
        self._firsts = np.array([phase.first_index for phase in self.phases], np.int64)

    def locate(self, indices: Indices) -> Located:
        """Where these samples come from. [n] in, three arrays [n] out."""
        source, draw = np.empty_like(indices), np.empty_like(indices)
        phase = np.searchsorted(self._firsts, indices, side="right") - 1
        for number in np.unique(phase):
            here = phase == number
            source[here], draw[here] = self._patterns[number].draws(indices[here])
        epoch, row = np.divmod(draw, np.array(self.rows, np.int64)[source])
        for number in np.unique(source):
            for turn in np.unique(epoch[source == number]):
                here = (source == number) & (epoch == turn)
                row[here] = self._permutation(int(number), int(turn))(row[here])
        return Located(source, epoch, row)

    def find(self, source: str, epoch: int, row: int) -> int | None:
        """The index at which this row is seen in that epoch; None if its source left before."""
        number = self.sources.index(source)
        place = self._permutation(number, epoch).inverse(np.array([row], np.int64))
        draw = epoch * self.rows[number] + int(place[0])
        ends = [*self._firsts[1:], None]
        for pattern, end in zip(self._patterns, ends, strict=True):
            index = pattern.index_of(number, draw)
            if index is not None and (end is None or index < end):
                return index
        return None

    def counts(self, index: int) -> dict[str, int]:
        """How often each source has been drawn before sample `index`."""
        number = int(np.searchsorted(self._firsts, index, side="right")) - 1
        counts = self._patterns[max(0, number)].counts(index)
        return dict(zip(self.sources, counts.tolist(), strict=True))

    def _permutation(self, source: int, epoch: int) -> Permutation:
        key = key_of(self.seed, "rows", self.sources[source], epoch)
        return Permutation(self.rows[source], key)


class _PhasePattern:
    """One phase's pattern, unrolled once: which draw of which source each place of a period is."""

    def __init__(self, first_index: int, weights: Sequence[int], before: Indices) -> None:
        drawn = [number for number, weight in enumerate(weights) if weight]
        self._first, self._before = first_index, before
        self._weights = np.array(weights, np.int64)
        self._pattern = np.array(drawn)[balanced_pattern([weights[number] for number in drawn])]
        self._places = [np.flatnonzero(self._pattern == n) for n in range(len(weights))]
        self._ordinal = np.empty_like(self._pattern)
        for places in self._places:
            self._ordinal[places] = np.arange(len(places))

    def draws(self, indices: Indices) -> tuple[Indices, Indices]:
        """The source of each sample, and the number of its draw from that source."""
        period, place = np.divmod(indices - self._first, len(self._pattern))
        source = self._pattern[place]
        draw = self._before[source] + period * self._weights[source] + self._ordinal[place]
        return source, draw

    def index_of(self, source: int, draw: int) -> int | None:
        """The index of a source's draw if this phase went on for ever; None if it came before."""
        since = draw - int(self._before[source])
        if since < 0 or not self._weights[source]:
            return None
        period, ordinal = divmod(since, int(self._weights[source]))
        return self._first + period * len(self._pattern) + int(self._places[source][ordinal])

    def counts(self, index: int) -> Indices:
        """How often each source has been drawn before `index`."""
        period, place = divmod(index - self._first, len(self._pattern))
        within = [np.searchsorted(places, place) for places in self._places]
        return self._before + period * self._weights + np.array(within, np.int64)


class BatchShape(NamedTuple):
    """How a step's rows are dealt out: G rows = A accumulations x W ranks x M rows."""

    global_batch_size: int
    micro_batch_size: int
    world_size: int

    @property
    def grad_accum_steps(self) -> int:
        """Micro-batches of each rank in one step."""
        return self.global_batch_size // (self.micro_batch_size * self.world_size)


def leave_out(first: int, places: Indices, skipped: Sequence[tuple[int, int]]) -> Indices:
    """The samples that come so many places after `first`, when ranges [begin, end) are left out.

    With (10, 30) left out, the samples 0, 1, 2 places after 9 are 9, 30, 31. Ranges ascend.
    """
    indices = first + places
    for begin, end in skipped:
        if end > first:
            indices = np.where(indices >= max(begin, first), indices + end - max(begin, first),
                               indices)  # fmt: skip
    return indices


def micro_batch_indices(
    seed: int, first_index: int, shape: BatchShape, micro_step: int, rank: int
) -> Indices:
    """[M]: the samples of one rank's micro-batch in the step that starts at `first_index`."""
    pi = Permutation(shape.global_batch_size, key_of(seed, "step", first_index))
    start = (micro_step * shape.world_size + rank) * shape.micro_batch_size
    return first_index + pi(np.arange(start, start + shape.micro_batch_size, dtype=np.int64))
