"""Writes and reads checkpoints: a run's weights, moments and record, complete or not at all.

    checkpoints/step-40/
      shard-00001-model-00001-of-00002.safetensors   rank 0's part of the weights
      shard-00001-model-00002-of-00002.safetensors   rank 0's part of the moments
      ...                                            the other ranks' parts
      checkpoint.json                                written last: SHA-256 of each file, step, data

torch.distributed.checkpoint writes the tensors from all ranks at once and distributes them over any
number of ranks on loading. Nothing is pickled. Loading verifies every byte first: without that, 36
of 40 single-bit flips loaded without an error.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import hf_storage
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save as save_tensors
from torch.optim import Optimizer

from shards.files import (
    fsync_folder,
    json_bytes,
    open_plain,
    publish_bytes,
    read_plain,
    sha256_file,
)
from shards.shape import check_shape
from shards.versions import CHECKPOINT, STAMP, check_format, check_keys, stamp, writer_of
from trainer.checkpoint.runs import RECORD, checkpoint_path, record_path
from trainer.distributed.world import World, local_tensor
from trainer.errors import CheckpointError

_NAME: Final = re.compile(r"[\w-]+\.safetensors")
_WEIGHTS, _MOMENTS = 1, 2  # the files that tensors of each kind go to
_NEEDED: Final = ("step", "files")
Record = dict[str, Any]

_COUNTS: Final = {"*": {"rows": int, "tokens": int, "epochs": float}}
_SHAPE: Final = {
    "step": int, "next_index": int, "refused_in_a_row": int, "world_size": int, "bit_exact": bool,
    "time_s": float, "unix_s": float, "norms": [float], "spent_s": {"*": float},
    "skipped": [(int, int)], "phases": [(int, {"*": float})], "ledger": _COUNTS,
    "files": {"*": {"bytes": int, "sha256": str}}, "config": {},
    "data": {"*": {"*": frozenset({bool, int, float, str})}}, "tokenizer_sha256": str,
    "versions": {"*": frozenset({str, type(None)})}, "anneal": frozenset({type(None), (int, int)}),
}  # fmt: skip
"""Of each key the type; what a configuration holds is checked when one is made of it."""

_KNOWN: Final = frozenset((*STAMP, *_SHAPE, "converted_from"))
"""What a record may hold; trainer/session/state.py has a default for each key added later."""


def tensors_of(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """The weights and moments themselves, by their names in a checkpoint, and `optim.updates`."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        tensors[f"model.{name}"] = parameter.detach()
        for key, value in optimizer.state[parameter].items():
            stored = "optim.updates" if key == "step" else f"optim.{key}.{name}"
            tensors[stored] = value if value.ndim else value.view(1)
    return tensors


def share_bytes(share: Mapping[str, Tensor]) -> int:
    """How many bytes a rank's share has."""
    return sum(local_tensor(tensor).nbytes for tensor in share.values())


def save(run: Path, share: Mapping[str, Tensor], record: Record, world: World) -> Path:
    """The new checkpoint of `record["step"]`, to which every rank gives its share.

    CheckpointError, on every rank, leaves the older ones as they are.
    """
    folder = checkpoint_path(run, int(record["step"]))
    size = sum(world.gather(share_bytes(share)))
    try:
        world.on_main(lambda: make_room(folder, size))
        names = [name for part in world.gather(list(share)) for name in part]
        kinds = {name: _WEIGHTS if name.startswith("model.") else _MOMENTS for name in names}
        writer = hf_storage.HuggingFaceStorageWriter(
            str(folder), fqn_to_index_mapping=kinds, save_distributed=True
        )
        alone = world.world_size == 1
        save_tensors(dict(share), storage_writer=writer, process_group=world.group, no_dist=alone)
        own = f"shard-{world.rank + 1:05d}-*.safetensors"
        parts = world.on_all(lambda: {path.name: _flushed(path) for path in folder.glob(own)})
        files = dict(sorted(item for part in parts for item in part.items()))
        made_with = versions(world.device)
        record = {**stamp(CHECKPOINT), **record, "versions": made_with, "files": files}
        world.on_main(lambda: _publish_record(folder, record))
    except (OSError, CheckpointException) as error:
        if world.is_main:
            with contextlib.suppress(OSError):
                remove(folder)
        raise CheckpointError(
            f"{folder} could not be written ({cause_of(error)}); older checkpoints are intact: "
            "make room or repair the disk"
        ) from error
    return folder


def make_room(folder: Path, size: int) -> None:
    """Make the folder of a checkpoint of `size` bytes; CheckpointError where they would not fit."""
    remove(folder)  # a try that was not saved, or a checkpoint found damaged
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    if free < size + (1 << 20):
        raise CheckpointError(
            f"{folder} needs {size / 1e9:.3f} GB and the disk has {free / 1e9:.3f} GB left; "
            "older checkpoints are intact: make room"
        )
    folder.mkdir()


def remove(folder: Path) -> None:
    """Remove a checkpoint, its record first: what is left of it after a kill is no checkpoint."""
    if folder.exists():
        record_path(folder).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # a disk that fails: digests will find what is left
            fsync_folder(folder)
        shutil.rmtree(folder)


def restore(checkpoint: Path, model: nn.Module, optimizer: Optimizer, world: World) -> None:
    """Fill weights and moments, in place, from a checkpoint whose files have been verified."""
    tensors = tensors_of(model, optimizer)
    _read_tensors(checkpoint, dict(tensors), world)
    for state in optimizer.state.values():
        if "step" in state:
            state["step"].copy_(tensors["optim.updates"][0])


def load_weights(checkpoint: Path) -> dict[str, Tensor]:
    """The weights of a checkpoint by parameter name, fp32 on the CPU, their digests verified."""
    record = read_record(checkpoint)
    names = [name for name in record["files"] if f"-model-{_WEIGHTS:05d}-of-" in name]
    if damage := _damage(checkpoint, record, names):
        raise CheckpointError(damage)
    try:
        metadata = hf_storage.HuggingFaceStorageReader(str(checkpoint)).read_metadata()
    except Exception as error:  # safetensors has its own family of errors for damaged headers
        message = f"{checkpoint} is damaged ({error}); use another checkpoint"
        raise CheckpointError(message) from error
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in metadata.state_dict_metadata.items()
        if name.startswith("model.") and isinstance(entry, TensorStorageMetadata)
    }
    _read_tensors(checkpoint, tensors, None)
    return {name.removeprefix("model."): tensor.float() for name, tensor in tensors.items()}


def read_record(checkpoint: Path) -> Record:
    """The record of a checkpoint; CheckpointError if it is damaged, VersionError if unknown."""
    path = record_path(checkpoint)
    try:
        data = read_plain(path)
        record = json.loads(data)
        as_written = json_bytes(record) == data  # spaces too
        digest = record.pop("sha256")
    except FileNotFoundError:
        raise CheckpointError(
            f"{checkpoint}: no {RECORD} there, so nothing was saved; name a folder "
            "runs/NAME/checkpoints/step-N that holds one"
        ) from None
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged; use another checkpoint") from error
    if not as_written or hashlib.sha256(json_bytes(record)).hexdigest() != digest:
        raise CheckpointError(f"{path} is damaged (its digest differs); use another checkpoint")
    check_format(record, CHECKPOINT, path)
    check_keys(record, _KNOWN, path, writer_of(record))
    if absent := [key for key in _NEEDED if key not in record]:
        raise CheckpointError(f"{path} lacks {absent[0]}; use another checkpoint")
    try:
        check_shape(record, _SHAPE, "")
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}, which cannot be; use another") from error
    return dict(record)


def verify(checkpoint: Path, world: World) -> Record:
    """The record of a checkpoint, every file of which is what it was when it was written."""
    record: Record = world.on_main(lambda: read_record(checkpoint))
    mine = sorted(record["files"])[world.rank :: world.world_size]
    if damage := next(filter(None, world.gather(_damage(checkpoint, record, mine))), ""):
        raise CheckpointError(damage)
    return record


def versions(device: torch.device) -> dict[str, str | None]:
    """What the numbers were computed with."""
    on_cuda = device.type == "cuda"
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "device": torch.cuda.get_device_name(device) if on_cuda else platform.processor() or "cpu",
    }


def _read_tensors(checkpoint: Path, tensors: dict[str, Any], world: World | None) -> None:
    """Fill tensors from a checkpoint, with the other ranks of a world or in this process alone."""
    group, alone = (world.group, world.world_size == 1) if world else (None, True)
    reader = hf_storage.HuggingFaceStorageReader(str(checkpoint))
    try:
        with no_single_process_warning():
            load(tensors, storage_reader=reader, process_group=group, no_dist=alone)
    except CheckpointException as error:
        raise CheckpointError(f"{checkpoint} cannot be loaded ({cause_of(error)})") from error


@contextlib.contextmanager
def no_single_process_warning() -> Iterator[None]:
    """A block in which torch saves on one process without a warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


def _flushed(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file, now on the disk, its header sorted (its order is random)."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.dumps(json.loads(file.read(size)), separators=(",", ":"), sort_keys=True)
        if len(header) <= size:
            file.seek(8)
            file.write(header.encode().ljust(size))
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "sha256": sha256_file(path)}


def _publish_record(folder: Path, record: Record) -> None:
    fsync_folder(folder)  # the names of the tensors' files, before the record that lists them
    digest = hashlib.sha256(json_bytes(record)).hexdigest()
    publish_bytes(folder / RECORD, json_bytes({**record, "sha256": digest}))
    fsync_folder(folder.parent)


def _damage(checkpoint: Path, record: Record, names: list[str]) -> str:
    """What is wrong with one of these files of a checkpoint, or with what else is there."""
    listed = record["files"]
    for path in sorted(checkpoint.glob("*.safetensors")):  # torch would load any that is there
        if path.name not in listed:
            return f"{path} is not listed in {RECORD}; remove it, or use another checkpoint"
    for name in names:
        path = checkpoint / name
        if not _NAME.fullmatch(name):
            return f"{checkpoint}: {name!r} is no file of a checkpoint; use another"
        with contextlib.suppress(FileNotFoundError, ValueError), open_plain(path) as file:
            size = os.fstat(file.fileno()).st_size
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            if {"bytes": size, "sha256": digest} == listed[name]:
                continue
        return f"{path} is damaged or missing (its digest differs); use another checkpoint"
    return ""


def cause_of(error: BaseException) -> str:
    """The first cause of a failure, in one line, from under torch's wrapping."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).splitlines()[0] if str(error) else type(error).__name__
