"""Questions -> plans over ids -> the scorer -> accuracies. One way for every task.

A pair of texts is encoded as the harness does it: context and continuation as one text, of which
the ids beyond those of the context alone are scored; spaces that end the context go over to the
continuation. Too long a pair loses ids on the left. Then, over the choices of a question,

    acc        the continuation with the highest log-likelihood is the right one
    acc_norm   the same after division by the continuation's length in characters
    perplexity exp of the mean negative log-likelihood (tasks with a single continuation, whose
               acc is the share that the model would have written itself)
"""

from __future__ import annotations

import functools
import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tools.errors import EvaluationError
from tools.evaluation.datasets import read_records, sha256_of_rows
from tools.evaluation.perplexity import refuse_context
from tools.evaluation.protocols import IGNORED, Window
from tools.evaluation.scoring import Progress, Scored, Scorer, score
from tools.evaluation.tasks import Question, Task, read_questions
from tools.models.loading import LoadedModel
from tools.models.vocabulary import Vocabulary

Encode = Callable[[str], Sequence[int]]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How a task is put: examples before each question, where they and the questions are from.

    Without `examples` they are the Hub's, or for a local `data` its own first other questions.
    """

    data: Path | None = None
    examples: Path | None = None
    num_fewshot: int = 0
    limit: int | None = None
    context: int | None = None
    with_bos: bool = False


@dataclass(frozen=True)
class Figure:
    """A measured value and its standard error, None where there is none."""

    value: float | None
    error: float | None


@dataclass(frozen=True, kw_only=True)
class TaskScore:
    """A model's score on a task. `truncated` counts pairs that lost ids on the left."""

    task: str
    metrics: dict[str, Figure]
    subjects: dict[str, float]
    items: int
    num_fewshot: int
    examples_from: str
    context: int
    bos: str
    truncated: int
    data: str
    items_sha256: str
    limit: int | None
    model: dict[str, object]
    time_s: float

    def to_json(self) -> dict[str, object]:
        """All figures under their names."""
        return asdict(self)


@dataclass(frozen=True)
class Answer:
    """What the model made of one question: log-likelihood and greediness of each choice."""

    question: Question
    log_likelihoods: npt.NDArray[np.float64]
    greedy: npt.NDArray[np.bool_]

    @property
    def chosen(self) -> int:
        """The likeliest choice."""
        return int(np.argmax(self.log_likelihoods))

    @property
    def chosen_by_length(self) -> int:
        """The choice with the highest log-likelihood a character."""
        lengths = np.array([max(1, len(choice)) for choice in self.question.choices])
        return int(np.argmax(self.log_likelihoods / lengths))

    @property
    def is_right(self) -> bool:
        """Whether the right one was chosen, or where there is but one, written greedily."""
        if len(self.question.choices) == 1:
            return bool(self.greedy[0])
        return self.chosen == self.question.gold

    def to_json(self) -> dict[str, object]:
        """The item for a log."""
        return {
            "contexts": self.question.contexts,
            "choices": self.question.choices,
            "gold": self.question.gold,
            "log_likelihoods": self.log_likelihoods.tolist(),
            "greedy": self.greedy.tolist(),
            "right": self.is_right,
            **({"subject": self.question.subject} if self.question.subject else {}),
        }


def evaluate_task(
    loaded: LoadedModel,
    task: Task,
    setting: Setting,
    *,
    batch_tokens: int = 8192,
    progress: Progress | None = None,
) -> tuple[TaskScore, list[Answer]]:
    """The model's score on a task, and its answer to each question (the first `limit`)."""
    context = setting.context or loaded.trained_context
    refuse_context(loaded, context)
    started = time.monotonic()
    records = read_records(setting.data, task.table)
    every = read_questions(task, records)
    questions = every[: setting.limit]
    examples, examples_from = _examples(task, setting, every)
    pairs = [pair for q in questions for pair in pairs_of(task, q, examples(q))]
    bos_id = _bos(loaded, setting)
    windows, truncated = compile_pairs(loaded.vocabulary, pairs, context, bos_id)
    scored = score(Scorer.of(loaded), windows, batch_tokens=batch_tokens, progress=progress)
    answers = _answers(questions, scored)
    result = TaskScore(
        task=task.name,
        metrics={name: METRICS[name](answers) for name in task.metrics},
        subjects=_by_subject(answers),
        items=len(questions),
        num_fewshot=setting.num_fewshot,
        examples_from=examples_from,
        context=context,
        bos="never" if bos_id is None else "start",
        truncated=truncated,
        data=records.where,
        items_sha256=sha256_of_rows(records.rows[: setting.limit]),
        limit=setting.limit,
        model=loaded.describe(),
        time_s=time.monotonic() - started,
    )
    return result, answers


def pairs_of(task: Task, question: Question, examples: Sequence[Question]) -> list[tuple[str, str]]:
    """Context and continuation of each choice of a question, behind solved examples."""
    shown = "".join(f"{example.solved()}\n\n" for example in examples)
    before = task.introduce(question.subject) + shown
    return [
        (before + question.context(place), task.delimiter + choice)
        for place, choice in enumerate(question.choices)
    ]


def compile_pairs(
    vocabulary: Vocabulary,
    pairs: Sequence[tuple[str, str]],
    context: int,
    bos_id: int | None = None,
) -> tuple[list[Window], int]:
    """A window for each pair, and how many of them lost ids on the left.

    `bos_id` goes in front of every pair. An empty context becomes BOS in any case (EOS where the
    vocabulary has none), for something must stand before the first scored id.
    """
    encode: Encode = functools.lru_cache(maxsize=64)(vocabulary.encode)  # contexts come back
    windows, truncated = [], 0
    for before, after in pairs:
        ids, n_scored = encode_pair(encode, before, after)
        if not n_scored:
            raise EvaluationError(f"nothing is left to score of {after!r} behind {before[-40:]!r}")
        if bos_id is not None or not before:
            ids = [_first_id(vocabulary) if bos_id is None else bos_id, *ids]
        truncated += len(ids) > context + 1
        windows.append(pair_window(ids, n_scored, context))
    return windows, truncated


def pair_window(ids: Sequence[int], n_scored: int, context: int) -> Window:
    """The window of a pair's ids, the last `n_scored` as targets, `context` fed at most."""
    kept = np.array(ids[-(context + 1) :], np.int64)
    targets = kept[1:].copy()
    targets[: max(0, len(targets) - n_scored)] = IGNORED
    return Window(kept[:-1], targets)


def encode_pair(encode: Encode, before: str, after: str) -> tuple[list[int], int]:
    """The ids of both texts as one, and how many of them, at the end, belong to the second."""
    if not before:
        ids = list(encode(after))
        return ids, len(ids)
    kept = before.rstrip()
    whole = list(encode(before + after))
    return whole, max(0, len(whole) - len(encode(kept)))


def _first_id(vocabulary: Vocabulary) -> int:
    """What stands before a text: BOS, or EOS where there is none."""
    for number in (vocabulary.bos_id, vocabulary.eos_id):
        if number is not None:
            return number
    raise EvaluationError(f"{vocabulary.name} has neither BOS nor EOS to put before a text")


def _answers(questions: Sequence[Question], scored: Scored) -> list[Answer]:
    ends = np.cumsum([len(question.choices) for question in questions])[:-1]
    shares = zip(np.split(-scored.nats, ends), np.split(scored.greedy, ends), strict=True)
    return [Answer(q, *share) for q, share in zip(questions, shares, strict=True)]


def _examples(
    task: Task, setting: Setting, questions: Sequence[Question]
) -> tuple[Callable[[Question], Sequence[Question]], str]:
    """The solved examples for a question, and where they are from: the first of its subject."""
    n = setting.num_fewshot
    if not n:
        return (lambda _: ()), ""
    own = setting.examples is None and (
        setting.data is not None or task.examples == task.table.split
    )
    if own:
        pool, where = questions, "the first other questions of the same file"
    else:
        records = read_records(setting.examples, task.example_table)
        pool, where = read_questions(task, records), records.where
    by_subject: dict[str, list[Question]] = defaultdict(list)
    for candidate in pool:
        by_subject[candidate.subject].append(candidate)

    def choose(question: Question) -> Sequence[Question]:
        first = by_subject[question.subject][: n + own]
        chosen = [other for other in first if not own or other != question][:n]
        if len(chosen) < n:
            about = f" about {question.subject}" if question.subject else ""
            raise EvaluationError(
                f"--num-fewshot {n}: only {len(chosen)} examples{about} in {where}: ask for fewer"
            )
        return chosen

    return choose, where


def _bos(loaded: LoadedModel, setting: Setting) -> int | None:
    if setting.with_bos and loaded.vocabulary.bos_id is None:
        raise EvaluationError("bos 'start': this tokenizer has no BOS; choose never")
    return loaded.vocabulary.bos_id if setting.with_bos else None


def _mean(values: Sequence[float]) -> Figure:
    """A mean with the standard error of a sample's."""
    if len(values) < 2:
        return Figure(float(values[0]), None)
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return Figure(float(np.mean(values)), error)


def _accuracy(answers: Sequence[Answer]) -> Figure:
    return _mean([float(answer.is_right) for answer in answers])


def _accuracy_by_length(answers: Sequence[Answer]) -> Figure:
    return _mean([float(answer.chosen_by_length == answer.question.gold) for answer in answers])


def _perplexity(answers: Sequence[Answer]) -> Figure:
    """exp of the mean; its standard error by the derivative."""
    mean = _mean([-float(answer.log_likelihoods[0]) for answer in answers])
    if mean.value is None or mean.value > 700:
        return Figure(None, None)
    value = math.exp(mean.value)
    return Figure(value, None if mean.error is None else value * mean.error)


METRICS: Mapping[str, Callable[[Sequence[Answer]], Figure]] = {
    "acc": _accuracy,
    "acc_norm": _accuracy_by_length,
    "perplexity": _perplexity,
}


def _by_subject(answers: Sequence[Answer]) -> dict[str, float]:
    """The accuracy in each subject, where there are subjects."""
    right: dict[str, list[float]] = defaultdict(list)
    for answer in answers:
        if answer.question.subject:
            right[answer.question.subject].append(float(answer.is_right))
    return {subject: float(np.mean(values)) for subject, values in sorted(right.items())}
