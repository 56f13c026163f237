"""Versions, devices, memory, the attention kernel, and settings that harm a run."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import torch
from torch.utils import collect_env

from model.self_test import self_test
from trainer.config import memory
from trainer.config.config import RunConfig
from trainer.distributed.devices import device_memory_bytes, kernel_kind, unused_gpu

OLDEST_TORCH: Final = (2, 9)
NUMA_BALANCING: Final = Path("/proc/sys/kernel/numa_balancing")
_MI300X_GUIDE: Final = (
    "AMD Instinct MI300X workload optimization (rocm.docs.amd.com/en/latest/how-to/rocm-for-ai/"
    "inference-optimization/workload.html)"
)
_NCCL: Final = "NCCL User Guide (docs.nvidia.com/deeplearning/nccl/user-guide/docs/env.html)"
_HIP: Final = "HIP (rocm.docs.amd.com/projects/HIP/en/latest/reference/env_variables.html)"
_CUDA: Final = "CUDA Programming Guide, Environment Variables (docs.nvidia.com/cuda)"
_TORCH: Final = "PyTorch (docs.pytorch.org/docs/stable/cuda_environment_variables.html)"
HARMFUL: Final = (  # made for debugging: the variable, its effect, the document that says so
    ("CUDA_LAUNCH_BLOCKING", "the host waits for every kernel", _CUDA),
    ("HIP_LAUNCH_BLOCKING", "the host waits for every kernel", _HIP),
    ("AMD_SERIALIZE_KERNEL", "the host waits for every kernel", _HIP),
    ("NCCL_P2P_DISABLE", "gradients go through host memory, not links", _NCCL),
    ("NCCL_SHM_DISABLE", "ranks of a machine exchange over the network", _NCCL),
    ("NCCL_IB_DISABLE", "machines exchange over IP, not InfiniBand", _NCCL),
    ("PYTORCH_NO_CUDA_MEMORY_CACHING", "every tensor asks the driver", _TORCH),
    ("TORCH_COMPILE_DISABLE", "nothing is compiled", "torch/_dynamo/config.py"),
    ("TORCHDYNAMO_DISABLE", "nothing is compiled", "torch/_dynamo/eval_frame.py"),
    ("SUMMER_FAULT", "injects a fault into the run", "trainer/faults/inject.py"),
)

Verdict = Literal["ok", "note", "warn", "fail"]


@dataclass(frozen=True)
class CheckResult:
    """One thing that was checked: ok, worth knowing, suspicious or preventing the run.

    `fix` is what to do about it, `source` who says so, `figures` the numbers in SI units.
    """

    verdict: Verdict
    topic: str
    detail: str
    fix: str = ""
    source: str = ""
    figures: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Context:
    """The run that is planned, with what differs from its preset; the device; where it would write.

    `measured` is filled by the checks that measure, for those that come after them.
    """

    config: RunConfig
    settings: tuple[str, ...] = ()
    device: str
    folder: Path
    nproc: int = 1
    shards: Path | None = None
    probe: bool = False  # train 200 steps and resume
    measured: dict[str, float] = field(default_factory=dict)


def versions(context: Context) -> Iterator[CheckResult]:
    """Torch; the toolkit that it was built with; the driver that is loaded."""
    release = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    recent = release >= OLDEST_TORCH
    wanted = "" if recent else f" is too old: install {OLDEST_TORCH[0]}.{OLDEST_TORCH[1]} or newer"
    yield CheckResult("ok" if recent else "fail", "torch", f"{torch.__version__}{wanted}")
    driver = "none: this torch is built for the CPU"
    if torch.version.hip is not None:
        version = Path("/sys/module/amdgpu/version")
        loaded = version.read_text().strip() if version.exists() else "not loaded"
        driver = f"ROCm {torch.version.hip}, amdgpu {loaded}"
    elif torch.version.cuda is not None:
        find: Any = collect_env.get_nvidia_driver_version
        driver = f"CUDA {torch.version.cuda}, driver {find(collect_env.run) or 'not loaded'}"
    yield CheckResult("note", "driver", f"{driver}; Python {platform.python_version()}")


def devices(context: Context) -> Iterator[CheckResult]:
    """What torch sees, and whether all of it is the same."""
    size = f"{device_memory_bytes(context.device) / 1e9:.0f} GB"
    if context.device != "cuda":
        threads = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
        yield CheckResult("note", "devices", f"{context.device}, {threads}, {size}")
        if idle := unused_gpu():
            yield CheckResult("fail", "devices", idle)
        return
    names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    if len(names) < context.nproc:
        text = f"{len(names)} for {context.nproc} ranks"
        yield CheckResult("fail", "devices", text, f"--nproc {len(names)}")
    alike = len(set(names)) == 1
    text = f"{len(names)} x {names[0]}, {size}" if alike else f"mixed: {', '.join(names)}"
    yield CheckResult("ok" if alike else "warn", "devices", text)


def memory_fits(context: Context) -> Iterator[CheckResult]:
    """Whether the preset, training on one sequence at a time, fits into a device."""
    parts = memory.memory_by_part(context.config, 1, kernel_kind(context.device))
    limit = device_memory_bytes(context.device, context.nproc)
    needed, fits = sum(parts.values()), memory.fits(parts, limit)
    text = f"{context.config.preset} needs {needed / 1e9:.1f} GB for one sequence a device"
    text = f"{text}, of {limit / 1e9:.1f} GB"
    fix = "" if fits else "a smaller preset, activation_checkpointing=full, or shard_degree"
    figures = {"needed_bytes": needed, "device_bytes": limit}
    yield CheckResult("ok" if fits else "fail", "memory", text, fix, figures=figures)


def attention(context: Context) -> Iterator[CheckResult]:
    """The error of attention in the run's precision; ModelError if it computes another model."""
    precision = context.config.precision
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    if precision == "bf16" and context.device == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        yield CheckResult("ok" if native else "fail", "bf16", "native" if native else "emulated")
    found = self_test(context.device, dtype, context.config.model)
    yield CheckResult("ok", "attention", f"{found}; {context.config.preset}'s heads in {precision}")


def numa_balancing(context: Context) -> Iterator[CheckResult]:
    """Whether the kernel moves pages about while the ranks work."""
    if NUMA_BALANCING.exists() and NUMA_BALANCING.read_text().strip() != "0":
        text = "automatic NUMA balancing is on: times vary, and collectives are slower"
        fix = "sudo sysctl kernel.numa_balancing=0"
        yield CheckResult("warn", "numa", text, fix, _MI300X_GUIDE)
    else:
        yield CheckResult("ok", "numa", "automatic NUMA balancing is off")


def environment(
    context: Context, variables: Mapping[str, str] = os.environ
) -> Iterator[CheckResult]:
    """Variables that are set and slow a run down, or break it."""
    found = [each for each in HARMFUL if variables.get(each[0], "") not in ("", "0")]
    for name, effect, source in found:
        text = f"{name}={variables[name]}: {effect}"
        yield CheckResult("warn", "environment", text, f"unset {name}", source)
    if not found:
        yield CheckResult("ok", "environment", "no variable that is known to harm a run is set")
