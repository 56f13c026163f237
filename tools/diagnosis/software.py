"""Versions, the attention kernel, and environment variables that harm a run."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from torch.utils import collect_env

from model.attention import self_test
from model.config import ModelError
from tools.diagnosis.results import CheckResult, Context

OLDEST_PYTHON: Final = (3, 11)
OLDEST_TORCH: Final = (2, 9)
_NCCL: Final = (
    "NCCL User Guide, Environment Variables "
    "(docs.nvidia.com/deeplearning/nccl/user-guide/docs/env.html)"
)
_HIP: Final = (
    "HIP environment variables "
    "(rocm.docs.amd.com/projects/HIP/en/latest/reference/env_variables.html)"
)
_CUDA: Final = (
    "CUDA Programming Guide, CUDA Environment Variables "
    "(docs.nvidia.com/cuda/cuda-programming-guide/05-appendices/environment-variables.html)"
)
_TORCH_CUDA: Final = (
    "PyTorch, CUDA Environment Variables "
    "(docs.pytorch.org/docs/stable/cuda_environment_variables.html)"
)


class HarmfulVariable(NamedTuple):
    """A variable made for debugging: what it does to a run, and the document that says so."""

    name: str
    effect: str
    source: str


HARMFUL: Final = (
    HarmfulVariable("CUDA_LAUNCH_BLOCKING", "the host waits for every kernel", _CUDA),
    HarmfulVariable("HIP_LAUNCH_BLOCKING", "the host waits for every kernel", _HIP),
    HarmfulVariable("AMD_SERIALIZE_KERNEL", "the host waits for every kernel", _HIP),
    HarmfulVariable("NCCL_P2P_DISABLE", "gradients go through host memory, not links", _NCCL),
    HarmfulVariable("NCCL_SHM_DISABLE", "ranks of a machine exchange over the network", _NCCL),
    HarmfulVariable("NCCL_IB_DISABLE", "machines exchange over IP, not InfiniBand", _NCCL),
    HarmfulVariable("PYTORCH_NO_CUDA_MEMORY_CACHING", "every tensor asks the driver", _TORCH_CUDA),
    HarmfulVariable("TORCH_COMPILE_DISABLE", "nothing is compiled", "torch/_dynamo/config.py"),
    HarmfulVariable("TORCHDYNAMO_DISABLE", "nothing is compiled", "torch/_dynamo/eval_frame.py"),
    HarmfulVariable("SUMMER_FAULT", "injects a fault into the run", "trainer/faults/inject.py"),
)


def versions(context: Context) -> Iterator[CheckResult]:
    """Python, torch and the driver."""
    recent = sys.version_info[:2] >= OLDEST_PYTHON
    yield CheckResult("ok" if recent else "fail", "python", platform.python_version())
    release = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    recent = release >= OLDEST_TORCH
    wanted = "" if recent else f" is too old: install {OLDEST_TORCH[0]}.{OLDEST_TORCH[1]} or newer"
    yield CheckResult("ok" if recent else "fail", "torch", f"{torch.__version__}{wanted}")
    yield CheckResult("note", "driver", _driver())


def _driver() -> str:
    """The version of the toolkit that torch was built with, and of the driver that is loaded."""
    if torch.version.hip is not None:
        version = Path("/sys/module/amdgpu/version")
        loaded = version.read_text().strip() if version.exists() else "not loaded"
        return f"ROCm {torch.version.hip}, amdgpu {loaded}"
    if torch.version.cuda is not None:
        find: Any = collect_env.get_nvidia_driver_version
        return f"CUDA {torch.version.cuda}, driver {find(collect_env.run) or 'not loaded'}"
    return "none: this torch is built for the CPU"


def attention(context: Context) -> Iterator[CheckResult]:
    """Whether the attention kernel computes the configured model, in the run's precision."""
    bf16 = context.config.precision == "bf16"
    if bf16 and context.device == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        yield CheckResult("ok" if native else "fail", "bf16", "native" if native else "emulated")
    dtype = torch.bfloat16 if bf16 else torch.float32
    try:
        error = self_test(context.device, dtype, context.config.model)
    except ModelError as failure:
        yield CheckResult("fail", "attention", str(failure))
        return
    shape = f"{context.config.preset}'s heads in {str(dtype).removeprefix('torch.')}"
    text = f"{error:.1e} nats from fp32 math (limit 1e-3), {shape}"
    yield CheckResult("ok", "attention", text)


def environment(
    context: Context, variables: Mapping[str, str] = os.environ
) -> Iterator[CheckResult]:
    """Variables that are set and slow a run down, or break it."""
    found = [v for v in HARMFUL if variables.get(v.name, "") not in ("", "0")]
    for name, effect, source in found:
        text = f"{name}={variables[name]}: {effect}"
        yield CheckResult("warn", "environment", text, f"unset {name}", source)
    if not found:
        text = "no variable that is known to harm a run is set"
        yield CheckResult("ok", "environment", text)
