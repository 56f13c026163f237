"""Runs of a few steps, in this process: going on exactly, changing nothing, rejecting."""

import itertools
import json
import math
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model.transformer import Transformer
from shards.errors import ShardError
from shards.format import Part
from shards.writer import ShardWriter, write_manifest
from shards_samples import make_source, sample_facts
from trainer.checkpoint.runs import checkpoints, newest_checkpoint
from trainer.checkpoint.storage import load_weights
from trainer.config.config import load_config
from trainer.errors import ConfigError, TrainingError
from trainer.faults.heartbeat import Watchdog
from trainer.metrics.metrics import read_events, read_metrics
from trainer.train import Outcome, train
from trainer_samples import (
    RecordingDisplay,
    events_of,
    log_of,
    make_shards,
    same_weights,
    small_plan,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_run_learns_and_explains_itself(shards: Path, tmp_path: Path) -> None:
    (shards / "fineweb" / "tokenizer.model").write_bytes(b"a model")
    plan, run = small_plan(shards, optim__lr=1e-2, max_steps=20), tmp_path / "run"
    outcome = train(plan, run)
    assert outcome == Outcome(20, False, run / "checkpoints" / "step-20")
    lines = read_metrics(run)
    assert [line["step"] for line in lines] == list(range(1, 21))
    assert lines[0]["loss"] == pytest.approx(math.log(512), abs=1.0)
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.1
    assert {"loss", "lr", "grad_norm", "tokens", "tokens_per_s", "time_s", "data_wait"} <= set(
        lines[0]
    )
    assert lines[-1]["tokens"] == 20 * 256
    assert load_config(run) == plan.config
    assert (run / "tokenizer.model").read_bytes() == b"a model"
    assert events_of(run) == ["start", "checkpoint", "done"]
    record = json.loads((outcome.checkpoint / "checkpoint.json").read_text())
    assert (record["step"], record["next_index"]) == (20, 160)
    assert {name: entry["rows"] for name, entry in record["ledger"].items()} == {
        "fineweb": 137,
        "pg19": 23,
    }
    assert record["ledger"]["pg19"]["epochs"] == pytest.approx(23 / 12)


def test_recomputing_activations_changes_nothing(shards: Path, tmp_path: Path) -> None:
    for kind in ("none", "selective", "full"):
        changes: dict[str, Any] = {
            "activation_checkpointing": kind,
            "model__attention_dropout": 0.1,
        }
        train(small_plan(shards, max_steps=3, **changes), tmp_path / kind)
    assert log_of(tmp_path / "none") == log_of(tmp_path / "selective") == log_of(tmp_path / "full")
    assert same_weights(tmp_path / "none", tmp_path / "full")


def test_micro_batches_give_the_gradient_of_the_whole(tmp_path: Path) -> None:
    """Also where rows have different numbers of targets: the mask of a chat source."""
    make_source(tmp_path / "shards" / "slimorca", n_rows=40, seq_len=32, masked=True)
    losses = []
    for size in (8, 1):
        plan = small_plan(tmp_path / "shards", micro_batch_size=size, precision="fp32", max_steps=6)
        train(plan, tmp_path / str(size))
        lines = read_metrics(tmp_path / str(size))
        losses.append([line["loss"] for line in lines])
        assert len({line["n_targets"] for line in lines}) > 1
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_without_a_target_the_update_is_skipped(tmp_path: Path) -> None:
    folder = tmp_path / "shards" / "slimorca"
    folder.mkdir(parents=True)
    facts = sample_facts("slimorca", seq_len=32, masked=True)
    writer, numbers = ShardWriter(folder, "00000", facts), np.arange(16, dtype=np.uint32)
    rows, nothing = np.ones((16, 32), np.uint16), np.zeros((16, 4), np.uint8)
    writer.add("train", rows, numbers * 0, numbers, nothing)
    writer.finish([], plan_sha256="0" * 64)
    write_manifest(folder, facts, [Part(file="0.txt", first=0, last=1)], 1)

    said, run = RecordingDisplay(), tmp_path / "run"
    plan = small_plan(tmp_path / "shards", max_steps=3)
    train(plan, run, display=said)
    assert "! step 1: gradient not finite, update skipped" in said
    assert events_of(run).count("skipped") == 3
    lines = read_metrics(run)
    assert [(line["loss"], line["n_targets"]) for line in lines] == [(None, 0)] * 3
    start = Transformer(plan.config.model)
    start.init_weights(plan.config.seed)
    weights = load_weights(newest_checkpoint(run))
    assert all(torch.equal(weights[name], p) for name, p in start.named_parameters())


def test_skipped_updates_without_end_are_an_error(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = Transformer.forward
    calls = itertools.count(1)

    def poisoned(self: Transformer, *args: Any) -> torch.Tensor:
        loss = forward(self, *args)
        return loss * math.nan if next(calls) > 2 else loss

    monkeypatch.setattr(Transformer, "forward", poisoned)
    changes = {"guard__patience": 2, "guard__max_rollbacks": 1}
    plan = small_plan(shards, checkpoint__interval_steps=1, precision="fp32", **changes)
    message = r"step 5: 3 updates in a row were skipped, after 1 rollbacks; the run is saved"
    with pytest.raises(TrainingError, match=message):
        train(plan, tmp_path)
    # a step's numbers are read one step late
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]
    assert [checkpoint.name for checkpoint in checkpoints(tmp_path)] == ["step-2", "step-6"]
    assert events_of(tmp_path).count("rollback") == 1


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


def test_the_watchdog_knows_what_each_step_does(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marks = list[tuple[int, str]]()
    monkeypatch.setattr(Watchdog, "mark", lambda self, *mark: marks.append(mark))
    freed = list[bool]()
    monkeypatch.setattr("trainer.train.keep_freed_memory", lambda: freed.append(True))
    changes: dict[str, Any] = {"micro_batch_size": 4, "checkpoint__interval_steps": 2}
    changes |= {"validation__interval": 2, "validation__rows": 1}
    train(small_plan(shards, max_steps=3, **changes), tmp_path / "run")
    assert freed == [True]
    steps = [[(step, part) for part in ("data", "gradient")] * 2 for step in (1, 2, 3)]
    assert marks == [
        *steps[0], *steps[1], (2, "validation"), (2, "checkpoint"), *steps[2], (3, "checkpoint")
    ]  # fmt: skip


def test_a_damaged_row_ends_the_run_before_its_step_and_repaired_it_goes_on(
    tmp_path: Path,
) -> None:
    shards, run = make_shards(tmp_path / "shards", fineweb=16), tmp_path / "run"
    plan = small_plan(shards, max_steps=4)
    train(plan, tmp_path / "intact")
    shard = shards / "fineweb" / "00001-000.npy"
    intact = shard.read_bytes()
    damaged = bytearray(intact)
    damaged[-1 - 64 * 2] ^= 4  # the third row from the end
    shard.write_bytes(damaged)
    with pytest.raises(ShardError, match=r"is damaged .*; the run is saved at step 1 and goes on"):
        train(plan, run)
    assert newest_checkpoint(run).name == "step-1"
    assert read_events(run)[-1].items() >= {"event": "damaged", "step": 2}.items()
    shard.write_bytes(intact)
    train(plan, run)
    assert log_of(run) == log_of(tmp_path / "intact")
    assert same_weights(run, tmp_path / "intact")
