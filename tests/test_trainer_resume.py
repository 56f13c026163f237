"""A run that is interrupted goes on as if it had not been, or says why it must not."""

import itertools
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from model.transformer import Transformer
from shards_samples import make_source
from trainer.checkpoint import storage
from trainer.checkpoint.runs import checkpoints, newest_checkpoint
from trainer.config.config import load_config
from trainer.errors import CheckpointError, ConfigError
from trainer.metrics.metrics import read_metrics
from trainer.optimizer.optimizer import make_optimizer
from trainer.session import network as parallel
from trainer.train import Outcome, train
from trainer_samples import (
    ALONE,
    RecordingDisplay,
    events_of,
    log_of,
    same_weights,
    small_plan,
    tensor_files,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def stopped_after(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the process be asked to stop while it makes step `steps`."""
    seen = itertools.count(1)
    reseed = parallel.reseed_attention_dropout

    def ask(*args: Any) -> None:
        if next(seen) == steps:
            os.kill(os.getpid(), signal.SIGTERM)
        reseed(*args)

    monkeypatch.setattr("trainer.session.network.reseed_attention_dropout", ask)


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
    assert not train(plan, tmp_path / "full").stopped
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    micro_steps = plan.shape.grad_accum_steps
    with monkeypatch.context() as patch:
        stopped_after(2 * micro_steps, patch)
        first = train(plan, tmp_path / "parted")
    assert first == Outcome(3, True, tmp_path / "parted" / "checkpoints" / "step-3")
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    torch.manual_seed(99)  # nothing depends on what the process did before
    assert not train(plan, tmp_path / "parted").stopped
    assert log_of(tmp_path / "parted") == log_of(tmp_path / "full")
    assert same_weights(tmp_path / "parted", tmp_path / "full")
    assert events_of(tmp_path / "parted") == [
        *("start", "checkpoint", "stopped"),
        *("resume", "checkpoint", "checkpoint", "checkpoint", "done"),
    ]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:::torch")  # what torch says while it compiles
def test_with_everything_on_and_resumed_again_and_again_it_is_the_same_run(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled, dropout, accumulation, workers, asynchronous checkpoints, across the end of each
    source's epoch, and across a change of the mixture, which both runs have at step 6."""
    changes: dict[str, Any] = {
        "compile": "true", "micro_batch_size": 2, "model__attention_dropout": 0.1,
        "loader__num_workers": 2, "checkpoint__interval_steps": 2, "max_steps": 14,
        "checkpoint__asynchronous": "true",
    }  # fmt: skip
    before, after = small_plan(shards, **changes), small_plan(shards, **changes, mixture__pg19=30)
    sessions = {
        "full": [(before, 6), (after, 14)],
        "parted": [(before, 4), (before, 6), (after, 10), (after, 14)],
    }
    for name, parts in sessions.items():
        step = 0
        for plan, stop in parts:
            with monkeypatch.context() as patch:
                if stop < 14:
                    stopped_after((stop - 1 - step) * plan.shape.grad_accum_steps, patch)
                torch.manual_seed(stop)  # nothing depends on what the process did before
                step = train(plan, tmp_path / name).step
            assert step == stop
    record = json.loads((newest_checkpoint(tmp_path / "parted") / "checkpoint.json").read_text())
    assert [first for first, _ in record["phases"]] == [0, 48]
    assert all(entry["epochs"] > 1 for entry in record["ledger"].values())
    assert log_of(tmp_path / "parted") == log_of(tmp_path / "full")
    ours, theirs = (newest_checkpoint(tmp_path / name) for name in ("parted", "full"))
    assert tensor_files(ours) == tensor_files(theirs)  # moments too


def test_a_run_that_checkpoint_every_step_can_be_stopped(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped_after(2, monkeypatch)
    plan = small_plan(shards, max_steps=9, checkpoint__interval_steps=1)
    assert train(plan, tmp_path).step == 2


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
    tensors = storage.tensors_of(model, make_optimizer(model, plan.config.optim))
    storage.save(tmp_path, tensors, {"step": 0}, ALONE)
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
    said = RecordingDisplay()
    train(small_plan(shards, max_steps=4, optim__lr=1e-3), tmp_path, display=said)
    assert "changed: max_steps was 2, is 4" in said
    assert "changed: optim.lr was 0.003, is 0.001" in said
    assert load_config(tmp_path).max_steps == 4
    again = RecordingDisplay()
    assert train(small_plan(shards, max_steps=4, optim__lr=1e-3), tmp_path, display=again).step == 4
    assert "already at step 4; --set max_steps=N takes it further" in again


def test_a_mixture_changed_in_the_middle_goes_on_from_the_counts(
    shards: Path, tmp_path: Path
) -> None:
    train(small_plan(shards, max_steps=5), tmp_path)
    said = RecordingDisplay()
    train(small_plan(shards, max_steps=9, mixture__pg19=6), tmp_path, display=said)
    assert "the mixture is now {'fineweb': 10, 'pg19': 1}" in said
    record = json.loads((newest_checkpoint(tmp_path) / "checkpoint.json").read_text())
    assert [first for first, _ in record["phases"]] == [0, 40]
    assert sum(entry["rows"] for entry in record["ledger"].values()) == 72
    assert "mixture" in events_of(tmp_path)


def test_a_batch_changed_in_the_middle_skips_nothing(shards: Path, tmp_path: Path) -> None:
    train(small_plan(shards, max_steps=3), tmp_path)
    train(small_plan(shards, max_steps=5, global_batch_tokens=512), tmp_path)
    assert [line["next_index"] for line in read_metrics(tmp_path)] == [
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
    with pytest.raises(CheckpointError, match=r"no checkpoint there; name a run or its step-N"):
        train(plan, tmp_path / "d", resume=str(tmp_path / "nowhere"))


def test_going_back_to_an_earlier_checkpoint_sets_the_later_ones_aside(
    shards: Path, tmp_path: Path
) -> None:
    plan = small_plan(shards, max_steps=6, checkpoint__interval_steps=2, checkpoint__keep_last=9)
    train(plan, tmp_path)
    said, other = RecordingDisplay(), small_plan(shards, max_steps=3, optim__lr=1e-3)
    train(other, tmp_path, resume=str(tmp_path / "checkpoints" / "step-2"), display=said)
    assert "! step-6 is set aside: the run goes on from before it" in said
    assert [checkpoint.name for checkpoint in checkpoints(tmp_path)] == ["step-2", "step-3"]
    assert [line[0] for line in log_of(tmp_path)] == [1, 2, 3]


def test_a_damaged_checkpoint_costs_steps_and_nothing_else(shards: Path, tmp_path: Path) -> None:
    plan = small_plan(shards, max_steps=6, checkpoint__interval_steps=2)
    train(plan, tmp_path / "good")
    train(small_plan(shards, max_steps=4, checkpoint__interval_steps=2), tmp_path / "hurt")
    victim = sorted(newest_checkpoint(tmp_path / "hurt").glob("*.safetensors"))[1]
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 16
    victim.write_bytes(data)
    said = RecordingDisplay()
    train(
        small_plan(shards, max_steps=6, checkpoint__interval_steps=2),
        tmp_path / "hurt",
        display=said,
    )
    assert "its digest differs); use another checkpoint; GOING ON FROM step-2" in said
    # the learning rate of steps 1 to 4 was that of a shorter run
    assert [line[0] for line in log_of(tmp_path / "hurt")] == [1, 2, 3, 4, 5, 6]
    assert "fallback" in events_of(tmp_path / "hurt")
