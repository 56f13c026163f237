"""The plan: parts, units, their order, and the file it is written to."""

import itertools
from pathlib import Path

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import PrepareError, SourceError
from pipeline.inputs.listing import local_inputs
from pipeline.inputs.sources import Source
from pipeline.units import units
from pipeline.units.recipe import recipe_of
from pipeline.units.units import (
    WeighedPart,
    cut_into_parts,
    fill_units,
    make_plan,
    read_plan,
)
from pipeline_samples import TEXT, request, write_jsonl, write_parquet
from shards.format import PLAN, Part


@settings(deadline=None)
@given(st.lists(st.integers(0, 50), min_size=1, max_size=60), st.integers(1, 100))
def test_units_take_consecutive_parts_until_they_are_full(
    sizes: list[int], unit_bytes: int
) -> None:
    weighed = [
        WeighedPart(Part(file=f"f{n // 3}", first=n % 3, last=n % 3 + 1), size, 2 * size)
        for n, size in enumerate(sizes)
    ]
    made = fill_units(weighed, unit_bytes)
    in_order = sorted(made, key=lambda unit: unit.first)
    assert [unit.first for unit in in_order] == [0, *(unit.last for unit in in_order[:-1])]
    assert in_order[-1].last == len(sizes)
    for unit in in_order:
        inside = sizes[unit.first : unit.last]
        assert unit.text_bytes == sum(inside) and unit.read_bytes == 2 * sum(inside)
        assert sum(inside[:-1]) < unit_bytes  # not one part more than needed
        assert sum(inside) >= unit_bytes or unit is in_order[-1]
    keys = [
        xxhash.xxh3_64_intdigest(f"f{unit.first // 3}:{unit.first % 3}".encode()) for unit in made
    ]
    assert keys == sorted(keys)


def test_every_kind_of_file_is_cut_as_described(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(units, "LINES_BYTES", 100)
    write_parquet(tmp_path / "a.parquet", ["word " * 50] * 25, group=10)
    size = write_jsonl(tmp_path / "b.jsonl", ["line"] * 10).stat().st_size
    (tmp_path / "c.jsonl.gz").write_bytes(b"x" * 30)
    (tmp_path / "d.txt").write_bytes(b"x" * 500)
    weighed = cut_into_parts(local_inputs((str(tmp_path / "*"),)), TEXT)
    cuts = [*range(0, size, 100), size]
    assert [(w.part.file, w.part.first, w.part.last) for w in weighed] == [
        *(("a.parquet", n, n + 1) for n in range(3)),
        *(("b.jsonl", first, last) for first, last in itertools.pairwise(cuts)),
        ("c.jsonl.gz", 0, 30),
        ("d.txt", 0, 500),
    ]
    assert [w.text_bytes for w in weighed[3:]] == [
        *(last - first for first, last in itertools.pairwise(cuts)), 120, 500,
    ]  # fmt: skip
    lines = Source(name="m", about="", licence="", shape="lines")
    pages = cut_into_parts(local_inputs((str(tmp_path / "a.parquet"),)), lines)
    assert [(w.part.first, w.part.last) for w in pages] == [(0, 3)]


def test_the_listing_is_in_bytewise_order_and_relative(tmp_path: Path) -> None:
    for name in ("b/2.txt", "B/1.txt", "b-1.txt", "ä.txt", ".hidden.txt", "b/readme.html"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    inputs = local_inputs((str(tmp_path),))
    assert [file.path for file in inputs.files] == ["B/1.txt", "b-1.txt", "b/2.txt", "ä.txt"]
    twice = local_inputs((str(tmp_path / "b" / "*.txt"), str(tmp_path / "*" / "*.txt")))
    assert [file.path for file in twice.files] == ["B/1.txt", "b/2.txt"]


def test_a_data_sets_card_and_scripts_are_no_data(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "data" / "a.jsonl", ["text"])
    for name in ("README.md", "LICENSE.txt", "loader.py", "notes.txt", ".gitattributes"):
        (tmp_path / "data" / name).write_text("x")
    for pattern in (tmp_path, tmp_path / "data", tmp_path / "data" / "*.jsonl"):
        (file,) = local_inputs((str(pattern),)).files
        assert file.path.endswith("a.jsonl")
    (notes,) = local_inputs((str(tmp_path / "data" / "[Nn]*.txt"),)).files
    assert notes.path == "notes.txt"
    (card,) = local_inputs((str(tmp_path / "data" / "LICENSE.txt"),)).files  # named, so meant
    assert card.path == "LICENSE.txt"
    (card,) = local_inputs((str(tmp_path / "data" / "LIC*"),)).files
    assert card.path == "LICENSE.txt"
    with pytest.raises(SourceError, match="no file matches"):
        local_inputs((str(tmp_path / "data" / "NOTICE*"),))


def test_a_plan_survives_its_file(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "in" / "a.jsonl", ["text"] * 9)
    inputs = local_inputs((str(tmp_path / "in"),))
    plan = make_plan(recipe_of(request(tmp_path, "in"), inputs), inputs, TEXT, 1 << 20)
    assert read_plan(tmp_path) is None
    (tmp_path / PLAN).write_bytes(plan.to_bytes())
    again = read_plan(tmp_path)
    assert again is not None and again == plan and again.sha256 == plan.sha256
    (tmp_path / PLAN).write_bytes(plan.to_bytes().replace(b'"licence"', b'"license"'))
    with pytest.raises(PrepareError, match=r"no plan of this version \(licence is missing\)"):
        read_plan(tmp_path)
    (tmp_path / PLAN).write_bytes(b'{"format": "other/9"}')
    with pytest.raises(PrepareError, match=r"units\.json is no plan of this version"):
        read_plan(tmp_path)


def test_nothing_to_read_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").touch()
    with pytest.raises(SourceError, match=r"nothing to read in a\.jsonl \(0 bytes of text\)"):
        make_plan({}, local_inputs((str(tmp_path),)), TEXT, 1 << 20)


@pytest.mark.parametrize(("n_files", "n_units"), [(3, 2), (6, 3), (15, 5), (30, 10)])
def test_a_small_listing_has_units_for_many_workers(
    n_files: int, n_units: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(units, "LEAST_UNIT_BYTES", 2000)
    monkeypatch.setattr(units, "UNITS_WANTED", 5)
    for n in range(n_files):
        (tmp_path / f"{n:02}.txt").write_bytes(b"x" * 1000)
    inputs = local_inputs((str(tmp_path / "*.txt"),))
    assert len(make_plan({}, inputs, TEXT, 3000).units) == n_units
