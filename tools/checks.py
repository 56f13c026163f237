"""What must be right on a machine before a long run is started there, one function a question.

Each returns findings that are ok, worth knowing (`note`), suspicious (`warn`) or in the way
(`fail`). Nothing is assumed: the kernel is compared with fp32 math, products are timed, a file is
written to the disk.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import torch

from model.attention import self_test
from model.config import ModelError, count_params
from shards.files import publish
from trainer import memory
from trainer.config import RunConfig
from trainer.devices import device_memory_bytes, device_name, find_accelerator

Verdict = Literal["ok", "note", "warn", "fail"]

OLDEST_PYTHON: Final = (3, 11)
OLDEST_TORCH: Final = (2, 9)
LEAST_SHARE_OF_PEAK: Final = 0.4
"""AMD measures 0.54 of an MI300X's peak in bf16 products; far below that something throttles."""
LEAST_WRITE_RATE: Final = 100e6
PROBE_BYTES: Final = 256 << 20
CHECKPOINT_BYTES_PER_PARAMETER: Final = 12  # weights and two moments, fp32

VARIABLES: Final = (
    "CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES",
    "HSA_OVERRIDE_GFX_VERSION", "HSA_FORCE_FINE_GRAIN_PCIE", "OMP_NUM_THREADS",
    "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF",
    "PYTORCH_TUNABLEOP_ENABLED", "TORCHINDUCTOR_CACHE_DIR", "TORCH_LOGS", "TORCHDYNAMO_DISABLE",
    "NCCL_DEBUG", "NCCL_SOCKET_IFNAME", "NCCL_IB_DISABLE", "NCCL_P2P_DISABLE", "GLOO_SOCKET_IFNAME",
    "CUDA_LAUNCH_BLOCKING", "AMD_SERIALIZE_KERNEL", "CUBLAS_WORKSPACE_CONFIG", "TMPDIR",
    "HF_HOME", "HF_HUB_OFFLINE",
)  # fmt: skip
HARMFUL: Final = {
    "CUDA_LAUNCH_BLOCKING": "waits for every kernel",
    "AMD_SERIALIZE_KERNEL": "waits for every kernel",
    "NCCL_P2P_DISABLE": "sends gradients between devices through host memory",
    "TORCHDYNAMO_DISABLE": "switches torch.compile off",
    "SUMMER_FAULT": "injects a fault into the run",
}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    verdict: Verdict
    topic: str
    detail: str


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is examined: the run that is planned, the kind of device, and where it would write."""

    config: RunConfig
    device: str
    folder: Path


def examine(subject: Subject) -> Iterator[Finding]:
    """All findings, as they come; a question that itself fails is a finding too."""
    for question in QUESTIONS:
        try:
            yield from question(subject)
        except Exception as error:  # a broken driver can raise anything, and that is the news
            topic = question.__name__.replace("_", " ")
            text = " ".join(str(error).split())
            yield Finding("fail", topic, f"{type(error).__name__}: {text}"[:300])


def versions(subject: Subject) -> Iterator[Finding]:
    """Python, torch and the driver."""
    fits = sys.version_info[:2] >= OLDEST_PYTHON
    yield Finding("ok" if fits else "fail", "python", platform.python_version())
    release = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    fits = release >= OLDEST_TORCH
    wanted = "" if fits else f" is too old: install {OLDEST_TORCH[0]}.{OLDEST_TORCH[1]} or newer"
    yield Finding("ok" if fits else "fail", "torch", f"{torch.__version__}{wanted}")
    yield Finding("note", "driver", _driver())


def _driver() -> str:
    if torch.version.hip is not None:
        return f"ROCm {torch.version.hip}, amdgpu {_first_line('/sys/module/amdgpu/version')}"
    if torch.version.cuda is not None:
        return f"CUDA {torch.version.cuda}, {_first_line('/proc/driver/nvidia/version')}"
    return "none: this torch is built for the CPU"


def _first_line(path: str) -> str:
    try:
        return Path(path).read_text().splitlines()[0]
    except (OSError, IndexError):
        return "driver not loaded"


def devices(subject: Subject) -> Iterator[Finding]:
    """What torch sees, and whether all of it is the same."""
    if subject.device != "cuda":
        verdict: Verdict = "warn" if subject.config.preset == "summer-4b" else "note"
        threads = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
        size = device_memory_bytes(subject.device) / 1e9
        yield Finding(verdict, "devices", f"{subject.device}, {threads}, {size:.0f} GB")
        return
    names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    size = device_memory_bytes("cuda") / 1e9
    alike = len(set(names)) == 1
    text = f"{len(names)} x {names[0]}, {size:.0f} GB" if alike else f"unlike: {', '.join(names)}"
    yield Finding("ok" if alike else "warn", "devices", text)


def memory_fits(subject: Subject) -> Iterator[Finding]:
    """Whether one row of the preset fits into a device."""
    parts = memory.memory_by_part(subject.config, 1, subject.device)
    limit = device_memory_bytes(subject.device)
    fits = memory.fits(parts, limit)
    text = f"{subject.config.preset} needs {sum(parts.values()) / 1e9:.1f} GB for one row a device"
    yield Finding("ok" if fits else "fail", "memory", f"{text}, of {limit / 1e9:.1f} GB")


def bf16(subject: Subject) -> Iterator[Finding]:
    """Whether the device multiplies bf16 by itself."""
    if subject.device == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        yield Finding("ok" if native else "fail", "bf16", "native" if native else "emulated")
        return
    if subject.device == "cpu":
        native = "bf16" in _first_line_with("/proc/cpuinfo", "flags")
        slower = "" if native else ": --set precision=fp32 may be faster"
        yield Finding("note", "bf16", f"{'native' if native else 'emulated'}{slower}")


def _first_line_with(path: str, start: str) -> str:
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith(start)), "")


def attention(subject: Subject) -> Iterator[Finding]:
    """Whether the attention kernel computes the model that is named."""
    dtype = torch.bfloat16 if subject.config.precision == "bf16" else torch.float32
    try:
        error = self_test(subject.device, dtype, subject.config.model)
    except ModelError as failure:
        yield Finding("fail", "attention", str(failure))
        return
    shape = f"{subject.config.preset}'s heads in {str(dtype).removeprefix('torch.')}"
    yield Finding("ok", "attention", f"{error:.1e} nats from fp32 math (limit 1e-3), {shape}")


def products(subject: Subject) -> Iterator[Finding]:
    """The rate of matrix products, beside the peak where that is known."""
    rate = _product_rate(subject.device)
    text = f"{rate / 1e12:.3g} TFLOP/s in bf16"
    known = find_accelerator(device_name(subject.device))
    if known is None:
        yield Finding("note", "products", f"{text}; no peak is known, so no MFU will be shown")
        return
    share = rate / (known.bf16_tflops * 1e12)
    text = f"{text}, {share:.0%} of {known.name}'s {known.bf16_tflops:g} (its maker's data sheet)"
    yield Finding("ok" if share >= LEAST_SHARE_OF_PEAK else "warn", "products", text)


def _product_rate(device: str) -> float:
    """FLOP/s of square bf16 products, after a warm-up, over half a second."""
    n = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device).to(torch.bfloat16) for _ in range(2))
    wait: Callable[[], None] = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    for _ in range(3):
        a @ b
    wait()
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < 0.5:
        a @ b
        count += 1
        if count % 8 == 0:
            wait()
    wait()
    return 2 * n**3 * count / (time.perf_counter() - start)


def compiler(subject: Subject) -> Iterator[Finding]:
    """Whether torch.compile has what it needs: a small function is compiled and run."""
    if not subject.config.compile:
        return
    x = torch.arange(8.0, device=subject.device)
    start = time.perf_counter()
    try:
        right = torch.equal(torch.compile(_double)(x), _double(x))
    except Exception as error:
        reason = " ".join(str(error).split())[:160]
        detail = f"torch.compile fails, training will be slower ({type(error).__name__}: {reason})"
        yield Finding("warn", "compiler", detail)
        return
    took = f"compiled a function in {time.perf_counter() - start:.1f} s"
    yield Finding("ok" if right else "fail", "compiler", took if right else "wrong result")


def _double(x: torch.Tensor) -> torch.Tensor:
    return x * 2 + 1


def disk(subject: Subject) -> Iterator[Finding]:
    """Room for the checkpoints that are kept, and the rate at which they are written."""
    config = subject.config
    one = CHECKPOINT_BYTES_PER_PARAMETER * count_params(config.model)
    needed = (config.checkpoint.keep_last + 1) * one
    free = shutil.disk_usage(subject.folder).free
    verdict: Verdict = "ok" if free >= needed else "fail" if free < one else "warn"
    room = f"{free / 1e9:,.1f} GB free; checkpoints of {config.preset} need {needed / 1e9:,.1f} GB"
    yield Finding(
        verdict, "disk", f"{room} ({config.checkpoint.keep_last} kept, one in the making)"
    )
    if free < 2 * PROBE_BYTES:
        return
    rate = _write_rate(subject.folder)
    wait = f"a checkpoint takes {one / rate:,.0f} s to write"
    fast = rate >= LEAST_WRITE_RATE
    yield Finding("ok" if fast else "warn", "write rate", f"{rate / 1e6:,.0f} MB/s, {wait}")


def _write_rate(folder: Path) -> float:
    """Bytes a second of a file that is really on the disk."""
    block = os.urandom(1 << 20)
    path = folder / f".doctor-{os.getpid()}"
    start = time.perf_counter()
    try:
        with publish(path) as file:
            for _ in range(PROBE_BYTES // len(block)):
                file.write(block)
        return PROBE_BYTES / (time.perf_counter() - start)
    finally:
        path.unlink(missing_ok=True)


def environment(subject: Subject) -> Iterator[Finding]:
    """Variables that change what torch, the driver or a run does."""
    for name, harm in HARMFUL.items():
        if os.environ.get(name, "0") not in ("", "0"):
            yield Finding("warn", "environment", f"{name}={os.environ[name]} {harm}")
    harmless = [name for name in VARIABLES if name in os.environ and name not in HARMFUL]
    listed = " ".join(f"{name}={os.environ[name]}" for name in harmless)
    yield Finding("note", "environment", listed or "none of the variables that matter is set")


QUESTIONS: Final[tuple[Callable[[Subject], Iterator[Finding]], ...]] = (
    versions, devices, memory_fits, bf16, attention, products, compiler, disk, environment,
)  # fmt: skip
