"""Requests that cannot be met, input that is spoilt, a disk without room."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import PrepareError, SourceError, TokenizerError
from pipeline.estimate import PrepareListener, check_disk_space
from pipeline.prepare import prepare
from pipeline.text import slices
from pipeline.text.tokenizer import Tokenizer
from pipeline.units.executors import Executor
from pipeline.units.job import Limit
from pipeline_samples import (
    TEXTS,
    contents,
    corpus,
    prepared,
    request,
    tokenizer,
    write_jsonl,
)


def rejected(wanted: Any, kind: Any = PrepareError) -> Any:
    with pytest.raises(kind) as caught:
        prepare(wanted, Executor(), PrepareListener())
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder_of_another_recipe_is_not_touched(tmp_path: Path) -> None:
    corpus(tmp_path / "in", 2)
    files = str(tmp_path / "in")
    prepared(request(tmp_path, files))
    before = contents(tmp_path / "mine")
    message = rejected(request(tmp_path, files, seq_len=128))
    assert "begun with seq_len 64, not 128" in message and "--out" in message
    assert "another tokenizer than mistral-v3-extended" in rejected(
        request(tmp_path, files, tokenizer=Tokenizer.default())
    )
    assert "max_tokens None, not 5" in rejected(request(tmp_path, files, limit=Limit(tokens=5)))
    write_jsonl(tmp_path / "in" / "0.jsonl", ["changed"])
    assert "0.jsonl was" in rejected(request(tmp_path, files))
    (tmp_path / "in" / "0.jsonl").unlink()
    assert "0.jsonl was" in rejected(request(tmp_path, files)) and "absent" in rejected(
        request(tmp_path, files)
    )
    assert contents(tmp_path / "mine") == before


def test_without_one_document_there_is_no_source(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", ["", 7, None])
    message = rejected(request(tmp_path, str(tmp_path / "a.jsonl")))
    assert "not one document" in message and "1 empty" in message and "1 wrong type" in message
    assert not (tmp_path / "mine" / "manifest.json").exists()


def test_rejected_records_are_listed_with_file_and_number(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", ["good", 7, "", "good too"])
    manifest = prepared(request(tmp_path, str(tmp_path / "a.jsonl")))
    assert dict(manifest.rejected) == {"empty": 1, "wrong type": 1}
    lines = (tmp_path / "mine" / "00000.rejected.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"reason": "wrong type", "file": "a.jsonl", "record": 1},
        {"reason": "empty", "file": "a.jsonl", "record": 2},
    ]


def test_a_missing_field_is_noticed_before_anything_is_done(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", ["x"] * 50, column="content")
    message = rejected(request(tmp_path, str(tmp_path / "a.jsonl")), SourceError)
    assert "no field 'text'" in message and "--text-column" in message
    assert not list((tmp_path / "mine").glob("[0-9]*.npy"))


def test_a_damaged_file_stops_the_run_and_nothing_done_is_lost(tmp_path: Path) -> None:
    corpus(tmp_path / "in")
    files = tmp_path / "in"
    complete = (files / "3.parquet").read_bytes()
    spoilt = bytearray(complete)
    spoilt[200:4000] = bytes(3800)
    (files / "3.parquet").write_bytes(spoilt)
    with pytest.raises(SourceError, match=r"3\.parquet is damaged"):
        prepared(request(tmp_path / "out", str(files)), workers=2)
    assert not (tmp_path / "out").exists()  # a start of which nothing came leaves nothing
    (files / "3.parquet").write_bytes(complete)
    prepared(request(tmp_path / "out", str(files)))
    prepared(request(tmp_path / "undisturbed", str(files)))
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")


def test_without_room_on_the_disk_nothing_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_jsonl(tmp_path / "a.jsonl", TEXTS * 60)
    free = shutil.disk_usage(tmp_path)._replace(free=100_000)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: free)
        message = rejected(request(tmp_path, str(tmp_path / "*.jsonl")))
    assert "MB are needed and 0 MB are free" in message and "--max-tokens" in message
    assert not list((tmp_path / "mine").glob("[0-9]*.npy"))
    check_disk_space(tmp_path, 1)


RUN_SHORT_OF_ROOM = """
import resource, sys
from pathlib import Path
from pipeline.errors import PrepareError
from pipeline_samples import prepared, request
resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, 12_000))  # as far as a full disk lets one write
try:
    prepared(request(Path(sys.argv[1]), sys.argv[2], unit_bytes=1 << 16))
except PrepareError as error:
    print(error)
"""


def test_a_disk_that_fills_up_loses_nothing(tmp_path: Path) -> None:
    corpus(tmp_path / "in")
    small: dict[str, Any] = {"unit_bytes": 1 << 16}
    prepared(request(tmp_path / "complete", str(tmp_path / "in"), **small))
    (tmp_path / "out" / "mine").mkdir(parents=True)
    for name in ("tokenizer.model", "units.json"):  # the plan was made while there was room
        shutil.copy(tmp_path / "complete" / "mine" / name, tmp_path / "out" / "mine")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(["tests", "."])}
    command = [sys.executable, "-c", RUN_SHORT_OF_ROOM, str(tmp_path / "out"), str(tmp_path / "in")]
    message = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert ": make room and start the same command again" in message.stdout
    assert not [path for path in (tmp_path / "out" / "mine").iterdir() if path.name[0] == "."]
    prepared(request(tmp_path / "out", str(tmp_path / "in"), **small))
    assert contents(tmp_path / "out") == contents(tmp_path / "complete")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"part": (0, 4)}, "parts are numbered 1/4 to 4/4"),
        ({"part": (5, 4)}, "--part 5/4"),
        ({"part": (1, 2), "limit": Limit(tokens=9)}, "--part does not go with --max-tokens"),
        ({"loss_mask": True}, "mine has none"),
    ],
)
def test_contradictions_are_rejected(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    assert message in rejected(request(tmp_path, str(tmp_path / "a.jsonl"), **changes))


def test_a_vocabulary_without_chat_markers_cannot_prepare_chat(tmp_path: Path) -> None:
    proto = Tokenizer.default().proto.__class__()
    proto.CopyFrom(tokenizer().proto)
    proto.pieces[3].piece = "[OTHER]"
    other = Tokenizer(proto.SerializeToString(), "other")
    write_jsonl(tmp_path / "a.jsonl", [[]], column="conversations")
    wanted = request(tmp_path, str(tmp_path / "a.jsonl"), name="slimorca", tokenizer=other)
    assert "other has no control piece [INST]" in rejected(wanted, TokenizerError)


@pytest.mark.parametrize("shape", ["documents", "chat"])
def test_a_word_that_would_take_too_much_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: Any
) -> None:
    """Its record is listed; its neighbours and the other words of its file stay."""
    monkeypatch.setattr(slices, "LONGEST_WORD", 1000)
    texts = ["one", "a" * 900, "a" * 1001, "a " * 900, "last"]
    rows: list[Any] = texts
    if shape == "chat":
        rows = [[{"from": "human", "value": "q"}, {"from": "gpt", "value": text}] for text in texts]
    files = str(write_jsonl(tmp_path / "a.jsonl", rows, "text"))
    wanted = request(tmp_path, files, tokenizer=Tokenizer.default())
    wanted = replace(wanted, source=replace(wanted.source, shape=shape))
    manifest = prepared(wanted)
    assert dict(manifest.rejected) == {"a word above 4 MiB": 1} and manifest.n_documents == 4
    (line,) = (tmp_path / "mine" / "00000.rejected.jsonl").read_text().splitlines()
    assert json.loads(line)["record"] == 2
