"""Whether the evaluator can be believed on this machine: models whose scores are known beforehand.

No data, no network, no trained model: a uniform model must have the vocabulary's size as its
perplexity under every protocol, a table of bigrams its sum, and a real network its own loss; every
plan must score each id that it ought to, once, with nothing of the future in sight.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from model.config import ModelConfig
from model.transformer import Transformer
from tools.errors import EvaluationError
from tools.evaluation.multiple_choice import Answer, encode_pair
from tools.evaluation.ngrams import N_WORDS, grams_of, normalised
from tools.evaluation.protocols import (
    IGNORED,
    Ids,
    Plan,
    Protocol,
    ProtocolName,
    Window,
    plan_texts,
)
from tools.evaluation.scoring import Scorer, score
from tools.evaluation.tasks import Question
from tools.evaluation.wikitext import detokenized

_BOS: Final = 1
_VOCAB: Final = 61
_SIZES: Final = (170, 1, 33, 64)


@dataclass(frozen=True)
class Check:
    """One thing that was looked at; `failure` is empty if it is as it must be."""

    name: str
    failure: str
    time_s: float


def run_checks() -> Iterator[Check]:
    """Every check, in order, none of which stops the others."""
    for name, check in _CHECKS.items():
        started = time.monotonic()
        try:
            check()
            failure = ""
        except EvaluationError as error:
            failure = str(error)
        yield Check(name, failure, time.monotonic() - started)


def _plans_score_what_they_ought_to() -> None:
    for name in _names():
        for context in (3, 4, 16, 63, 64, 65, 400):
            sizes = [size for size in _SIZES if name == "lm-eval" or size >= context]
            if not sizes:
                continue
            texts = np.split(np.arange(1000, 1000 + sum(sizes)), np.cumsum(sizes)[:-1])
            plan = _plan(texts, name, context)
            targets = [int(t) for window in plan for t in window.targets if t != IGNORED]
            _expect(len(set(targets)) == len(targets), f"{name}: an id is scored twice")
            wanted = _wanted(name, texts, context)
            _expect(set(targets) == wanted, f"{name}, context {context}: other ids are scored")
            for window in plan:
                _expect(len(window.inputs) <= context, f"{name}: a window exceeds {context}")
                _expect(_follow(window), f"{name}: a target does not follow its input")


def _uniform_models_have_perplexity_v() -> None:
    for name in _names():
        found = score(Scorer.of_logits(lambda ids: torch.zeros(*ids.shape, _VOCAB)), _random(name))
        perplexity = math.exp(found.total_nats / found.total_targets)
        _near(perplexity, _VOCAB, f"{name}: perplexity of a uniform model")


def _bigrams_cost_their_sum() -> None:
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(_VOCAB, _VOCAB, generator=generator)
    cost = -table.double().log_softmax(dim=1)
    for name in _names():
        plan = _random(name)
        expected = sum(
            float(cost[i, t])
            for window in plan
            for i, t in zip(window.inputs.tolist(), window.targets.tolist(), strict=True)
            if t != IGNORED
        )
        found = score(Scorer.of_logits(lambda ids: table[ids]), plan)
        _near(found.total_nats, expected, f"{name}: nats of a table of bigrams")


def _the_future_is_out_of_sight() -> None:
    scorer = Scorer.of_logits(_running_sum)
    for name in _names():
        ids = _ids(sum(_SIZES))
        changed = ids.copy()
        changed[150:] = (changed[150:] + 5) % _VOCAB
        before, plan = (_plan([each], name, 32) for each in (ids, changed))
        early = plan.spans[:, 1] <= 150 + plan.protocol.starts_with_bos
        same = score(scorer, before).nats == score(scorer, plan).nats
        _expect(bool(same[early].all()), f"{name}: a score depends on later ids")
        _expect(not same[~early].any(), f"{name}: a score does not depend on its own ids")
        cut, masked = zip(*map(_first_part, plan), strict=True)
        whole, alone = score(scorer, masked).nats, score(scorer, cut).nats
        _expect(bool(np.allclose(whole, alone, rtol=1e-9)), f"{name}: a window sees its future")


def _batches_change_nothing() -> None:
    for name in _names():
        plan = _random(name)
        alone, together = (
            score(Scorer.of_logits(_running_sum), plan, batch_tokens=size).nats
            for size in (1, 10**6)
        )
        _expect(bool(np.allclose(alone, together, rtol=1e-9)), f"{name}: batches change scores")


def _a_network_has_its_own_loss() -> None:
    config = ModelConfig(
        vocab_size=128, seq_len=64, n_layers=2, d_model=48, n_heads=2, d_ff=96,
        dropout=0.0, attention_dropout=0.0,
    )  # fmt: skip
    model = Transformer(config).eval()
    for name in _names():
        plan = _random(name)
        expected = 0.0
        with torch.no_grad():
            for window in plan:
                inputs, targets = map(torch.from_numpy, (window.inputs, window.targets))
                expected += float(model(inputs[None], targets[None]))
        found = score(Scorer.of_transformer(model), plan)
        _near(found.total_nats, expected, f"{name}: a network's loss", 1e-5)


def _questions_are_answered_by_likelihood() -> None:
    ids, n_scored = encode_pair(lambda text: list(text.encode()), "ab ", "cd")
    _expect((bytes(ids), n_scored) == (b"ab cd", 3), "a pair is cut in another place")
    question = Question(contexts=("c",), choices=("four", "x"), gold=0)
    answer = Answer(question, np.array([-6.0, -2.0]), np.array([False, False]))
    _expect((answer.chosen, answer.chosen_by_length) == (1, 0), "acc or acc_norm is another")


def _texts_are_cut_as_described() -> None:
    page = " = A = \n One @-@ two , ( three ) it 's \n"
    _expect(detokenized(page) == " = A =\nOne-two, (three) it's\n", "a page is written otherwise")
    words = [f"w{n * n % 7}" for n in range(200)]
    hashes = grams_of(normalised(" ,".join(words).upper().encode())).hashes
    tuples = [tuple(words[at : at + N_WORDS]) for at in range(len(words) - N_WORDS + 1)]
    _expect(len(hashes) == len(tuples), "sequences of words are missing")
    _expect(len(set(hashes.tolist())) == len(set(tuples)), "sequences of words are mixed up")


_CHECKS: Final[dict[str, Callable[[], None]]] = {
    "plans score what they ought to, once": _plans_score_what_they_ought_to,
    "a uniform model has perplexity V": _uniform_models_have_perplexity_v,
    "a table of bigrams costs its sum": _bigrams_cost_their_sum,
    "no score depends on what comes later": _the_future_is_out_of_sight,
    "batches and padding change nothing": _batches_change_nothing,
    "a network has its own loss": _a_network_has_its_own_loss,
    "questions are answered by likelihood": _questions_are_answered_by_likelihood,
    "texts are cut as described": _texts_are_cut_as_described,
}


def _names() -> tuple[ProtocolName, ...]:
    return ("disjoint", "stride", "lm-eval", "llama.cpp")


def _plan(texts: list[Ids], name: ProtocolName, context: int) -> Plan:
    return plan_texts(texts, Protocol(name=name, context=context, bos_id=_BOS))


def _random(name: ProtocolName) -> Plan:
    texts = [_ids(size) for size in _SIZES]
    return _plan(texts, name, 32)


def _ids(n: int) -> Ids:
    return np.random.default_rng(n).integers(2, _VOCAB, n)


def _wanted(name: str, texts: list[Ids], context: int) -> set[int]:
    """The ids that a protocol scores, from its description instead of its code."""
    wanted: set[int] = set()
    for ids in texts:
        places = range(len(ids))
        if name == "disjoint":
            whole = len(ids) // context * context
            scored = [at for at in places if at < whole and at % context]
        elif name == "stride":
            scored = list(places[1:])
        elif name == "lm-eval":
            scored = list(places)
        else:  # a BOS stands before the ids
            whole = (len(ids) + 1) // context * context
            scored = [at for at in places if at + 1 < whole and (at + 1) % context > context // 2]
        wanted |= {int(ids[at]) for at in scored}
    return wanted


def _first_part(window: Window) -> tuple[Window, Window]:
    """A window cut at three quarters, and the whole with the same targets only."""
    middle = len(window.inputs) * 3 // 4
    targets = window.targets.copy()
    targets[middle:] = IGNORED
    return Window(window.inputs[:middle], targets[:middle]), Window(window.inputs, targets)


def _follow(window: Window) -> bool:
    inside = window.targets[:-1]
    return bool((inside[inside != IGNORED] == window.inputs[1:][inside != IGNORED]).all())


def _running_sum(ids: Tensor) -> Tensor:
    """Logits that depend on all ids so far and on no later one."""
    state = torch.cumsum((ids + 1).double() * 0.37, dim=1)
    return torch.sin(state[..., None] * torch.arange(1, _VOCAB + 1)).float()


def _expect(holds: bool, complaint: str) -> None:
    if not holds:
        raise EvaluationError(complaint)


def _near(found: float, expected: float, what: str, relative: float = 1e-6) -> None:
    _expect(
        math.isclose(found, expected, rel_tol=relative), f"{what} is {found}, must be {expected}"
    )
