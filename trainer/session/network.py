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
import os
import shutil
import sysconfig
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
import torch._inductor.config
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint as recomputing
from torch.utils.checkpoint import CheckpointPolicy

from model.config import ModelError
from model.self_test import self_test
from model.transformer import Transformer
from trainer.config.config import RunConfig
from trainer.data.mixture import key_of
from trainer.distributed.devices import unused_gpu
from trainer.distributed.world import World
from trainer.errors import TrainingError

KERNEL_NOTE: Final = "attention kernel: "


class Network(NamedTuple):
    """One model twice: `bare` holds the parameters, `model` is what is called in training."""

    bare: Transformer
    model: nn.Module
    notes: tuple[str, ...]
    repeatable: bool = True  # whether the same step gives the same bits, and so does resuming


def build_network(config: RunConfig, world: World) -> Network:
    """The model on this rank's device, initialised from the seed, its kernels tested.

    TrainingError where the attention kernel computes another model, and with `deterministic=true`
    where a kernel of this run cannot give the same bits twice.
    """
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    notes = [] if not config.compile else _prepare_compiler(world)
    compiled = config.compile and not notes
    obstacle = _be_deterministic(config, world, compiled=compiled)
    try:
        test = self_test(world.device, dtype, config.model)
    except ModelError as failure:
        raise TrainingError(str(failure)) from failure
    notes.insert(0, f"{KERNEL_NOTE}{test}")
    if idle := world.device.type != "cuda" and unused_gpu():
        notes.append(f"! {idle}")
    if obstacle:
        notes.append(f"! resuming will not be bit-exact here: {obstacle}")
    with torch.device("meta"):
        bare = Transformer(config.model)
    _prepare(bare, config, compiled=compiled)
    if config.shard_degree > 1:
        _shard(bare, config, world)
    bare.to_empty(device=world.device)
    with fill_shards():
        bare.init_weights(config.seed)
    model = bare if config.shard_degree > 1 else _replicate(bare, world)
    return Network(bare, model, tuple(notes), repeatable=not obstacle)


def _prepare(bare: Transformer, config: RunConfig, *, compiled: bool) -> None:
    """Have the blocks recomputed and compiled as the configuration says."""
    if config.activation_checkpointing != "none":
        _recompute_blocks(bare, config)
    if compiled:
        bare.compile_parts()


def _prepare_compiler(world: World) -> list[str]:
    """Set torch.compile up for a run; a note where it cannot be used."""
    if lack := _lack_of_a_compiler(world.device):
        return [f"not compiled, which is slower: {lack}"]
    # DDP's own graph splitter would cut even graphs of a single block
    torch._dynamo.config.optimize_ddp = False
    # inductor's own random numbers can corrupt dropout on CUDA (pytorch#198333, torch 2.13)
    if hasattr(torch._inductor.config, "align_random_eager"):
        torch._inductor.config.align_random_eager = True
    if "TORCHINDUCTOR_COMPILE_THREADS" not in os.environ:  # of each rank; by itself 32 or all cores
        cores = len(os.sched_getaffinity(0)) // world.local_world_size
        torch._inductor.config.compile_threads = min(32, max(1, cores))
    return []


def _be_deterministic(config: RunConfig, world: World, *, compiled: bool) -> str:
    """Ask torch for kernels that give the same bits every time; why this run has one that does not.

    Strictly: asked to warn only, torch keeps flash attention's other backward pass, and a resumed
    run ended with other bits (H200, torch 2.11). A CPU's kernels need no asking.
    """
    if world.device.type != "cuda":
        return ""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    strict = config.deterministic != "false"
    torch.use_deterministic_algorithms(strict)
    if not strict:
        return "deterministic=false asks for speed"
    look = functools.partial(_unrepeatable, config, world.device, compiled=compiled)
    first = world.local_rank == 0  # the other ranks then find what it has compiled
    found = world.on_all(lambda: look() if first else "")
    found += world.on_all(lambda: "" if first else look())
    obstacle = next((each for each in found if each), "")
    if obstacle and config.deterministic == "true":
        raise TrainingError(
            f"deterministic=true: {obstacle}; --set deterministic=auto starts all the same, and "
            "resuming is then not bit-exact"
        )
    if obstacle:
        torch.use_deterministic_algorithms(False)  # nothing is left to gain from it
    return obstacle


def _unrepeatable(config: RunConfig, device: torch.device, *, compiled: bool) -> str:
    """What of a training step does not give the same bits twice, or has no kernel that does.

    Two forward and backward passes of the same model with a single layer: its kernels are those of
    all layers.
    """
    with torch.device("meta"):
        bare = Transformer(dataclasses.replace(config.model, n_layers=1))
    _prepare(bare, config, compiled=compiled)
    bare.to_empty(device=device)
    bare.init_weights(config.seed)
    shape = (config.micro_batch_size or 1, config.model.seq_len)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.model.vocab_size, shape, generator=generator).to(device)
    key = torch.zeros(shape[0], 2, dtype=torch.int32, device=device)
    names, weights = zip(*bare.named_parameters(), strict=True)
    passes = []
    try:
        for _ in range(2):
            reseed_attention_dropout(config, 0, 0, 0)
            with autocast(config, device):
                loss = bare(tokens, tokens, key)
            passes.append([loss.detach(), *torch.autograd.grad(loss, weights)])
    except RuntimeError as failure:
        if "deterministic" not in str(failure):
            raise
        return str(failure).partition(". ")[0].partition("\n")[0]
    for name, one, other in zip(("the loss", *names), *passes, strict=True):
        if not torch.equal(one, other):
            what = name if name == "the loss" else f"the gradient of {name}"
            return f"{what} differs between two passes over the same tokens"
    return ""


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


def gradients_in_buckets(model: nn.Module) -> bool:
    """Whether gradients are views of DDP's buckets, to be zeroed there and never dropped.

    Dropped, they would be made anew beside the buckets by the passes that do not exchange them:
    17.9 GB at full size.
    """
    return isinstance(model, DistributedDataParallel)


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
    replicas, slices = world.world_size // config.shard_degree, config.shard_degree
    sizes = {"replicate": replicas, "shard": slices} if replicas > 1 else {"shard": slices}
    mesh = init_device_mesh(world.device.type, (*sizes.values(),), mesh_dim_names=(*sizes,))
    common: dict[str, Any] = {
        "mesh": mesh,  # neighbours share a replica
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
        model = DistributedDataParallel(
            bare,
            device_ids=[world.local_rank] if world.device.type == "cuda" else None,
            broadcast_buffers=False,  # tables and constants, the same everywhere
            gradient_as_bucket_view=True,
            bucket_cap_mb=max(1, round(block_mb)),
        )
    _fill_buckets(model, world.device)
    return model


def _fill_buckets(model: DistributedDataParallel, device: torch.device) -> None:
    """Have every gradient be a view of its bucket, zero, before the first step.

    After its first exchange DDP orders its buckets as gradients come, and moves them at the next
    forward pass: without this the first step's gradients would be made beside the buckets, and
    exchanged in one piece when the backward pass is over.
    """
    tokens = torch.zeros(1, 1, dtype=torch.int64, device=device)
    with torch.compiler.set_stance("force_eager"):
        for _ in range(2):
            (model(tokens, tokens) * 0).backward()


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
