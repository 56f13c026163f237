"""Runs, checkpoints and Hugging Face folders that a stranger has changed: one clear line each."""

import copy
import errno
import fcntl
import hashlib
import json
import logging
import os
import random
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import REPOSITORY
from shards.errors import SummerError
from shards.files import json_bytes
from tools.models.loading import ModelSpec, load
from trainer.checkpoint import storage
from trainer.checkpoint.runs import newest_checkpoint, record_path
from trainer.config.config import configure, load_config
from trainer.config.resolve import make_plan
from trainer.errors import CheckpointError, ConfigError
from trainer.session.state import claim, state_from
from trainer_samples import ALONE

GOLDEN = REPOSITORY / "tests" / "data" / "v0.1"
N_CASES = int(os.environ.get("SUMMER_DAMAGES", "60"))  # of each kind
STRANGE: list[Any] = [
    None, True, False, -1, 0, 1e300, 10**9, 10**18, 10**40, "", "../x", "x" * 1000, [], {}, [[]],
    {"a": 1}, float("nan"), float("inf"), 1.5, "\u202e", [None], {"": None}, [10**9] * 3,
]  # fmt: skip


def resident_bytes() -> int:
    """The process's memory now; from here on its peak is measured anew."""
    Path("/proc/self/clear_refs").write_text("5")
    return grown_bytes(0)


def grown_bytes(before: int) -> int:
    """How far above `before` the memory has been since."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024 - before


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something stands in a JSON value."""
    if path:
        yield path
    if isinstance(value, (dict, list)):
        inside = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in list(inside)[:50]:
            yield from places(item, (*path, key))


def mutated(value: Any, chance: random.Random) -> tuple[Any, str]:
    """A copy with one entry removed, doubled under another name, or replaced; and what was done."""
    value = copy.deepcopy(value)
    path = chance.choice(list(places(value)))
    parent = value
    for key in path[:-1]:
        parent = parent[key]
    how = chance.random()
    if how < 0.15:
        parent.pop(path[-1])
        return value, f"{path} removed"
    if how < 0.25 and isinstance(parent, dict):
        name = chance.choice(["../../x", "new", ""])
        parent[name] = parent[path[-1]]
        return value, f"{path} also as {name!r}"
    parent[path[-1]] = new = chance.choice(STRANGE)
    return value, f"{path} = {new!r}"[:200]


def change_record(folder: Path, chance: random.Random) -> str:
    path = record_path(newest_checkpoint(folder))
    record = json.loads(path.read_bytes())
    del record["sha256"]
    record, what = mutated(record, chance)
    if isinstance(record, dict):
        record["sha256"] = hashlib.sha256(json_bytes(record)).hexdigest()
    path.write_bytes(json_bytes(record))
    return what


def change_json(*names: str) -> Callable[[Path, random.Random], str]:
    def change(folder: Path, chance: random.Random) -> str:
        path = folder / chance.choice(names)
        value, what = mutated(json.loads(path.read_bytes()), chance)
        path.write_text(json.dumps(value))
        return f"{path.name}: {what}"

    return change


def resume(run: Path) -> None:
    config = configure(file=GOLDEN / "plain.toml", shards=str(GOLDEN / "shards"))
    load_config(run)
    state_from(storage.verify(newest_checkpoint(run), ALONE), make_plan(config, 1))


KINDS: dict[str, tuple[str, Callable[[Path, random.Random], str], list[Callable[..., object]]]] = {
    "checkpoint": ("runs/plain", change_record, [resume, lambda run: load(ModelSpec(run=run))]),
    "config": ("runs/plain", change_json("config.json"), [lambda run: load(ModelSpec(run=run))]),
    "folder": (
        "exports/plain",
        change_json("config.json", "config.json", "generation_config.json", "tokenizer.json",
                    "tokenizer_config.json"),
        [lambda folder: load(ModelSpec(hf=folder))],
    ),
    "own folder": (
        "exports/alibi", change_json("config.json"), [lambda folder: load(ModelSpec(hf=folder))],
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_is_changed_it_loads_or_is_one_line(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    source, change, uses = KINDS[kind]
    warnings.simplefilter("ignore")
    logging.disable()
    request.addfinalizer(lambda: logging.disable(logging.NOTSET))
    before = resident_bytes()
    for seed in range(N_CASES):
        folder = tmp_path / str(seed)
        shutil.copytree(GOLDEN / source, folder)
        what = change(folder, random.Random(seed))
        for use in uses:
            began = time.monotonic()
            try:
                use(folder)
            except SummerError as error:
                assert "\n" not in str(error), what
            except Exception as error:
                raise AssertionError(f"seed {seed}: {what}") from error
            assert time.monotonic() - began < 10, what
        shutil.rmtree(folder)
    assert grown_bytes(before) < 1 << 30


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN / "runs/plain", tmp_path / "run"))


@pytest.mark.parametrize(
    "name",
    [".lock", "metrics.jsonl", "events.jsonl", "ranks", "checkpoints", "checkpoints/step-9",
     "checkpoints/step-2/COMMIT.json", "config.json", "stacks/rank-0.txt", "tensorboard/events"],
)  # fmt: skip
def test_a_run_writes_and_removes_nothing_through_a_link(
    run: Path, tmp_path: Path, name: str
) -> None:
    target = tmp_path / "elsewhere"
    target.write_text("mine")
    path = run / name
    path.parent.mkdir(exist_ok=True)
    if path.is_dir():
        path.rename(tmp_path / "moved")
        target = tmp_path / "moved"
    path.unlink(missing_ok=True)
    path.symlink_to(target)
    before = {each: each.read_bytes() for each in tmp_path.glob("[em]*") if each.is_file()}
    with pytest.raises(ConfigError, match=f"{path.name} is a link"), claim(run, ALONE):
        pass
    assert before == {each: each.read_bytes() for each in before}


def test_weights_that_the_record_does_not_list_are_not_loaded(run: Path) -> None:
    checkpoint = newest_checkpoint(run)
    weights = next(checkpoint.glob("*-model-00001-of-*.safetensors"))
    shutil.copy(weights, checkpoint / "zzz.safetensors")
    for read in (storage.load_weights, lambda path: storage.verify(path, ALONE)):
        with pytest.raises(CheckpointError, match="zzz"):
            read(checkpoint)


@pytest.mark.parametrize("kind", ["link", "fifo", "longer"])
def test_a_listed_file_is_a_regular_one_of_its_size(run: Path, tmp_path: Path, kind: str) -> None:
    checkpoint = newest_checkpoint(run)
    path = next(checkpoint.glob("*.safetensors"))
    if kind == "longer":
        path.write_bytes(path.read_bytes() + b"\0")
    else:
        path.rename(tmp_path / "moved")
        path.symlink_to(tmp_path / "moved") if kind == "link" else os.mkfifo(path)
    with pytest.raises(CheckpointError, match="is damaged or missing"):
        storage.verify(checkpoint, ALONE)


def test_a_name_that_leads_out_of_the_checkpoint_is_refused(run: Path, tmp_path: Path) -> None:
    checkpoint = newest_checkpoint(run)
    path = record_path(checkpoint)
    record = json.loads(path.read_bytes())
    del record["sha256"]
    name, entry = next(iter(record["files"].items()))
    shutil.copy(checkpoint / name, checkpoint.parent / name)
    record["files"][f"../{name}"] = entry
    record["sha256"] = hashlib.sha256(json_bytes(record)).hexdigest()
    path.write_bytes(json_bytes(record))
    with pytest.raises(CheckpointError, match="is no file of a checkpoint"):
        storage.verify(checkpoint, ALONE)


@pytest.mark.parametrize("text", ["[" * 200_000, "{" * 10, "", "[]", "\0", '{"model": []}'])
def test_a_configuration_that_is_none_is_one_line(run: Path, text: str) -> None:
    (run / "config.json").write_text(text)
    with pytest.raises(ConfigError, match="config"):
        load_config(run)


def test_a_file_system_without_locks_is_not_another_trainer(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS and Lustre without locks answer ENOLCK."""

    def no_locks(*of: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    with claim(run, ALONE):
        assert (run / ".lock").exists()
