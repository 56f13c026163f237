r"""The tasks: where their questions come from, how they are asked, and what is counted.

A new task is a row of `_TABLE`, with a function that turns a record into a Question.

The definitions are those of lm-evaluation-harness 0.4, so that figures can be laid side by side:
a question is a context and several continuations, or several contexts and one continuation
(WinoGrande); the pair with the highest likelihood is the answer. Each reader takes the records of
the data set on the Hub, and of the local layout that evaluation suites pass around (`query`,
`choices`, `gold`).

    arc_easy     "Question: Meiosis is a type of ...\nAnswer:"    " brain cells" | " bone cells" ...
    winogrande   "... so Sarah" | "... so Maria"                  " always got the easier cases."
    lambada      all words but the last                           " signs", by itself
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

Record = Mapping[str, Any]


class HubTable(NamedTuple):
    """A split of a data set on the Hub."""

    dataset: str
    config: str
    split: str

    def __str__(self) -> str:
        config = f" ({self.config})" if self.config else ""
        return f"{self.dataset}{config}, {self.split}"


CORPORA: Final = {
    "wikitext2": HubTable("Salesforce/wikitext", "wikitext-2-raw-v1", "test"),
    "wikitext103": HubTable("Salesforce/wikitext", "wikitext-103-raw-v1", "test"),
}
"""The texts whose perplexity is a task. Their test splits are the same text."""


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """How tasks are run; each takes what concerns it.

    `batch_tokens` None is 32,768 on a GPU and 8,192 elsewhere. With `contamination` a result also
    has the overlap with `shards`, and with what a run had seen at `seen_by`, its checkpoint.
    Few-shot examples are `fewshot_data`'s, else the Hub's, or for a local `data` its own first
    other questions.
    """

    data: Path | None = None
    shards: Path = Path("shards")
    protocol: str = "disjoint"
    all_protocols: bool = False
    context: int | None = None
    stride: int | None = None
    bos: str | None = None
    limit: int | None = None
    num_fewshot: int = 0
    fewshot_data: Path | None = None
    batch_tokens: int | None = None
    contamination: bool = False
    seen_by: Path | None = None


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

    def with_answer(self) -> str:
        """The question with its right answer, as an example for others."""
        return f"{self.context(self.gold)} {self.choices[self.gold]}"


@dataclass(frozen=True)
class Task:
    """One task. `examples` is the split that few-shot examples are taken from, in order.

    `delimiter` stands between context and choice; `description` is the text that comes first.
    """

    name: str
    table: HubTable
    examples: str
    read: Callable[[Record], Question]
    metrics: tuple[str, ...] = ("acc", "acc_norm")
    delimiter: str = " "
    description: Callable[[str], str] = lambda _: ""


def _lambada(row: Record) -> Question:
    *before, last = row["text"].split(" ")
    return Question(contexts=(" ".join(before),), choices=(f" {last}",), gold=0)


def _arc(row: Record) -> Question:
    question = _stem(row, "question", "Question: ")
    return _with_choices(f"Question: {question}\nAnswer:", row)


def _openbookqa(row: Record) -> Question:
    return _with_choices(_stem(row, "question_stem", ""), row)


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
        text, gold = f"{row['passage']}\nQuestion: {row['question']}?", int(row["label"])
    else:
        text, gold = row["query"].removeprefix("Passage: "), row["gold"]
    return Question(contexts=(f"{text}\nAnswer:",), choices=("no", "yes"), gold=gold)


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
        return _with_choices(row["query"], row)
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


def _describe_subject(subject: str) -> str:
    about = subject.replace("_", " ")
    return f"The following are multiple choice questions (with answers) about {about}.\n\n"


def _stem(row: Record, hub: str, prefix: str) -> str:
    """The question alone: the Hub's own field, or `query` without what was put around it."""
    if hub in row:
        return str(row[hub])
    return str(row["query"]).removeprefix(prefix).removesuffix("\n")


def _with_choices(context: str, row: Record) -> Question:
    """A question whose choices are texts: `gold` is an index, `answerKey` a label."""
    choices: Any = row["choices"]
    if isinstance(choices, Mapping):
        gold = list(choices["label"]).index(row["answerKey"].strip())
        choices = choices["text"]
    else:
        gold = int(row["gold"])
    return Question(contexts=(context,), choices=tuple(choices), gold=gold)


def _without_markup(text: str) -> str:
    """HellaSwag's texts from WikiHow without their bracketed marks."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


_TABLE: Final = (
    Task("lambada", HubTable("EleutherAI/lambada_openai", "default", "test"), "test", _lambada,
         metrics=("acc", "perplexity"), delimiter=""),
    Task("arc_easy", HubTable("allenai/ai2_arc", "ARC-Easy", "test"), "train", _arc),
    Task("arc_challenge", HubTable("allenai/ai2_arc", "ARC-Challenge", "test"), "train", _arc),
    Task("mmlu", HubTable("cais/mmlu", "all", "test"), "dev", _mmlu,
         metrics=("acc",), description=_describe_subject),
    Task("hellaswag", HubTable("Rowan/hellaswag", "", "validation"), "train", _hellaswag),
    Task("piqa", HubTable("baber/piqa", "", "validation"), "train", _piqa),
    Task("winogrande", HubTable("allenai/winogrande", "winogrande_xl", "validation"), "train",
         _winogrande, metrics=("acc",)),
    Task("openbookqa", HubTable("allenai/openbookqa", "main", "test"), "train", _openbookqa),
    Task("boolq", HubTable("aps/super_glue", "boolq", "validation"), "train", _boolq,
         metrics=("acc",)),
)  # fmt: skip
TASKS: Final = {task.name: task for task in _TABLE}
