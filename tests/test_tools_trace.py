"""What a step saw, and when a document is seen: both compared with a walk over the shards."""

import json
import math
import re
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

import pipeline_samples
from model.transformer import Transformer
from shards.reader import ShardReader
from tools.errors import ToolError
from tools.trace import main
from tools.tracing.run_trace import RunTrace, rows_of_document
from trainer.data.mixture import BatchShape, micro_batch_indices
from trainer.metrics.metrics import read_events, read_metrics
from trainer.session.state import State
from trainer.train import train
from trainer_samples import small_plan

PARTS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of a parquet file with three row groups, and of a jsonl file; a run of 40 steps."""
    root = tmp_path_factory.mktemp("trace")
    texts = pipeline_samples.TEXTS
    web = pipeline_samples.write_parquet(root / "web.parquet", texts, group=100)
    book = pipeline_samples.write_jsonl(root / "book.jsonl", texts[:40])
    for path, name in ((web, "fineweb"), (book, "pg19")):
        request = pipeline_samples.request(root / "shards", str(path), name)
        pipeline_samples.prepared(request)
    plan = small_plan(root / "shards", max_steps=40, global_batch_tokens=1024, micro_batch_size=4)
    train(plan, root / "run")
    return root


def true_rows(reader: ShardReader) -> dict[int, set[int]]:
    """Number of a training document, as its text says it -> the rows that hold a piece of it."""
    tokenizer, first_row = pipeline_samples.tokenizer(), 0
    rows_of: dict[int, set[int]] = defaultdict(set)
    for unit in sorted({shard.file.split("-")[0] for shard in reader.manifest.shards}):
        files = [s.file for s in reader.manifest.split("train") if s.file.startswith(unit)]
        if not files:
            continue
        rows = np.concatenate([np.load(reader.folder / file) for file in files])
        stream, width = rows.reshape(-1), rows.shape[1]
        begins = [*np.flatnonzero(stream == tokenizer.bos_id), np.flatnonzero(stream)[-1] + 1]
        for begin, end in pairwise(begins):
            match = re.search(r"number (\d+)\.", tokenizer.decode(stream[begin:end]))
            assert match is not None
            held = range(begin // width, (end - 1) // width + 1)
            rows_of[int(match[1])] |= {first_row + row for row in held}
        first_row += len(rows)
    return rows_of


def name_of(number: int) -> str:
    return f"web.parquet#{number // 100}:{number % 100}"


def test_rows_of_every_document(folder: Path) -> None:
    reader = ShardReader(folder / "shards" / "fineweb")
    assert len({shard.file.split("-")[0] for shard in reader.manifest.shards}) > 1
    true = true_rows(reader)
    assert len(true) > 250
    for number, rows in true.items():
        assert set(rows_of_document(reader, name_of(number))) == rows, number


def test_a_step_shows_the_rows_that_were_trained_on(folder: Path) -> None:
    trace = RunTrace(folder / "run")
    seen = list(trace.at_step(5))
    expected = [
        int(index)
        for micro_step in range(4)
        for index in micro_batch_indices(0, 4 * 16, BatchShape(16, 4, 1), micro_step, 0)
    ]
    assert [row_seen.index for row_seen in seen] == expected
    tokenizer = pipeline_samples.tokenizer()
    for row_seen in seen:
        reader = ShardReader(folder / "shards" / row_seen.source)
        tokens, _ = reader.rows(np.array([row_seen.row]))
        letters = re.sub(r"<s>|\s", "", row_seen.text)
        assert letters == re.sub(r"\s", "", tokenizer.decode(tokens[0]))
        file, _, record = reader.origin(row_seen.row)
        assert row_seen.origin.startswith(Path(file).name)
        assert row_seen.origin.endswith(f":{record}")


def test_there_and_back(folder: Path) -> None:
    trace = RunTrace(folder / "run")
    for row_seen in list(trace.at_step(7))[::5]:
        found = list(trace.of_document(row_seen.origin))
        assert row_seen in found
        assert [each.index for each in found] == sorted(each.index for each in found)
        assert all(each.step <= 40 for each in found)


class Seen:
    """Every row that the model computed on, by step; a step made again counts as made last."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows: dict[int, list[list[int]]] = {}
        self.micro_steps: list[list[list[int]]] = []
        self.poisoned: set[int] = set()
        forward, advance = Transformer.forward, State.advance

        def watched(model: Transformer, tokens: torch.Tensor, *rest: Any) -> torch.Tensor:
            self.micro_steps.append(tokens.tolist())
            loss = forward(model, tokens, *rest)
            first = sum(map(len, self.micro_steps)) == len(tokens)
            return loss * math.nan if first and len(self.rows) + 1 in self.poisoned else loss

        def advanced(state: State, *rest: Any) -> None:
            advance(state, *rest)
            self.rows = {step: rows for step, rows in self.rows.items() if step < state.step}
            self.rows[state.step] = [row for rows in self.micro_steps for row in rows]
            self.micro_steps = []
            if state.step == max(self.poisoned, default=0):
                self.poisoned = set()

        monkeypatch.setattr(Transformer, "forward", watched)
        monkeypatch.setattr(State, "advance", advanced)


def traced(run: Path, step: int) -> list[list[int]]:
    trace = RunTrace(run)
    found = []
    for row_seen in trace.at_step(step):
        rows, _ = trace.readers[row_seen.source].rows(np.array([row_seen.row]))
        found.append(rows[0].tolist())
    return found


def test_what_is_traced_is_what_the_model_saw_whatever_happened(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another batch size, another mixture, updates that fail and are rolled back over."""
    seen, shards = Seen(monkeypatch), folder / "shards"
    common: dict[str, Any] = {"precision": "fp32", "checkpoint__interval_steps": 2}
    common |= {"guard__patience": 1, "micro_batch_size": 4}
    train(small_plan(shards, max_steps=3, global_batch_tokens=1024, **common), tmp_path)
    seen.poisoned = {7, 8}
    common |= {"mixture__pg19": 50, "global_batch_tokens": 512}
    train(small_plan(shards, max_steps=12, **common), tmp_path)
    events = read_events(tmp_path)
    assert [event["event"] for event in events].count("rollback") == 1
    assert sorted(seen.rows) == list(range(1, 13))
    for step in range(1, 13):
        assert traced(tmp_path, step) == seen.rows[step], step
    trace = RunTrace(tmp_path)
    (begin, end) = next(e["skipped"] for e in events if e["event"] == "rollback")
    indices = [each.index for step in range(1, 13) for each in trace.at_step(step)]
    assert sorted(indices) == [i for i in range(max(indices) + 1) if not begin <= i < end]
    drawn = Counter(each.source for step in range(1, 13) for each in trace.at_step(step))
    ledger = read_metrics(tmp_path)[-1]["ledger"]
    assert {name: entry["rows"] for name, entry in ledger.items()} == drawn
    everything = {
        (each.step, each.index): each for step in range(1, 13) for each in trace.at_step(step)
    }
    for origin in {each.origin for each in everything.values() if each.step in (3, 6, 7, 12)}:
        for row_seen in trace.of_document(origin):
            assert everything[row_seen.step, row_seen.index] == row_seen


def test_steps_of_another_run_are_not_guessed(folder: Path, tmp_path: Path) -> None:
    plan = small_plan(folder / "shards", max_steps=42, global_batch_tokens=1024, micro_batch_size=4)
    train(plan, tmp_path, resume=str(folder / "run"))
    assert len(list(RunTrace(tmp_path).at_step(41))) == 16
    with pytest.raises(ToolError, match="has the steps 41 to 42; those before 41 were made in an"):
        list(RunTrace(tmp_path).at_step(40))


def invoke(folder: Path, *arguments: str) -> Result:
    return CliRunner().invoke(main, [str(folder / "run"), *arguments])


def test_the_command_shows_rows_and_names_errors(folder: Path) -> None:
    result = invoke(folder, "--step", "3", "--chars", "30")
    assert result.exit_code == 0, result.stderr
    assert len(re.findall(r"^step 3 rank 0 micro-step \d: sample \d+, ", result.stdout, re.M)) == 16
    assert re.search(r" \.\.\. \d+ more$", result.stdout, re.M)
    result = invoke(folder, "--document", "book.jsonl:3", "--json")
    assert {json.loads(line)["source"] for line in result.stdout.splitlines()} == {"pg19"}
    for arguments, message in [
        (["--step", "41"], "error: --step 41: this run has the steps 1 to 40"),
        (
            ["--step", "1", "--rank", "1"],
            "error: --rank 1: this run has the ranks 0 to 0 at step 1",
        ),
        (["--document", "web.parquet:3"], f"error: web.parquet was read in {PARTS} parts: write"),
        (["--document", "web.parquet#7:3"], "that file has the parts 0 to 2"),
        (["--document", "nowhere.txt:3"], "no training row holds it"),
        (["--document", "book.jsonl"], "write it as FILE:RECORD"),
    ]:
        result = invoke(folder, *arguments)
        assert result.exit_code == 1
        assert message in result.stderr
    assert invoke(folder).exit_code == 2


def test_a_document_that_no_step_sees_is_named(folder: Path, tmp_path: Path) -> None:
    """The run as it would be if it ended after its first step."""
    (tmp_path / "run").mkdir()
    config = json.loads((folder / "run" / "config.json").read_text())
    (tmp_path / "run" / "config.json").write_text(json.dumps({**config, "max_steps": 1}))
    events = (folder / "run" / "events.jsonl").read_bytes()
    (tmp_path / "run" / "events.jsonl").write_bytes(events)
    trace = RunTrace(tmp_path / "run")
    later = {each.origin for each in RunTrace(folder / "run").at_step(30)}
    unseen = next(origin for origin in sorted(later) if not list(trace.of_document(origin)))
    result = invoke(tmp_path, "--document", unseen)
    assert (result.exit_code, result.stdout) == (0, "")
    assert result.stderr == "no step of this run sees it\n"


def test_other_shards_are_rejected(folder: Path, tmp_path: Path) -> None:
    record = folder / "run" / "config.json"
    config = json.loads(record.read_text())
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    for path in (folder / "run" / "checkpoints").glob("*/checkpoint.json"):
        (tmp_path / "run" / "checkpoints" / path.parent.name).mkdir()
        (tmp_path / "run" / "checkpoints" / path.parent.name / path.name).write_bytes(
            path.read_bytes()
        )
    book = pipeline_samples.write_jsonl(tmp_path / "b.jsonl", pipeline_samples.TEXTS[50:90])
    for name in ("fineweb", "pg19"):
        pipeline_samples.prepared(pipeline_samples.request(tmp_path / "shards", str(book), name))
    config["shards"] = str(tmp_path / "shards")
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ToolError, match="is not the data that the run has read"):
        RunTrace(tmp_path / "run")
