"""A checkpoint that is written while training goes on is that of its step; failures are logged."""

import errno
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.checkpoint import storage
from trainer.checkpoint.runs import checkpoints as saved
from trainer.errors import CheckpointError
from trainer.metrics.metrics import read_events
from trainer.session import save as checkpoints
from trainer.train import train
from trainer_samples import RecordingDisplay, events_of, small_plan, tensor_files

pytestmark = pytest.mark.usefixtures("one_thread")

LIMIT_S = 60


def steps_made(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], bool]:
    """A function that waits until training has made so many updates."""
    update, made, news = torch.optim.AdamW.step, [0], threading.Condition()

    def counted(self: torch.optim.AdamW, *args: Any) -> Any:
        result = update(self, *args)
        with news:
            made[0] += 1
            news.notify_all()
        return result

    def wait_for(steps: int) -> bool:
        with news:
            return news.wait_for(lambda: made[0] >= steps, LIMIT_S)

    monkeypatch.setattr(torch.optim.AdamW, "step", counted)
    return wait_for


def test_the_values_are_those_of_the_step(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: dict[str, Any] = {
        "max_steps": 9,
        "checkpoint__interval_steps": 4,
        "checkpoint__keep_last": 9,
    }
    train(small_plan(shards, **changes), tmp_path / "waiting")
    write, wait_for = storage.save, steps_made(monkeypatch)
    later: list[bool] = []

    def late(run: Path, share: Any, record: Any, world: Any) -> Path:
        later.append(wait_for(min(record["step"] + 3, 9)))  # not before training has gone on
        return write(run, share, record, world)

    monkeypatch.setattr(storage, "save", late)
    said = RecordingDisplay()
    plan = small_plan(shards, checkpoint__asynchronous="true", **changes)
    train(plan, tmp_path / "asynchronous", display=said)
    assert later == [True] * 3
    ours, theirs = saved(tmp_path / "asynchronous"), saved(tmp_path / "waiting")
    assert [checkpoint.name for checkpoint in ours] == ["step-4", "step-8", "step-9"]
    for one, other in zip(ours, theirs, strict=True):
        assert tensor_files(one) == tensor_files(other), one.name
    records = [storage.read_record(checkpoint) for checkpoint in ours]
    assert [(record["step"], record["next_index"]) for record in records] == [
        (4, 32), (8, 64), (9, 72)
    ]  # fmt: skip
    assert "checkpoints are asynchronous, with 0.0" in said


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, int]]]:
    """What is written when, on a disk that takes its time."""
    write, diary = storage.save, list[tuple[str, int]]()

    def slow(run: Path, share: Any, record: Any, world: Any) -> Path:
        diary.append(("begin", record["step"]))
        threading.Event().wait(0.3)
        folder = write(run, share, record, world)
        diary.append(("end", record["step"]))
        return folder

    monkeypatch.setattr(storage, "save", slow)
    yield diary


def test_one_at_a_time_and_the_end_waits(
    shards: Path, tmp_path: Path, slow_disk: list[tuple[str, int]]
) -> None:
    changes: dict[str, Any] = {"checkpoint__interval_steps": 1, "checkpoint__asynchronous": "true"}
    outcome = train(small_plan(shards, max_steps=3, **changes), tmp_path)
    assert slow_disk == [(what, step) for step in (1, 2, 3) for what in ("begin", "end")]
    assert outcome.checkpoint.name == "step-3"
    assert [checkpoint.name for checkpoint in saved(tmp_path)] == ["step-2", "step-3"]
    assert events_of(tmp_path) == ["start", "checkpoint", "checkpoint", "checkpoint", "done"]


def test_a_checkpoint_under_way_outlives_an_error(
    shards: Path, tmp_path: Path, slow_disk: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Any, *args: Any, **named: Any) -> Any:
        raise RuntimeError("broken")

    enter = checkpoints.CheckpointSaver.checkpoint

    def then_break(self: checkpoints.CheckpointSaver, **named: Any) -> None:
        enter(self, **named)
        monkeypatch.setattr(torch.optim.AdamW, "step", broken)

    monkeypatch.setattr(checkpoints.CheckpointSaver, "checkpoint", then_break)
    changes: dict[str, Any] = {"checkpoint__interval_steps": 2, "checkpoint__asynchronous": "true"}
    with pytest.raises(RuntimeError, match="broken"):
        train(small_plan(shards, **changes), tmp_path)
    assert slow_disk == [("begin", 2), ("end", 2)]
    assert events_of(tmp_path) == ["start", "checkpoint"]


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_checkpoint_that_fails_is_reported_and_outlived(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    write = storage.save

    def full(run: Path, share: Any, record: Any, world: Any) -> Path:
        if record["step"] == 4:
            assert (threading.current_thread() is threading.main_thread()) is not asynchronous
            raise CheckpointError("no room; older checkpoints are intact: make room")
        return write(run, share, record, world)

    monkeypatch.setattr(storage, "save", full)
    said = RecordingDisplay()
    changes: dict[str, Any] = {"checkpoint__interval_steps": 2}
    changes["checkpoint__asynchronous"] = str(asynchronous).lower()
    train(small_plan(shards, max_steps=6, **changes), tmp_path, display=said)
    assert "! no room; older checkpoints are intact: make room; TRAINING GOES ON" in said
    assert [checkpoint.name for checkpoint in saved(tmp_path)] == ["step-2", "step-6"]
    [refused] = [e for e in read_events(tmp_path) if e["event"] == "checkpoint failed"]
    assert refused["step"] == 4


def test_without_memory_for_a_copy_training_waits(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "available_memory_bytes", lambda: 1000)
    threads = set()
    write = storage.save

    def seen(*args: Any) -> Path:
        threads.add(threading.current_thread())
        return write(*args)

    monkeypatch.setattr(storage, "save", seen)
    said = RecordingDisplay()
    changes: dict[str, Any] = {"checkpoint__interval_steps": 2, "checkpoint__asynchronous": "true"}
    train(small_plan(shards, max_steps=4, **changes), tmp_path, display=said)
    assert threads == {threading.main_thread()}
    assert "of host memory, and 1e-06 GB are free" in said


def test_a_last_checkpoint_that_fails_is_an_error(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    plan = small_plan(shards, max_steps=2)
    train(plan, tmp_path)
    monkeypatch.setattr("trainer.checkpoint.storage.os.fsync", full)
    monkeypatch.setattr("trainer.session.resume.save_config", lambda run, config: None)
    with pytest.raises(CheckpointError, match="No space left on device"):
        train(small_plan(shards, max_steps=4), tmp_path)
    assert [checkpoint.name for checkpoint in saved(tmp_path)] == ["step-2"]


def test_checkpoint_by_the_clock(shards: Path, tmp_path: Path) -> None:
    plan = small_plan(shards, max_steps=6, checkpoint__interval_minutes=1e-9)
    train(plan, tmp_path)
    # a step's flag is read, like all its numbers, one step later: at 2, 4 and 6
    assert events_of(tmp_path) == ["start", *["checkpoint"] * 3, "done"]
