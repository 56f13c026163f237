"""What a loss of power leaves of a checkpoint: its record comes last, and goes first."""

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from test_trainer_checkpoint import tensors
from trainer.checkpoint.retention import copy_checkpoint
from trainer.checkpoint.runs import RECORD, checkpoint_path
from trainer.checkpoint.storage import remove, save
from trainer_samples import ALONE

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="asks /proc for a handle's file")

Events = list[tuple[str, Path]]
FLUSHED: dict[Path, bytes] = {}
"""What each file held when it was flushed last."""


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> Events:
    """What is flushed, renamed, unlinked and removed, in order."""
    seen: Events = []
    flush, replace, unlink, rmtree = os.fsync, Path.replace, Path.unlink, shutil.rmtree

    def watched_fsync(handle: Any) -> None:
        number = handle if isinstance(handle, int) else handle.fileno()
        flush(handle)
        path = Path(os.readlink(f"/proc/self/fd/{number}"))
        seen.append(("flush", path))
        if path.is_file():
            FLUSHED[path] = path.read_bytes()

    def watched_replace(self: Path, target: Any) -> Path:
        seen.append(("rename", Path(target)))
        return replace(self, target)

    def watched_unlink(self: Path, missing_ok: bool = False) -> None:
        seen.append(("unlink", self))
        unlink(self, missing_ok)

    def watched_rmtree(path: Any, *args: Any, **options: Any) -> None:
        seen.append(("remove", Path(path)))
        rmtree(path, *args, **options)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(Path, "replace", watched_replace)
    monkeypatch.setattr(Path, "unlink", watched_unlink)
    monkeypatch.setattr(shutil, "rmtree", watched_rmtree)
    return seen


def assert_record_comes_last(events: Events, checkpoint: Path) -> None:
    written = events.index(("rename", checkpoint / RECORD))
    files = [events.index(("flush", path)) for path in checkpoint.glob("*.safetensors")]
    assert files and max(files) < written
    assert all(FLUSHED[path] == path.read_bytes() for path in checkpoint.glob("*.safetensors"))
    assert ("flush", checkpoint) in events[max(files) : written]  # their names, too
    assert ("flush", checkpoint) in events[written:]  # the record's name
    assert ("flush", checkpoint.parent) in events[written:]  # and the checkpoint's own


def test_a_checkpoint_is_on_the_disk_before_its_record(tmp_path: Path, events: Events) -> None:
    assert_record_comes_last(events, save(tmp_path, tensors(0), {"step": 3}, ALONE))


def test_so_is_its_copy(tmp_path: Path, events: Events) -> None:
    checkpoint = save(tmp_path / "run", tensors(0), {"step": 3}, ALONE)
    events.clear()
    copy_checkpoint(checkpoint, tmp_path / "mirror")
    assert_record_comes_last(events, checkpoint_path(tmp_path / "mirror", 3))


def test_a_removed_checkpoint_loses_its_record_first(tmp_path: Path, events: Events) -> None:
    checkpoint = save(tmp_path, tensors(0), {"step": 3}, ALONE)
    events.clear()
    remove(checkpoint)
    assert events == [
        ("unlink", checkpoint / RECORD),
        ("flush", checkpoint),
        ("remove", checkpoint),
    ]
