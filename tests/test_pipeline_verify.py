"""Damage is named and repaired to the same bytes; what `inspect` says of a folder."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from pipeline import cli
from pipeline.checks.inspection import escaped, report, report_lines, show_row
from pipeline.checks.repair import repair
from pipeline.checks.verify import Metadata, _shard_damage, find_damage
from pipeline.errors import PrepareError
from pipeline.prepare import load_or_create_plan
from pipeline.units.executors import Executor
from pipeline.units.job import Limit
from pipeline_samples import TEXTS, contents, prepared, request, write_jsonl
from shards.errors import ShardError, one_line
from shards.files import json_bytes
from shards.format import TOKEN_BYTES
from shards.reader import RowFile, read_manifest

FILES = 5


@pytest.fixture(scope="module")
def prepared_place(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A prepared source of several units, some with rejected records; the input beside it."""
    place = tmp_path_factory.mktemp("prepared")
    for number in range(FILES):
        rows = [*TEXTS[number * 50 : number * 50 + 50], 7] if number % 2 else TEXTS[:90]
        write_jsonl(place / "in" / f"{number}.jsonl", rows)
    prepared(request(place, str(place / "in"), unit_bytes=1 << 13))
    return place


@pytest.fixture
def source(prepared_place: Path, tmp_path: Path) -> Any:
    """A copy of its own to spoil."""
    shutil.copytree(prepared_place / "mine", tmp_path / "mine")
    return tmp_path / "mine"


def test_an_intact_source_has_no_damage(source: Path) -> None:
    assert list(find_damage(source)) == []
    assert repair(source, (), Executor()) == []


def test_a_bad_row_is_named_with_its_file(source: Path) -> None:
    path = next(source.glob("00001-000.npy"))
    rows = np.load(path, mmap_mode="r+")
    rows[3, 5] ^= 1
    rows[7, 0] ^= 1
    rows.flush()
    (found,) = find_damage(source)
    assert str(found) == "00001-000.npy: rows 3, 7: damaged (digests differ)"


def test_repair_without_the_same_input_touches_nothing(
    prepared_place: Path, source: Path, tmp_path: Path
) -> None:
    next(source.glob("*.rows.npy")).write_bytes(b"")
    before = contents(source)
    with pytest.raises(PrepareError, match="name the same ones with --data-files"):
        repair(source, (), Executor())
    for number in range(FILES):  # the same sizes, other words
        text = (prepared_place / "in" / f"{number}.jsonl").read_text().replace("cat", "cow")
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / f"{number}.jsonl").write_text(text)
    with pytest.raises(PrepareError, match="its input has changed; nothing was replaced"):
        repair(source, (str(tmp_path / "in"),), Executor())
    for number in range(FILES - 1):
        (tmp_path / "in" / f"{number}.jsonl").unlink()
    (tmp_path / "in" / f"{FILES - 1}.jsonl").write_text("{}\n")
    with pytest.raises(PrepareError, match="which is not among the files now"):
        repair(source, (str(tmp_path / "in"),), Executor())
    assert contents(source) == before


def test_repair_of_a_limited_source_cuts_where_the_limit_did(
    prepared_place: Path, tmp_path: Path
) -> None:
    files = str(prepared_place / "in")
    prepared(request(tmp_path, files, unit_bytes=1 << 12, limit=Limit(documents=111)))
    before = contents(tmp_path / "mine")
    for path in (tmp_path / "mine").glob("*.rows.npy"):
        path.unlink()
    assert len(repair(tmp_path / "mine", (files,), Executor())) > 2
    assert contents(tmp_path / "mine") == before


def cut_by_hand(folder: Path, manifest: Any) -> Any:
    """Documents of which the first and the last token are in different rows."""
    seq_len, cut = manifest.facts.seq_len, 0
    streams: dict[str, list[Any]] = {}
    for shard in manifest.shards:
        streams.setdefault(shard.file[:-8], []).append(np.load(folder / shard.file).reshape(-1))
    for arrays in streams.values():
        stream = np.concatenate(arrays)
        stream = stream[: np.flatnonzero(stream)[-1] + 1]
        begins = np.flatnonzero(stream == 1)
        ends = [*(begins[1:] - 1), len(stream) - 1]
        cut += sum(int(a) // seq_len < int(b) // seq_len
                   for a, b in zip(begins, ends, strict=True))  # fmt: skip
    return cut


def test_the_report_counts_what_is_there(prepared_place: Path) -> None:
    folder = prepared_place / "mine"
    found, manifest = report(folder), read_manifest(folder)
    rows = [np.load(path) for path in folder.glob("*-[0-9][0-9][0-9].npy")]
    counts = np.bincount(np.concatenate([array.reshape(-1) for array in rows]), minlength=400)
    assert found["padding"] == counts[0] and counts[1:].sum() == found["n_tokens"]
    assert 0 < found["cut_documents"] == cut_by_hand(folder, manifest)
    share = found["cut_documents"] / found["n_documents"]
    counts[0], histogram, shown = 0, found["histogram"], report_lines(found)
    assert f"{found['cut_documents']:,} ({share:.1%}) run on into another sequence" in shown
    assert sum(histogram.values()) == 400 and histogram[0] == np.count_nonzero(counts == 0)
    assert histogram[10] == np.count_nonzero((counts >= 10) & (counts < 100))
    assert f"never {histogram[0]}, " in shown and f"10-99 times {histogram[10]}, " in shown
    assert "2 wrong type" in shown and manifest.root in shown
    as_json = json.loads(json.dumps(found))
    assert as_json["cut_share"] == share and as_json["histogram"]["10"] == histogram[10]
    assert as_json["n_files"] == FILES and len(as_json["top_tokens"]) == 20
    assert list(found["top_tokens"].values()) == sorted(counts.tolist(), reverse=True)[:20]
    assert counts[1] == manifest.n_documents == 3 * 90 + 2 * 50


def test_a_sequence_is_shown_as_text_with_its_documents(prepared_place: Path) -> None:
    folder = prepared_place / "mine"
    header, begins, text, *_ = show_row(folder, "train", 0).split("\n")
    assert begins == "--- document begins" and re.match("=== sequence 0: .*part .*record", header)
    file = header.split(": ")[1].split(",")[0]
    assert text in (prepared_place / "in" / file).read_text()
    with pytest.raises(PrepareError, match="there is no sequence 999999"):
        show_row(folder, "train", 999_999)


def test_token_bytes_are_optional_checked_and_repaired(source: Path) -> None:
    path = source / TOKEN_BYTES
    table = np.load(path)
    path.unlink()  # as earlier versions left it
    assert list(find_damage(source)) == []
    np.save(path, table + 1)
    assert [str(damage) for damage in find_damage(source)] == ["token_bytes.npy: damaged"]
    assert len(repair(source, (), Executor())) == 1
    assert np.array_equal(np.load(path), table)


def test_a_plan_without_its_keys_is_damage_too(source: Path) -> None:
    """Nothing else is left that could name its digest."""
    for path in source.glob("[0-9]*.json"):
        path.unlink()
    (source / "units.json").write_bytes(
        json_bytes({"format": "summerlm-units/1", "files": [], "parts": [], "units": []})
    )
    assert {"units.json", "00000.json"} <= {damage.file for damage in find_damage(source)}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("manifest.json", "units.json"), "prepare the source again"),
        (("manifest.json", "00001.json"), "run the same `summer-prep tokenize` again"),
    ],
)
def test_two_damaged_metadata_files_are_prepared_again(
    prepared_place: Path, source: Path, names: tuple[str, ...], message: str
) -> None:
    before = contents(source)
    for name in names:
        (source / name).write_bytes(before[name][:-9])
    with pytest.raises(PrepareError, match=message):
        repair(source, (str(prepared_place / "in"),), Executor())
    if "units.json" in names:
        shutil.rmtree(source)
    prepared(request(source.parent, str(prepared_place / "in"), unit_bytes=1 << 13))
    assert contents(source) == before


def test_the_commands_say_it_in_one_line(prepared_place: Path, source: Path) -> None:
    run = CliRunner()
    good = run.invoke(cli.main, ["verify", str(prepared_place)])
    assert good.exit_code == 0 and good.output == f"{prepared_place / 'mine'}: intact\n"
    (source / "00000-000.npy").unlink()
    bad = run.invoke(cli.main, ["verify", str(source)])
    assert bad.exit_code == 1 and "mine/00000-000.npy: missing" in bad.output
    repaired = run.invoke(
        cli.main,
        ["repair", str(source), "--data-files", str(prepared_place / "in"), "--workers", "1"],
    )
    assert repaired.exit_code == 0 and repaired.output.endswith("intact\n")
    shown = run.invoke(cli.main, ["inspect", str(source), "--row", "1"])
    assert shown.exit_code == 0 and "=== sequence 1" in shown.output
    nothing = run.invoke(cli.main, ["inspect", str(prepared_place / "in")])
    assert nothing.exit_code == 1 and nothing.output.count("\n") == 1
    for command in ("verify", "repair", "inspect"):
        nowhere = run.invoke(cli.main, [command, str(prepared_place / "nowhere")])
        assert nowhere.exit_code == 1 and nowhere.output.count("\n") == 1
        assert "No such file" not in nowhere.output


def verify(source: Path) -> tuple[int, str]:
    ran = CliRunner().invoke(cli.main, ["verify", str(source)])
    return ran.exit_code, ran.output


def test_a_stranger_is_a_note_for_verify_and_for_repair(source: Path) -> None:
    (source / ".DS_Store").write_bytes(b"x")
    code, output = verify(source)
    assert code == 0 and ".DS_Store: no part of the source (a note, no damage)" in output
    assert f"{source}: intact" in output
    assert repair(source, (), Executor()) == [] and (source / ".DS_Store").exists()
    (source / "00099-000.npy").write_bytes(b"x")  # looks like one of ours
    assert verify(source)[0] == 1


def test_missing_shards_are_noticed_by_the_same_command(prepared_place: Path, source: Path) -> None:
    wanted = request(source.parent, str(prepared_place / "in"), unit_bytes=1 << 13)
    prepared(wanted)
    for path in source.glob("*.npy"):
        path.unlink()
    with pytest.raises(ShardError, match=r"files of its shards are missing, 00000.*summer-prep re"):
        prepared(wanted)
    assert repair(source, (str(prepared_place / "in"),), Executor(workers=1))
    prepared(wanted)


def test_tokens_beyond_the_vocabulary_are_named(source: Path) -> None:
    """The digests are right: a writer made them so."""
    manifest = json.loads((source / "manifest.json").read_bytes())
    small = manifest["tokenizer"]["vocab_size"]
    damage = Metadata(source)
    shard = damage.shards_of("00000")[0]
    rows = RowFile(source / shard.file, (shard.n_rows, damage.facts.seq_len), damage.facts.dtype)
    largest = int(rows.read(slice(0, shard.n_rows)).max())
    assert largest < small
    facts = replace(damage.facts, tokenizer=replace(damage.facts.tokenizer, vocab_size=largest))
    (found,) = _shard_damage(source, shard, facts)
    assert found.what == f"token {largest} is beyond the vocabulary of {largest}"


def test_a_fifo_or_a_link_out_of_the_folder_is_damage_and_holds_nothing_up(source: Path) -> None:
    fifo, link = source / "00000-000.npy", source / "00001-000.npy"
    fifo.unlink()
    os.mkfifo(fifo)
    shutil.move(link, source.parent / "elsewhere.npy")
    link.symlink_to(source.parent / "elsewhere.npy")
    found = {damage.file: damage.what for damage in find_damage(source)}
    assert found == {
        fifo.name: "damaged (it is not a regular file)",
        link.name: "a link that leads out of the folder",
    }


@pytest.mark.parametrize("name", ["../x.npy", "/etc/x.npy", "a/b.npy", "..npy/", "x.txt", ".npy"])
def test_a_manifest_that_names_files_elsewhere_is_rejected(source: Path, name: str) -> None:
    path = source / "manifest.json"
    value = json.loads(path.read_bytes())
    value["shards"][0]["file"] = name
    path.write_bytes(json_bytes(value))
    with pytest.raises(ShardError, match="is no name of a shard in its own folder"):
        read_manifest(source)


REPAIR = """
import sys
from pathlib import Path
from pipeline.checks.repair import repair
from pipeline.units.executors import Executor
print(len(repair(Path(sys.argv[1]), (sys.argv[2],), Executor(workers=1))))
"""


def test_two_repairs_at_once_do_no_harm(prepared_place: Path, source: Path) -> None:
    before = contents(source)
    for path in list(source.glob("*-000.npy"))[::2]:
        path.unlink()
    command = [sys.executable, "-c", REPAIR, str(source), str(prepared_place / "in")]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [int(each.communicate(timeout=120)[0]) for each in both]
    assert [each.returncode for each in both] == [0, 0]
    assert min(outputs) == 0 < max(outputs)  # the second finds it done
    assert contents(source) == before


def test_text_on_a_terminal_has_no_control_characters() -> None:
    assert escaped("a\x1b[31m\x07\n\tb\u202e漢") == "a\\x1b[31m\\x07\n\tb\\u202e漢"
    assert one_line(ShardError("a\x1b[2Jb\nc")) == "a\\x1b[2Jb c"


@pytest.mark.parametrize(
    ("documents", "fraction"), [(20, 0.1), (150, 0.1), (1000, 0.02), (4000, 0.005), (50_000, 0.001)]
)
def test_small_sources_hold_some_documents_out_by_default(
    tmp_path: Path, documents: int, fraction: float
) -> None:
    texts = [f"{number:06} some text" for number in range(documents)]
    write_jsonl(tmp_path / "a.jsonl", texts)
    wanted = request(tmp_path / "out", str(tmp_path / "a.jsonl"), val_fraction=None)
    _, plan = load_or_create_plan(wanted, tmp_path / "out" / "mine")
    assert plan.recipe["val_fraction"] == fraction
    fixed = request(tmp_path / "fixed", str(tmp_path / "a.jsonl"), val_fraction=0.25)
    assert load_or_create_plan(fixed, tmp_path / "fixed")[1].recipe["val_fraction"] == 0.25
    again = load_or_create_plan(wanted, tmp_path / "out" / "mine")
    assert again[1] == plan
