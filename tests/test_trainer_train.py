"""Whole runs of a few steps, in this process: going on exactly, changing nothing, refusing."""

import errno
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model.transformer import Transformer
from shards.errors import ShardError
from shards.format import Part
from shards.reader import ShardReader
from shards.writer import ShardWriter, write_manifest
from shards_samples import make_source, sample_facts
from trainer import checkpoint, guard, parallel
from trainer.checkpoint import load_weights
from trainer.config import load_config
from trainer.errors import CheckpointError, ConfigError, TrainingError
from trainer.metrics import read_lines
from trainer.optimizer import make_optimizer
from trainer.runs import commits, newest_commit
from trainer.train import Outcome, train
from trainer_samples import ALONE, make_shards, small_plan


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("shards"))


class Said:
    """A screen that remembers."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)

    def step(self, values: Any) -> None:
        self.lines.append(f"step {values['step']}")

    def close(self) -> None:
        pass

    def __contains__(self, part: str) -> bool:
        return any(part in line for line in self.lines)


def log_of(run: Path) -> list[tuple[Any, ...]]:
    keys = ("step", "loss", "lr", "grad_norm", "n_targets", "next_index")
    return [tuple(line[key] for key in keys) for line in read_lines(run / "metrics.jsonl")]


def events_of(run: Path) -> list[str]:
    return [line["event"] for line in read_lines(run / "events.jsonl")]


def same_weights(one: Path, other: Path) -> bool:
    a, b = load_weights(newest_commit(one)), load_weights(newest_commit(other))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_learns_and_explains_itself(shards: Path, tmp_path: Path) -> None:
    (shards / "fineweb" / "tokenizer.model").write_bytes(b"a model")
    plan, run = small_plan(shards, optim__lr=1e-2, max_steps=20), tmp_path / "run"
    outcome = train(plan, run)
    assert outcome == Outcome(20, False, run / "checkpoints" / "step-20")
    lines = read_lines(run / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 21))
    assert lines[0]["loss"] == pytest.approx(math.log(512), abs=1.0)
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.1
    assert {"loss", "lr", "grad_norm", "tokens", "tokens_per_s", "time_s", "data_wait"} <= set(
        lines[0]
    )
    assert lines[-1]["tokens"] == 20 * 256
    assert load_config(run) == plan.config
    assert (run / "tokenizer.model").read_bytes() == b"a model"
    assert events_of(run) == ["start", "commit", "done"]
    record = json.loads((outcome.commit / "COMMIT.json").read_text())
    assert (record["step"], record["next_index"]) == (20, 160)
    assert {name: entry["rows"] for name, entry in record["ledger"].items()} == {
        "fineweb": 137,
        "pg19": 23,
    }
    assert record["ledger"]["pg19"]["epochs"] == pytest.approx(23 / 12)


def stopped_after(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the process be asked to stop while it makes step `steps`."""
    seen = itertools.count(1)
    reseed = parallel.reseed_attention_dropout

    def ask(*args: Any) -> None:
        if next(seen) == steps:
            os.kill(os.getpid(), signal.SIGTERM)
        reseed(*args)

    monkeypatch.setattr("trainer.train.reseed_attention_dropout", ask)


@pytest.mark.parametrize(
    "changes",
    [
        {"micro_batch_size": 2, "precision": "bf16"},
        {"loader__num_workers": 2, "model__attention_dropout": 0.1, "precision": "fp32"},
        {"activation_checkpointing": "full", "model__attention_dropout": 0.1},
        {"activation_checkpointing": "selective", "model__tie_embeddings": "false"},
    ],
)
def test_stopped_and_started_again_it_is_the_same_run(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    plan = small_plan(shards, max_steps=9, checkpoint__interval_steps=4, **changes)
    assert not train(plan, tmp_path / "whole").stopped
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    micro_steps = plan.shape.grad_accum_steps
    with monkeypatch.context() as patch:
        stopped_after(2 * micro_steps, patch)
        first = train(plan, tmp_path / "parted")
    assert first == Outcome(3, True, tmp_path / "parted" / "checkpoints" / "step-3")
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    torch.manual_seed(99)  # nothing depends on what the process did before
    assert not train(plan, tmp_path / "parted").stopped
    assert log_of(tmp_path / "parted") == log_of(tmp_path / "whole")
    assert same_weights(tmp_path / "parted", tmp_path / "whole")
    assert events_of(tmp_path / "parted") == [
        *("start", "commit", "stopped"),
        *("resume", "commit", "commit", "commit", "done"),
    ]


def test_a_run_that_commits_every_step_can_be_stopped(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped_after(2, monkeypatch)
    plan = small_plan(shards, max_steps=9, checkpoint__interval_steps=1)
    assert train(plan, tmp_path).step == 2


def test_recomputing_activations_changes_nothing(shards: Path, tmp_path: Path) -> None:
    for kind in ("none", "selective", "full"):
        changes: dict[str, Any] = {
            "activation_checkpointing": kind,
            "model__attention_dropout": 0.1,
        }
        train(small_plan(shards, max_steps=3, **changes), tmp_path / kind)
    assert log_of(tmp_path / "none") == log_of(tmp_path / "selective") == log_of(tmp_path / "full")
    assert same_weights(tmp_path / "none", tmp_path / "full")


def test_watching_changes_nothing(shards: Path, tmp_path: Path) -> None:
    train(small_plan(shards, max_steps=6), tmp_path / "unwatched")
    watched = small_plan(
        shards, max_steps=6, validation__interval=2, validation__rows=3, dollars_per_hour=20,
        checkpoint__interval_steps=1, loader__num_workers=1,
    )  # fmt: skip
    train(watched, tmp_path / "watched")
    assert log_of(tmp_path / "unwatched") == log_of(tmp_path / "watched")
    assert same_weights(tmp_path / "unwatched", tmp_path / "watched")
    lines = read_lines(tmp_path / "watched" / "metrics.jsonl")
    assert [line["step"] for line in lines if "val" in line] == [2, 4, 6]
    last = lines[-1]
    assert last["val_loss"] == pytest.approx((6 * last["val"]["fineweb"] + last["val"]["pg19"]) / 7)
    assert last["dollars"] > 0
    assert len(commits(tmp_path / "watched")) == 2


def test_held_out_loss_is_that_of_the_held_out_rows(shards: Path, tmp_path: Path) -> None:
    plan = small_plan(shards, max_steps=2, validation__interval=2, precision="fp32")
    train(plan, tmp_path)
    model = Transformer(plan.config.model)
    model.load_state_dict(load_weights(newest_commit(tmp_path)))
    reader = ShardReader(shards / "fineweb", "val")
    rows = torch.from_numpy(reader.rows(torch.arange(4).numpy())[0]).long()
    with torch.no_grad():
        targets = torch.cat([rows[:, 1:], torch.full((4, 1), -100)], dim=1)
        loss = model(rows, targets).item() / (4 * 31)
    line = read_lines(tmp_path / "metrics.jsonl")[-1]
    assert line["val"]["fineweb"] == pytest.approx(loss, rel=1e-5)


def test_micro_batches_give_the_gradient_of_the_whole(tmp_path: Path) -> None:
    """Also where rows have different numbers of targets: the mask of a chat source."""
    make_source(tmp_path / "shards" / "slimorca", n_rows=40, seq_len=32, masked=True)
    losses = []
    for size in (8, 1):
        plan = small_plan(tmp_path / "shards", micro_batch_size=size, precision="fp32", max_steps=6)
        train(plan, tmp_path / str(size))
        lines = read_lines(tmp_path / str(size) / "metrics.jsonl")
        losses.append([line["loss"] for line in lines])
        assert len({line["n_targets"] for line in lines}) > 1
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_without_a_target_the_update_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "shards" / "slimorca"
    folder.mkdir(parents=True)
    facts = sample_facts("slimorca", seq_len=32, masked=True)
    writer, numbers = ShardWriter(folder, "00000", facts), np.arange(16, dtype=np.uint32)
    rows, nothing = np.ones((16, 32), np.uint16), np.zeros((16, 4), np.uint8)
    writer.add("train", rows, numbers * 0, numbers, nothing)
    writer.finish([], plan_sha256="0" * 64)
    write_manifest(folder, facts, [Part(file="0.txt", first=0, last=1)], 1)

    said, run = Said(), tmp_path / "run"
    plan = small_plan(tmp_path / "shards", max_steps=3)
    train(plan, run, screen=said)
    assert "! step 1: gradient not finite, update refused" in said
    assert events_of(run).count("refused") == 3
    lines = read_lines(run / "metrics.jsonl")
    assert [(line["loss"], line["n_targets"]) for line in lines] == [(None, 0)] * 3
    start = Transformer(plan.config.model)
    start.init_weights(plan.config.seed)
    weights = load_weights(newest_commit(run))
    assert all(torch.equal(weights[name], p) for name, p in start.named_parameters())


def test_refused_updates_without_end_are_an_error(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = Transformer.forward
    calls = itertools.count(1)

    def poisoned(self: Transformer, *args: Any) -> torch.Tensor:
        loss = forward(self, *args)
        return loss * math.nan if next(calls) > 2 else loss

    monkeypatch.setattr(Transformer, "forward", poisoned)
    monkeypatch.setattr(guard, "PATIENCE", 2)
    plan = small_plan(shards, checkpoint__interval_steps=1, precision="fp32")
    with pytest.raises(TrainingError, match=r"step 5: 3 updates in a row .* lower optim\.lr"):
        train(plan, tmp_path)
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__n_layers": 1}, r"model\.n_layers is 1 and was 2 .* --set model\.n_layers=2"),
        ({"seed": 1}, r"seed is 1 and was 0 in this run"),
    ],
)
def test_what_must_not_change_on_resume(
    shards: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    train(small_plan(shards, max_steps=2), tmp_path)
    before = log_of(tmp_path)
    with pytest.raises(ConfigError, match=message):
        train(small_plan(shards, max_steps=4, **changes), tmp_path)
    assert log_of(tmp_path) == before
    assert load_config(tmp_path).max_steps == 2


def test_weights_without_a_state_are_no_run_to_go_on_with(shards: Path, tmp_path: Path) -> None:
    plan = small_plan(shards)
    model = Transformer(plan.config.model)
    tensors = checkpoint.tensors_of(model, make_optimizer(model, plan.config.optim))
    checkpoint.save(tmp_path, tensors, {"step": 0}, ALONE)
    with pytest.raises(ConfigError, match="start from it with --set init_from=ITS_RUN"):
        train(plan, tmp_path)


def test_other_data_are_refused_on_resume(shards: Path, tmp_path: Path) -> None:
    train(small_plan(shards, max_steps=2), tmp_path / "run")
    other = tmp_path / "other"
    make_source(other / "fineweb", n_rows=60, seq_len=32, seed=9)
    make_source(other / "pg19", n_rows=12, seq_len=32, seed=1)
    with pytest.raises(ConfigError, match=r"other/fineweb is not the data this run has read"):
        train(small_plan(other, max_steps=4), tmp_path / "run")


def test_other_changes_are_shown(shards: Path, tmp_path: Path) -> None:
    train(small_plan(shards, max_steps=2), tmp_path)
    said = Said()
    train(small_plan(shards, max_steps=4, optim__lr=1e-3), tmp_path, screen=said)
    assert "changed: max_steps was 2, is 4" in said
    assert "changed: optim.lr was 0.003, is 0.001" in said
    assert load_config(tmp_path).max_steps == 4
    again = Said()
    assert train(small_plan(shards, max_steps=4, optim__lr=1e-3), tmp_path, screen=again).step == 4
    assert "already at step 4; --set max_steps=N takes it further" in again


def test_a_mixture_changed_in_the_middle_goes_on_from_the_counts(
    shards: Path, tmp_path: Path
) -> None:
    train(small_plan(shards, max_steps=5), tmp_path)
    said = Said()
    train(small_plan(shards, max_steps=9, mixture__pg19=6), tmp_path, screen=said)
    assert "the mixture is now {'fineweb': 10, 'pg19': 1}" in said
    record = json.loads((newest_commit(tmp_path) / "COMMIT.json").read_text())
    assert [first for first, _ in record["phases"]] == [0, 40]
    assert sum(entry["rows"] for entry in record["ledger"].values()) == 72
    assert "mixture" in events_of(tmp_path)


def test_a_batch_changed_in_the_middle_skips_nothing(shards: Path, tmp_path: Path) -> None:
    train(small_plan(shards, max_steps=3), tmp_path)
    train(small_plan(shards, max_steps=5, global_batch_tokens=512), tmp_path)
    assert [line["next_index"] for line in read_lines(tmp_path / "metrics.jsonl")] == [
        8, 16, 24, 40, 56
    ]  # fmt: skip


def test_resume_never_and_resume_from_elsewhere(shards: Path, tmp_path: Path) -> None:
    plan = small_plan(shards, max_steps=4, checkpoint__interval_steps=2)
    train(plan, tmp_path / "a")
    with pytest.raises(ConfigError, match="--resume never would mix two runs"):
        train(plan, tmp_path / "a", resume="never")
    early = tmp_path / "a" / "checkpoints" / "step-2"
    train(plan, tmp_path / "b", resume=str(early))
    assert log_of(tmp_path / "b") == log_of(tmp_path / "a")[2:]
    assert same_weights(tmp_path / "a", tmp_path / "b")
    train(plan, tmp_path / "c", resume=str(tmp_path / "a"))
    assert same_weights(tmp_path / "a", tmp_path / "c")
    with pytest.raises(CheckpointError, match=r"no commit there; name a run or its step-N"):
        train(plan, tmp_path / "d", resume=str(tmp_path / "nowhere"))


def test_going_back_to_an_earlier_commit_sets_the_later_ones_aside(
    shards: Path, tmp_path: Path
) -> None:
    plan = small_plan(shards, max_steps=6, checkpoint__interval_steps=2, checkpoint__keep_last=9)
    train(plan, tmp_path)
    said, other = Said(), small_plan(shards, max_steps=3, optim__lr=1e-3)
    train(other, tmp_path, resume=str(tmp_path / "checkpoints" / "step-2"), screen=said)
    assert "! step-6 is set aside: the run goes on from before it" in said
    assert [commit.name for commit in commits(tmp_path)] == ["step-2", "step-3"]
    assert [line[0] for line in log_of(tmp_path)] == [1, 2, 3]


def test_a_damaged_commit_costs_steps_and_nothing_else(shards: Path, tmp_path: Path) -> None:
    plan = small_plan(shards, max_steps=6, checkpoint__interval_steps=2)
    train(plan, tmp_path / "good")
    train(small_plan(shards, max_steps=4, checkpoint__interval_steps=2), tmp_path / "hurt")
    victim = sorted(newest_commit(tmp_path / "hurt").glob("*.safetensors"))[1]
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 16
    victim.write_bytes(data)
    said = Said()
    train(
        small_plan(shards, max_steps=6, checkpoint__interval_steps=2),
        tmp_path / "hurt",
        screen=said,
    )
    assert "its digest differs); use another commit; GOING ON FROM step-2" in said
    # the learning rate of steps 1 to 4 was that of a shorter run
    assert [line[0] for line in log_of(tmp_path / "hurt")] == [1, 2, 3, 4, 5, 6]
    assert "fallback" in events_of(tmp_path / "hurt")


def test_a_full_disk_is_shouted_and_outlived(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, tries = checkpoint.save, itertools.count(1)

    def full_at_first(*args: Any) -> Path:
        if next(tries) == 2:
            raise CheckpointError("no room; older commits stand: make room")
        return save(*args)

    monkeypatch.setattr(checkpoint, "save", full_at_first)
    said = Said()
    plan = small_plan(shards, max_steps=6, checkpoint__interval_steps=2)
    train(plan, tmp_path, screen=said)
    assert "! no room; older commits stand: make room; TRAINING GOES ON" in said
    assert [commit.name for commit in commits(tmp_path)] == ["step-2", "step-6"]
    assert "commit refused" in events_of(tmp_path)


def test_a_last_commit_that_fails_is_an_error(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    plan = small_plan(shards, max_steps=2)
    train(plan, tmp_path)
    monkeypatch.setattr("trainer.checkpoint.os.fsync", full)
    monkeypatch.setattr("trainer.session._introduce", lambda plan, run: None)
    with pytest.raises(CheckpointError, match="No space left on device"):
        train(small_plan(shards, max_steps=4), tmp_path)
    assert [commit.name for commit in commits(tmp_path)] == ["step-2"]


def test_commits_by_the_clock(shards: Path, tmp_path: Path) -> None:
    plan = small_plan(shards, max_steps=6, checkpoint__interval_minutes=1e-9)
    train(plan, tmp_path)
    # a step's wish is read, like all its numbers, one step later: at 2, 4 and 6
    assert events_of(tmp_path) == ["start", *["commit"] * 3, "done"]


def test_one_run_one_job(shards: Path, tmp_path: Path) -> None:
    holder = (
        "import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); "
        "print('held', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", holder, str(tmp_path / ".lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(ConfigError, match="is being trained by another process"):
            train(small_plan(shards), tmp_path)
        process.kill()


def test_a_shard_that_rots_stops_the_run(tmp_path: Path) -> None:
    shards = make_shards(tmp_path / "shards", fineweb=16)
    plan = small_plan(shards, max_steps=4)
    shard = shards / "fineweb" / "00001-000.npy"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 4
    shard.write_bytes(data)
    with pytest.raises(ShardError, match=r"row 7 is damaged .*summer-prep repair"):
        train(plan, tmp_path / "run")


def test_fine_tuning_starts_from_the_weights_of_a_run(shards: Path, tmp_path: Path) -> None:
    train(small_plan(shards, max_steps=2), tmp_path / "base")
    tuned = small_plan(shards, max_steps=1, init_from=tmp_path / "base", optim__lr=1e-30)
    train(tuned, tmp_path / "tuned")
    assert same_weights(tmp_path / "base", tmp_path / "tuned")
    assert log_of(tmp_path / "tuned")[0][-1] == 8  # its own data order, from the beginning


def test_training_outside_the_main_thread(shards: Path, tmp_path: Path) -> None:
    outcomes = []
    plan = small_plan(shards, max_steps=1)
    thread = threading.Thread(target=lambda: outcomes.append(train(plan, tmp_path)))
    thread.start()
    thread.join()
    assert outcomes[0].step == 1
