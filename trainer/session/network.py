"""The model as it trains: on its device, its blocks compiled, recomputed, replicated or sharded.

With `shard_degree` 1 every rank holds everything and DDP exchanges gradients. With S above 1, S
ranks hold one copy of weights, gradients and moments between them (FSDP2): a block's matrices are
gathered when its turn comes, in the type in which they are multiplied, and dropped after it. The
embedding, head and vectors stay fp32, and every rank has all vectors (norms, LayerScale: 0.01 % of
the weights), so that the numbers are those of DDP but for the order of sums over ranks. Every
micro-step sums gradients up within a replica; replicas exchange theirs in the last.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import shutil
import sysconfig
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
import torch._inductor.config
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint as recomputing
from torch.utils.checkpoint import CheckpointPolicy

from model.attention import self_test
from model.config import ModelError
from model.transformer import Transformer
from trainer.config.config import RunConfig
from trainer.data.mixture import key_of
from trainer.distributed.world import World, make_mesh
from trainer.errors import TrainingError


class Network(NamedTuple):
    """One model twice: `bare` holds the parameters, `model` is what is called in training."""

    bare: Transformer
    model: nn.Module
    notes: tuple[str, ...]


def build_network(config: RunConfig, world: World) -> Network:
    """The model on this rank's device, initialised from the seed, its attention kernel tested."""
    with torch.device("meta"):
        bare = Transformer(config.model)
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    try:
        error = self_test(world.device, dtype, config.model)
    except ModelError as failure:
        raise TrainingError(str(failure)) from failure
    notes = [f"attention kernel: within {error:.1e} nats of fp32 math (limit 1e-3)"]
    if config.activation_checkpointing != "none":
        _recompute_blocks(bare, config)
    if config.compile and (lack := _lack_of_a_compiler(world.device)):
        notes.append(f"not compiled, which is slower: {lack}")
    elif config.compile:
        # DDP's own graph splitter would cut even graphs of a single block
        torch._dynamo.config.optimize_ddp = False
        # inductor's own random numbers can corrupt dropout on CUDA (pytorch#198333, torch 2.13)
        if hasattr(torch._inductor.config, "align_random_eager"):
            torch._inductor.config.align_random_eager = True
        bare.compile_parts()
    if config.shard_degree > 1:
        _shard(bare, config, world)
    bare.to_empty(device=world.device)
    with fill_shards():
        bare.init_weights(config.seed)
    model = bare if config.shard_degree > 1 else _replicate(bare, world)
    return Network(bare, model, tuple(notes))


def autocast(config: RunConfig, device: torch.device) -> torch.autocast:
    """The context of forward passes: bf16 matrices over fp32 weights, or all in fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16")


def no_sync_unless_last(
    model: nn.Module, micro_step: int, grad_accum_steps: int
) -> contextlib.AbstractContextManager[None]:
    """The context in which gradients stay on their rank (or replica) until a step's last pass."""
    last = micro_step == grad_accum_steps - 1
    if isinstance(model, FSDPModule):
        model.set_requires_all_reduce(last)
    if isinstance(model, DistributedDataParallel) and not last:
        return model.no_sync()
    return contextlib.nullcontext()


def exposed_exchange_s(model: nn.Module) -> float:
    """Seconds that a backward pass waited for other ranks' gradients (DDP times each 100th)."""
    if not isinstance(model, DistributedDataParallel):
        return 0.0
    seen: dict[str, Any] = model._get_ddp_logging_data()  # type: ignore[no-untyped-call]
    exchange_ns = int(seen.get("backward_comm_time", 0))
    return max(0, exchange_ns - int(seen.get("backward_compute_comm_overlap_time", 0))) / 1e9


def reseed_attention_dropout(config: RunConfig, step: int, micro_step: int, rank: int) -> None:
    """Make the kernel's own dropout a function of the place in the run: nothing to restore."""
    if config.model.attention_dropout > 0:
        torch.manual_seed(key_of(config.seed, "attention", step, micro_step, rank) >> 1)


class fill_shards(TorchFunctionMode):  # noqa: N801  # used as a function is
    """A context in which a sharded tensor is filled with the values of the full one."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        target = args[0] if args else None
        if func not in _FILLS or not isinstance(target, DTensor):
            return func(*args, **(kwargs or {}))
        full = torch.empty(target.shape, dtype=target.dtype, device=target.device)
        func(full, *args[1:], **(kwargs or {}))
        mesh, placements = target.device_mesh, target.placements
        kept = distribute_tensor(full, mesh, placements, src_data_rank=None)  # nothing is sent
        target.to_local().copy_(kept.to_local())
        return target


_FILLS: Final = (Tensor.normal_, Tensor.fill_, Tensor.copy_)


def _shard(bare: Transformer, config: RunConfig, world: World) -> None:
    vectors = {parameter for parameter in bare.parameters() if parameter.ndim < 2}
    common: dict[str, Any] = {
        "mesh": make_mesh(world, config.shard_degree),
        "ignored_params": vectors,
        "reshard_after_forward": True,  # the root's too: checkpoints look at slices
    }
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)  # the residual stream is fp32
    if config.precision == "bf16":
        policy = dataclasses.replace(policy, param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in bare.blocks:
        fully_shard(block, mp_policy=policy, **common)
    fully_shard(bare, **common)


def _replicate(bare: Transformer, world: World) -> nn.Module:
    if world.world_size == 1:
        return bare
    block_mb = sum(p.numel() * p.element_size() for p in bare.blocks[0].parameters()) / 2**20
    with warnings.catch_warnings():  # torch 2.13 renames broadcast_buffers, 2.11 does not yet
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(
            bare,
            device_ids=[world.local_rank] if world.device.type == "cuda" else None,
            broadcast_buffers=False,  # tables and constants, the same everywhere
            gradient_as_bucket_view=True,
            bucket_cap_mb=max(1, round(block_mb)),
        )


def _recompute_blocks(bare: Transformer, config: RunConfig) -> None:
    """Let each block keep its input alone (full), or its matrix products too (selective)."""
    options: dict[str, Any] = {"preserve_rng_state": config.model.attention_dropout > 0}
    if config.activation_checkpointing == "selective":
        contexts = recomputing.create_selective_checkpoint_contexts
        options["context_fn"] = functools.partial(contexts, _keep)
    for block in bare.blocks:
        block.forward = functools.partial(_recomputed, block.forward, options)


def _recomputed(forward: Callable[..., Tensor], options: dict[str, Any], *args: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args)
    return recomputing.checkpoint(forward, *args, use_reentrant=False, **options)


def _keep(context: object, operator: object, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Products are kept, pointwise work is done again."""
    product = str(operator).startswith(("aten.mm", "aten.addmm", "aten._scaled_dot_product"))
    return CheckpointPolicy.MUST_SAVE if product else CheckpointPolicy.PREFER_RECOMPUTE


def _lack_of_a_compiler(device: torch.device) -> str:
    """What torch.compile would miss on the CPU, or nothing."""
    compilers = [shutil.which(name) for name in ("g++", "c++", "clang++")]
    if device.type == "cpu" and not any(compilers):
        return "there is no C++ compiler (install g++, or --set compile=false)"
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if device.type == "cpu" and not header.exists():
        return "Python.h is missing (install python3-dev, or --set compile=false)"
    return ""
