"""Prepared folders that a stranger has changed: whatever reads them gives one clear line."""

import contextlib
import json
import logging
import os
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from pipeline.checks.inspection import report, show_row, summary
from pipeline.checks.repair import repair
from pipeline.checks.verify import find_damage
from pipeline.text.exclude import Exclusion
from pipeline.text.json_tokenizer import JsonTokenizer
from pipeline.units.executors import Executor
from pipeline.units.recipe import PrepareRequest
from pipeline_samples import TEXTS, byte_level, prepared, request, write_jsonl
from shards.errors import SummerError
from shards.files import json_bytes
from shards.format import Manifest, compute_root
from shards.reader import ShardReader, find_sources, read_manifest
from test_hostile_folders import grown_bytes, mutated, resident_bytes
from trainer.config.config import configure
from trainer.config.resolve import make_plan

N_CASES = int(os.environ.get("SUMMER_DAMAGES", "40"))  # of each kind
ITEM = "it was the best of times it was the worst of times it was the age"


def change_json(pattern: str, folder: Path, chance: random.Random) -> str:
    """One value of a file of ours, its own digests made anew every other time."""
    path = chance.choice(sorted(folder.glob(pattern)))
    value, what = mutated(json.loads(path.read_bytes()), chance)
    if path.name == "manifest.json" and chance.random() < 0.5:
        value = with_root(value)
    path.write_bytes(json_bytes(value))
    return f"{path.name}: {what}"


def with_root(value: object) -> object:
    """A manifest with the dataset hash of what it lists, if there is one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("shards.format.summarise", lambda *_: None)
        patch.setattr(Manifest, "__eq__", lambda *_: True)
        patch.setattr(Manifest, "__ne__", lambda *_: False)
        try:
            manifest = Manifest.from_json(value)
            return replace(manifest, root=compute_root(manifest.facts, manifest.shards)).to_json()
        except Exception:  # whatever: the value stays as it is
            return value


def change_bytes(pattern: str, folder: Path, chance: random.Random) -> str:
    """Bytes of a file, most of them near its beginning: a header's."""
    path = chance.choice(sorted(folder.glob(pattern)))
    data = bytearray(path.read_bytes())
    place = chance.randrange(min(len(data), chance.choice([16, 128, len(data)])))
    how = chance.random()
    if how < 0.6:
        data[place] ^= 1 << chance.randrange(8)
    elif how < 0.8:
        data[place : place + chance.randrange(1, 9)] = chance.randbytes(chance.randrange(9))
    else:
        del data[place:]
    path.write_bytes(data)
    return f"{path.name}: byte {place}"


KINDS: dict[str, Callable[[Path, random.Random], str]] = {
    "manifest": partial(change_json, "manifest.json"),
    "plan": partial(change_json, "units.json"),
    "unit record": partial(change_json, "0*.json"),
    "arrays": partial(change_bytes, "0*.npy"),
    "tokenizer": partial(change_bytes, "tokenizer.*"),
    "tokenizer's values": partial(change_json, "tokenizer*.json"),
    "other files": partial(change_bytes, "*[!y]"),
}


@pytest.fixture(scope="module")
def wanted(tmp_path_factory: pytest.TempPathFactory) -> PrepareRequest:
    """A source with everything that a folder can hold, but masks."""
    place = tmp_path_factory.mktemp("good")
    files = str(write_jsonl(place / "in" / "a.jsonl", [*TEXTS[:60], f"{ITEM}!", 7]))
    found = JsonTokenizer(byte_level("llama3"), "small")
    listed = Exclusion.of({"tale": [ITEM]})
    made = request(place / "shards", files, exclude=listed, tokenizer=found, unit_bytes=1 << 12)
    prepared(made)
    return made


def read_rows(source: Path) -> None:
    find_sources(source.parent)
    for split in ("train", "val"):
        reader = ShardReader(source, split, read_manifest(source))
        reader.rows(np.arange(min(8, reader.n_rows)))
        for index in range(min(2, reader.n_rows)):
            reader.origin(index)


def look(source: Path) -> None:
    report(source)
    for as_json in (False, True):
        summary(source, read_manifest(source), as_json)
    show_row(source, "val", 0)


def verify(source: Path) -> None:
    list(find_damage(source))


def plan_a_run(source: Path) -> None:
    make_plan(configure(preset="demo", shards=str(source.parent)), 1)


@pytest.mark.parametrize("name", ["units.json", "manifest.json", "00000.json"])
@pytest.mark.parametrize(
    "data",
    [b"[]", b"null", b"7", b'"x"', b"", b"{}", b"[" * 100_000, b"\xff\xfe", bytes(99),
     b'{"format": 7}', b'{"format": ["a"]}', b'{"format": "summerlm-shards/1", "tokenizer": []}',
     b'{"format": "summerlm-units/1", "files": {}}'],
)  # fmt: skip
def test_metadata_that_is_something_else_is_one_line(
    name: str, data: bytes, wanted: PrepareRequest, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(wanted.out / "mine", tmp_path / "mine"))
    (source / name).write_bytes(data)
    for use in (
        read_rows,
        look,
        plan_a_run,
        verify,
        lambda _: prepared(replace(wanted, out=tmp_path)),
    ):
        with contextlib.suppress(SummerError):
            use(source)


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_is_changed_is_read_or_is_one_line(
    kind: str, wanted: PrepareRequest, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    logging.disable()
    request.addfinalizer(lambda: logging.disable(logging.NOTSET))
    before = resident_bytes()
    for seed in range(N_CASES):
        out = tmp_path / str(seed)
        source = Path(shutil.copytree(wanted.out / "mine", out / "mine"))
        what = KINDS[kind](source, random.Random(seed))
        again = replace(wanted, out=out)
        uses: dict[str, Callable[[], object]] = {
            "read": partial(read_rows, source),
            "inspect": partial(look, source),
            "train": partial(plan_a_run, source),
            "verify": partial(verify, source),
            "go on": partial(prepared, again),
            "repair": partial(repair, source, wanted.data_files, Executor()),
        }
        for name, use in uses.items():
            began = time.monotonic()
            try:
                use()
            except SummerError as error:
                assert "\n" not in str(error), (what, name)
            except Exception as error:
                raise AssertionError(f"seed {seed}: {what}: {name}") from error
            assert time.monotonic() - began < 10, (what, name)
        shutil.rmtree(out)
    assert grown_bytes(before) < 1 << 30
