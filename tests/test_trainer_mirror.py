"""Checkpoints copied elsewhere: verified there, harmless when that fails, used when the own are
gone."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from trainer.checkpoint.retention import newest_intact, resumable
from trainer.checkpoint.runs import RECORD, checkpoints, newest_checkpoint
from trainer.checkpoint.storage import verify
from trainer.errors import CheckpointError
from trainer.train import train
from trainer_samples import (
    ALONE,
    RecordingDisplay,
    events_of,
    log_of,
    small_plan,
    tensor_files,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def test_each_checkpoint_is_copied_and_kept_by_the_same_rule(shards: Path, tmp_path: Path) -> None:
    run, copy = tmp_path / "run", tmp_path / "mirror" / "run"
    (shards / "fineweb" / "tokenizer.model").write_bytes(b"a model")
    plan = small_plan(
        shards, max_steps=7, checkpoint__interval_steps=2, checkpoint__mirror=tmp_path / "mirror"
    )
    said = RecordingDisplay()
    train(plan, run, display=said)
    assert [checkpoint.name for checkpoint in checkpoints(copy)] == ["step-6", "step-7"]
    for ours, theirs in zip(checkpoints(run), checkpoints(copy), strict=True):
        assert {path.name: path.read_bytes() for path in ours.iterdir()} == {
            path.name: path.read_bytes() for path in theirs.iterdir()
        }
        verify(theirs, ALONE)
    assert f"copied to {copy / 'checkpoints' / 'step-7'} in" in said
    assert (copy / "config.json").read_bytes() == (run / "config.json").read_bytes()
    assert (copy / "tokenizer.model").read_bytes() == b"a model"


@pytest.mark.parametrize("loss", ["gone", "damaged", "the newest damaged"])
def test_a_run_goes_on_from_its_mirror(shards: Path, tmp_path: Path, loss: str) -> None:
    run, copy = tmp_path / "run", tmp_path / "mirror" / "run"
    changes: dict[str, Any] = {"checkpoint__interval_steps": 2, "max_steps": 8}
    train(small_plan(shards, **changes), tmp_path / "full")
    changes["checkpoint__mirror"] = tmp_path / "mirror"
    train(small_plan(shards, **changes), run)
    for folder in (*checkpoints(run)[-1:], *checkpoints(copy)[-1:]):  # as if it had come to step 6
        shutil.rmtree(folder)
    if loss == "gone":
        shutil.rmtree(run / "checkpoints")
    for checkpoint in checkpoints(run)[-1 if loss == "the newest damaged" else 0 :]:
        flip(next(checkpoint.glob("*.safetensors")))
    said = RecordingDisplay()
    train(small_plan(shards, **changes), run, display=said)
    assert f"resumed {copy}/checkpoints/step-6 at step 6" in said
    why = (
        "has no checkpoint of its own left; its mirror" if loss == "gone" else "its digest differs"
    )
    assert any(why in line and line.endswith("GOING ON FROM step-6") for line in said.lines)
    assert tensor_files(newest_checkpoint(run)) == tensor_files(
        newest_checkpoint(tmp_path / "full")
    )
    assert log_of(run)[6:] == log_of(tmp_path / "full")[6:]


def test_a_copy_that_went_wrong_is_no_checkpoint(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copyfile = shutil.copyfile

    def wrongly(source: Path, target: Path) -> None:
        copyfile(source, target)
        if "step-6" in str(target):  # the last one, which is copied however slow the mirror is
            flip(target)

    monkeypatch.setattr(shutil, "copyfile", wrongly)
    said = RecordingDisplay()
    plan = small_plan(
        shards, max_steps=6, checkpoint__interval_steps=2, checkpoint__mirror=tmp_path / "mirror",
        checkpoint__keep_last=9,
    )  # fmt: skip
    train(plan, tmp_path / "run", display=said)
    assert "step-6" not in [c.name for c in checkpoints(tmp_path / "mirror" / "run")]
    assert "is not what was copied (its digest differs)); TRAINING GOES ON" in said
    assert len(checkpoints(tmp_path / "run")) == 3


def test_a_mirror_that_cannot_be_written_harms_nothing(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "mirror").write_text("a file")
    said = RecordingDisplay()
    plan = small_plan(shards, max_steps=2, checkpoint__mirror=tmp_path / "mirror")
    assert train(plan, tmp_path / "run", display=said).step == 2
    assert "! step-2 was not copied to" in said
    assert events_of(tmp_path / "run")[-1] == "done"


def test_what_is_set_aside_is_set_aside_in_the_mirror(shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    changes: dict[str, Any] = {
        "checkpoint__interval_steps": 2,
        "checkpoint__keep_last": 9,
        "checkpoint__mirror": tmp_path / "mirror",
    }
    train(small_plan(shards, max_steps=6, **changes), run)
    other = small_plan(shards, max_steps=3, optim__lr=1e-3, **changes)
    train(other, run, resume=str(run / "checkpoints" / "step-2"))
    found = newest_intact(*resumable(run, tmp_path / "mirror" / "run"), ALONE)
    assert found is not None
    assert found[0] == run / "checkpoints" / "step-3"


def test_the_run_before_its_mirror(shards: Path, tmp_path: Path) -> None:
    run, mirror = tmp_path / "run", tmp_path / "mirror"
    plan = small_plan(
        shards, max_steps=4, checkpoint__interval_steps=2, checkpoint__mirror=mirror
    )  # fmt: skip
    train(plan, run)
    found = newest_intact(*resumable(run, mirror / "run"), ALONE)
    assert found is not None
    assert found[0] == run / "checkpoints" / "step-4"
    for checkpoint in [*checkpoints(run), *checkpoints(mirror / "run")]:
        (checkpoint / RECORD).write_text("{")
    with pytest.raises(CheckpointError, match=r"no checkpoint of .* is intact"):
        newest_intact(*resumable(run, mirror / "run"), ALONE)
