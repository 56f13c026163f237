"""Which files are read, what is said of the others, and what happens when they change."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.cli import main
from pipeline.errors import PrepareError, SourceError
from pipeline.estimate import PrepareListener
from pipeline.inputs.inputs import LocalInputs, layout_of, listing_lines
from pipeline.inputs.listing import local_inputs, split_of
from pipeline.prepare import prepare
from pipeline.units.executors import Executor
from pipeline.units.recipe import PrepareRequest
from pipeline.units.units import PreparePlan, read_plan
from pipeline_samples import (
    TEXTS,
    contents,
    corpus,
    prepared,
    request,
    tokenizer,
    write_jsonl,
)
from shards.files import create_once


def files_below(folder: Path, *names: str, data: bytes = b'{"text": "x"}\n') -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def taken(pattern: Path | str, split: str = "") -> list[str]:
    return [file.path for file in local_inputs((str(pattern),), split).files]


def left_out(inputs: LocalInputs) -> dict[str, str]:
    return {entry.path: entry.why for entry in inputs.left_out}


def test_what_a_folder_leaves_out_is_listed_with_the_reason(tmp_path: Path) -> None:
    names = ("a.jsonl", "b.jsonl.xz", "README.md", "LICENSE", "notes.txt", "state.json", "plot.png")
    hidden = (".cache/x.jsonl", ".ipynb_checkpoints/a.jsonl", "sub/.git/c.jsonl", ".secret.jsonl")
    files_below(tmp_path, *names, *hidden)
    inputs = local_inputs((str(tmp_path),))
    assert [file.path for file in inputs.files] == ["a.jsonl", "b.jsonl.xz"]
    assert left_out(inputs) == {
        "README.md": "a card",
        "LICENSE": "a card",
        "notes.txt": "text next to tables",
        "state.json": "metadata of datasets",
        "plot.png": "no reader for its ending",
        ".cache": "hidden",
        ".ipynb_checkpoints": "hidden",
        "sub/.git": "hidden",
        ".secret.jsonl": "hidden",
    }
    *lines, summary = listing_lines(inputs)
    assert len(lines) == 11 and "README.md  left out: a card" in "\n".join(lines)
    assert summary.startswith("2 files, 28 bytes; 9 left out: 4 hidden, 2 a card, ")


@pytest.mark.parametrize("name", ["b.jsonl.7z", "b.warc", "b.parquet.part", "sub/c.tar.gz"])
def test_nothing_starts_where_what_is_left_out_looks_like_data(tmp_path: Path, name: str) -> None:
    files_below(tmp_path, "a.jsonl", name)
    with pytest.raises(SourceError, match="looks like data and would be left out: .*" + name):
        taken(tmp_path)
    assert taken(tmp_path / "*.jsonl") == ["a.jsonl"]  # as the message advises


def test_a_large_file_of_any_ending_looks_like_data(tmp_path: Path) -> None:
    files_below(tmp_path, "a.jsonl", "small.dat", "notes.txt")
    assert taken(tmp_path) == ["a.jsonl"]
    for name in ("small.dat", "notes.txt"):
        (tmp_path / name).write_bytes(bytes(1 << 20))
        with pytest.raises(SourceError, match=name):
            taken(tmp_path)
        (tmp_path / name).unlink()


def test_an_explicit_pattern_is_obeyed_or_refused(tmp_path: Path) -> None:
    files_below(tmp_path, "README-corpus.txt", "LICENSE.txt", "a.txt", "sub/b.txt", data=b"x")
    assert taken(tmp_path / "*.txt") == ["LICENSE.txt", "README-corpus.txt", "a.txt"]
    files_below(tmp_path, "odd.bin")
    with pytest.raises(SourceError, match=r"odd\.bin: no reader for this kind of file"):
        taken(tmp_path / "[ao]*")
    with pytest.raises(SourceError, match=r"looks like data and would be left out: .*sub \(a fold"):
        taken(tmp_path / "[as]*")
    assert taken(tmp_path / "**" / "*.txt") == [
        "LICENSE.txt", "README-corpus.txt", "a.txt", "sub/b.txt",
    ]  # fmt: skip


def test_a_folder_and_the_pattern_over_it_agree(tmp_path: Path) -> None:
    files_below(tmp_path, "a.jsonl", "b/c.jsonl", "b/d.parquet")
    assert (
        taken(tmp_path) == taken(tmp_path / "**" / "*") == ["a.jsonl", "b/c.jsonl", "b/d.parquet"]
    )


@pytest.mark.parametrize(
    "names",
    [
        ("train.jsonl", "test.jsonl", "validation.jsonl"),
        ("train-00000-of-00002.jsonl", "test-00000-of-00001.jsonl", "dev.jsonl"),
        ("train/a.jsonl", "test/a.jsonl", "val/a.jsonl"),
    ],
)
def test_only_the_training_files_are_taken_unasked(tmp_path: Path, names: tuple[str, ...]) -> None:
    files_below(tmp_path, *names)
    inputs = local_inputs((str(tmp_path),))
    assert [file.path for file in inputs.files] == [names[0]]
    assert set(left_out(inputs).values()) == {"test split", "validation split"}
    assert taken(tmp_path, "test") == [names[1]]
    assert taken(tmp_path, "dev") == taken(tmp_path, "validation") == [names[2]]
    assert taken(tmp_path, "all") == sorted(names)
    pattern = tmp_path / "**" / "*.jsonl"
    with pytest.raises(SourceError, match=r"next to training files: narrow it, or --split all"):
        taken(pattern)
    assert taken(pattern, "all") == sorted(names)
    assert taken(tmp_path / names[1]) == [Path(names[1]).name]  # named, so meant


def test_a_folder_without_the_wanted_split_is_refused(tmp_path: Path) -> None:
    files_below(tmp_path, "test.jsonl", "dev.jsonl")
    with pytest.raises(SourceError, match=r"no train files, only test and validation: choose"):
        taken(tmp_path)
    files_below(tmp_path, "corpus.jsonl")
    assert taken(tmp_path) == ["corpus.jsonl"]


def test_names_say_splits_as_whole_words() -> None:
    assert split_of(Path("wiki.valid.raw")) == "validation"
    assert split_of(Path("data/train-00001.jsonl")) == "train"
    for name in ("latest.jsonl", "trainer.jsonl", "contest/a.jsonl", "test_train.jsonl", "test.py"):
        assert split_of(Path(name)) == "", name


def test_links_are_followed_once_and_what_is_no_file_is_named(tmp_path: Path) -> None:
    files_below(tmp_path, "in/a.jsonl", "elsewhere/b.jsonl")
    (tmp_path / "in" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "twin.jsonl").symlink_to(tmp_path / "in" / "a.jsonl")
    os.mkfifo(tmp_path / "in" / "pipe")
    inputs = local_inputs((str(tmp_path / "in"),))
    assert [file.path for file in inputs.files] == ["a.jsonl", "more/b.jsonl"]
    assert left_out(inputs) == {
        "pipe": "not a regular file",
        "twin.jsonl": "the same file as a.jsonl",
    }
    (tmp_path / "in" / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    with pytest.raises(SourceError, match=r"gone\.jsonl \(not a regular file\)"):
        taken(tmp_path / "in")


NAMES = st.from_regex(
    r"(\.|)(a|train|test|README|state)[0-9]?(\.jsonl|\.txt|\.csv|\.json|\.zip|\.png|)(\.xz|\.zst|)",
    fullmatch=True,
).filter(lambda name: name not in (".", ".."))


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    tree=st.dictionaries(st.tuples(st.sampled_from(["", "d", ".h", "d/e"]), NAMES), st.booleans())
)
def test_every_file_is_taken_or_left_out_or_stops_the_start(
    tree: dict[tuple[str, str], bool], tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("tree")
    for (folder, name), large in tree.items():
        files_below(root / folder, name, data=bytes(1 << 20) if large else b"x")
    try:
        inputs = local_inputs((str(root),))
    except SourceError as error:
        assert str(root) in str(error)
        return
    known = {file.path for file in inputs.files}
    others = left_out(inputs)
    assert known and not known & others.keys()
    for path in (path.relative_to(root) for path in root.rglob("*") if path.is_file()):
        inside = {str(path), *map(str, path.parents)}
        assert len(inside & (known | others.keys())) == 1, path
        if str(path) in known:
            assert not any(part.startswith(".") for part in path.parts)
            assert layout_of(path.name) is not None and split_of(path) in ("", "train")


def begun(out: Path, files: Path, after: int) -> PrepareRequest:
    """A preparation that was interrupted when so many units were done."""

    class Interrupted(PrepareListener):
        done = 0

        def unit_done(self, position: int) -> None:
            self.done += 1
            if self.done == after:
                raise KeyboardInterrupt

    wanted = request(out, str(files))
    with pytest.raises(KeyboardInterrupt):
        prepare(wanted, Executor(workers=1), Interrupted())
    return wanted


@pytest.mark.parametrize("change", ["cut", "edited", "touched", "gone", "new"])
def test_a_file_that_changed_between_two_starts_stops_the_second(
    tmp_path: Path, change: str
) -> None:
    corpus(tmp_path / "in")
    wanted = begun(tmp_path / "out", tmp_path / "in", after=2)
    file = tmp_path / "in" / "2.jsonl"
    data, at = file.read_bytes(), file.stat()
    if change == "cut":
        file.write_bytes(data[:100])
    elif change == "edited":
        file.write_bytes(data.replace(b"cat", b"dog"))
    elif change == "touched":
        os.utime(file, ns=(at.st_atime_ns, at.st_mtime_ns + 1))
    elif change == "gone":
        file.unlink()
    else:
        (tmp_path / "in" / "9.jsonl").write_bytes(data)
    what = (
        r"without 9\.jsonl.*--source NAME-2" if change == "new" else r"other files: 2\.jsonl was "
    )
    before = contents(tmp_path / "out")
    with pytest.raises(PrepareError, match=what):
        prepared(wanted)
    assert contents(tmp_path / "out") == before
    (tmp_path / "in" / "9.jsonl").unlink(missing_ok=True)
    file.write_bytes(data)
    os.utime(file, ns=(at.st_atime_ns, at.st_mtime_ns))  # put back, with its time
    prepared(wanted)
    prepared(request(tmp_path / "calm", str(tmp_path / "in")))
    assert contents(tmp_path / "out") == contents(tmp_path / "calm")


@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
def test_a_file_that_changes_during_the_work_stops_it(tmp_path: Path, ending: str) -> None:
    corpus(tmp_path / "in")
    changed: list[Path] = []

    class Meddling(PrepareListener):
        def unit_done(self, position: int) -> None:
            plan = read_plan(tmp_path / "out" / "mine")
            assert plan is not None
            *_, last = (
                p.file for p in map(plan.parts.__getitem__, order(plan)) if ending in p.file
            )
            if not changed:
                changed.append(tmp_path / "in" / last)
                os.truncate(changed[0], 200)

    def order(plan: PreparePlan) -> list[int]:
        return [number for unit in range(len(plan.units)) for number, _ in plan.parts_of(unit)]

    wanted = request(tmp_path / "out", str(tmp_path / "in"))
    with pytest.raises(SourceError, match=r" has changed since it was listed: [\d,]+ bytes of 2"):
        prepare(wanted, Executor(workers=1), Meddling())
    assert not (tmp_path / "out" / "mine" / "manifest.json").exists()


def test_a_plan_of_an_earlier_version_has_no_times_and_goes_on(tmp_path: Path) -> None:
    corpus(tmp_path / "in")
    wanted = begun(tmp_path / "out", tmp_path / "in", after=1)
    plan = tmp_path / "out" / "mine" / "units.json"
    value = json.loads(plan.read_bytes())
    assert all(file.pop("version").isdigit() for file in value["files"])
    for path in (tmp_path / "out" / "mine").glob("[0-9]*"):
        path.unlink()
    plan.write_text(json.dumps(value))
    os.utime(tmp_path / "in" / "2.jsonl", ns=(1, 1))
    prepared(wanted)
    assert "version" not in plan.read_text()


def test_a_failed_start_leaves_nothing_and_its_advice_works(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", TEXTS, column="body")
    with pytest.raises(SourceError, match="no field 'text'"):
        prepared(request(tmp_path / "out", str(tmp_path / "a.jsonl")))
    assert not (tmp_path / "out").exists()
    wanted = begun(tmp_path / "out2", write_jsonl(tmp_path / "b.jsonl", TEXTS), after=1)
    with pytest.raises(PrepareError, match="was begun with seq_len 64, not 32"):
        prepared(request(tmp_path / "out2", str(tmp_path / "b.jsonl"), seq_len=32))
    assert prepared(wanted).facts.seq_len == 64  # what is done is kept


def test_a_plan_of_which_nothing_was_made_is_replaced(tmp_path: Path) -> None:
    files = str(write_jsonl(tmp_path / "b.jsonl", TEXTS))
    prepared(request(tmp_path / "out", files))
    for path in (tmp_path / "out" / "mine").iterdir():
        if path.name not in ("units.json", "tokenizer.model"):
            path.unlink()  # killed before the first unit was done
    assert prepared(request(tmp_path / "out", files, seq_len=32)).facts.seq_len == 32
    prepared(request(tmp_path / "calm", files, seq_len=32))
    assert contents(tmp_path / "out") == contents(tmp_path / "calm")


def test_a_file_system_without_hard_links_will_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*of: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    assert create_once(tmp_path / "x", b"one") and not create_once(tmp_path / "x", b"two")
    assert (tmp_path / "x").read_bytes() == b"one"
    prepared(request(tmp_path / "out", str(write_jsonl(tmp_path / "b.jsonl", TEXTS))))


def summer_prep(*arguments: Any) -> tuple[int, str]:
    ran = CliRunner().invoke(main, list(map(str, arguments)))
    return ran.exit_code, ran.output


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--config", "x"], 1, "--config does nothing here: --data-files names local files"),
        (["--revision", "x"], 1, "--revision does nothing here"),
        (["--split", "test"], 1, "--split test does nothing here: --data-files names the files"),
        (["--seq-len", 4294967297], 2, "4294967297 is not in the range"),
        (["--workers", 10**9], 2, "is not in the range"),
        (["--max-tokens", "1.5X"], 2, "'1.5X' is not a count: write it as in 5000, 10M or 1.5B"),
        (["--max-tokens", "0.5"], 2, "is not a count"),
        (["--max-documents", "99999T"], 2, "is not a count"),
        (["--source", "other"], 2, "--dataset and --data-files go with a single --source"),
    ],
)
def test_options_that_do_nothing_or_are_absurd_are_refused(
    tmp_path: Path, arguments: list[Any], code: int, message: str
) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    common = ("tokenize", "--source", "mine", "--data-files", file, "--out", tmp_path / "out")
    found, output = summer_prep(*common, *arguments)
    assert (found, message in output) == (code, True), output
    assert not (tmp_path / "out").exists()


def test_several_sources_and_numbers_as_people_write_them(tmp_path: Path) -> None:
    (tmp_path / "small.model").write_bytes(tokenizer().model)
    common = ("--tokenizer", tmp_path / "small.model", "--out", tmp_path / "out", "--workers", 1)
    code, output = summer_prep(
        "tokenize", "--source", "python-docs", "--source", "python-code", *common,
        "--max-tokens", "0.02M", "--seq-len", 64,
    )  # fmt: skip
    assert code == 0, output
    for name in ("python-docs", "python-code"):
        manifest = json.loads((tmp_path / "out" / name / "manifest.json").read_text())
        assert manifest["n_tokens"] >= 20_000


def test_the_listing_can_be_asked_for(tmp_path: Path) -> None:
    files_below(tmp_path, "a.jsonl", "README.md")
    code, output = summer_prep("tokenize", "--source", "x", "--data-files", tmp_path, "--list")
    assert code == 0 and "a.jsonl\n" in output and "README.md  left out: a card" in output
    assert not (tmp_path / "x").exists()
