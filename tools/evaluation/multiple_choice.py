"""Questions -> windows of tokens -> the scorer -> accuracies. One way for every task.

A pair of texts is encoded as the harness does it: context and continuation as one text, of which
the tokens beyond those of the context alone are scored; spaces that end the context go over to the
continuation, which is encoded alone where it has no token of its own in the whole. Too long a pair
loses tokens of its context. Then, over the choices of a question,

    acc        the continuation with the highest log-likelihood is the right one
    acc_norm   the same after division by the continuation's length in characters
    perplexity exp of the mean negative log-likelihood (tasks with a single continuation, whose
               acc is the share that greedy decoding would have written)
"""

import functools
import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from tools.errors import EvaluationError
from tools.evaluation.cards import Metric, Result
from tools.evaluation.datasets import read_questions, read_records, sha256_of_rows
from tools.evaluation.protocols import IGNORED, Window
from tools.evaluation.scoring import Progress, Scorer, check_context, score
from tools.evaluation.tasks import Question, Task, TaskOptions
from tools.models.loading import LoadedModel
from tools.models.tokenizers import Vocabulary


class PairError(EvaluationError):
    """A pair, by its number, that cannot be scored."""

    def __init__(self, number: int, text: str) -> None:
        super().__init__(text)
        self.number = number


class Answer(NamedTuple):
    """What the model made of one question: log-likelihood of each choice, and whether greedy."""

    question: Question
    log_likelihoods: npt.NDArray[np.float64]
    greedy: npt.NDArray[np.bool_]

    @property
    def chosen(self) -> int:
        """The choice with the highest log-likelihood."""
        return int(np.argmax(self.log_likelihoods))

    @property
    def chosen_by_length(self) -> int:
        """The choice with the highest log-likelihood a character."""
        lengths = np.array([max(1, len(choice)) for choice in self.question.choices])
        return int(np.argmax(self.log_likelihoods / lengths))

    @property
    def is_right(self) -> bool:
        """Whether the right one was chosen, or where there is but one, is greedy."""
        if len(self.question.choices) == 1:
            return bool(self.greedy[0])
        return self.chosen == self.question.gold

    def to_json(self) -> dict[str, Any]:
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
    loaded: LoadedModel, task: Task, options: TaskOptions, progress: Progress | None = None
) -> Result:
    """The model's score on a task; the items are its answers to the questions, in order."""
    context = options.context or loaded.trained_context
    check_context(loaded, context)
    started = time.monotonic()
    records = read_records(options.data, task.table)
    every = read_questions(task, records)
    questions = every[: options.limit]
    examples, examples_from = _examples(task, options, every)
    pairs = [pair for q in questions for pair in pairs_of(task, q, examples(q))]
    bos_id = loaded.vocabulary.bos_id if options.bos in ("start", "window") else None
    if bos_id is None and options.bos in ("start", "window"):
        raise EvaluationError("bos 'start': this tokenizer has no BOS; choose never")
    numbers = [number for number, q in enumerate(questions) for _ in q.choices]
    try:
        windows, truncated, merged = windows_of(loaded.vocabulary, pairs, context, bos_id)
    except PairError as error:
        where = f"{records.where}: row {numbers[error.number]}"
        raise EvaluationError(f"{where}: {error}") from error
    scorer = Scorer.of(loaded)
    scored = score(scorer, windows, batch_tokens=options.batch_tokens, progress=progress)
    ends = np.cumsum([len(question.choices) for question in questions])[:-1]
    shares = np.split(-scored.nats, ends), np.split(scored.greedy, ends)
    answers = list(map(Answer, questions, *shares))
    settings = {
        "subjects": _by_subject(answers),
        "items": len(questions),
        "num_fewshot": options.num_fewshot,
        "examples_from": examples_from,
        "context": context,
        "bos": "never" if bos_id is None else "start",
        "truncated": truncated,
        "merged": merged,
        "data": records.where,
        "items_sha256": sha256_of_rows(records.rows[: options.limit]),
        "limit": options.limit,
        "time_s": time.monotonic() - started,
    }
    return Result(
        task=task.name,
        metrics={name: METRICS[name](answers) for name in task.metrics},
        settings=settings,
        model=loaded.describe(),
        grouped=True,
        notes=_notes(settings),
        samples={
            name: [value / len(answers) for value in SAMPLES[name](answers)]
            for name in task.metrics
            if name in SAMPLES
        },
        items=[{"item": number, **answer.to_json()} for number, answer in enumerate(answers)],
    )


def pairs_of(task: Task, question: Question, examples: Sequence[Question]) -> list[tuple[str, str]]:
    """Context and continuation of each choice of a question, behind the examples."""
    shown = "".join(f"{example.with_answer()}\n\n" for example in examples)
    before = task.description(question.subject) + shown
    return [
        (before + question.context(number), task.delimiter + choice)
        for number, choice in enumerate(question.choices)
    ]


def windows_of(
    vocabulary: Vocabulary,
    pairs: Sequence[tuple[str, str]],
    context: int,
    bos_id: int | None = None,
) -> tuple[list[Window], int, int]:
    """A window for each pair, how many lost tokens of their context, and how many continuations
    were encoded alone. PairError for one that is empty, or longer than a window.

    `bos_id` goes in front of every pair. An empty context becomes BOS in any case (EOS where the
    vocabulary has none), for the first scored token needs an input.
    """
    encode = functools.lru_cache(maxsize=64)(vocabulary.encode)  # contexts come back
    in_front = [bos_id, vocabulary.bos_id, vocabulary.eos_id]
    windows, truncated, merged = [], 0, 0
    for number, (before, after) in enumerate(pairs):
        ids, n_scored = encode_pair(encode, before, after)
        if not n_scored:  # its text is part of the context's last token
            merged += 1
            kept = before.rstrip()
            alone = encode(before[len(kept) :] + after)
            ids, n_scored = [*encode(kept), *alone], len(alone)
        if not n_scored:
            raise PairError(number, f"nothing to score of {after!r} behind {before[-40:]!r}")
        if n_scored > context:
            raise PairError(
                number, f"a choice of {n_scored} tokens is longer than the context of {context}: "
                "give a longer --context"
            )  # fmt: skip
        if bos_id is not None or not before:
            first = next((number for number in in_front if number is not None), None)
            if first is None:
                raise EvaluationError(
                    f"{vocabulary.name} has neither BOS nor EOS to put before a text"
                )
            ids = [first, *ids]
        truncated += len(ids) > context + 1
        windows.append(pair_window(ids, n_scored, context))
    return windows, truncated, merged


def pair_window(ids: Sequence[int], n_scored: int, context: int) -> Window:
    """The window of a pair's tokens: the last `n_scored` are targets, at most `context` inputs."""
    kept = np.array(ids[-(context + 1) :], np.int64)
    targets = kept[1:].copy()
    targets[: max(0, len(targets) - n_scored)] = IGNORED
    return Window(kept[:-1], targets)


def encode_pair(
    encode: Callable[[str], Sequence[int]], before: str, after: str
) -> tuple[list[int], int]:
    """The tokens of both texts as one, and how many, at the end, belong to the second."""
    if not before:
        ids = list(encode(after))
        return ids, len(ids)
    kept = before.rstrip()
    ids = list(encode(before + after))
    return ids, max(0, len(ids) - len(encode(kept)))


def _examples(
    task: Task, options: TaskOptions, questions: Sequence[Question]
) -> tuple[Callable[[Question], Sequence[Question]], str]:
    """The examples for a question, the first of its subject, and where they are from."""
    n = options.num_fewshot
    if not n:
        return (lambda _: ()), ""
    own = options.fewshot_data is None and (
        options.data is not None or task.examples == task.table.split
    )
    if own:
        pool, where = questions, "the first other questions of the same file"
    else:
        table = task.table._replace(split=task.examples)
        records = read_records(options.fewshot_data, table)
        pool, where = read_questions(task, records), records.where
    by_subject: dict[str, list[Question]] = defaultdict(list)
    for candidate in pool:
        by_subject[candidate.subject].append(candidate)

    def choose(question: Question) -> Sequence[Question]:
        same = by_subject[question.subject]
        chosen = list(islice((other for other in same if not own or other != question), n))
        if len(chosen) < n:
            about = f" about {question.subject}" if question.subject else ""
            raise EvaluationError(
                f"--num-fewshot {n}: only {len(chosen)} examples{about} in {where}: ask for fewer"
            )
        return chosen

    return choose, where


def _notes(found: Mapping[str, Any]) -> list[str]:
    examples = f" (examples: {found['examples_from']})" if found["num_fewshot"] else ""
    cut = f", {found['truncated']:,} pairs cut on the left" if found["truncated"] else ""
    cut += f", {found['merged']:,} continuations encoded alone" if found["merged"] else ""
    return [
        f"asked     {found['num_fewshot']}-shot{examples}, context {found['context']:,}, "
        f"BOS {found['bos']}{cut}",
        f"items     {found['items']:,}{' (a limit)' if found['limit'] else ''} of "
        f"{found['data']}; sha256 {found['items_sha256']}",
    ]


def _mean(values: Sequence[float]) -> Metric:
    """A mean with the standard error of a sample's."""
    if len(values) < 2:
        return Metric(float(values[0]), None)
    stderr = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return Metric(float(np.mean(values)), stderr)


def _perplexity(answers: Sequence[Answer]) -> Metric:
    """exp of the mean; its standard error by the derivative."""
    mean = _mean([-float(answer.log_likelihoods[0]) for answer in answers])
    if mean.value is None or mean.value > 700:
        return Metric(None, None)
    value = math.exp(mean.value)
    return Metric(value, None if mean.stderr is None else value * mean.stderr)


SAMPLES: Final[Mapping[str, Callable[[Sequence[Answer]], list[float]]]] = {
    "acc": lambda answers: [float(each.is_right) for each in answers],
    "acc_norm": lambda answers: [
        float(each.chosen_by_length == each.question.gold) for each in answers
    ],
}
"""Of metrics that are means: the value of each answer."""

METRICS: Final[Mapping[str, Callable[[Sequence[Answer]], Metric]]] = {
    "acc": lambda answers: _mean(SAMPLES["acc"](answers)),
    "acc_norm": lambda answers: _mean(SAMPLES["acc_norm"](answers)),
    "perplexity": _perplexity,
}


def _by_subject(answers: Sequence[Answer]) -> dict[str, float]:
    """The accuracy in each subject, where there are subjects."""
    right: dict[str, list[float]] = defaultdict(list)
    for answer in answers:
        if answer.question.subject:
            right[answer.question.subject].append(float(answer.is_right))
    return {subject: float(np.mean(values)) for subject, values in sorted(right.items())}
