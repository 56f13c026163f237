"""What must be right on a machine before a long run is started there, one function a question.

Nothing is assumed: the kernel is compared with fp32 math, products, memory and all-reduce are
timed, a file is written to the disk.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Final

import torch

from model.attention import self_test
from model.config import ModelError, count_params
from shards.errors import SummerError
from shards.reader import find_sources
from tools.diagnosis import environment_variables as variables
from tools.diagnosis import host, rates, speed
from tools.diagnosis.findings import Finding, Subject, Verdict
from tools.diagnosis.shards import shards
from trainer.config import memory
from trainer.config.config import configure
from trainer.distributed.devices import device_memory_bytes, pick_device

OLDEST_PYTHON: Final = (3, 11)
OLDEST_TORCH: Final = (2, 9)
LEAST_WRITE_RATE: Final = 100e6
PROBE_BYTES: Final = 256 << 20
CHECKPOINT_BYTES_PER_PARAMETER: Final = 12  # weights and two moments, fp32


def make_subject(
    *, preset: str, device: str, nproc: int | None, shards: Path | None, out: Path
) -> Subject:
    """What is to be examined; ConfigError for a preset that does not exist.

    With shards, the rows are as long and the vocabulary as large as theirs.
    """
    configured, kind = configure(preset=preset), pick_device(device)
    n_ranks = nproc or (torch.cuda.device_count() if kind == "cuda" else 1)
    config = configured.config
    if shards is not None:
        with contextlib.suppress(SummerError):  # that they do not fit, the questions will say
            facts = next(iter(find_sources(shards).values())).facts
            vocab_size = -(-facts.tokenizer.vocab_size // 128) * 128
            shape = replace(config.model, seq_len=facts.seq_len, vocab_size=vocab_size)
            config = replace(config, model=shape)
    return Subject(config=config, device=kind, folder=out, nproc=n_ranks, shards=shards)


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
        mend = "" if verdict == "note" else "a preset of this size wants accelerators"
        yield Finding(verdict, "devices", f"{subject.device}, {threads}, {size:.0f} GB", mend)
        return
    names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    size = device_memory_bytes("cuda") / 1e9
    alike = len(set(names)) == 1
    if len(names) < subject.nproc:
        text = f"{len(names)} for {subject.nproc} ranks"
        yield Finding("fail", "devices", text, f"--nproc {len(names)}")
    text = f"{len(names)} x {names[0]}, {size:.0f} GB" if alike else f"unlike: {', '.join(names)}"
    yield Finding("ok" if alike else "warn", "devices", text)


def memory_fits(subject: Subject) -> Iterator[Finding]:
    """Whether one row of the preset fits into a device."""
    parts = memory.memory_by_part(subject.config, 1, subject.device)
    limit = device_memory_bytes(subject.device, subject.nproc)
    fits = memory.fits(parts, limit)
    subject.measured["fits"] = float(fits)
    text = f"{subject.config.preset} needs {sum(parts.values()) / 1e9:.1f} GB for one row a device"
    spread = f"shard_degree={subject.nproc}" if subject.nproc > 1 else "shard_degree, on several"
    mend = "" if fits else f"a smaller preset, activation_checkpointing=full, or {spread}"
    text = f"{text}, of {limit / 1e9:.1f} GB"
    figures = {"needed_bytes": sum(parts.values()), "device_bytes": limit}
    yield Finding("ok" if fits else "fail", "memory", text, mend, figures=figures)


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
    text = f"{room} ({config.checkpoint.keep_last} kept, one in the making)"
    yield Finding(verdict, "disk", text, figures={"free_bytes": free, "needed_bytes": needed})
    if free < 2 * PROBE_BYTES:
        return
    rate = rates.write_rate(subject.folder, PROBE_BYTES)
    wait = f"a checkpoint takes {one / rate:,.2g} s to write"
    fast = rate >= LEAST_WRITE_RATE
    text, figures = f"{rate / 1e6:,.0f} MB/s, {wait}", {"bytes_per_s": rate}
    yield Finding("ok" if fast else "warn", "write rate", text, figures=figures)


def environment(subject: Subject) -> Iterator[Finding]:
    """Variables that change what torch, the driver or a run does."""
    kind = "rocm" if subject.device == "cuda" and torch.version.hip is not None else subject.device
    yield from variables.look_at(os.environ, kind)


QUESTIONS: Final[tuple[Callable[[Subject], Iterator[Finding]], ...]] = (
    versions, devices, host.other_work, memory_fits, bf16, attention, speed.products,
    speed.bandwidth, speed.all_reduce, compiler, host.numa_balancing, host.shared_memory,
    host.limits, host.host_memory, disk, environment, speed.expected, shards,
)  # fmt: skip
