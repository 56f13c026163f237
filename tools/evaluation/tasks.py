r"""The tasks: where their questions come from, how they are put, and what is counted.

The definitions are those of lm-evaluation-harness 0.4, so that figures can be laid side by side:
a question is a context and several continuations, or several contexts and one continuation
(WinoGrande); the likeliest pair is the answer. Each reader takes the rows of the data set on the
Hub, and of the local layout that evaluation suites pass around (`query`, `choices`, `gold`).

    arc_easy     "Question: Meiosis is a type of ...\nAnswer:"    " brain cells" | " bone cells" ...
    winogrande   "... so Sarah" | "... so Maria"                  " always got the easier cases."
    lambada      all words but the last                           " signs", by itself
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from tools.errors import EvaluationError
from tools.evaluation.datasets import HubTable, Record, Records

_TITLE: Final = re.compile(r" \[title\]")
_BRACKETED: Final = re.compile(r"\[.*?\]")


@dataclass(frozen=True, kw_only=True)
class Question:
    """What a model is asked. One context for all choices, or one for each; `gold` is a choice."""

    contexts: tuple[str, ...]
    choices: tuple[str, ...]
    gold: int
    subject: str = ""

    def context(self, choice: int) -> str:
        """The context in front of a choice."""
        return self.contexts[choice if len(self.contexts) > 1 else 0]

    def solved(self) -> str:
        """The question with its answer, as an example for others."""
        return f"{self.context(self.gold)} {self.choices[self.gold]}"


@dataclass(frozen=True)
class Task:
    """One task. `examples` is the split that few-shot examples are taken from, in order.

    `delimiter` stands between context and choice; `introduce` makes the line that comes first.
    """

    name: str
    table: HubTable
    examples: str
    read: Callable[[Record], Question]
    metrics: tuple[str, ...] = ("acc", "acc_norm")
    delimiter: str = " "
    introduce: Callable[[str], str] = lambda _: ""

    @property
    def example_table(self) -> HubTable:
        """Where few-shot examples come from on the Hub."""
        return HubTable(self.table.dataset, self.table.config, self.examples)


def read_questions(task: Task, records: Records) -> list[Question]:
    """The questions in a set's rows; EvaluationError names a row that holds none."""
    questions = []
    for number, row in enumerate(records.rows):
        try:
            question = task.read(row)
            question.choices[question.gold]
        except (KeyError, ValueError, IndexError, TypeError, AttributeError) as error:
            raise EvaluationError(
                f"{records.where}: row {number} is no {task.name} question "
                f"({type(error).__name__}: {error}): name a file of {task.table}"
            ) from error
        questions.append(question)
    if not questions:
        raise EvaluationError(f"{records.where}: no question in it: name a file of {task.table}")
    return questions


def find_task(name: str) -> Task:
    """The task of that name; EvaluationError with the nearest names if there is none."""
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, n=3) or list(TASKS)
        raise EvaluationError(f"task {name!r} is unknown: choose one of {', '.join(near)}")
    return TASKS[name]


def _lambada(row: Record) -> Question:
    *before, last = row["text"].split(" ")
    return Question(contexts=(" ".join(before),), choices=(f" {last}",), gold=0)


def _arc(row: Record) -> Question:
    question = _stem(row, "question", "Question: ")
    return _asked(f"Question: {question}\nAnswer:", row)


def _openbookqa(row: Record) -> Question:
    return _asked(_stem(row, "question_stem", ""), row)


def _piqa(row: Record) -> Question:
    context = f"Question: {_stem(row, 'goal', 'Question: ')}\nAnswer:"
    if "goal" in row:
        choices, gold = (row["sol1"], row["sol2"]), row["label"]
    else:
        (first, second), gold = row["choices"], row["gold"]  # a file of another task has more
        choices = (first, second)
    return Question(contexts=(context,), choices=choices, gold=int(gold))


def _boolq(row: Record) -> Question:
    if "passage" in row:
        asked, gold = f"{row['passage']}\nQuestion: {row['question']}?", int(row["label"])
    else:
        asked, gold = row["query"].removeprefix("Passage: "), row["gold"]
    return Question(contexts=(f"{asked}\nAnswer:",), choices=("no", "yes"), gold=gold)


def _winogrande(row: Record) -> Question:
    if "sentence" in row:
        before, _, after = row["sentence"].partition("_")
        contexts = (before + row["option1"], before + row["option2"])
        rest, gold = after.strip(), int(row["answer"]) - 1
    else:
        first, second = row["context_options"]
        contexts, rest, gold = (first, second), row["continuation"], row["gold"]
    return Question(contexts=contexts, choices=(rest, rest), gold=gold)


def _hellaswag(row: Record) -> Question:
    if "query" in row:
        return _asked(row["query"], row)
    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    choices = tuple(_without_markup(ending) for ending in row["endings"])
    return Question(contexts=(_without_markup(context),), choices=choices, gold=int(row["label"]))


def _mmlu(row: Record) -> Question:
    letters = "ABCDEFGHIJ"[: len(row["choices"])]
    options = (f"{letter}. {text}\n" for letter, text in zip(letters, row["choices"], strict=True))
    return Question(
        contexts=(f"{row['question'].strip()}\n{''.join(options)}Answer:",),
        choices=tuple(letters),
        gold=int(row["answer"]),
        subject=row["subject"],
    )


def _introduce_subject(subject: str) -> str:
    about = subject.replace("_", " ")
    return f"The following are multiple choice questions (with answers) about {about}.\n\n"


def _stem(row: Record, hub: str, prefix: str) -> str:
    """The question alone: the Hub's own field, or `query` without what was put around it."""
    if hub in row:
        return str(row[hub])
    return str(row["query"]).removeprefix(prefix).removesuffix("\n")


def _asked(context: str, row: Record) -> Question:
    """A question whose choices are texts: `gold` is a place, `answerKey` a label."""
    choices: Any = row["choices"]
    if isinstance(choices, Mapping):
        gold = list(choices["label"]).index(row["answerKey"].strip())
        choices = choices["text"]
    else:
        gold = int(row["gold"])
    return Question(contexts=(context,), choices=tuple(choices), gold=gold)


def _without_markup(text: str) -> str:
    """HellaSwag's texts from WikiHow without their bracketed marks."""
    text = _TITLE.sub(". ", text.strip())
    return _BRACKETED.sub("", text).replace("  ", " ")


_TABLE: Final = (
    Task("lambada", HubTable("EleutherAI/lambada_openai", "default", "test"), "test", _lambada,
         metrics=("acc", "perplexity"), delimiter=""),
    Task("arc_easy", HubTable("allenai/ai2_arc", "ARC-Easy", "test"), "train", _arc),
    Task("arc_challenge", HubTable("allenai/ai2_arc", "ARC-Challenge", "test"), "train", _arc),
    Task("mmlu", HubTable("cais/mmlu", "all", "test"), "dev", _mmlu,
         metrics=("acc",), introduce=_introduce_subject),
    Task("hellaswag", HubTable("Rowan/hellaswag", "", "validation"), "train", _hellaswag),
    Task("piqa", HubTable("baber/piqa", "", "validation"), "train", _piqa),
    Task("winogrande", HubTable("allenai/winogrande", "winogrande_xl", "validation"), "train",
         _winogrande, metrics=("acc",)),
    Task("openbookqa", HubTable("allenai/openbookqa", "main", "test"), "train", _openbookqa),
    Task("boolq", HubTable("aps/super_glue", "boolq", "validation"), "train", _boolq,
         metrics=("acc",)),
)  # fmt: skip
TASKS: Final = {task.name: task for task in _TABLE}
