"""Records of an evaluation set, from a local file or the Hub, their digest, and their questions."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from pipeline.errors import SourceError
from pipeline.inputs.formats import decompressed
from pipeline.inputs.hub import hub_inputs
from pipeline.inputs.inputs import Inputs, layout_of
from pipeline.inputs.listing import local_inputs
from pipeline.inputs.records import open_parquet
from pipeline.inputs.sources import Source
from tools.errors import EvaluationError
from tools.evaluation.tasks import HubTable, Question, Record, Task


class EvaluationSet(NamedTuple):
    """Rows in order. `where` names their origin, with the revision where it is the Hub's."""

    rows: tuple[Record, ...]
    where: str


def sha256_of_rows(rows: Sequence[Record]) -> str:
    """SHA-256 over rows as JSON lines with sorted keys, whatever file held them."""
    lines = (json.dumps(row, sort_keys=True, ensure_ascii=False) + "\n" for row in rows)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def read_questions(task: Task, records: EvaluationSet) -> list[Question]:
    """The questions in a set's rows; EvaluationError names a row that holds none."""
    questions = []
    for number, row in enumerate(records.rows):
        try:
            question = task.read(row)
            if not 0 <= question.gold < len(question.choices):
                raise ValueError(f"label {question.gold}: a split without answers?")
        except (KeyError, ValueError, IndexError, TypeError, AttributeError) as error:
            raise EvaluationError(
                f"{records.where}: row {number} is no {task.name} question "
                f"({type(error).__name__}: {error}): name a file of {task.table}"
            ) from error
        questions.append(question)
    if not questions:
        raise EvaluationError(f"{records.where}: no question in it: name a file of {task.table}")
    return questions


def read_records(data: Path | None, table: HubTable) -> EvaluationSet:
    """The rows of a local .jsonl or .parquet, or of the Hub where none is named."""
    if data is None:
        return _from_hub(table)
    layout = layout_of(data.name)
    if data.is_dir() or layout is None or layout.kind == "text":
        raise EvaluationError(f"{data}: name a .jsonl or .parquet file that holds {table}")
    return EvaluationSet(_rows(local_inputs((str(data),))), data.name)


def _from_hub(table: HubTable) -> EvaluationSet:
    source = Source(
        name=table.dataset.rpartition("/")[2], about="an evaluation set", licence="",
        dataset=table.dataset, config=table.config, split=table.split,
    )  # fmt: skip
    try:
        inputs = hub_inputs(source)
        return EvaluationSet(_rows(inputs), f"{table} at {inputs.revision[:12]}")
    except SourceError as error:  # it names the option of another command
        raise EvaluationError(str(error).replace("--data-files", "--data FILE")) from error


def _rows(inputs: Inputs) -> tuple[Record, ...]:
    rows: list[Record] = []
    for file in inputs.files:
        try:
            with inputs.open(file.path) as raw:
                if file.layout.kind == "parquet":
                    rows += open_parquet(raw).read().to_pylist()
                else:
                    rows += _json_lines(file.path, decompressed(raw, file).read())
        except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
            raise EvaluationError(f"{file.path}: damaged ({error}): fetch it again") from error
    return tuple(rows)


def _json_lines(path: str, data: bytes) -> Iterator[Record]:
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise EvaluationError(
                f"{path}: line {number} is no JSON ({error}): fetch the file again"
            ) from error
        if not isinstance(row, dict):
            raise EvaluationError(f"{path}: line {number} is no JSON object")
        yield row
