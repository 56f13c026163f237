"""When a run checkpoints, and what it does when it cannot."""

import errno
import itertools
import os
from pathlib import Path
from typing import Any

import pytest

from trainer.checkpoint import storage
from trainer.checkpoint.runs import checkpoints
from trainer.errors import CheckpointError
from trainer.train import train
from trainer_samples import Said, events_of, make_shards, small_plan

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("shards"))


def test_a_full_disk_is_shouted_and_outlived(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, tries = storage.save_from_any_thread, itertools.count(1)

    def full_at_first(*args: Any) -> Path:
        if next(tries) == 2:
            raise CheckpointError("no room; older checkpoints stand: make room")
        return save(*args)

    monkeypatch.setattr(storage, "save_from_any_thread", full_at_first)
    said = Said()
    plan = small_plan(shards, max_steps=6, checkpoint__interval_steps=2)
    train(plan, tmp_path, display=said)
    assert "! no room; older checkpoints stand: make room; TRAINING GOES ON" in said
    assert [checkpoint.name for checkpoint in checkpoints(tmp_path)] == ["step-2", "step-6"]
    assert "checkpoint failed" in events_of(tmp_path)


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
    assert [checkpoint.name for checkpoint in checkpoints(tmp_path)] == ["step-2"]


def test_checkpoint_by_the_clock(shards: Path, tmp_path: Path) -> None:
    plan = small_plan(shards, max_steps=6, checkpoint__interval_minutes=1e-9)
    train(plan, tmp_path)
    # a step's wish is read, like all its numbers, one step later: at 2, 4 and 6
    assert events_of(tmp_path) == ["start", *["checkpoint"] * 3, "done"]
