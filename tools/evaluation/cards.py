"""What an evaluation found, and the one way it is written: JSON records, text, Markdown.

Evaluation during training keeps the results of each checkpoint in its run, as it appears:

    runs/NAME/evaluations/step-200/lambada.json, lambada.md, ...

A task whose card exists is not scored twice, so the same command resumes after an interruption.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

from shards.errors import SummerError
from shards.files import json_bytes, publish_bytes
from trainer.checkpoint.runs import EVALUATIONS, checkpoints, step_of
from trainer.config.config import load_config

POLL_S: Final = 10.0
_COMPARED: Final = ("protocol", "read_as", "context", "bos", "scored_tokens")
"""Settings that are shown with the metrics where several results of a task are compared."""


class Metric(NamedTuple):
    """A measured value and its standard error; None where there is none."""

    value: float | None
    stderr: float | None = None

    def __str__(self) -> str:
        error = "" if self.stderr is None else f" ± {_number(self.stderr)}"
        return _number(self.value) + error


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a model (empty: none took part) reached on a task, and all that this depends on.

    In JSON the metrics and settings stand side by side, a metric's standard error as NAME_error;
    with `grouped` the metrics are an object of their own. `table` (its head first) is shown in
    place of the metrics, `about` behind the model's name, `notes` below. `items` are for a log;
    `samples` are what each item or window adds to a metric, for a comparison.
    """

    task: str
    metrics: Mapping[str, Metric | float | None]
    settings: Mapping[str, Any]
    model: Mapping[str, Any]
    grouped: bool = False
    about: str = ""
    table: Sequence[Sequence[str]] = ()
    notes: Sequence[str] = ()
    items: Sequence[Mapping[str, Any]] = ()
    samples: Mapping[str, Sequence[float]] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Any:
        """The value of a metric, or a setting."""
        found = self.metrics[name] if name in self.metrics else self.settings[name]
        return found.value if isinstance(found, Metric) else found

    def to_json(self) -> dict[str, Any]:
        """Everything under its name."""
        figures: dict[str, Any] = {}
        for name, metric in self.metrics.items():
            if not isinstance(metric, Metric):
                figures[name] = metric
            elif self.grouped:
                figures[name] = {"value": metric.value, "error": metric.stderr}
            else:
                figures |= {name: metric.value, f"{name}_error": metric.stderr}
        record = {"task": self.task, **({"metrics": figures} if self.grouped else figures)}
        return {**record, **self.settings, **({"model": self.model} if self.model else {})}


def to_text(results: Sequence[Result]) -> list[str]:
    """One result of a task in lines for people; several of them, side by side."""
    first, model = results[0], results[0].model
    notes = [note for note in first.notes if all(note in each.notes for each in results)]
    if len(results) > 1 or first.table:
        lines = aligned(_comparison(results) if len(results) > 1 else first.table)
    else:
        lines = [f"  {name:<17} {_cell(metric)}" for name, metric in first.metrics.items()]
    name = f"{model['model']} ({model['parameters']:,} parameters)" if model else ""
    title = f"{first.task}: {'; '.join(filter(None, (name, first.about)))}"
    return [title, *lines, *notes, *_provenance(results)]


def write_results(path: Path, tasks: Sequence[Sequence[Result]]) -> None:
    """Publish the results of some tasks: every record in a .json, or a page in an .md."""
    if path.suffix == ".json":
        records = [result.to_json() for results in tasks for result in results]
        publish_bytes(path, json_bytes(records))
    else:
        pages = (
            "\n".join([f"## {results[0].task}", "", "```", *to_text(results), "```", ""])
            for results in tasks
        )
        publish_bytes(path, "\n".join(pages).encode())


Evaluate = Callable[[Path, Sequence[str]], Iterator[Sequence[Result]]]  # checkpoint, tasks


def follow(
    run: Path,
    tasks: Sequence[str],
    evaluate: Evaluate,
    wait: Callable[[float], None] = time.sleep,
) -> Iterator[Sequence[Result]]:
    """The results of each task at each checkpoint, until the run's last step has been scored.

    Checkpoints that exist already are taken oldest first. One that training deletes before it
    could be read is skipped.
    """
    last_step = load_config(run).max_steps
    passed: set[Path] = set()
    while True:
        waiting = [checkpoint for checkpoint in checkpoints(run) if checkpoint not in passed]
        if not waiting:
            if any(step_of(checkpoint) >= last_step for checkpoint in passed):
                return
            wait(POLL_S)
            continue
        checkpoint = waiting[0]
        passed.add(checkpoint)
        missing = [task for task in tasks if not card_of(checkpoint, task).is_file()]
        try:
            for results in evaluate(checkpoint, missing) if missing else ():
                card = card_of(checkpoint, results[0].task)
                card.parent.mkdir(parents=True, exist_ok=True)
                write_results(card.with_suffix(".md"), [results])
                write_results(card, [results])  # last: it says that the task is done
                yield results
        except (SummerError, OSError):
            if checkpoint in checkpoints(run):
                raise


def card_of(checkpoint: Path, task: str) -> Path:
    """Where the results of a checkpoint on a task are kept in its run."""
    return checkpoint.parents[1] / EVALUATIONS / checkpoint.name / f"{task}.json"


def aligned(rows: Iterable[Sequence[str]]) -> list[str]:
    """Rows in columns: the first to the left, the others to the right."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def _comparison(results: Sequence[Result]) -> list[tuple[str, ...]]:
    """A row for each result: what may differ between them, and the metrics."""
    names = (*_COMPARED, *results[0].metrics)
    rows = [{**each.settings, **each.metrics} for each in results]
    return [names, *(tuple(_cell(row[name]) for name in names) for row in rows)]


def _provenance(results: Sequence[Result]) -> list[str]:
    model, seconds = results[0].model, sum(each.settings.get("time_s", 0) for each in results)
    if not model:
        return []
    return [
        f"weights   sha256 {model['weights_sha256']}, {model['dtype']} on {model['device']}",
        f"tokenizer {model['tokenizer']}, sha256 {model['tokenizer_sha256']}",
        f"time      {seconds:.1f} s",
    ]


def _cell(value: Metric | float | str | None) -> str:
    """A metric, or (integers and texts) a setting."""
    if isinstance(value, str):
        return value.replace("\n", "\\n")
    if isinstance(value, int):
        return f"{value:,}"
    return str(value if isinstance(value, Metric) else Metric(value))


def _number(value: float | None) -> str:
    if value is None:
        return "none (nothing counted, or beyond any number)"
    return f"{value:,.4f}" if value < 1e9 else f"{value:.4e}"
