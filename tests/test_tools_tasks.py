"""Questions: read from both layouts, asked as the harness asks them, scored by known models."""

import dataclasses
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from tools.errors import EvaluationError
from tools.evaluate import NAMES, PROTOCOLS, main
from tools.evaluation.datasets import read_questions, read_records, sha256_of_rows
from tools.evaluation.multiple_choice import (
    METRICS,
    Answer,
    encode_pair,
    evaluate_task,
    pairs_of,
    windows_of,
)
from tools.evaluation.protocols import IGNORED, PLANS
from tools.evaluation.tasks import CORPORA, TASKS, Question, TaskOptions
from tools.models.tokenizers import Vocabulary
from tools_samples import SEQ_LEN, sample_loaded, sample_tokenizer, write_run

LOCAL = {
    "lambada": "lambada_openai_test", "arc_easy": "arc_easy", "arc_challenge": "arc_challenge",
    "mmlu": "mmlu_test", "piqa": "piqa", "winogrande": "winogrande", "openbookqa": "openbook_qa",
    "boolq": "boolq",
}  # fmt: skip

pytestmark = pytest.mark.usefixtures("one_thread")
HUB_AND_LOCAL: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "arc_easy": (
        {"question": "Where?", "choices": {"text": ["a", "b"], "label": ["1", "2"]},
         "answerKey": "2"},
        {"query": "Question: Where?", "choices": ["a", "b"], "gold": 1},
    ),
    "openbookqa": (
        {"question_stem": "Frogs", "choices": {"text": ["a", "b"], "label": ["A", "B"]},
         "answerKey": " A"},
        {"query": "Frogs", "choices": ["a", "b"], "gold": 0},
    ),
    "piqa": (
        {"goal": "Cut.", "sol1": "a", "sol2": "b", "label": 1},
        {"query": "Question: Cut.\n", "choices": ["a", "b"], "gold": 1},
    ),
    "boolq": (
        {"passage": "Text.", "question": "is it", "label": 1},
        {"query": "Passage: Text.\nQuestion: is it?", "choices": ["no", "yes"], "gold": 1},
    ),
    "winogrande": (
        {"sentence": "A saw B so _ ran away.", "option1": "A", "option2": "B", "answer": "2"},
        {"context_options": ["A saw B so A", "A saw B so B"], "continuation": "ran away.",
         "gold": 1},
    ),
    "hellaswag": (
        {"activity_label": "Ski", "ctx_a": "He goes.", "ctx_b": "then he", "label": "0",
         "endings": ["falls [step] down  .", " sits [title] well."]},
        {"query": "Ski: He goes. Then he", "choices": ["falls down .", "sits. well."], "gold": 0},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HUB_AND_LOCAL)
def test_both_layouts_are_the_same_question(name: str) -> None:
    hub, local = HUB_AND_LOCAL[name]
    task = TASKS[name]
    assert task.read(hub) == task.read(local)


def test_questions_are_asked_as_the_harness_asks_them() -> None:
    def pairs(name: str, row: dict[str, Any]) -> list[tuple[str, str]]:
        return pairs_of(TASKS[name], TASKS[name].read(row), ())

    local = {name: row for name, (_, row) in HUB_AND_LOCAL.items()}
    assert pairs("arc_easy", local["arc_easy"])[1] == ("Question: Where?\nAnswer:", " b")
    assert pairs("openbookqa", local["openbookqa"])[0] == ("Frogs", " a")
    assert pairs("piqa", local["piqa"])[0] == ("Question: Cut.\nAnswer:", " a")
    assert pairs("boolq", local["boolq"])[0] == ("Text.\nQuestion: is it?\nAnswer:", " no")
    assert pairs("winogrande", local["winogrande"]) == [
        ("A saw B so A", " ran away."),
        ("A saw B so B", " ran away."),
    ]
    assert pairs("lambada", {"text": "a b c"}) == [("a b", " c")]
    row = {"question": " Why? ", "choices": ["w", "x", "y", "z"], "answer": 2, "subject": "us_law"}
    asked = "Why?\nA. w\nB. x\nC. y\nD. z\nAnswer:"
    intro = "The following are multiple choice questions (with answers) about us law.\n\n"
    assert pairs("mmlu", row)[3] == (intro + asked, " D")
    question = TASKS["mmlu"].read(row)
    shown = pairs_of(TASKS["mmlu"], question, [question, question])[0][0]
    assert shown == intro + f"{asked} C\n\n" * 2 + asked


@pytest.mark.parametrize("name", LOCAL)
def test_real_files_are_read_to_the_end(shared: Path, name: str) -> None:
    records = read_records(shared / f"eval/{LOCAL[name]}.even.jsonl", TASKS[name].table)
    questions = read_questions(TASKS[name], records)
    assert len(questions) == len(records.rows) > 100
    for question in questions:
        assert len(question.contexts) in (1, len(question.choices))
        assert 0 <= question.gold < len(question.choices)
        for before, after in pairs_of(TASKS[name], question, ()):
            assert before and after.startswith(" ")
    if len(questions[0].choices) > 1:  # no answer is right by its place alone
        places = np.bincount([question.gold for question in questions]) / len(questions)
        assert places.max() < 0.7


@given(st.text("ab .\n", max_size=20), st.text("ab .\n", min_size=1, max_size=10))
def test_a_pair_is_one_text_cut_behind_the_contexts_own_ids(before: str, after: str) -> None:
    encode = sample_tokenizer().encode
    ids, n_scored = encode_pair(encode, before, after)
    assert ids == encode(before + after)
    kept = len(ids) - n_scored
    assert kept == (len(encode(before.rstrip())) if before else 0) or n_scored == 0


def test_spaces_that_end_a_context_belong_to_the_continuation() -> None:
    ids, n_scored = encode_pair(lambda text: list(text.encode()), "ab ", "cd")
    assert (bytes(ids), n_scored) == (b"ab cd", 3)


def test_windows_end_with_the_continuation_and_lose_ids_on_the_left() -> None:
    vocabulary = Vocabulary.of(sample_tokenizer())
    pair = ("def parse_args(self, args=None", ", namespace=None):")
    ids, n_scored = encode_pair(vocabulary.encode, *pair)
    (window,), truncated, _ = windows_of(vocabulary, [pair], 100)
    assert list(window.inputs) == ids[:-1] and truncated == 0
    assert list(window.targets[-n_scored:]) == ids[-n_scored:]
    assert set(window.targets[:-n_scored].tolist()) == {IGNORED}
    (short,), truncated, _ = windows_of(vocabulary, [pair], n_scored + 2)
    assert list(short.inputs) == ids[-n_scored - 3 : -1] and truncated == 1
    (with_bos,), *_ = windows_of(vocabulary, [pair], 100, bos_id=1)
    assert list(with_bos.inputs) == [1, *ids[:-1]]
    (alone,), *_ = windows_of(vocabulary, [("", "a word")], 100)
    assert alone.inputs[0] == vocabulary.bos_id
    assert IGNORED not in alone.targets
    assert windows_of(vocabulary, [pair], n_scored)[0][0].targets.tolist() == ids[-n_scored:]
    with pytest.raises(EvaluationError, match=f"a choice of {n_scored} tokens is longer"):
        windows_of(vocabulary, [pair], n_scored - 1)
    for context, lost in ((len(ids) - 1, 0), (len(ids) - 2, 1)):  # its last id is not fed
        assert windows_of(vocabulary, [pair, pair], context)[1] == 2 * lost
    with pytest.raises(EvaluationError, match="nothing to score of '' behind 'a word'"):
        windows_of(vocabulary, [("a word", "")], 100)
    without_bos = dataclasses.replace(vocabulary, bos_id=None)
    assert windows_of(without_bos, [("", "a word")], 100)[0][0].inputs[0] == vocabulary.eos_id
    headless = dataclasses.replace(vocabulary, bos_id=None, eos_id=None)
    with pytest.raises(EvaluationError, match="neither BOS nor EOS"):
        windows_of(headless, [("", "a word")], 100)


def test_a_continuation_that_merges_with_its_context_is_encoded_alone() -> None:
    """As the harness does: one such pair ended the whole task."""
    ids = {"ab": [7], "abc": [8], "c": [9], "ab ": [7, 4], "ab c": [8], " c": [5, 6]}
    merging: Any = SimpleNamespace(encode=ids.__getitem__, bos_id=1, eos_id=2, name="merging")
    (window, spaced), _, merged = windows_of(merging, [("ab", "c"), ("ab ", "c")], 9)
    assert (window.inputs.tolist(), window.targets.tolist()) == ([7], [9])
    assert (spaced.inputs.tolist(), spaced.targets.tolist()) == ([7, 5], [5, 6])
    assert merged == 2


def test_a_choice_longer_than_the_context_is_named_with_its_row(tmp_path: Path) -> None:
    """It was scored in part, and divided by its whole length."""
    rows = [
        {"query": "Which?", "choices": ["a", "b"], "gold": 0},
        {"query": "Which?", "choices": ["a", "word " * 40], "gold": 0},
    ]
    path = tmp_path / "arc.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(EvaluationError, match=r"arc\.jsonl: row 1: a choice of \d+ tokens is long"):
        evaluate_task(sample_loaded(), TASKS["arc_easy"], TaskOptions(data=path, context=16))


@pytest.mark.parametrize("gold", [-1, 2])
def test_a_split_without_answers_is_not_scored(tmp_path: Path, gold: int) -> None:
    """Of a test split whose labels are -1 the accuracy was 0.0000."""
    path = tmp_path / "arc.jsonl"
    path.write_text(json.dumps({"query": "Which?", "choices": ["a", "b"], "gold": gold}) + "\n")
    with pytest.raises(EvaluationError, match=f"row 0 is no arc_easy question .*label {gold}"):
        evaluate_task(sample_loaded(), TASKS["arc_easy"], TaskOptions(data=path))


def test_metrics_are_those_worked_out_by_hand() -> None:
    question = Question(contexts=("c",), choices=("long answer", "x"), gold=0)
    no = np.array([False, False])
    by_sum = Answer(question, np.array([-11.0, -3.0]), no)  # a character: -1 and -3
    right = Answer(question, np.array([-1.0, -3.0]), no)
    assert (by_sum.chosen, by_sum.chosen_by_length, by_sum.is_right) == (1, 0, False)
    both = [by_sum, right, right, by_sum]
    assert METRICS["acc"](both).value == 0.5
    assert METRICS["acc"](both).stderr == pytest.approx(math.sqrt(1 / 3) / 2)
    assert METRICS["acc_norm"](both).value == 1
    word = Question(contexts=("c",), choices=(" w",), gold=0)
    written = [
        Answer(word, np.array([-nats]), np.array([greedy]))
        for nats, greedy in ((1.0, True), (3.0, False))
    ]
    assert METRICS["perplexity"](written).value == pytest.approx(math.exp(2))
    assert METRICS["acc"](written).value == 0.5
    assert METRICS["acc"](written[:1]).stderr is None
    assert METRICS["acc"](written).stderr == pytest.approx(0.5)
    assert METRICS["perplexity"](written).stderr == pytest.approx(math.exp(2))  # by the derivative
    assert METRICS["perplexity"](written[:1]).stderr is None
    letters = Question(contexts=("c",), choices=("x", "yz"), gold=1)
    assert Answer(letters, np.array([-3.0, -4.0]), no).chosen_by_length == 1


@pytest.mark.parametrize(("nats", "beyond"), [(700.0, False), (700.5, True)])
def test_a_perplexity_beyond_any_float_is_none(nats: float, beyond: bool) -> None:
    word = Question(contexts=("c",), choices=(" w",), gold=0)
    figure = METRICS["perplexity"]([Answer(word, np.array([-nats]), np.array([False]))] * 2)
    assert (figure.value is None) == (figure.stderr is None) == beyond


@pytest.fixture(scope="module")
def arc_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [
        {"query": f"Question: what is {n}", "choices": [f"it is {n}", "no", "else"], "gold": n % 3}
        for n in range(12)
    ]
    path = tmp_path_factory.mktemp("arc") / "arc.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def direct_log_likelihood(loaded: Any, before: str, after: str) -> float:
    ids = loaded.vocabulary.encode(before + after)
    n_before = len(loaded.vocabulary.encode(before))
    tokens = torch.tensor([ids])
    with torch.no_grad():
        log_p = loaded.model.logits(tokens[:, :-1]).log_softmax(dim=2)
    return sum(float(log_p[0, at - 1, ids[at]]) for at in range(n_before, len(ids)))


@pytest.mark.parametrize("num_fewshot", [0, 2])
def test_log_likelihoods_are_the_models_own(arc_file: Path, num_fewshot: int) -> None:
    loaded, task = sample_loaded(seq_len=256), TASKS["arc_easy"]
    options = TaskOptions(data=arc_file, num_fewshot=num_fewshot, limit=5)
    result = evaluate_task(loaded, task, options)
    every = read_questions(task, read_records(arc_file, task.table))
    for place, item in enumerate(result.items):
        others = [other for other in every if other != every[place]][:num_fewshot]
        expected = [
            direct_log_likelihood(loaded, *pair) for pair in pairs_of(task, every[place], others)
        ]
        assert item["log_likelihoods"] == pytest.approx(expected, abs=1e-4)
    assert (result["items"], result["truncated"]) == (5, 0)
    assert result["acc"] == np.mean([item["right"] for item in result.items])
    assert list(result.samples) == ["acc", "acc_norm"]  # what has a value for each item
    assert sum(result.samples["acc"]) == pytest.approx(result["acc"])


def test_the_answers_do_not_depend_on_the_batch_and_cut_pairs_are_counted(arc_file: Path) -> None:
    loaded, task = sample_loaded(), TASKS["arc_easy"]
    options = TaskOptions(data=arc_file, num_fewshot=3, bos="start")
    one, other = (
        evaluate_task(loaded, task, dataclasses.replace(options, batch_tokens=size))
        for size in (1, 10_000)
    )
    assert (one["context"], one["truncated"], one["bos"]) == (SEQ_LEN, 36, "start")
    for a, b in zip(one.items, other.items, strict=True):
        assert a["log_likelihoods"] == pytest.approx(b["log_likelihoods"], abs=1e-5)
    assert one.metrics == other.metrics


def test_examples_come_from_their_own_file_and_subject(tmp_path: Path) -> None:
    def row(n: int, subject: str) -> dict[str, Any]:
        return {"question": f"q{n}", "choices": ["a", "b"], "answer": n % 2, "subject": subject}

    asked, shown = tmp_path / "test.parquet", tmp_path / "dev.jsonl"
    pq.write_table(pa.Table.from_pylist([row(1, "law"), row(2, "art")]), asked)
    shown.write_text("".join(json.dumps(row(n, "law" if n % 2 else "art")) + "\n" for n in (3, 4)))
    loaded = sample_loaded(seq_len=256)
    options = TaskOptions(data=asked, fewshot_data=shown, num_fewshot=1)
    result = evaluate_task(loaded, TASKS["mmlu"], options)
    assert result["examples_from"] == "dev.jsonl"
    assert result["subjects"] == {item["subject"]: float(item["right"]) for item in result.items}
    assert [item["subject"] for item in result.items] == ["law", "art"]
    questions, examples = (
        read_questions(TASKS["mmlu"], read_records(path, TASKS["mmlu"].table))
        for path in (asked, shown)
    )
    for item, question, example in zip(result.items, questions, examples, strict=True):
        first = pairs_of(TASKS["mmlu"], question, [example])[0]
        assert item["log_likelihoods"][0] == pytest.approx(
            direct_log_likelihood(loaded, *first), abs=1e-4
        )
    with pytest.raises(EvaluationError, match="only 1 examples about law"):
        evaluate_task(
            loaded, TASKS["mmlu"], TaskOptions(data=asked, fewshot_data=shown, num_fewshot=2)
        )


def test_examples_of_the_same_split_never_show_the_question_itself(
    arc_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = dataclasses.replace(TASKS["arc_easy"], examples=TASKS["arc_easy"].table.split)
    records = read_records(arc_file, task.table)
    monkeypatch.setattr(
        "tools.evaluation.multiple_choice.read_records", lambda data, table: records
    )
    loaded = sample_loaded(seq_len=256)
    result = evaluate_task(loaded, task, TaskOptions(num_fewshot=1, limit=2))
    assert result["examples_from"] == "the first other questions of the same file"
    every = read_questions(task, records)
    for item, question, example in zip(result.items, every[:2], every[1::-1], strict=True):
        assert item["contexts"] == question.contexts
        expected = direct_log_likelihood(loaded, *pairs_of(task, question, [example])[0])
        assert item["log_likelihoods"][0] == pytest.approx(expected, abs=1e-4)


def test_what_a_model_cannot_do_is_rejected_before_it_runs(arc_file: Path) -> None:
    loaded = sample_loaded()
    with pytest.raises(EvaluationError, match="context 16,449"):
        evaluate_task(loaded, TASKS["arc_easy"], TaskOptions(data=arc_file, context=16_449))
    bare = dataclasses.replace(
        loaded, vocabulary=dataclasses.replace(loaded.vocabulary, bos_id=None)
    )
    with pytest.raises(EvaluationError, match="this tokenizer has no BOS"):
        evaluate_task(bare, TASKS["arc_easy"], TaskOptions(data=arc_file, bos="start"))


def test_pairs_are_scored_in_batches_of_the_size_asked_for(arc_file: Path) -> None:
    seen: list[tuple[int, int]] = []
    options = TaskOptions(data=arc_file, limit=2, batch_tokens=1)
    result = evaluate_task(
        sample_loaded(), TASKS["arc_easy"], options, lambda *step: seen.append(step)
    )
    assert seen == [(done, 6) for done in range(1, 7)]
    assert 0 <= result["time_s"] < 600


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"query": "q", "choices": ["a"], "gold": 1}\n', r"row 0 is no arc_easy question"),
        ('{"text": "q"}\n', r"row 0 is no arc_easy question \(KeyError: 'query'\)"),
        ("[1]\n", "line 1 is no JSON object"),
        ('{"query": \n', "line 1 is no JSON"),
        ("", "no question in it"),
    ],
)
def test_a_file_of_something_else_is_named(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(content)
    with pytest.raises(EvaluationError, match=words) as error:
        read_questions(TASKS["arc_easy"], read_records(path, TASKS["arc_easy"].table))
    assert "data.jsonl" in str(error.value)


def test_names_are_the_same_everywhere() -> None:
    assert set(NAMES) == {*CORPORA, "heldout", *TASKS}
    assert list(PROTOCOLS) == list(PLANS)
    with pytest.raises(EvaluationError, match="name a"):
        read_records(Path("a.txt"), TASKS["piqa"].table)


def test_the_digest_is_the_rows_own(tmp_path: Path) -> None:
    rows = ({"b": 1, "a": "ü"},)
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(rows[0], indent=None) + "\n\n")
    table = TASKS["piqa"].table
    assert sha256_of_rows(read_records(path, table).rows) == sha256_of_rows(rows)
    pq.write_table(pa.Table.from_pylist(list(rows)), tmp_path / "x.parquet")
    assert sha256_of_rows(read_records(tmp_path / "x.parquet", table).rows) == sha256_of_rows(rows)


def test_the_command_scores_tasks_and_writes_items_and_cards(
    tmp_path: Path, arc_file: Path
) -> None:
    run, items, card = tmp_path / "run", tmp_path / "items.jsonl", tmp_path / "card.md"
    write_run(run, steps=(2,))
    arguments = ["arc_easy", "arc_challenge", "--run", run, "--data", arc_file, "--limit", 7]
    result = CliRunner().invoke(
        main, [*map(str, arguments), "--log-items", str(items), "--card", str(card)]
    )
    assert result.exit_code == 0, result.output
    assert re.search(r"acc_norm +0\.\d+ ± ", result.stdout)
    assert "0-shot, context 32, BOS never" in result.stdout
    logged = [json.loads(line) for line in items.read_text().splitlines()]
    assert [(line["task"], line["item"]) for line in logged][6:8] == [
        ("arc_easy", 6),
        ("arc_challenge", 0),
    ]
    assert all(len(line["log_likelihoods"]) == 3 for line in logged)
    assert card.read_text().startswith("## arc_easy\n\n```\narc_easy: ")
    card = tmp_path / "card.json"
    arguments[0:2] = ["arc_easy"]
    result = CliRunner().invoke(main, [*map(str, arguments), "--json", "--card", str(card)])
    printed = json.loads(result.stdout)
    assert printed["metrics"]["acc"]["value"] == np.mean([line["right"] for line in logged[:7]])
    assert json.loads(card.read_text())[0]["metrics"] == printed["metrics"]
    result = CliRunner().invoke(main, [*map(str, arguments), "--card", "card.txt"])
    assert result.exit_code == 2 and "name a .md or a .json file" in result.stderr
