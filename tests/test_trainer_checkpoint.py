"""A checkpoint is complete and verified, or it does not exist."""

import ast
import errno
import hashlib
import json
import multiprocessing
import os
import pickle
import random
import shutil
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from conftest import REPOSITORY
from shards.errors import VersionError
from test_house import LAYERS, imports
from trainer.checkpoint import storage
from trainer.checkpoint.retention import newest_intact, purge, resumable
from trainer.checkpoint.runs import (
    RECORD,
    checkpoint_path,
    checkpoints,
    newest_checkpoint,
    newest_run,
)
from trainer.checkpoint.storage import load_weights, restore, save, verify
from trainer.config.sections import CheckpointConfig
from trainer.errors import CheckpointError, ConfigError
from trainer.optimizer.optimizer import make_optimizer
from trainer.optimizer.schedule import OptimConfig
from trainer.session.save import tensors_to_save
from trainer_samples import ALONE


def toy(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 2))
    optimizer = make_optimizer(model, OptimConfig())
    for state in optimizer.state.values():
        state["exp_avg"].normal_()
        state["exp_avg_sq"].normal_()
        state["step"].fill_(7)
    return model, optimizer


def tensors(seed: int) -> dict[str, torch.Tensor]:
    return storage.tensors_of(*toy(seed))


def saved(run: Path, step: int, seed: int = 0) -> Path:
    return save(run, tensors(seed), {"step": step, "world_size": 7}, ALONE)


def test_what_was_saved_comes_back_bit_for_bit(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path, 3)
    model, optimizer = toy(1)
    restore(checkpoint, model, optimizer, ALONE)
    for name, tensor in storage.tensors_of(model, optimizer).items():
        assert torch.equal(tensor, tensors(0)[name]), name
    record = verify(checkpoint, ALONE)
    assert (record["step"], record["world_size"]) == (3, 7)
    assert set(record["files"]) == {path.name for path in checkpoint.glob("*.safetensors")}
    assert record["versions"]["torch"] == torch.__version__


def test_equal_tensors_make_equal_files(tmp_path: Path) -> None:
    digests = [verify(saved(tmp_path / str(n), 3), ALONE)["files"] for n in range(4)]
    assert all(digest == digests[0] for digest in digests)


def test_weights_alone(tmp_path: Path) -> None:
    weights = load_weights(saved(tmp_path, 3))
    expected = dict(toy(0)[0].named_parameters())
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in weights)
    assert all(tensor.dtype == torch.float32 for tensor in weights.values())


def test_200_flips_and_cuts_fall_back_and_say_so(tmp_path: Path) -> None:
    older, newer = saved(tmp_path, 3), saved(tmp_path, 6, seed=1)
    good, generator = tmp_path / "good", random.Random(0)
    newer.rename(good)
    for _ in range(200):
        shutil.copytree(good, newer)
        path = generator.choice(sorted(newer.iterdir()))
        data = bytearray(path.read_bytes())
        if generator.random() < 0.2:
            del data[generator.randrange(len(data)) :]
        else:
            data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
        path.write_bytes(data)
        found = newest_intact(*resumable(tmp_path), ALONE)
        assert found is not None
        assert found[0] == older and checkpoints(tmp_path) == [older], path
        [complaint] = found[2]
        assert str(path) in complaint and "\n" not in complaint
        shutil.rmtree(newer)


class Bomb:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("vouched_for", [False, True])
def test_a_planted_pickle_is_never_read(tmp_path: Path, vouched_for: bool) -> None:
    """Also by someone who can make digests, and as the index that torch itself would unpickle."""
    checkpoint, data = saved(tmp_path, 3), pickle.dumps(Bomb(tmp_path / "exploded"))
    (checkpoint / ".metadata").write_bytes(data)
    assert load_weights(checkpoint).keys() == dict(toy(0)[0].named_parameters()).keys()
    restore(checkpoint, *toy(1), ALONE)
    for victim in checkpoint.glob("*.safetensors"):
        victim.write_bytes(data)
    if vouched_for:
        record = storage.read_record(checkpoint)
        for entry in record["files"].values():
            entry |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        storage._publish_record(checkpoint, record)
        verify(checkpoint, ALONE)
    with pytest.raises(CheckpointError, match="damaged"):
        load_weights(checkpoint)
    with pytest.raises(CheckpointError):
        restore(checkpoint, *toy(1), ALONE)
    assert not (tmp_path / "exploded").exists()


def test_nothing_unpickles() -> None:
    unpicklers = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve",
                  "marshal", "pandas"}  # fmt: skip
    files = [p for floor in LAYERS for p in (REPOSITORY / floor).rglob("*.py")]
    assert len(files) > 80
    for path in files:
        assert not unpicklers & {name for name, _ in imports(path)}, path
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                call = ast.unparse(node)
                assert "allow_pickle=True" not in call, path
                if ast.unparse(node.func) in ("torch.load", "load_state_dict_from_url"):
                    assert "weights_only=True" in call, path


def test_without_a_record_nothing_is_saved(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path, 3)
    (checkpoint / RECORD).unlink()
    assert newest_intact(*resumable(tmp_path), ALONE) is None
    with pytest.raises(CheckpointError, match="nothing was saved"):
        load_weights(checkpoint)
    assert saved(tmp_path, 3, seed=1) == checkpoint  # the try is made again
    assert torch.equal(load_weights(checkpoint)["0.weight"], tensors(1)["model.0.weight"])


def test_a_future_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "CHECKPOINT", "summerlm-checkpoint/2")
    checkpoint = saved(tmp_path, 3)
    monkeypatch.undo()
    refusal = r"of format 'summerlm-checkpoint/2', written by .* reads 'summerlm-checkpoint/1'"
    with pytest.raises(VersionError, match=refusal):
        verify(checkpoint, ALONE)
    with pytest.raises(VersionError, match=refusal):
        newest_intact(*resumable(tmp_path), ALONE)
    assert checkpoints(tmp_path) == [checkpoint]  # it is not damaged, and not marked so


def test_no_room_is_an_error_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    older = saved(tmp_path, 3)
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match=r"step-6 needs .* make room"):
        saved(tmp_path, 6)
    assert checkpoints(tmp_path) == [older]


def test_a_disk_that_fills_up_leaves_nothing_half_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    older = saved(tmp_path, 3)

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"step-6 could not be written \(No space left on"):
        saved(tmp_path, 6)
    monkeypatch.undo()
    assert checkpoints(tmp_path) == [older]
    assert not (tmp_path / "checkpoints" / "step-6").exists()
    verify(older, ALONE)


def save_on_two_and_load(rank: int, folder: Path, port: int) -> None:
    """One of four processes: the first two save; one, two and four load, and compare each bit."""
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=4)
    worlds = {n: replace(ALONE, rank=rank, world_size=n, group=dist.new_group(range(n)))
              for n in (1, 2, 4)}  # fmt: skip
    checkpoint = checkpoint_path(folder, 3)
    if rank < 2:
        share = tensors_to_save(tensors(0), worlds[2])
        assert 0 < len(share) < len(tensors(0))
        save(folder, share, {"step": 3}, worlds[2])
    dist.barrier()
    for n, world in worlds.items():
        if rank < n:
            verify(checkpoint, world)
            model, optimizer = toy(1)
            restore(checkpoint, model, optimizer, world)
            for name, tensor in storage.tensors_of(model, optimizer).items():
                assert torch.equal(tensor, tensors(0)[name]), (n, name)
            dist.barrier(group=world.group)
    dist.destroy_process_group()


@pytest.mark.slow
def test_saved_on_two_processes_it_loads_on_one_two_and_four(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=save_on_two_and_load, args=(rank, tmp_path, port))
                 for rank in range(4)]  # fmt: skip
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * 4
    record = verify(checkpoints(tmp_path)[0], ALONE)
    assert {name.split("-model")[0] for name in record["files"]} == {"shard-00001", "shard-00002"}
    assert torch.equal(
        load_weights(checkpoints(tmp_path)[0])["0.weight"], tensors(0)["model.0.weight"]
    )


def test_what_a_kill_left_of_a_checkpoint_goes_with_the_next_purge(tmp_path: Path) -> None:
    for step in (2, 4, 6):
        saved(tmp_path, step)
    damaged, left = (tmp_path / "checkpoints" / f"step-{step}" for step in (2, 4))
    (damaged / RECORD).rename(damaged / "damaged.json")  # is for people to look at
    (left / RECORD).unlink()
    saved(tmp_path, 8)
    purge(tmp_path, CheckpointConfig())
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-2", "step-6", "step-8"]


def test_purging_keeps_the_last_and_every_nth(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8, 10):
        saved(tmp_path, step)
    purge(tmp_path, CheckpointConfig(keep_last=2, keep_every=4))
    assert [checkpoint.name for checkpoint in checkpoints(tmp_path)] == [
        "step-4",
        "step-8",
        "step-10",
    ]
    purge(tmp_path, CheckpointConfig(keep_last=2))
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == [
        "step-10",
        "step-8",
    ]


def test_the_newest_checkpoint_and_the_newest_run(tmp_path: Path) -> None:
    for number, name in enumerate(["old", "new", "empty"]):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        if name != "empty":
            for step in (9, 10):
                mark = saved(tmp_path / name, step) / RECORD
                os.utime(mark, (1000 + number, 1000 + number))
    assert newest_checkpoint(tmp_path / "new").name == "step-10"  # by number, not by name
    assert newest_run(tmp_path) == tmp_path / "new"
    with pytest.raises(ConfigError, match="nothing is saved yet"):
        newest_checkpoint(tmp_path / "empty")
    with pytest.raises(ConfigError, match=r"no config\.json there"):
        newest_checkpoint(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="summer-train --shards shards/ --preset tiny"):
        newest_run(tmp_path / "nowhere")


def test_the_record_is_readable(tmp_path: Path) -> None:
    record = json.loads((saved(tmp_path, 3) / RECORD).read_text())
    assert list(record)[:4] == ["format", "summerlm_version", "step", "world_size"]
    assert list(record)[-1] == "sha256"
