"""The command line: what it says, and how it rejects."""

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from pipeline.cli import main
from pipeline.inputs.sources import SOURCES, SourceOverrides, find
from pipeline.text.tokenizer import Tokenizer
from pipeline_samples import TEXTS, tokenizer, write_jsonl
from trainer.config.shares import SUBSTITUTES

COMMANDS = ("tokenize", "inspect", "verify", "repair", "sources", "tokenizer")


def run(*arguments: Any) -> Any:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def test_help_answers_at_once() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-c", "from pipeline.cli import main; main()", "--help"]
    subprocess.run(command, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_shows_an_example(name: str) -> None:
    message = run(name, "--help").output
    assert f"summer-prep {name} " in message.split("Options:")[0].split("\n", 2)[2] or (
        f"summer-prep {name}\n" in message.split("Options:")[0]
    )


def test_the_reference_mixture_is_complete() -> None:
    assert [(s.name, s.share) for s in SOURCES if s.share] == [
        ("fineweb", 60), ("the-stack", 20), ("books3", 10), ("arxiv", 5), ("slimorca", 5),
    ]  # fmt: skip
    substitutes = {source.name: source.substitute for source in SOURCES if source.substitute}
    assert substitutes == SUBSTITUTES  # what the trainer gives their share to
    for source in SOURCES:
        places = bool(source.dataset), source.embedded, bool(source.unavailable)
        assert sum(places) == 1 and source.licence, source.name
    message = run("sources").output
    assert all(source.name in message and source.licence in message for source in SOURCES)
    assert [entry["name"] for entry in json.loads(run("sources", "--json").output)] == [
        source.name for source in SOURCES
    ]


def test_a_row_of_the_table_can_be_read_from_elsewhere() -> None:
    changed = find(
        "the-stack", SourceOverrides(dataset="me/mirror", config="go,rust", revision="v1")
    )
    assert changed.dataset == "me/mirror" and not changed.gated
    assert changed.patterns == ("data/go/*.parquet", "data/rust/*.parquet")
    assert changed.text_column == "content"
    assert find("the-stack").patterns[:2] == ("data/c/*.parquet", "data/c++/*.parquet")


def test_a_source_is_prepared_and_described(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [*TEXTS, 7])
    model = tmp_path / "small.model"
    model.write_bytes(tokenizer().model)
    arguments = ("tokenize", "--source", "mine", "--data-files", tmp_path / "*.jsonl", "--out",
                 tmp_path, "--tokenizer", model, "--seq-len", 128, "--workers", 1)  # fmt: skip
    first = run(*arguments)
    assert first.exit_code == 0, first.output
    for message in ("files      1 file,", "to read", "to write   about", "columnar enc",
                 "time       estimating: the first", "300 documents", "MB/s"):  # fmt: skip
        assert message in first.stderr, message
    assert "300 documents" in first.stdout and "rejected: 1 records, wrong type" in first.stdout
    assert "held out   6.7% of the documents" in first.stderr  # some 20 of 300
    assert "no document is held out" not in first.stdout
    again = run(*arguments, "--json")
    assert again.stderr == "" and json.loads(again.stdout)["n_documents"] == 300


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--source", "finweb"), "unknown source 'finweb': did you mean fineweb?"),
        (("--source", "zzz"), "known: fineweb, the-stack"),
        (("--source", "../up", "--data-files", "x"), "it becomes a folder's name"),
        (("--source", "mine", "--data-files", "/nowhere/*.parquet"), "no file matches"),
        (("--source", "python-docs", "--tokenizer", "/nowhere.model"), "name a SentencePiece"),
        (("--source", "books3"), "it was withdrawn over copyright"),
        (("--source", "python-docs", "--loss-mask"), "python-docs has none"),
        (("--source", "python-docs", "--part", "3/2"), "--part 3/2"),
        (("--source", "python-docs", "--executor", "ray"), "summerlm[ray]"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[Any, ...], message: str
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # as if it were not installed
    result = run("tokenize", *arguments, "--out", tmp_path)
    assert result.exit_code == 1
    assert result.stderr.split("\n")[-2].startswith("error: ") and message in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [("tokenize",), ("tokenize", "--source", "x", "--part", "half"), ("tokenizer",), ("nothing",),
     ("tokenizer", "--train"), ("tokenize", "--source", "x", "--check-encoding", "0"),
     ("tokenize", "--source", "python-docs", "--address", "here:6379")],
)  # fmt: skip
def test_wrong_usage_has_exit_code_2(arguments: tuple[Any, ...]) -> None:
    assert run(*arguments).exit_code == 2


def test_a_try_that_could_not_begin_leaves_nothing_behind(tmp_path: Path) -> None:
    """With nothing there, the next try may be made with another tokenizer."""
    out = tmp_path / "shards"
    assert run("tokenize", "--source", "books3", "--out", out).exit_code == 1
    assert not out.exists()


def test_vocabularies_are_learnt_extended_and_shown(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    learnt, more = tmp_path / "a.model", tmp_path / "b.model"
    made = run("tokenizer", "--train", "--vocab-size", 400, "--data-files",
               tmp_path / "a.jsonl", "--out", learnt)  # fmt: skip
    assert made.exit_code == 0 and "a: 400 entries" in made.output
    run("tokenizer", "--extend", learnt, "--piece", "[TOOL]", "--out", more)
    assert Tokenizer.load(more).id_of("[TOOL]") == 400
    assert "[TOOL]" in run("tokenizer", "--show", more).output
    assert "spare slots    733" in run("tokenizer", "--show", "default").output
    nothing = run("tokenizer", "--train", "--out", tmp_path / "c.model")
    assert nothing.exit_code == 1 and "nothing to learn from" in nothing.stderr
