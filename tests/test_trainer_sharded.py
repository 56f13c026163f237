"""Weights divided among ranks train as full ones do, and are saved as the same tensors."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch._dynamo.utils import counters
from torch.distributed.tensor import DTensor

from trainer.checkpoint import storage
from trainer.checkpoint.runs import checkpoints, newest_checkpoint
from trainer.config.config import RunConfig, configure
from trainer.config.memory import memory_by_part
from trainer.distributed.world import World, join_world, local_tensor, shard_count
from trainer.errors import ConfigError
from trainer.metrics.metrics import read_metrics
from trainer.optimizer.optimizer import finish_gradients, make_optimizer, update
from trainer.optimizer.schedule import OptimConfig
from trainer.session.network import Network, build_network, fill_shards, no_sync_unless_last
from trainer.session.save import tensors_to_save
from trainer.train import train
from trainer_samples import (
    ALONE,
    LIMIT_S,
    become,
    events_of,
    free_ports,
    log_of,
    make_shards,
    on_ranks,
    set_texts,
    small_plan,
    tensor_files,
    tensors_in,
)


class Job(NamedTuple):
    """One run, on the first so many of the processes."""

    name: str
    ranks: int
    changes: dict[str, Any]
    resume: str = "auto"


FP32: dict[str, Any] = {"precision": "fp32", "micro_batch_size": 1, "checkpoint__interval_steps": 3}
BF16: dict[str, Any] = {"precision": "bf16", "micro_batch_size": 2}
BF16 |= {"validation__interval": 4, "validation__rows": 1}  # three batches for two ranks
FAST = {"compile": "true", "activation_checkpointing": "selective"}
MUON = FP32 | {"optim__name": "muon"}
LAYOUTS = {"two": (2, 2), "full": (2, 1), "hybrid": (4, 2), "four": (4, 4), "alone": (1, 1)}
JOBS = [
    Job("fp32-full", 2, FP32),
    Job("fp32-sliced", 2, FP32 | {"shard_degree": 2}),
    Job("asynchronous", 2, FP32 | {"shard_degree": 2, "checkpoint__asynchronous": "true"}),
    Job("fp32-hybrid", 4, FP32 | {"shard_degree": 2}),
    Job("bf16-full", 2, BF16),
    Job("bf16-sliced", 2, BF16 | FAST | {"shard_degree": 2}),
    Job("muon-full", 2, MUON),
    Job("muon-sliced", 2, MUON | {"shard_degree": 2}),
    Job("muon-hybrid", 4, MUON | {"shard_degree": 2}),
    *(  # each begins with what the one before it has saved
        Job(name, ranks, {"precision": "fp32", "micro_batch_size": 1, "shard_degree": degree}, to)
        for (name, (ranks, degree)), to in zip(
            LAYOUTS.items(), ["fp32-sliced", *LAYOUTS], strict=False
        )
    ),
]


def run_jobs(rank: int, folder: Path, ports: list[int]) -> None:
    for job, port in zip(JOBS, ports, strict=True):
        if rank < job.ranks:
            become(rank, job.ranks, port)
            plan = small_plan(folder / "shards", job.ranks, **job.changes)
            resume = "auto" if job.resume == "auto" else str(folder / job.resume)
            train(plan, folder / job.name, resume=resume)
    assert not counters["graph_break"]  # a block's hooks stay outside of its graph


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of all jobs, and two on one process to compare with."""
    folder = tmp_path_factory.mktemp("runs")
    make_shards(folder / "shards", fineweb=300, the_stack=90, slimorca=9)
    on_ranks(4, run_jobs, folder, free_ports(len(JOBS)))
    for name, changes in (("fp32-alone", FP32), ("bf16-alone", BF16), ("muon-alone", MUON)):
        train(small_plan(folder / "shards", **changes), folder / name)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "limit"), [("fp32", 1e-6), ("bf16", 1e-4), ("muon", 1e-6)])
def test_slices_learn_what_the_whole_learns(folder: Path, precision: str, limit: float) -> None:
    expected = log_of(folder / f"{precision}-alone")
    assert [line[0] for line in expected] == list(range(1, 9))
    for name in ["full", "sliced"] if precision == "bf16" else ["full", "sliced", "hybrid"]:
        for ours, theirs in zip(expected, log_of(folder / f"{precision}-{name}"), strict=True):
            assert theirs == pytest.approx(ours, rel=limit), name
        scores = [scores_of(folder / f"{precision}-{kind}") for kind in ("alone", name)]
        assert len(scores[0]) == (2 if precision == "bf16" else 0)
        assert scores[1] == pytest.approx(scores[0], rel=limit), name


def scores_of(run: Path) -> list[float]:
    return [line["val_loss"] for line in read_metrics(run) if "val_loss" in line]


@pytest.mark.slow
def test_a_checkpoint_is_the_same_tensors_in_any_layout(folder: Path) -> None:
    """Two slices -> DDP on two -> 2 x 2 -> four slices -> one process: loaded and written again."""
    expected = tensors_in(newest_checkpoint(folder / "fp32-sliced"))
    for name in LAYOUTS:
        checkpoint = newest_checkpoint(folder / name)
        assert checkpoint.name == "step-8"
        tensors = tensors_in(checkpoint)
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[key], expected[key]) for key in expected), name
    record = storage.read_record(newest_checkpoint(folder / "four"))
    assert len(record["files"]) == 8  # of weights and of moments, each rank's own
    sizes = [entry["bytes"] for name, entry in record["files"].items() if "-model-00002" in name]
    assert max(sizes) < 1.2 * min(sizes)


@pytest.mark.slow
def test_slices_are_saved_asynchronously_as_they_were_at_the_step(folder: Path) -> None:
    ours, theirs = checkpoints(folder / "asynchronous"), checkpoints(folder / "fp32-sliced")
    assert [checkpoint.name for checkpoint in ours] == ["step-6", "step-8"]
    for one, other in zip(ours, theirs, strict=True):
        assert tensor_files(one) == tensor_files(other), one.name


@pytest.mark.slow
def test_a_killed_rank_of_a_sharded_run_leaves_no_trace(folder: Path, tmp_path: Path) -> None:
    run, full = tmp_path / "run", folder / "fp32-sliced"
    start = [sys.executable, "-m", "trainer.cli", "--shards", str(folder / "shards"),
             "--preset", "tiny", "--out", str(run), "--nproc", "2"]  # fmt: skip
    sets = set_texts(**FP32, shard_degree=2)
    result = subprocess.run(
        [*start, *(text for s in sets for text in ("--set", s))], capture_output=True, text=True,
        timeout=LIMIT_S, check=False, env={**os.environ, "SUMMER_FAULT": "sigkill:1:5"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert events_of(run)[:3] == ["start", "checkpoint", "resume"]
    assert log_of(run) == log_of(full)
    assert tensor_files(newest_checkpoint(run)) == tensor_files(newest_checkpoint(full))


def sharded_config(degree: int) -> RunConfig:
    sets = set_texts(precision="fp32", shard_degree=degree, model__seq_len=16)
    return configure(preset="tiny", sets=[*sets, "model.vocab_size=131"]).config


def gradients(network: Network, world: World, micro_steps: int = 2) -> None:
    for micro_step in range(micro_steps):
        tokens = torch.arange(16).view(1, 16) + world.rank + 4 * micro_step
        with no_sync_unless_last(network.model, micro_step, micro_steps):
            loss = network.model(tokens, tokens + 1, torch.ones(1, 2, dtype=torch.int32))
        loss.backward()


def finished(network: Network, optimizer: torch.optim.Optimizer) -> float:
    """The norm of a step's gradients, which end as the update takes them."""
    config = sharded_config(1).optim
    return finish_gradients(optimizer, 128, torch.tensor(120), config).item()


def of_four_ranks_on_one() -> tuple[float, dict[str, torch.Tensor]]:
    """The norm and the finished gradients that four ranks should come to."""
    alone = build_network(sharded_config(1), ALONE)
    for rank in range(4):
        gradients(alone, replace(ALONE, rank=rank))
    for parameter in alone.bare.parameters():
        assert parameter.grad is not None
        parameter.grad /= 4
    norm = finished(alone, make_optimizer(alone.bare, OptimConfig()))
    return norm, {n: p.grad for n, p in alone.bare.named_parameters() if p.grad is not None}


def held(network: Network, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Copies of what this rank holds of everything."""
    tensors = storage.tensors_of(network.bare, optimizer)
    return {name: local_tensor(tensor).clone() for name, tensor in tensors.items()}


def gathered(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def check_two_by_two(rank: int, port: int) -> None:
    """One of four ranks: two replicas of two slices, of which those of 131 rows are not equal."""
    become(rank, 4, port)
    config = sharded_config(2)
    with join_world("cpu") as world:
        expected = build_network(sharded_config(1), ALONE).bare.state_dict()
        network = build_network(config, world)
        optimizer = make_optimizer(network.bare, config.optim)
        for factor in (2, 1):  # weights from elsewhere; then the seed's own again
            for name, parameter in network.bare.named_parameters():
                assert torch.equal(gathered(parameter), expected[name] * (3 - factor)), name
                assert shard_count(parameter) == (2 if parameter.ndim > 1 else 1)
                with torch.no_grad(), fill_shards():
                    parameter.copy_(factor * expected[name])
        norm_alone, gradients_alone = of_four_ranks_on_one()
        gradients(network, world)
        assert finished(network, optimizer) == pytest.approx(norm_alone, rel=1e-6)
        for name, parameter in network.bare.named_parameters():
            assert parameter.grad is not None
            torch.testing.assert_close(gathered(parameter.grad), gradients_alone[name])
        optimizer.zero_grad()
        for refused in (0.0, 1.0, 0.0):
            before = held(network, optimizer)
            gradients(network, world)
            norms = world.gather(finished(network, optimizer))
            assert norms == norms[:1] * 4
            update(optimizer, torch.tensor(refused))
            after = held(network, optimizer)
            stayed = {name: torch.equal(after[name], before[name]) for name in before}
            assert set(stayed.values()) == {refused == 1.0}, stayed
        everything = world.gather(held(network, optimizer))
        for one, other in ((0, 2), (1, 3)):  # the replicas' slices, bit for bit
            pairs = [(everything[one][name], everything[other][name]) for name in everything[one]]
            assert all(torch.equal(*pair) for pair in pairs)
        shares = world.gather(
            list(tensors_to_save(storage.tensors_of(network.bare, optimizer), world))
        )
        for name, tensor in everything[0].items():  # each is written once, by one replica
            assert sum(name in share for share in shares) == min(2, tensor.ndim), name


@pytest.mark.slow
def test_replicas_of_slices_begin_and_stay_alike() -> None:
    """The seed's own weights; a refused update changes nothing; the same norm on every rank."""
    on_ranks(4, check_two_by_two, *free_ports(1))


def test_the_ranks_must_divide_into_groups(tmp_path: Path) -> None:
    shards = make_shards(tmp_path)
    assert small_plan(shards, 4, shard_degree=2).config.shard_degree == 2
    with pytest.raises(ConfigError, match="shard_degree=3: 4 ranks cannot be divided into groups"):
        small_plan(shards, 4, shard_degree=3)
    with pytest.raises(ConfigError, match="shard_degree=0"):
        small_plan(shards, 4, shard_degree=0)


def test_the_arithmetic_divides_what_is_divided() -> None:
    full, sliced = (
        memory_by_part(configure(preset="summer-4b", sets=[f"shard_degree={n}"]).config, 1, "cuda")
        for n in (1, 8)
    )
    for part in ("weights", "gradients", "moments"):
        assert sliced[part] == full[part] // 8
    assert full["gathered"] == sliced["bf16 copies"] == 0
    assert sliced["activations"] == full["activations"]
    assert sum(sliced.values()) < sum(full.values()) / 3
