"""Limits: the same fair prefix of a source for any number of workers."""

import io
import threading
from pathlib import Path
from typing import Any

import pytest

from pipeline.estimate import PrepareListener
from pipeline.inputs.listing import local_inputs
from pipeline.prepare import prepare
from pipeline.progress import PrepareDisplay
from pipeline.units.executors import Executor
from pipeline.units.job import Limit
from pipeline.units.recipe import recipe_of
from pipeline_samples import (
    WORDS,
    contents,
    corpus,
    documents,
    prepared,
    request,
    write_parquet,
)
from shards.reader import ShardReader, read_manifest


@pytest.mark.parametrize("limit", [Limit(documents=120), Limit(tokens=9000), Limit(150, 30_000)])
def test_a_limit_takes_the_same_prefix_for_any_number_of_workers(
    tmp_path: Path, limit: Limit
) -> None:
    corpus(tmp_path / "in")
    small: dict[str, Any] = {"unit_bytes": 1 << 12, "limit": limit}
    for workers in (1, 3):
        prepared(request(tmp_path / f"{workers}", str(tmp_path / "in"), **small), workers)
    assert contents(tmp_path / "1") == contents(tmp_path / "3")
    manifest = read_manifest(tmp_path / "1" / "mine")
    longest = max(len(ids) for ids in documents(tmp_path / "1" / "mine"))
    if limit.documents is not None:
        assert manifest.n_documents <= limit.documents
    if limit.tokens is not None:
        assert manifest.n_tokens < limit.tokens + longest
    reached = (
        (limit.documents or 10**9) - manifest.n_documents,
        (limit.tokens or 10**9) - manifest.n_tokens,
    )
    assert min(reached) <= 0
    files = {manifest.parts[ShardReader(tmp_path / "1" / "mine").origin(i)[1]].file
             for i in range(manifest.n_rows - manifest.n_val_rows)}  # fmt: skip
    assert len(files) > 2  # not the alphabet's first


@pytest.mark.parametrize(
    ("limit", "unit_bytes"),
    [
        (Limit(), 256 << 20),
        (Limit(tokens=1), 8 << 20),
        (Limit(tokens=1 << 30), 64 << 20),
        (Limit(tokens=1 << 40), 256 << 20),
        (Limit(documents=1 << 20, tokens=1 << 40), 2500 << 14),
    ],
)
def test_a_limit_makes_smaller_units(limit: Limit, unit_bytes: int, tmp_path: Path) -> None:
    wanted = request(tmp_path, "unused", limit=limit, unit_bytes=None)
    assert recipe_of(wanted, local_inputs((__file__,)))["unit_bytes"] == unit_bytes


def test_a_limit_beyond_the_source_takes_all(tmp_path: Path) -> None:
    texts = corpus(tmp_path / "in", 2)
    wanted = request(tmp_path, str(tmp_path / "in"), limit=Limit(tokens=10**9))
    assert prepared(wanted).n_documents == len(texts)
    assert prepared(wanted).n_documents == len(texts)


@pytest.mark.parametrize("limit", [Limit(documents=120), Limit(tokens=3000)])
def test_a_small_sample_is_of_the_whole_listing(tmp_path: Path, limit: Limit) -> None:
    """A tenth or less of sixty files of two row groups each, as web crawls come."""
    for number in range(60):
        rows = [f"{number} {n} {WORDS[number % 30 :]}" for n in range(20)]
        write_parquet(tmp_path / "in" / f"{number:03}.parquet", rows, group=10)
    wanted = request(tmp_path, str(tmp_path / "in"), unit_bytes=1, limit=limit, val_fraction=0.0)
    manifest = prepared(wanted)
    reader = ShardReader(tmp_path / "mine")
    files = {int(reader.origin(row)[0].split(".")[0]) for row in range(reader.n_rows)}
    assert manifest.n_documents <= 130 and len(files) > 8
    assert {number // 10 for number in files} == set(range(6))


def test_a_second_limited_run_says_that_it_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first is in the middle of its work; the second finds it done, and has nothing to do."""
    corpus(tmp_path / "in")
    wanted = request(tmp_path / "out", str(tmp_path / "in"), limit=Limit(documents=120))
    stream = io.StringIO()
    waits = threading.Event()

    class Second(PrepareDisplay):
        def waits(self, folder: Path) -> None:
            super().waits(folder)
            waits.set()

    class First(PrepareListener):
        def planned(self, *_: Any) -> None:
            second.start()
            assert waits.wait(60)

    second = threading.Thread(target=lambda: prepare(wanted, Executor(workers=1), Second(stream)))
    prepare(wanted, Executor(workers=1), First())
    second.join(60)
    assert not second.is_alive()
    folder = tmp_path / "out" / "mine"
    assert f"{folder}: another limited run is at work here" in stream.getvalue()
