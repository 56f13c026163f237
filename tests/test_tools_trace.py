"""What a step saw, and when a document is seen: both against a walk over the shards."""

import json
import re
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

import pipeline_samples
from shards.reader import ShardReader
from tools.errors import TraceError
from tools.provenance import rows_of_document
from tools.trace import main
from tools.tracing import RunTrace
from trainer.metrics import read_lines
from trainer.mixture import BatchShape, micro_batch_indices
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
    assert [sighting.index for sighting in seen] == expected
    tokenizer = pipeline_samples.tokenizer()
    for sighting in seen:
        reader = ShardReader(folder / "shards" / sighting.source)
        tokens, _ = reader.rows(np.array([sighting.row]))
        letters = re.sub(r"<s>|\s", "", sighting.text)
        assert letters == re.sub(r"\s", "", tokenizer.decode(tokens[0]))
        file, _, record = reader.origin(sighting.row)
        assert sighting.origin.startswith(Path(file).name)
        assert sighting.origin.endswith(f":{record}")


def test_there_and_back(folder: Path) -> None:
    trace = RunTrace(folder / "run")
    for sighting in list(trace.at_step(7))[::5]:
        again = list(trace.of_document(sighting.origin))
        assert sighting in again
        assert [each.index for each in again] == sorted(each.index for each in again)
        assert all(each.step <= 40 for each in again)


def test_steps_are_those_of_the_log_where_batches_changed(folder: Path, tmp_path: Path) -> None:
    shards = folder / "shards"
    train(small_plan(shards, max_steps=3, global_batch_tokens=1024), tmp_path)
    train(small_plan(shards, max_steps=6, global_batch_tokens=512), tmp_path)
    trace = RunTrace(tmp_path)
    lines = read_lines(tmp_path / "metrics.jsonl")
    for line in lines[3:]:
        indices = sorted(sighting.index for sighting in trace.at_step(line["step"]))
        assert indices == list(range(line["next_index"] - 8, line["next_index"]))


def invoke(folder: Path, *arguments: str) -> Result:
    return CliRunner().invoke(main, [str(folder / "run"), *arguments])


def test_the_command_shows_and_refuses(folder: Path) -> None:
    result = invoke(folder, "--step", "3", "--chars", "30")
    assert result.exit_code == 0, result.stderr
    assert len(re.findall(r"^step 3 rank 0 micro-step \d: sample \d+, ", result.stdout, re.M)) == 16
    assert re.search(r" \.\.\. \d+ more$", result.stdout, re.M)
    result = invoke(folder, "--document", "book.jsonl:3", "--json")
    assert {json.loads(line)["source"] for line in result.stdout.splitlines()} == {"pg19"}
    for arguments, message in [
        (["--step", "41"], "error: --step 41: this run has the steps 1 to 40"),
        (["--step", "1", "--rank", "1"], "error: --rank 1: this run has the ranks 0 to 0"),
        (["--document", "web.parquet:3"], f"error: web.parquet was read in {PARTS} parts: write"),
        (["--document", "web.parquet#7:3"], "that file has the parts 0 to 2"),
        (["--document", "nowhere.txt:3"], "no training row holds it"),
        (["--document", "book.jsonl"], "write it as FILE:RECORD"),
    ]:
        result = invoke(folder, *arguments)
        assert result.exit_code == 1
        assert message in result.stderr
    assert invoke(folder).exit_code == 2


def test_other_shards_are_refused(folder: Path, tmp_path: Path) -> None:
    record = folder / "run" / "config.json"
    config = json.loads(record.read_text())
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    for path in (folder / "run" / "checkpoints").glob("*/COMMIT.json"):
        (tmp_path / "run" / "checkpoints" / path.parent.name).mkdir()
        (tmp_path / "run" / "checkpoints" / path.parent.name / path.name).write_bytes(
            path.read_bytes()
        )
    book = pipeline_samples.write_jsonl(tmp_path / "b.jsonl", pipeline_samples.TEXTS[50:90])
    for name in ("fineweb", "pg19"):
        pipeline_samples.prepared(pipeline_samples.request(tmp_path / "shards", str(book), name))
    config["shards"] = str(tmp_path / "shards")
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    with pytest.raises(TraceError, match="is not the data that the run has read"):
        RunTrace(tmp_path / "run")
