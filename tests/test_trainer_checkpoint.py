"""A commit is whole and proven, or it does not exist."""

import errno
import json
import os
import pickle
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from trainer import checkpoint
from trainer.checkpoint import CheckpointConfig, load_weights, prove, restore, save
from trainer.errors import CheckpointError, ConfigError
from trainer.optimizer import make_optimizer
from trainer.retention import newest_proven, purge
from trainer.runs import COMMIT, commits, newest_commit, newest_run
from trainer.schedule import OptimConfig
from trainer_samples import ALONE


def toy(seed: int) -> tuple[nn.Module, torch.optim.AdamW]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 2))
    optimizer = make_optimizer(model, OptimConfig())
    for state in optimizer.state.values():
        state["exp_avg"].normal_()
        state["exp_avg_sq"].normal_()
        state["step"].fill_(7)
    return model, optimizer


def tensors(seed: int) -> dict[str, torch.Tensor]:
    return checkpoint.tensors_of(*toy(seed))


def committed(run: Path, step: int, seed: int = 0) -> Path:
    return save(run, tensors(seed), {"step": step, "note": "x"}, ALONE)


def test_what_was_saved_comes_back_bit_for_bit(tmp_path: Path) -> None:
    commit = committed(tmp_path, 3)
    model, optimizer = toy(1)
    restore(commit, model, optimizer, ALONE)
    for name, tensor in checkpoint.tensors_of(model, optimizer).items():
        assert torch.equal(tensor, tensors(0)[name]), name
    record = prove(commit, ALONE)
    assert (record["step"], record["note"]) == (3, "x")
    assert set(record["files"]) == {path.name for path in commit.glob("*.safetensors")}
    assert record["versions"]["torch"] == torch.__version__


def test_equal_tensors_make_equal_files(tmp_path: Path) -> None:
    digests = [prove(committed(tmp_path / str(n), 3), ALONE)["files"] for n in range(4)]
    assert all(digest == digests[0] for digest in digests)


def test_weights_alone(tmp_path: Path) -> None:
    weights = load_weights(committed(tmp_path, 3))
    expected = dict(toy(0)[0].named_parameters())
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in weights)
    assert all(tensor.dtype == torch.float32 for tensor in weights.values())


def test_200_flips_and_cuts_load_never(tmp_path: Path) -> None:
    commit = committed(tmp_path, 3)
    generator, damaged = random.Random(0), tmp_path / "step-4"
    for _ in range(200):
        shutil.copytree(commit, damaged, dirs_exist_ok=True)
        path = generator.choice(sorted(damaged.iterdir()))
        data = bytearray(path.read_bytes())
        if generator.random() < 0.2:
            del data[generator.randrange(len(data)) :]
        else:
            data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
        path.write_bytes(data)
        with pytest.raises(CheckpointError) as caught:
            prove(damaged, ALONE)
        assert str(damaged) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_planted_pickle_is_never_read(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "exploded"),)

    commit = committed(tmp_path, 3)
    victim = next(commit.glob("*-00001-of-00002.safetensors"))
    victim.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(CheckpointError, match="damaged"):
        load_weights(commit)
    assert not (tmp_path / "exploded").exists()


def test_nothing_unpickles() -> None:
    for path in Path(checkpoint.__file__).parent.glob("*.py"):
        text = path.read_text()
        assert "torch.load" not in text, path
        assert "pickle" not in text.replace("Nothing is pickled", ""), path


def test_a_damaged_commit_is_passed_over_and_told(tmp_path: Path) -> None:
    older, newer = committed(tmp_path, 3), committed(tmp_path, 6)
    victim = sorted(newer.glob("*.safetensors"))[0]
    victim.write_bytes(victim.read_bytes()[:-1])
    found = newest_proven(tmp_path, ALONE)
    assert found is not None
    assert found[0] == older
    assert found[2] == [f"{victim} is damaged or missing (its digest differs); use another commit"]
    assert commits(tmp_path) == [older]  # the damaged one counts no more


def test_no_commit_is_whole(tmp_path: Path) -> None:
    commit = committed(tmp_path, 3)
    (commit / COMMIT).write_text("{")
    with pytest.raises(CheckpointError, match=r"no commit of .* is whole"):
        newest_proven(tmp_path, ALONE)


def test_without_a_mark_nothing_is_committed(tmp_path: Path) -> None:
    commit = committed(tmp_path, 3)
    (commit / COMMIT).unlink()
    assert newest_proven(tmp_path, ALONE) is None
    with pytest.raises(CheckpointError, match="nothing was committed"):
        load_weights(commit)
    assert committed(tmp_path, 3, seed=1) == commit  # the try is made again
    assert torch.equal(load_weights(commit)["0.weight"], tensors(1)["model.0.weight"])


def test_a_future_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "FORMAT", "summerlm-commit/2")
    commit = committed(tmp_path, 3)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=r"of format 'summerlm-commit/2', not 'summ.*/1'"):
        prove(commit, ALONE)


def test_no_room_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    older = committed(tmp_path, 3)
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match=r"step-6 needs .* make room"):
        committed(tmp_path, 6)
    assert commits(tmp_path) == [older]


def test_a_disk_that_fills_up_leaves_nothing_half_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    older = committed(tmp_path, 3)

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"step-6 could not be written \(No space left on"):
        committed(tmp_path, 6)
    monkeypatch.undo()
    assert commits(tmp_path) == [older]
    assert not (tmp_path / "checkpoints" / "step-6").exists()
    prove(older, ALONE)


def test_purging_keeps_the_last_and_every_nth(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8, 10):
        committed(tmp_path, step)
    purge(tmp_path, CheckpointConfig(keep_last=2, keep_every=4))
    assert [commit.name for commit in commits(tmp_path)] == ["step-4", "step-8", "step-10"]
    purge(tmp_path, CheckpointConfig(keep_last=2))
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == [
        "step-10",
        "step-8",
    ]


def test_the_newest_commit_and_the_newest_run(tmp_path: Path) -> None:
    for number, name in enumerate(["old", "new", "empty"]):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        if name != "empty":
            for step in (9, 10):
                mark = committed(tmp_path / name, step) / COMMIT
                os.utime(mark, (1000 + number, 1000 + number))
    assert newest_commit(tmp_path / "new").name == "step-10"  # by number, not by name
    assert newest_run(tmp_path) == tmp_path / "new"
    with pytest.raises(ConfigError, match="nothing is committed yet"):
        newest_commit(tmp_path / "empty")
    with pytest.raises(ConfigError, match=r"no config\.json there"):
        newest_commit(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="summer-train --shards shards/ --preset tiny"):
        newest_run(tmp_path / "nowhere")


def test_the_record_is_readable(tmp_path: Path) -> None:
    record = json.loads((committed(tmp_path, 3) / COMMIT).read_text())
    assert list(record)[:3] == ["format", "step", "note"]
    assert list(record)[-1] == "sha256"
