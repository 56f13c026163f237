"""The data order, by its properties: shares, permutations, ranks, phases."""

import hashlib
import math
import tempfile
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from shards.reader import ShardReader
from shards_samples import make_source
from trainer.data import mixture
from trainer.data.batches import HostBatch, MicroBatches, StepRange
from trainer.data.mixture import (
    BatchShape,
    DataOrder,
    Permutation,
    Phase,
    balanced_pattern,
    dropout_keys,
    micro_batch_indices,
    splitmix64,
)

weights = st.lists(st.integers(1, 60), min_size=1, max_size=7)


def test_splitmix64_is_the_published_one() -> None:
    # the first outputs of the generator seeded with 1234567, whose state moves by the golden gamma
    state = np.uint64(1234567) + np.arange(3, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    assert splitmix64(state).tolist() == [
        6457827717110365317, 3203168211198807973, 9817491932198370423
    ]  # fmt: skip


def excess(weights: list[int], pattern: np.ndarray) -> float:
    """The largest |count - n w| over prefixes n and sources."""
    counts = np.cumsum(pattern[:, None] == np.arange(len(weights)), axis=0)
    n = np.arange(1, len(pattern) + 1)[:, None]
    return float(np.abs(counts - n * np.array(weights) / sum(weights)).max())


@given(weights)
@settings(deadline=None)
def test_every_prefix_has_every_source_by_its_weight(weights: list[int]) -> None:
    pattern = balanced_pattern(weights)
    assert Counter(pattern.tolist()) == dict(enumerate(weights))
    assert excess(weights, pattern) < 1


def test_the_reference_mixture_is_within_0_8() -> None:
    assert excess([12, 4, 2, 1, 1], balanced_pattern([12, 4, 2, 1, 1])) == pytest.approx(0.8)


@given(st.integers(1, 20_000), st.integers(0, 2**64 - 1))
@settings(max_examples=60, deadline=None)
def test_permutations_are_bijections_with_an_inverse(n: int, key: int) -> None:
    permutation, places = Permutation(n, key), np.arange(n)
    elements = permutation(places)
    assert np.array_equal(np.sort(elements), places)
    assert np.array_equal(permutation.inverse(elements), places)


@given(st.integers(4097, 10**12), st.integers(0, 2**64 - 1), st.data())
@settings(deadline=None)
def test_large_permutations_stay_in_range_and_turn_back(
    n: int, key: int, data: st.DataObject
) -> None:
    places = np.array(data.draw(st.lists(st.integers(0, n - 1), min_size=1)), np.int64)
    elements = Permutation(n, key)(places)
    assert ((elements >= 0) & (elements < n)).all()
    assert np.array_equal(Permutation(n, key).inverse(elements), places)


def chi_square_of_neighbours(n: int, keys: int) -> float:
    """Chi-square, over its degrees of freedom, of how far apart neighbours end, modulo sqrt n."""
    side = math.isqrt(n)
    counts = np.zeros(side)
    for key in range(keys):
        elements = Permutation(n, key)(np.arange(n))
        counts += np.bincount(np.diff(elements) % side, minlength=side)
    expected = counts.sum() / side
    return float(((counts - expected) ** 2 / expected).sum() / (side - 1))


def test_neighbours_are_parted_at_random_and_two_rounds_would_be_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert 0.5 < chi_square_of_neighbours(5003, 20) < 1.5
    monkeypatch.setattr(mixture, "_ROUNDS", 2)
    assert chi_square_of_neighbours(5003, 20) > 1000


@pytest.mark.parametrize("n", range(1, 11))
def test_small_permutations_are_all_there_and_equally_often(n: int) -> None:
    """Every order up to five elements; up to ten, each element at each place, by a chi-square."""
    places, keys = np.arange(n), 3000
    table, orders = np.zeros((n, n)), Counter[tuple[int, ...]]()
    for key in range(keys):
        permutation = Permutation(n, key)
        elements = permutation(places)
        assert sorted(elements) == places.tolist()
        assert np.array_equal(permutation.inverse(elements), places)
        table[places, elements] += 1
        orders[tuple(elements)] += 1
    if n <= 5:
        assert len(orders) == math.factorial(n)
    if n > 1:
        chi_square = ((table - keys / n) ** 2 / (keys / n)).sum() / (n - 1) ** 2
        assert chi_square < 1 + 5 * math.sqrt(2) / (n - 1)  # five standard deviations


@pytest.mark.parametrize(
    ("n", "first"), [(4096, [553, 1055, 3236, 1481]), (4097, [2018, 2420, 768, 572])]
)
def test_the_order_where_sorting_ends_is_that_of_every_version(n: int, first: list[int]) -> None:
    permutation = Permutation(n, 7)
    assert permutation(np.arange(4)).tolist() == first
    assert permutation.inverse(np.array(first)).tolist() == [0, 1, 2, 3]


def test_a_network_of_three_elements_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Why small permutations are sorts: a Feistel network on three has three orders of six."""
    monkeypatch.setattr(mixture, "_SORTED", 0)
    orders = {tuple(Permutation(3, key)(np.arange(3))) for key in range(600)}
    assert len(orders) == 3


def chi_square_of_places(n: int, keys: int) -> float:
    """Chi-square, over its degrees of freedom, of where single places end, in 64 parts of range."""
    places = np.linspace(0, n - 1, 50).astype(np.int64)
    ends = np.concatenate([Permutation(n, key)(places) for key in range(keys)])
    counts = np.bincount(ends * 64 // n, minlength=64)
    return float(((counts - len(ends) / 64) ** 2 / (len(ends) / 64)).sum() / 63)


def chi_square_of_pairs(n: int, keys: int) -> float:
    """The same of how far apart, in columns, two places of one column end."""
    side = math.isqrt(n)
    first = np.arange(50) * 97
    apart = [Permutation(n, k)(first + 7 * side) - Permutation(n, k)(first) for k in range(keys)]
    counts = np.bincount(np.concatenate(apart) % side * 64 // side, minlength=64)
    total = counts.sum() / 64
    return float(((counts - total) ** 2 / total).sum() / 63)


def test_places_and_pairs_end_anywhere_and_two_rounds_would_be_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    n = 1_000_003
    assert 0.3 < chi_square_of_places(n, 200) < 1.9
    assert 0.3 < chi_square_of_pairs(n, 200) < 1.9
    monkeypatch.setattr(mixture, "_ROUNDS", 2)
    assert chi_square_of_pairs(n, 200) > 3


def order_of(rows: dict[str, int], *phases: Phase, seed: int = 0) -> DataOrder:
    return DataOrder(seed=seed, rows=rows, phases=phases)


@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 30)), min_size=1, max_size=4),
    st.integers(0, 2**32),
)
@settings(max_examples=50, deadline=None)
def test_an_epoch_shows_each_row_once(sources: list[tuple[int, int]], seed: int) -> None:
    rows = {f"s{number}": n for number, (n, _) in enumerate(sources)}
    shares = {f"s{number}": weight for number, (_, weight) in enumerate(sources)}
    order = order_of(rows, Phase(0, shares), seed=seed)
    located = order.locate(np.arange(3000))
    for number, name in enumerate(order.sources):
        here = located.source == number
        epochs, seen = located.epoch[here], located.row[here]
        assert np.array_equal(epochs, np.sort(epochs))  # the k-th draw is of epoch k div n
        for epoch in range(epochs.max() if len(epochs) else 0):
            assert sorted(seen[epochs == epoch]) == list(range(rows[name]))
        last = seen[epochs == epochs.max()] if len(epochs) else []
        assert len(set(last)) == len(last)


def test_epochs_differ_in_order() -> None:
    located = order_of({"a": 50}, Phase(0, {"a": 1})).locate(np.arange(100))
    assert not np.array_equal(located.row[:50], located.row[50:])


@given(st.lists(st.tuples(st.integers(0, 400), weights), min_size=1, max_size=4), st.integers(0, 9))
@settings(max_examples=50, deadline=None)
def test_phases_repeat_and_skip_nothing(changes: list[tuple[int, list[int]]], retired: int) -> None:
    firsts = [0, *sorted(first for first, _ in changes[1:])]
    phases = []
    for first, (_, shares) in zip(firsts, changes, strict=True):
        named = {f"s{number}": share for number, share in enumerate(shares) if number != retired}
        assume(named)
        phases.append(Phase(first, named))
    rows = {f"s{number}": 7 + 5 * number for number in range(10)}
    order = order_of(rows, *phases)
    located = order.locate(np.arange(1000))
    for number, name in enumerate(order.sources):
        here = np.flatnonzero(located.source == number)
        draws = located.epoch[here] * rows[name]  # + place, which grows within an epoch
        for epoch in np.unique(located.epoch[here])[:-1]:
            assert sorted(located.row[here][located.epoch[here] == epoch]) == list(
                range(rows[name])
            )
        assert np.array_equal(draws, np.sort(draws))
        assert order.counts(1000)[name] == len(here)
    for phase, following in pairwise([*phases, Phase(1000, {})]):
        inside = located.source[phase.first_index : following.first_index]
        assert {order.sources[number] for number in inside} <= set(phase.weights)


@given(st.integers(0, 5000), st.integers(0, 3))
@settings(max_examples=50, deadline=None)
def test_find_turns_locate_back(index: int, kind: int) -> None:
    rows = {"a": 900, "b": 30, "c": 5000}
    phases = [
        Phase(0, {"a": 2, "b": 1, "c": 3}),
        Phase(700, {"b": 1}),
        Phase(1500, {"a": 5, "b": 3}),
    ]
    order = order_of(rows, *phases[: kind + 1])
    source, epoch, row = (int(part[0]) for part in order.locate(np.array([index])))
    assert order.find(order.sources[source], epoch, row) == index


def test_find_gives_none_for_a_source_that_leaves() -> None:
    order = order_of({"a": 100, "b": 100}, Phase(0, {"a": 1, "b": 1}), Phase(20, {"b": 1}))
    found = [order.find("a", 0, row) for row in range(100)]
    assert sum(index is not None for index in found) == 10


def test_the_far_future_is_near() -> None:
    order = order_of({"a": 10**9, "b": 17}, Phase(0, {"a": 12, "b": 1}))
    far = order.locate(np.array([10**12]))
    assert (
        order.find(order.sources[int(far.source[0])], int(far.epoch[0]), int(far.row[0])) == 10**12
    )
    assert order.counts(13 * 10**11) == {"a": 12 * 10**11, "b": 10**11}


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 4), st.integers(0, 10**9))
@settings(deadline=None)
def test_a_step_has_one_order_however_it_is_shared(W: int, M: int, A: int, start: int) -> None:
    G = A * W * M
    shape = BatchShape(global_batch_size=G, micro_batch_size=M, world_size=W)
    assert shape.grad_accum_steps == A
    parts = [micro_batch_indices(3, start, shape, a, rank) for a in range(A) for rank in range(W)]
    full = micro_batch_indices(3, start, BatchShape(G, G, 1), 0, 0)
    assert np.array_equal(np.concatenate(parts), full)
    assert sorted(full) == list(range(start, start + G))


def test_every_rank_meets_the_rarest_source() -> None:
    order = order_of(
        dict.fromkeys("abcde", 10**6), Phase(0, dict(zip("abcde", [12, 4, 2, 1, 1], strict=True)))
    )
    shape = BatchShape(global_batch_size=80, micro_batch_size=10, world_size=8)
    ranks = set()
    for step in range(40):
        for rank in range(8):
            indices = micro_batch_indices(0, 80 * step, shape, 0, rank)
            if (order.locate(indices).source == 4).any():
                ranks.add(rank)
    assert ranks == set(range(8))


@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 2**32), st.sampled_from([1, 2, 4, 8]))
@settings(max_examples=15, deadline=None)
def test_no_held_out_row_is_ever_read(a: int, b: int, seed: int, world_size: int) -> None:
    """By the bytes of the rows that ranks are given, over two epochs and more."""
    with tempfile.TemporaryDirectory() as folder:
        for name, n in (("a", a), ("b", b)):
            make_source(Path(folder) / name, n_rows=n, n_val_rows=5, seed=ord(name))
        readers = {name: ShardReader(Path(folder) / name) for name in "ab"}
        held_out = {row.tobytes() for name in "ab" for row in
                    ShardReader(Path(folder) / name, "val").rows(np.arange(5))[0]}  # fmt: skip
        train = {row.tobytes() for name, n in (("a", a), ("b", b)) for row in
                 readers[name].rows(np.arange(n))[0]}  # fmt: skip
        order = order_of({"a": a, "b": b}, Phase(0, {"a": 1, "b": 1}), seed=seed)
        shape, n_steps = BatchShape(8, 8 // world_size, world_size), max(a, b) // 2 + 1
        seen = set()
        for rank in range(world_size):
            steps = StepRange(first_index=0, n_steps=n_steps, shape=shape, rank=rank)
            for batch in MicroBatches(order, readers, steps):
                assert isinstance(batch, HostBatch)
                seen |= {row.tobytes() for row in batch.tokens.numpy()}
    assert seen == train
    assert not seen & held_out


def test_dropout_keys_belong_to_samples() -> None:
    keys = dropout_keys(0, np.arange(1000))
    assert keys.shape == (1000, 2)
    assert keys.dtype == np.int32
    assert len(np.unique(keys, axis=0)) == 1000
    assert np.array_equal(dropout_keys(0, np.array([7, 5]))[1], keys[5])
    assert not np.array_equal(dropout_keys(1, np.arange(1000)), keys)


def digest(*arrays: np.ndarray) -> str:
    joined = b"".join(np.ascontiguousarray(array, "<i8").tobytes() for array in arrays)
    return hashlib.sha256(joined).hexdigest()[:16]


BEGIN = [2, 0, 2, 2, 2, 0, 2, 2]
LOCATED = "834c50ffd0c94be1"
PERMUTED = {
    7: "3dd2aebb0bb8e522",
    4096: "272a075b93c00beb",
    4097: "a46cc132e1c3e2b5",
    10000: "f220c90e75703462",
}
SAMPLES = [20, 22]
KEYS = [[-1138008063, -904351133], [2029280830, 244003380]]


def test_the_order_of_a_run_is_the_same_in_every_version() -> None:
    """A run that goes on reads on where it was: numbers written down, not a property."""
    rows = {"books": 40, "chat": 9, "web": 5000}
    phases = [Phase(0, {"books": 1, "web": 3}), Phase(100, {"books": 2, "chat": 1, "web": 5})]
    order = DataOrder(seed=5, rows=rows, phases=phases)
    located = order.locate(np.arange(700))
    assert located.source[:8].tolist() == BEGIN
    assert digest(*located) == LOCATED
    assert balanced_pattern([1, 1, 3]).tolist() == [2, 0, 2, 1, 2]
    assert balanced_pattern([1, 1, 1, 5]).tolist() == [3, 3, 0, 3, 1, 3, 2, 3]
    for n, expected in PERMUTED.items():
        permutation = Permutation(n, 17)
        assert digest(permutation(np.arange(n))) == expected
    shape = BatchShape(8, 2, 2)
    assert micro_batch_indices(5, 16, shape, 1, 1).tolist() == SAMPLES
    assert dropout_keys(5, np.array([0, 2**40])).tolist() == KEYS
