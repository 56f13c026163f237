"""Environment variables that matter to a run: what each does, and the document that says so."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final, NamedTuple

from tools.diagnosis.findings import Finding

_NCCL: Final = (
    "NCCL User Guide, Environment Variables "
    "(docs.nvidia.com/deeplearning/nccl/user-guide/docs/env.html)"
)
_RCCL: Final = (
    "RCCL environment variables "
    "(rocm.docs.amd.com/projects/rccl/en/docs-7.1.1/api-reference/env-variables.html)"
)
_HIP: Final = (
    "HIP environment variables "
    "(rocm.docs.amd.com/projects/HIP/en/latest/reference/env_variables.html)"
)
_ROCR: Final = (
    "ROCR-Runtime, Environment variables (rocm.docs.amd.com/projects/ROCR-Runtime/en/latest/"
    "api-reference/environment_variables.html)"
)
MI300X_GUIDE: Final = (
    "AMD Instinct MI300X workload optimization (rocm.docs.amd.com/en/latest/how-to/rocm-for-ai/"
    "inference-optimization/workload.html)"
)
_CUDA: Final = (
    "CUDA Programming Guide, CUDA Environment Variables "
    "(docs.nvidia.com/cuda/cuda-programming-guide/05-appendices/environment-variables.html)"
)
_TORCH_CUDA: Final = (
    "PyTorch, CUDA Environment Variables "
    "(docs.pytorch.org/docs/stable/cuda_environment_variables.html)"
)
_TUNING: Final = (
    "PyTorch, Performance Tuning Guide (pytorch.org/tutorials/recipes/recipes/tuning_guide.html)"
)


class Variable(NamedTuple):
    """One variable. `advised` is the value its source advises where the variable is not set."""

    name: str
    why: str
    source: str
    advised: str = ""


HARMFUL: Final = (
    Variable("CUDA_LAUNCH_BLOCKING", "the host waits for every kernel", _CUDA),
    Variable("HIP_LAUNCH_BLOCKING", "the host waits for every kernel", _HIP),
    Variable("AMD_SERIALIZE_KERNEL", "the host waits for every kernel", _HIP),
    Variable("AMD_SERIALIZE_COPY", "the host waits for every copy", _HIP),
    Variable("NCCL_P2P_DISABLE", "gradients travel through host memory, not device links", _NCCL),
    Variable("NCCL_SHM_DISABLE", "ranks of a machine speak over the network", _NCCL),
    Variable("NCCL_IB_DISABLE", "InfiniBand and RoCE stay unused, machines speak over IP", _NCCL),
    Variable("NCCL_ALGO", "overrides the automatic choice of the algorithm", _RCCL),
    Variable("NCCL_PROTO", "overrides the automatic choice of the protocol", _RCCL),
    Variable("PYTORCH_NO_CUDA_MEMORY_CACHING", "every tensor asks the driver", _TORCH_CUDA),
    Variable("TORCH_COMPILE_DISABLE", "nothing is compiled", "torch/_dynamo/config.py"),
    Variable("TORCHDYNAMO_DISABLE", "nothing is compiled", "torch/_dynamo/eval_frame.py"),
    Variable("SUMMER_FAULT", "injects a fault into the run", "trainer/faults/inject.py"),
)
"""Made for debugging: a run that is paid for does without them."""

ADVISED_ON_ROCM: Final = (
    Variable(
        "NCCL_MIN_NCHANNELS", "collectives have more channels on 8 x MI300X", MI300X_GUIDE, "112"
    ),
    Variable(
        "HSA_NO_SCRATCH_RECLAIM",
        "kernels that spill keep their scratch memory and do not allocate it at every launch",
        _ROCR,
        "1",
    ),
    Variable(
        "HIP_FORCE_DEV_KERNARG",
        "some kernels start 2 to 3 us earlier (newer ROCm does so)",
        _HIP,
        "1",
    ),
    Variable(
        "TORCH_NCCL_HIGH_PRIORITY",
        "gradients need not queue behind the kernels of the backward pass",
        "torch/csrc/distributed/c10d/ProcessGroupNCCL.hpp",
        "1",
    ),
)
ADVISED_ON_CUDA: Final = (
    Variable(
        "PYTORCH_ALLOC_CONF",
        "segments that grow leave less memory in pieces too small to use",
        "PyTorch, CUDA semantics, Memory management (docs.pytorch.org/docs/stable/notes/cuda.html)",
        "expandable_segments:True",
    ),
)
SHOWN: Final = (
    Variable("CUDA_VISIBLE_DEVICES", "which devices there are", _CUDA),
    Variable("HIP_VISIBLE_DEVICES", "which devices there are", _HIP),
    Variable("ROCR_VISIBLE_DEVICES", "which devices there are", _ROCR),
    Variable("CUDA_DEVICE_MAX_CONNECTIONS", "queues from the host to the device", _CUDA),
    Variable("GPU_MAX_HW_QUEUES", "queues a process has on a device, 4 by default", _HIP),
    Variable("PYTORCH_CUDA_ALLOC_CONF", "the older name of PYTORCH_ALLOC_CONF", _TORCH_CUDA),
    Variable("CUBLAS_WORKSPACE_CONFIG", "cuBLAS workspaces, and its determinism", _TORCH_CUDA),
    Variable("NCCL_SOCKET_IFNAME", "the interfaces that ranks speak over", _NCCL),
    Variable("NCCL_DEBUG", "how much NCCL prints", _NCCL),
    Variable("PYTORCH_TUNABLEOP_ENABLED", "products are chosen by trying them",
             "PyTorch, TunableOp (docs.pytorch.org/docs/stable/cuda.tunable.html)"),
    Variable("OMP_NUM_THREADS", "threads of CPU kernels", _TUNING),
    Variable("LD_PRELOAD", "may replace malloc", _TUNING),
    Variable("GLIBC_TUNABLES", "malloc's thresholds",
             "GNU C Library, Memory Allocation Tunables (sourceware.org/glibc/manual)"),
)  # fmt: skip
"""Only shown where they are set. No other variable is: some hold secrets."""


def look_at(environment: Mapping[str, str], kind: str) -> Iterable[Finding]:
    """What is set and harms, what is set and worth knowing, and what a maker advises to set.

    `kind` is cuda, rocm or the name of another device.
    """
    for variable in HARMFUL:
        value = environment.get(variable.name, "")
        if value not in ("", "0"):
            text = f"{variable.name}={value}: {variable.why}"
            yield Finding("warn", "environment", text, f"unset {variable.name}", variable.source)
    for variable in {"rocm": ADVISED_ON_ROCM, "cuda": ADVISED_ON_CUDA}.get(kind, ()):
        if variable.name not in environment:
            text = f"{variable.name} is not set; with it, {variable.why}"
            mend = f"export {variable.name}={variable.advised}"
            yield Finding("note", "environment", text, mend, variable.source)
        else:
            text = f"{variable.name}={environment[variable.name]}"
            yield Finding("note", "environment", text)
    advised = () if kind in ("cuda", "rocm") else (*ADVISED_ON_ROCM, *ADVISED_ON_CUDA)
    set_here = [v.name for v in (*SHOWN, *advised) if v.name in environment]
    listed = " ".join(f"{name}={environment[name]}" for name in set_here)
    yield Finding("note", "environment", listed or "no other variable that matters is set")
