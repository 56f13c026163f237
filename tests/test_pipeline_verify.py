"""Damage is named, all of it, and repaired to the same bytes."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from pipeline import cli
from pipeline.checks.inspection import report, report_lines, row_lines, show_row
from pipeline.checks.repair import repair
from pipeline.checks.verify import damages
from pipeline.errors import PrepareError
from pipeline.text.tokenizer import Tokenizer
from pipeline.units.executors import Executor
from pipeline.units.work import Limit
from pipeline_samples import TEXTS, contents, prepared, request, write_jsonl

FILES = 5


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A prepared source of several units, some with refused records; the input beside it."""
    place = tmp_path_factory.mktemp("whole")
    for number in range(FILES):
        rows = [*TEXTS[number * 50 : number * 50 + 50], 7] if number % 2 else TEXTS[:90]
        write_jsonl(place / "in" / f"{number}.jsonl", rows)
    prepared(request(place, str(place / "in"), unit_bytes=1 << 13))
    return place


@pytest.fixture
def source(whole: Path, tmp_path: Path) -> Any:
    """A copy of its own to spoil."""
    shutil.copytree(whole / "mine", tmp_path / "mine")
    return tmp_path / "mine"


def test_what_is_whole_is_found_whole(source: Path) -> None:
    assert list(damages(source)) == []
    assert repair(source, (), Executor()) == []


def test_a_bad_row_is_named_with_its_file(source: Path) -> None:
    path = next(source.glob("00001-000.npy"))
    rows = np.load(path, mmap_mode="r+")
    rows[3, 5] ^= 1
    rows[7, 0] ^= 1
    rows.flush()
    (found,) = damages(source)
    assert str(found) == "00001-000.npy: rows 3, 7: damaged (digests differ)"


def test_repair_without_the_same_input_touches_nothing(
    whole: Path, source: Path, tmp_path: Path
) -> None:
    next(source.glob("*.rows.npy")).write_bytes(b"")
    before = contents(source)
    with pytest.raises(PrepareError, match="name the same ones with --data-files"):
        repair(source, (), Executor())
    for number in range(FILES):  # the same sizes, other words
        text = (whole / "in" / f"{number}.jsonl").read_text().replace("cat", "cow")
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


def test_repair_of_a_limited_source_cuts_where_the_limit_did(whole: Path, tmp_path: Path) -> None:
    files = str(whole / "in")
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


def test_the_report_counts_what_is_there(whole: Path) -> None:
    folder = whole / "mine"
    found = report(folder)
    rows = [np.load(path) for path in folder.glob("*-[0-9][0-9][0-9].npy")]
    tokens = np.concatenate([array.reshape(-1) for array in rows])
    assert found.padding == np.count_nonzero(tokens == 0)
    assert found.counts.sum() == np.count_nonzero(tokens) == found.manifest.n_tokens
    assert 0 < found.cut_documents == cut_by_hand(folder, found.manifest)
    tokenizer = Tokenizer.load(folder / "tokenizer.model", "small")
    told = report_lines(folder, found, tokenizer)
    share = found.cut_documents / found.manifest.n_documents
    assert f"{found.cut_documents:,} ({share:.1%}) run on into another row" in told
    histogram = found.histogram()
    assert sum(histogram.values()) == 400 and histogram[0] == np.count_nonzero(found.counts == 0)
    assert histogram[10] == np.count_nonzero((found.counts >= 10) & (found.counts < 100))
    assert f"never {histogram[0]}, " in told and f"10-99 times {histogram[10]}, " in told
    assert "2 wrong type" in told and found.manifest.root in told
    as_json = json.loads(json.dumps(found.to_json(tokenizer)))
    assert as_json["cut_share"] == share and as_json["histogram"]["10"] == histogram[10]
    assert as_json["n_files"] == FILES and len(as_json["top_tokens"]) == 20
    assert found.counts[1] == found.manifest.n_documents == 3 * 90 + 2 * 50


def test_a_row_is_shown_as_text_with_its_documents(whole: Path) -> None:
    folder = whole / "mine"
    row = show_row(folder, "train", 0)
    assert row.pieces[0][1] and row.pieces[0][0].endswith(("barked", ".", "\n")) is not None
    told = row_lines(row)
    assert told.startswith("=== row 0: ") and "--- document begins" in told
    joined = "".join(text for text, _, _ in row.pieces)
    assert joined[:20] in (whole / "in" / row.file).read_text().replace("\\n", "\n")
    with pytest.raises(PrepareError, match="there is no row 999999"):
        show_row(folder, "train", 999_999)


def test_the_commands_say_it_in_one_line(whole: Path, source: Path) -> None:
    run = CliRunner()
    good = run.invoke(cli.main, ["verify", str(whole)])
    assert good.exit_code == 0 and good.output == f"{whole / 'mine'}: whole\n"
    (source / "00000-000.npy").unlink()
    bad = run.invoke(cli.main, ["verify", str(source)])
    assert bad.exit_code == 1 and "mine/00000-000.npy: missing" in bad.output
    mended = run.invoke(
        cli.main, ["repair", str(source), "--data-files", str(whole / "in"), "--workers", "1"]
    )
    assert mended.exit_code == 0 and mended.output.endswith("whole\n")
    shown = run.invoke(cli.main, ["inspect", str(source), "--row", "1"])
    assert shown.exit_code == 0 and "=== row 1" in shown.output
    nothing = run.invoke(cli.main, ["inspect", str(whole / "in")])
    assert nothing.exit_code == 1 and nothing.output.count("\n") == 1
    for command in ("verify", "repair", "inspect"):
        nowhere = run.invoke(cli.main, [command, str(whole / "nowhere")])
        assert nowhere.exit_code == 1 and nowhere.output.count("\n") == 1
        assert "No such file" not in nowhere.output
