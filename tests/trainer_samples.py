"""Small runs for tests: a folder of shards and a model of a few thousand weights."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from shards_samples import make_source
from trainer.checkpoint.runs import newest_checkpoint
from trainer.checkpoint.storage import _read_tensors, load_weights
from trainer.config.config import configure
from trainer.config.resolve import make_plan
from trainer.config.train_plan import TrainPlan
from trainer.distributed.world import World
from trainer.metrics.display import Display
from trainer.metrics.metrics import read_events, read_metrics

ALONE = World(rank=0, local_rank=0, world_size=1, local_world_size=1, device=torch.device("cpu"))

SMALL = {
    "model.n_layers": 2,
    "model.d_model": 32,
    "model.n_heads": 2,
    "model.d_ff": 64,
    "max_steps": 8,
    "global_batch_tokens": 256,  # 8 rows of 32
    "compile": "false",
    "device": "cpu",
    "precision": "bf16",  # whatever this CPU would choose
    "loader.num_workers": 0,
    "validation.interval": 0,
    "checkpoint.interval_steps": 0,
    "checkpoint.asynchronous": "false",  # so that it is known what is saved when
    "optim.warmup_steps": 2,
}


LIMIT_S = 240


def make_shards(folder: Path, **rows: int) -> Path:
    """Sources with these numbers of training rows; underscores in names stand for dashes."""
    for seed, (name, n_rows) in enumerate((rows or {"fineweb": 60, "pg19": 12}).items()):
        make_source(folder / name.replace("_", "-"), n_rows=n_rows, seq_len=32, seed=seed)
    return folder


def set_texts(**changes: Any) -> list[str]:
    """`--set` texts of the small run with changes; two underscores stand for a dot."""
    named = {key.replace("__", "."): value for key, value in changes.items()}
    return [f"{key}={value}" for key, value in {**SMALL, **named}.items()]


def small_plan(shards: Path, /, ranks: int = 1, **changes: Any) -> TrainPlan:
    sets = set_texts(**changes)
    return make_plan(configure(preset="tiny", sets=sets, shards=str(shards)), ranks)


class RecordingDisplay(Display):
    """A display that remembers."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.values: list[Any] = []

    def print(self, text: str) -> None:
        self.lines.append(text)

    def step(self, values: Any) -> None:
        self.lines.append(f"step {values['step']}")
        self.values.append(values)

    def __contains__(self, part: str) -> bool:
        return any(part in line for line in self.lines)


def log_of(run: Path) -> list[tuple[Any, ...]]:
    keys = ("step", "loss", "lr", "grad_norm", "n_targets", "next_index")
    return [tuple(line[key] for key in keys) for line in read_metrics(run)]


def events_of(run: Path) -> list[str]:
    return [line["event"] for line in read_events(run)]


def find_events(run: Path, kind: str) -> list[dict[str, Any]]:
    return [line for line in read_events(run) if line["event"] == kind]


def same_weights(one: Path, other: Path) -> bool:
    a, b = load_weights(newest_checkpoint(one)), load_weights(newest_checkpoint(other))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def tensor_files(checkpoint: Path) -> dict[str, bytes]:
    """The files of weights and moments of a checkpoint."""
    return {path.name: path.read_bytes() for path in checkpoint.glob("*.safetensors")}


def free_ports(n: int) -> list[int]:
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(n)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def become(rank: int, ranks: int, port: int) -> None:
    """Make this process one of so many that torchrun has started."""
    numbers = {"RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
    numbers |= {"LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": ranks}
    os.environ.update({name: str(number) for name, number in numbers.items()})
    os.environ["MASTER_ADDR"] = "127.0.0.1"


def on_ranks(n: int, act: Callable[..., None], *arguments: Any) -> None:
    """Call `act(rank, *arguments)` in n processes, and wait until they have all returned."""
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=act, args=(rank, *arguments)) for rank in range(n)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(LIMIT_S)
        process.kill()  # where it has returned, nothing
    assert [process.exitcode for process in processes] == [0] * n


def tensors_in(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, on one rank."""
    stored = HuggingFaceStorageReader(str(checkpoint)).read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in stored.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    _read_tensors(checkpoint, tensors, None)
    return tensors
