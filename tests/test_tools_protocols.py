"""Plans without a model: what is scored, after what, in windows of what size. Then closed forms."""

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tools.errors import EvaluationError
from tools.evaluation.protocols import (
    BOS_POLICIES,
    IGNORED,
    PLANS,
    BosPolicy,
    Protocol,
    ProtocolName,
    Window,
    WindowPlan,
    document_windows,
    plan_windows,
)
from tools.evaluation.scoring import Scored, Scorer, batches, score

BOS = 1
VOCAB = 50

policies = st.sampled_from(["never", "start", "window"])


def text_ids(n: int) -> np.ndarray:
    """Ids that are all different, so that a target says which place of the text it is."""
    return np.arange(1000, 1000 + n)


def make_plan(ids: Any, protocol: Protocol) -> WindowPlan:
    return plan_windows([np.asarray(ids, np.int64)], protocol)


def targets_of(windows: list[Window] | WindowPlan) -> list[int]:
    return [int(target) for w in windows for target in w.targets if target != IGNORED]


def check_windows(windows: list[Window] | WindowPlan, context: int) -> None:
    """Each target is the id right after its input, and no window feeds more than the context."""
    for window in windows:
        assert 0 < len(window.inputs) == len(window.targets) <= context
        for (_, following), target in zip(
            pairwise([*window.inputs, None]), window.targets, strict=True
        ):
            if following is not None and target != IGNORED:
                assert target == following


@given(st.integers(2, 200), st.integers(2, 40), policies)
def test_disjoint_scores_all_but_the_first_of_each_window(
    n: int, context: int, bos: BosPolicy
) -> None:
    ids = text_ids(n)
    protocol = Protocol(context=context, bos=bos, bos_id=BOS)
    stream = [BOS, *ids] if bos == "start" else list(ids)
    room = context - 1 if bos == "window" else context
    if len(stream) < room:
        with pytest.raises(EvaluationError, match="too few for one disjoint window"):
            make_plan(ids, protocol)
        return
    plan = make_plan(ids, protocol)
    check_windows(plan, context)
    assert len(plan) == len(stream) // room
    assert plan.tail_dropped == len(stream) % room
    assert all(len(window.inputs) == context - 1 for window in plan)
    expected = [
        token
        for place, token in enumerate(stream[: len(plan) * room])
        if bos == "window" or place % room
    ]
    assert targets_of(plan) == expected


@given(st.integers(2, 200), st.integers(2, 40), st.data(), policies)
def test_stride_scores_each_id_once_and_never_the_first(
    n: int, context: int, data: st.DataObject, bos: BosPolicy
) -> None:
    stride = data.draw(st.integers(1, context - 1))
    ids = text_ids(n)
    plan = make_plan(
        ids, Protocol(name="stride", context=context, stride=stride, bos=bos, bos_id=BOS)
    )
    check_windows(plan, context)
    assert targets_of(plan) == list(ids if bos == "start" else ids[1:])
    assert plan.tail_dropped == 0
    assert list(ids[plan.scored_places()]) == targets_of(plan)


def test_stride_windows_are_those_of_the_hugging_face_guide() -> None:
    n, context, stride = 1000, 128, 48
    expected, previous_end = [], 0
    for begin in range(0, n, stride):
        end = min(begin + context, n)
        expected.append((begin, end, end - previous_end - (begin == 0)))
        previous_end = end
        if end == n:
            break
    plan = make_plan(text_ids(n), Protocol(name="stride", context=context, stride=stride))
    assert [(b, e, e - first) for b, e, first in plan.spans] == expected


@given(st.lists(st.integers(1, 90), min_size=1, max_size=4), st.integers(2, 40))
def test_lm_eval_scores_each_id_of_each_page_once(sizes: list[int], context: int) -> None:
    """The windows of the harness, which it makes of lists, made here from its own description."""
    pages = np.split(text_ids(sum(sizes)), np.cumsum(sizes)[:-1])
    plan = plan_windows(pages, Protocol(name="lm-eval", context=context, bos_id=BOS))
    check_windows(plan, context)
    assert targets_of(plan) == list(text_ids(sum(sizes)))
    assert plan.tail_dropped == 0
    assert list(plan.ids[plan.scored_places()]) == targets_of(plan)
    windows = iter(plan)
    for page in pages:
        behind_bos = [BOS, *page]
        for begin in range(0, len(page), context):
            window, end = next(windows), min(begin + context, len(page))
            assert list(window.inputs) == behind_bos[max(0, end - context) : end]
            assert list(window.targets[window.targets != IGNORED]) == list(page[begin:end])
    assert next(windows, None) is None


@given(st.integers(3, 200), st.integers(3, 40), st.booleans())
def test_llama_cpp_scores_the_second_half_of_each_full_window(
    n: int, context: int, has_bos: bool
) -> None:
    ids = text_ids(n)
    protocol = Protocol(name="llama.cpp", context=context, bos_id=BOS if has_bos else None)
    stream = [BOS, *ids] if has_bos else list(ids)
    if len(stream) < context:
        with pytest.raises(EvaluationError, match=r"too few for one llama\.cpp window"):
            make_plan(ids, protocol)
        return
    plan = make_plan(ids, protocol)
    check_windows(plan, context)
    assert len(plan) == len(stream) // context
    assert plan.tail_dropped == len(stream) % context
    for number, window in enumerate(plan):
        chunk = stream[number * context : (number + 1) * context]
        if has_bos:
            chunk[0] = BOS
        assert list(window.inputs) == chunk[:-1]
        assert list(window.targets[: context // 2]) == [IGNORED] * (context // 2)
        assert list(window.targets[context // 2 :]) == chunk[context // 2 + 1 :]
    assert list(ids[plan.scored_places()]) == targets_of(plan)


def test_the_worked_example_of_the_module() -> None:
    ids = [ord(letter) for letter in "abcdefghij"]
    bos = ord("B")

    def spelled(plan: WindowPlan) -> list[tuple[str, str]]:
        return [
            ("".join(map(chr, w.inputs)), "".join(chr(t) for t in w.targets if t != IGNORED))
            for w in plan
        ]

    assert spelled(make_plan(ids, Protocol(context=4))) == [("abc", "bcd"), ("efg", "fgh")]
    strided = make_plan(ids, Protocol(name="stride", context=4, stride=2))
    assert spelled(strided) == [("abc", "bcd"), ("cde", "ef"), ("efg", "gh"), ("ghi", "ij")]
    rolling = make_plan(ids, Protocol(name="lm-eval", context=4, bos_id=bos))
    assert spelled(rolling) == [("Babc", "abcd"), ("defg", "efgh"), ("fghi", "ij")]
    halves = make_plan(ids, Protocol(name="llama.cpp", context=4, bos_id=bos))
    assert spelled(halves) == [("Bab", "c"), ("Bef", "g")]


@given(st.integers(2, 120), st.integers(1, 30))
def test_a_document_is_scored_from_its_bos_to_its_end(n: int, context: int) -> None:
    document = [BOS, *text_ids(n - 1)]
    windows = document_windows(document, context)
    check_windows(windows, context)
    assert targets_of(windows) == document[1:]
    assert [int(i) for w in windows for i in w.inputs] == document[:-1]


def test_scored_places_name_the_text_whatever_stands_in_front() -> None:
    ids = text_ids(21)
    for bos in ("never", "start", "window"):
        plan = make_plan(ids, Protocol(context=5, bos=bos, bos_id=BOS))
        assert list(ids[plan.scored_places()]) == targets_of(plan)


def test_limit_takes_the_first_windows() -> None:
    plan = make_plan(text_ids(100), Protocol(context=10))[:3]
    assert len(plan) == 3
    assert len(targets_of(plan)) == 27
    assert plan.tail_dropped == 70


def test_a_plan_of_no_windows_scores_nothing() -> None:
    plan = make_plan(text_ids(30), Protocol(context=10))[:0]
    assert (len(plan), targets_of(plan), plan.tail_dropped) == (0, [], 30)
    assert plan.scored_places().tolist() == []


@pytest.mark.parametrize("name", ["disjoint", "stride", "llama.cpp"])
def test_ids_of_any_width_and_a_bos_of_zero(name: ProtocolName) -> None:
    ids = text_ids(40).astype(np.uint16)  # as shards hold them: too narrow for -100
    narrow: Any = ids
    for bos in (BOS_POLICIES[name][0], "never"):
        plan = plan_windows([narrow], Protocol(name=name, context=8, bos=bos, bos_id=0))
        assert targets_of(plan) == ids[plan.scored_places()].tolist()
        assert all(w.inputs.dtype == w.targets.dtype == np.int64 for w in plan)
    starting = plan_windows([narrow], Protocol(context=8, bos="start", bos_id=0))
    assert starting[0].inputs[0] == 0
    assert all(w.inputs.dtype == w.targets.dtype == np.int64 for w in document_windows(ids, 9))


def test_a_single_id_has_nothing_before_it_to_be_predicted_from() -> None:
    with pytest.raises(EvaluationError, match="1 tokens, too few for one stride window"):
        make_plan([7], Protocol(name="stride", context=4))
    plan = make_plan([7], Protocol(name="stride", context=4, bos="start", bos_id=1))
    assert targets_of(plan) == [7]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "sliding"}, "protocol 'sliding'"),
        ({"bos": "always"}, "bos 'always'"),
        ({"context": 1}, "context 1"),
        ({"bos": "start", "bos_id": None}, "has no BOS; choose never"),
        ({"stride": 4}, "disjoint windows have none"),
        ({"name": "stride", "stride": 8}, "stride 8: choose 1 to 7"),
        ({"name": "stride", "stride": 0}, "stride 0"),
        ({"name": "lm-eval", "bos": "never"}, "bos 'never': choose one of start"),
        ({"name": "lm-eval", "bos_id": None}, "has no BOS; choose disjoint"),
        ({"name": "llama.cpp", "context": 2}, "at least 3 tokens"),
        ({"name": "llama.cpp", "stride": 4}, "llama.cpp windows have none"),
    ],
)
def test_an_invalid_protocol_is_rejected(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(EvaluationError, match=words):
        Protocol(**{"context": 8, "bos_id": BOS, **changes})


# ---- closed forms: models whose scores are known without computing them


def uniform(tokens: torch.Tensor) -> torch.Tensor:
    return torch.zeros(*tokens.shape, VOCAB)


EVERY_PROTOCOL = list(PLANS)


@pytest.mark.parametrize("name", EVERY_PROTOCOL)
def test_uniform_logits_have_perplexity_v(name: ProtocolName) -> None:
    ids = np.random.default_rng(0).integers(0, VOCAB, 500)
    plan = make_plan(ids, Protocol(name=name, context=64, bos_id=BOS))
    scores = score(Scorer.of_logits(uniform), plan)
    assert scores.total_targets == len(plan.scored_places())
    assert scores.standard_error == pytest.approx(0, abs=1e-6)
    assert math.exp(scores.total_nats / scores.total_targets) == pytest.approx(VOCAB, rel=1e-6)


@pytest.mark.parametrize("name", EVERY_PROTOCOL)
def test_a_bigram_table_gives_its_analytic_value_under_every_protocol(name: ProtocolName) -> None:
    """Each scored id costs its bigram with the id before it, which is BOS where a page begins."""
    generator = np.random.default_rng(4)
    table = torch.from_numpy(generator.normal(size=(VOCAB, VOCAB))).float()
    pages = [generator.integers(2, VOCAB, size) for size in (130, 41, 64)]
    plan = plan_windows(pages, Protocol(name=name, context=16, bos_id=BOS))
    cost = -table.double().log_softmax(dim=1).numpy()
    before = {
        page_begin + place: (page[place - 1] if place else BOS)
        for page, page_begin in zip(pages, (0, 130, 171), strict=True)
        for place in range(len(page))
    }
    ids = np.concatenate(pages)
    expected = sum(cost[before[place], ids[place]] for place in plan.scored_places().tolist())
    result = score(Scorer.of_logits(lambda tokens: table[tokens]), plan, batch_tokens=100)
    assert result.total_nats == pytest.approx(expected, rel=1e-6)


def test_the_standard_error_is_that_of_means_of_clusters() -> None:
    """As many windows again, drawn at random, have means that scatter by the standard error."""
    generator = np.random.default_rng(5)
    sizes = generator.integers(5, 20, (4000, 60))
    nats = generator.normal(3.0, 1.0, sizes.shape) * sizes  # a window's targets move together
    hits = np.zeros(60, np.bool_)
    scores = [Scored(*pair, hits) for pair in zip(nats, sizes, strict=True)]
    means = [each.total_nats / each.total_targets for each in scores]
    errors = [each.standard_error for each in scores]
    assert np.mean(np.array(errors, float)) == pytest.approx(np.std(means), rel=0.06)
    assert Scored(nats[0][:1], sizes[0][:1], hits[:1]).standard_error is None


def test_standard_errors_worked_out_by_hand() -> None:
    def error(nats: list[float], sizes: list[int]) -> float | None:
        hits = np.zeros(len(nats), np.bool_)
        return Scored(np.array(nats), np.array(sizes), hits).standard_error

    assert error([1.0, 3.0], [1, 1]) == pytest.approx(1.0)  # sqrt(2 * 2 / 1) / 2
    assert error([1.0, 3.0, 5.0], [1, 1, 2]) == pytest.approx(math.sqrt(3.5625) / 4)
    assert error([1.0, 0.0], [1, 0]) == 0
    assert error([0.0, 0.0], [0, 0]) is None


def running_sum_model(tokens: torch.Tensor) -> torch.Tensor:
    """Logits that depend on all ids so far (and on no later one)."""
    state = torch.cumsum((tokens + 1).double() * 0.37, dim=1)
    return torch.sin(state[..., None] * torch.arange(1, VOCAB + 1)).float()


RUNNING_SUM = Scorer.of_logits(running_sum_model)


@pytest.mark.parametrize("name", EVERY_PROTOCOL)
def test_future_ids_change_no_scored_logit(name: ProtocolName) -> None:
    """Leak test: ids behind a window's scored target may change, the window's nats may not."""
    ids = np.random.default_rng(2).integers(0, VOCAB, 300)
    protocol = Protocol(name=name, context=32, bos_id=BOS)
    before = score(RUNNING_SUM, make_plan(ids, protocol))
    for cut in (33, 150, 299):
        changed = ids.copy()
        changed[cut:] = (changed[cut:] + 7) % VOCAB
        plan = make_plan(changed, protocol)
        after = score(RUNNING_SUM, plan)
        untouched = plan.spans[:, 1] <= cut + protocol.starts_with_bos
        assert (before.nats[untouched] == after.nats[untouched]).all()
        assert (before.nats[~untouched] != after.nats[~untouched]).all()


def test_batch_size_and_padding_change_nothing() -> None:
    ids = np.random.default_rng(3).integers(0, VOCAB, 333)
    windows = [
        *document_windows(ids, 50),
        *document_windows(ids[:7], 50),
        *document_windows(ids, 9),
    ]
    alone = score(RUNNING_SUM, windows, batch_tokens=1)
    for batch_tokens in (100, 333, 10**6):
        together = score(RUNNING_SUM, windows, batch_tokens=batch_tokens)
        assert together.nats == pytest.approx(alone.nats, rel=1e-9)
        assert (together.n_targets == alone.n_targets).all()


def test_ranks_score_every_batch_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes after each other, the sum of whose figures is what one process finds."""
    plan = make_plan(np.random.default_rng(6).integers(0, VOCAB, 90), Protocol(context=10))
    alone = score(RUNNING_SUM, plan, batch_tokens=20)
    shares: list[torch.Tensor] = []
    monkeypatch.setattr("tools.evaluation.scoring.dist.is_initialized", lambda: True)
    monkeypatch.setattr("tools.evaluation.scoring.dist.get_world_size", lambda: 2)
    monkeypatch.setattr(
        "tools.evaluation.scoring.dist.all_reduce", lambda each: shares.append(each.clone())
    )
    for rank in (0, 1):
        monkeypatch.setattr("tools.evaluation.scoring.dist.get_rank", lambda rank=rank: rank)
        score(RUNNING_SUM, plan, batch_tokens=20)
    first, second = shares
    assert ((first[1] == 0) ^ (second[1] == 0)).all() and first[1].any() and second[1].any()
    expected = [alone.nats, alone.n_targets, alone.greedy]
    assert (first + second).tolist() == np.array(expected, np.float64).tolist()


def test_a_batch_beyond_memory_is_one_clear_error() -> None:
    def large(tokens: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("no")

    with pytest.raises(EvaluationError, match=r"27 tokens at a time .*a smaller --batch-tokens"):
        score(Scorer.of_logits(large), make_plan(text_ids(100), Protocol(context=10))[:3])


def test_windows_of_one_id_fill_a_batch() -> None:
    assert list(batches([1] * 6, 4)) == [[0, 1, 2, 3], [4, 5]]


@given(st.lists(st.integers(1, 100), max_size=60), st.integers(1, 300))
def test_batches_hold_every_window_once_and_keep_to_their_size(
    lengths: list[int], batch_tokens: int
) -> None:
    made = list(batches(lengths, batch_tokens))
    assert sorted(place for batch in made for place in batch) == list(range(len(lengths)))
    for batch in made:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= batch_tokens


def test_long_rows_go_through_the_vocabulary_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 40, VOCAB, generator=generator)
    targets = torch.randint(0, VOCAB, (2, 40), generator=generator)
    targets[0, :5] = targets[1, 17] = IGNORED
    scorer = Scorer.of_logits(lambda _: logits)
    nats = scorer.nll(targets, targets)[0]
    monkeypatch.setattr("tools.evaluation.scoring._LOGITS_AT_ONCE", VOCAB * 7)
    assert torch.equal(scorer.nll(targets, targets)[0], nats)
    assert (nats[0, :5] == 0).all()
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), reduction="none", ignore_index=IGNORED
    )
    assert torch.allclose(nats.flatten(), expected, atol=1e-6)


def test_progress_reaches_the_end() -> None:
    seen = []
    windows = make_plan(text_ids(100) % VOCAB, Protocol(context=10))
    score(
        Scorer.of_logits(uniform),
        windows,
        batch_tokens=30,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen[-1] == (10, 10)
    assert seen == sorted(seen)


def test_a_model_that_gives_nan_is_named() -> None:
    def broken(tokens: torch.Tensor) -> torch.Tensor:
        return torch.full((*tokens.shape, VOCAB), torch.nan)

    with pytest.raises(EvaluationError, match=r"window 0.*damaged"):
        score(Scorer.of_logits(broken), make_plan(text_ids(20) % VOCAB, Protocol(context=10)))
