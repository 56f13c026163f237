"""Scores against a second computation of them: plain Python, fp64, one fed prefix at a time.

The reference says for every scored token what the model has been fed before it, asks the model for
the logits behind that prefix alone, and adds up. It knows texts, tokens and the model's logits, and
shares no code with plans, batches, the scorer or the questions.
"""

import functools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch

from tools.evaluation.cards import Metric, Result
from tools.evaluation.multiple_choice import evaluate_task
from tools.evaluation.perplexity import measure_perplexity
from tools.evaluation.protocols import Protocol
from tools.evaluation.tasks import TASKS, TaskOptions
from tools.evaluation.wikitext import from_raw
from tools.models.loading import LoadedModel
from tools_samples import sample_loaded, sample_tokenizer

BOS, CONTEXT = 1, 12
RAW = (
    " \n = Größe = \n \n Zwei Wörter , drei ; 日本語 @-@ Text . \n \n = = 節 = = \n \n naïve café\n"
    " = Zweite = \n \n ( Seite ) it 's 🙂 \n"
)
JOINED = (
    "\n\n = Größe = \n\n\n\n\n Zwei Wörter , drei ; 日本語 @-@ Text . \n\n\n\n\n = = 節 = = \n"
    "\n\n\n\n naïve café\n\n\n = Zweite = \n\n\n\n\n ( Seite ) it 's 🙂 \n"
)
PAGES = (
    " = Größe = \n \n Zwei Wörter , drei ; 日本語 @-@ Text . \n \n = = 節 = = \n \n naïve café",
    " = Zweite = \n \n ( Seite ) it 's 🙂 \n",
)
DETOKENIZED = (
    " = Größe =\n\nZwei Wörter, drei; 日本語-Text.\n\n== 節 ==\n\nnaïve café",
    " = Zweite =\n\n(Seite) it's 🙂\n",
)

pytestmark = pytest.mark.usefixtures("one_thread")
Target = tuple[tuple[int, ...], int]  # what is fed, and the token to predict behind it


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return sample_loaded(seq_len=64)


@functools.cache
def pieces() -> Any:
    return sentencepiece.SentencePieceProcessor(model_proto=sample_tokenizer().model)


def n_bytes(number: int) -> int:
    """Bytes of text that an id stands for."""
    if pieces().is_control(number) or pieces().is_unknown(number):
        return 0
    spelled = pieces().id_to_piece(number)
    return 1 if pieces().is_byte(number) else len(spelled.replace("▁", " ").encode())


def nats_of(loaded: LoadedModel, target: Target) -> float:
    """-log softmax of the logits behind the prefix, in fp64."""
    with torch.inference_mode():
        logits = loaded.model.logits(torch.tensor([target[0]]))[0, -1].double().numpy()
    shifted = logits - logits.max()
    return float(np.log(np.exp(shifted).sum()) - shifted[target[1]])


# ---- protocols: the windows of a text, each as a list of its targets


def behind(fed: Sequence[int], first: int) -> list[Target]:
    """Each id of a window from place `first` on, behind all that stand before it."""
    return [(tuple(fed[:place]), fed[place]) for place in range(first, len(fed))]


def disjoint(ids: list[int], bos: str) -> list[list[Target]]:
    stream = [BOS, *ids] if bos == "start" else ids
    front = [BOS] if bos == "window" else []
    room = CONTEXT - len(front)
    whole = range(0, len(stream) - room + 1, room)
    return [behind(front + stream[at : at + room], 1) for at in whole]


def stride(ids: list[int], bos: str, step: int = CONTEXT // 2) -> list[list[Target]]:
    stream = [BOS, *ids] if bos == "start" else ids
    front = [BOS] if bos == "window" else []
    room = CONTEXT - len(front)
    windows, at, done = [], 0, 1  # the stream's first id is never scored
    while done < len(stream):
        fed = front + stream[at : at + room]
        windows.append(behind(fed, done - at + len(front)))
        at, done = at + step, at + len(fed) - len(front)
    return windows


def lm_eval(pages: list[list[int]]) -> list[list[Target]]:
    windows = []
    for page in pages:
        stream = [BOS, *page]
        for first in range(1, len(stream), CONTEXT):
            last = min(first + CONTEXT, len(stream))  # one behind the window's last target
            begin = max(0, last - 1 - CONTEXT)  # so that CONTEXT ids are fed
            windows.append(behind(stream[begin:last], first - begin))
    return windows


def llama_cpp(ids: list[int], bos: str) -> list[list[Target]]:
    stream = [BOS, *ids] if bos == "window" else ids
    windows = []
    for at in range(0, len(stream) - CONTEXT + 1, CONTEXT):
        chunk = stream[at : at + CONTEXT]
        windows.append(behind([BOS, *chunk[1:]] if bos == "window" else chunk, CONTEXT // 2 + 1))
    return windows


def check(
    loaded: LoadedModel, result: Result, windows: list[list[Target]], ids: list[int], raw: str
) -> None:
    """Every figure of a result, from the windows' targets, the text's ids and the raw text."""
    nats = [[nats_of(loaded, target) for target in window] for window in windows]
    sums, sizes = np.array([sum(each) for each in nats]), np.array([len(each) for each in nats])
    total, n = float(sums.sum()), int(sizes.sum())
    scored = sum(n_bytes(target) for window in windows for _, target in window)
    share = scored / sum(map(n_bytes, ids))
    words, size = share * result["text_words"], share * len(raw.encode())
    spread = ((sums - sizes * total / n) ** 2).sum() * len(windows) / (len(windows) - 1)
    error = math.sqrt(spread) / n
    found = result.to_json()
    counts = [found[name] for name in ("windows", "scored_tokens", "text_tokens")]
    assert counts == [len(nats), n, len(ids)]
    assert (found["text_words"], found["text_bytes"]) == (len(RAW.split()), len(RAW.encode()))
    figures = {
        "nats": total,
        "scored_share": share,
        "scored_bytes": size,
        "token_perplexity": math.exp(total / n),
        "word_perplexity": math.exp(total / result["scored_words"]),
        "byte_perplexity": math.exp(total / size),
        "bits_per_byte": total / math.log(2) / size,
        "token_perplexity_error": error * math.exp(total / n),
        "bits_per_byte_error": error * n / math.log(2) / size,
    }
    for name, value in figures.items():
        assert found[name] == pytest.approx(value, rel=2e-5), name
    if result["protocol"] != "lm-eval":
        assert result["scored_words"] == pytest.approx(words)


def run(loaded: LoadedModel, name: Any, bos: Any, **changes: Any) -> Result:
    protocol = Protocol(name=name, context=CONTEXT, bos=bos, bos_id=BOS, **changes)
    return measure_perplexity(loaded, from_raw(RAW), protocol, batch_tokens=40)


@pytest.mark.parametrize("bos", ["never", "start", "window"])
def test_disjoint(loaded: LoadedModel, bos: str) -> None:
    ids = pieces().encode(JOINED)
    check(loaded, run(loaded, "disjoint", bos), disjoint(ids, bos), ids, RAW)


@pytest.mark.parametrize(("bos", "step"), [("never", None), ("start", 1), ("window", 7)])
def test_stride(loaded: LoadedModel, bos: str, step: int | None) -> None:
    ids = pieces().encode(JOINED)
    windows = stride(ids, bos, step or CONTEXT // 2)
    check(loaded, run(loaded, "stride", bos, stride=step), windows, ids, RAW)


@pytest.mark.parametrize("bos", ["never", "window"])
def test_llama_cpp(loaded: LoadedModel, bos: str) -> None:
    ids = pieces().encode(RAW[:-1])
    check(loaded, run(loaded, "llama.cpp", bos), llama_cpp(ids, bos), ids, RAW)


def test_lm_eval(loaded: LoadedModel) -> None:
    pages = [pieces().encode(page) for page in DETOKENIZED]
    result = run(loaded, "lm-eval", "start")
    check(loaded, result, lm_eval(pages), [number for page in pages for number in page],
          "".join(PAGES))  # fmt: skip
    assert result["scored_words"] == len(RAW.split()) + 3  # empty ones where a page begins or ends


def test_a_limit_of_lm_eval_is_one_of_pages(loaded: LoadedModel) -> None:
    protocol = Protocol(name="lm-eval", context=CONTEXT, bos_id=BOS)
    page = pieces().encode(DETOKENIZED[0])
    result = measure_perplexity(loaded, from_raw(RAW), protocol, limit=1)
    check(loaded, result, lm_eval([page]), page, PAGES[0])


# ---- questions: log-likelihoods, acc, acc_norm

ROWS: list[dict[str, Any]] = [
    {"query": f"Question: {n} größer", "choices": [two_bytes, one_byte], "gold": int(n % 3 > 0)}
    for n, (two_bytes, one_byte) in enumerate(zip("éßüñжåøλ", "zqxJKQZ%", strict=True))
]


def answered(loaded: LoadedModel, row: dict[str, Any]) -> list[float]:
    """The log-likelihood of each choice behind the question."""
    found = []
    before = f"{row['query']}\nAnswer:"
    n_before = len(pieces().encode(before))
    for choice in row["choices"]:
        ids = pieces().encode(f"{before} {choice}")
        found.append(-sum(nats_of(loaded, target) for target in behind(ids, n_before)))
    return found


def share_right(verdicts: list[bool]) -> tuple[float, float]:
    """The share and its standard error."""
    share = sum(verdicts) / len(verdicts)
    return share, math.sqrt(share * (1 - share) / (len(verdicts) - 1))


def test_acc_norm_divides_by_characters_not_by_bytes(loaded: LoadedModel, tmp_path: Path) -> None:
    """As lm-evaluation-harness does: `len` of the continuation, without the space before it."""
    path = tmp_path / "arc.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    likelihoods = [answered(loaded, row) for row in ROWS]

    def verdicts(length: Any) -> list[bool]:
        chosen = [
            max(range(len(each)), key=lambda at: each[at] / length(row["choices"][at]))
            for each, row in zip(likelihoods, ROWS, strict=True)
        ]
        return [place == row["gold"] for place, row in zip(chosen, ROWS, strict=True)]

    result = evaluate_task(loaded, TASKS["arc_easy"], TaskOptions(data=path))
    for item, expected in zip(result.items, likelihoods, strict=True):
        assert item["log_likelihoods"] == pytest.approx(expected, rel=2e-5)
    for name, length in (("acc", lambda _: 1), ("acc_norm", len)):
        assert isinstance(result.metrics[name], Metric)
        assert result.metrics[name] == pytest.approx(share_right(verdicts(length)))
    others = [lambda choice: len(choice.encode()), lambda choice: len(pieces().encode(choice))]
    for other in others:  # the rows tell the rules apart
        assert sum(verdicts(other)) != sum(verdicts(len))
