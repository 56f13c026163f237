"""Everything that must be measured on a GPU, in parts of at most eight minutes each.

    tools/benchmarks/gpu.sh --out results              # all of it, on one NVIDIA or AMD GPU
    tools/benchmarks/gpu.sh --parts step breakdown     # some parts
    tools/benchmarks/gpu.sh --device cpu --small       # no figures: is the script sound?

A part writes OUT/<part>.md line by line, so what was measured stays when it is cut off; one that
fails says so there, and the next goes on. Nothing is downloaded, and no shards are needed. The
folder defaults to $OUT, then to build/gpu.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

import attention
import gpu_runs
from attention_sides import AttentionBench
from measure import machine, spread
from model.attention import self_test
from model.config import ModelError
from trainer.config.config import configure
from trainer.distributed.devices import device_name, find_accelerator

STEP = Path(__file__).with_name("gpu_step.py")
FULL_PRESETS = ("summer-4b", "summer-1b")
SMALL = ["model.n_layers=2", "model.vocab_size=512", "model.seq_len=64", "compile=false"]


@dataclass(frozen=True)
class GpuBench:
    """What every part is given."""

    device: str
    small: bool
    out: Path
    work: Path  # removed afterwards
    golden: Path
    ends_at: float  # of the part, by time.monotonic()

    @property
    def presets(self) -> tuple[str, str]:
        """The reference model, and one that fits 80 GB."""
        return ("tiny", "tiny") if self.small else FULL_PRESETS

    @property
    def left_s(self) -> float:
        """Seconds that the part has left; at least one."""
        return max(1.0, self.ends_at - time.monotonic())

    def measured(self, preset: str, rows: int, *sets: str, **options: Any) -> dict[str, Any]:
        """gpu_step.py's findings; or, under "failed", why there are none."""
        if self.small:
            sets, options = (*SMALL, *sets), {**options, "steps": 2}
        sets = (f"device={self.device}", *sets)
        order = json.dumps({"preset": preset, "rows": rows, "sets": sets, **options})
        try:
            done = subprocess.run(
                [sys.executable, str(STEP), order],
                capture_output=True,
                text=True,
                timeout=self.left_s,
            )
        except subprocess.TimeoutExpired:
            return {"failed": "the part's time was up"}
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
            return {"failed": last[0][:120].replace("|", "/")}
        findings: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return findings


def main() -> None:
    """Run the parts that were asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny shapes: no figures")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "build/gpu")))
    parser.add_argument("--golden", type=Path, default=gpu_runs.GOLDEN)
    parser.add_argument("--minutes", type=float, default=8.0, help="for each part")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU here: --device cpu --small only checks the script")
    options.out.mkdir(parents=True, exist_ok=True)
    failed = [part for part in options.parts if not run_part(part, options)]
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}; the reasons are in {options.out}")


def run_part(part: str, options: argparse.Namespace) -> bool:
    """Write one part's file, and print it. Whether it went well."""
    path, start = options.out / f"{part}.md", time.monotonic()
    ends_at = start + 60 * options.minutes
    with tempfile.TemporaryDirectory() as work, path.open("w") as file:

        def write(line: str) -> None:
            print(line, flush=True)
            print(line, file=file, flush=True)

        write(f"## {part}\n\n{headline(options.device)}\n")
        bench = GpuBench(
            options.device, options.small, options.out, Path(work), options.golden, ends_at
        )
        try:
            for line in PARTS[part](bench):
                write(line)
                if time.monotonic() > ends_at:
                    write(f"\n**Cut off after {options.minutes:g} minutes.**")
                    break
        except Exception as failure:  # whatever it is: the other parts must still be measured
            write(f"\n**FAILED: {type(failure).__name__}: {str(failure)[:500]}**")
            return False
        write(f"\n{time.monotonic() - start:.0f} s\n")
    return True


def headline(device: str) -> str:
    """What it is measured on."""
    if device == "cpu":
        return f"**Not run on a GPU.** {machine('torch')}"
    known = find_accelerator(device_name(device))
    peak = f"peak {known.bf16_tflops:g} TFLOP/s in bf16" if known else "peak unknown: no MFU"
    runtime = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    return f"{device_name(device)}, {peak}, {runtime}; {machine('torch', 'triton')}"


STEP_HEADER = (
    "| model | rows | recomputed | attention dropout | tokens/s | causal MFU | full-square MFU |"
    " peak GB | cold s | first loss |\n|---|---|---|---|---|---|---|---|---|---|"
)


def step_line(
    bench: GpuBench, preset: str, rows: int, kind: str, dropout: float, *sets: str
) -> str:
    """A full step of a preset at T = 4,096, with AdamW, as a line of the table."""
    found = bench.measured(
        preset,
        rows,
        f"activation_checkpointing={kind}",
        f"model.attention_dropout={dropout}",
        *sets,
    )
    start = f"| {' '.join((preset, *sets))} | {rows} | {kind} | {dropout:g} |"
    if "failed" in found:
        return f"{start} {found['failed']} | | | | | |"
    rates = spread([found["tokens"] / s for s in found["seconds"]], "")
    cells = [f"{found[k]:.1%}" if found[k] else "" for k in ("causal_mfu", "square_mfu")]
    cells += [f"{found['peak_gb']:.1f}" if found["peak_gb"] else ""]
    cells += [f"{found['cold_s']:.0f}", f"{found['first_loss']:.3f}"]
    return f"{start} {rates} | {' | '.join(cells)} |"


def step(bench: GpuBench) -> Iterator[str]:
    """The reference model's step with all that it has on, and without attention dropout."""
    yield STEP_HEADER
    for preset in bench.presets:
        for dropout in (0.1, 0.0):
            yield step_line(bench, preset, 2, "none", dropout)


def sweep(bench: GpuBench, kind: str) -> Iterator[str]:
    """Rows a micro-batch, with one kind of recomputation, as far as memory goes."""
    yield STEP_HEADER
    for rows in (1, 2, 4, 8, 16):
        line = step_line(bench, bench.presets[0], rows, kind, 0.1)
        yield line
        if "emory" in line:  # and the next is larger
            break


def breakdown(bench: GpuBench) -> Iterator[str]:
    """Milliseconds of each part of a step, with the share of the kernels' time."""
    yield "| model | part | ms a step | share |\n|---|---|---|---|"
    for preset in bench.presets:
        found = bench.measured(preset, 2, profiled=3)
        parts = found.get("parts", {})
        launched, _ = (parts.pop(name, 0) for name in ("kernels launched", "wall, profiled"))
        total = sum(parts.values())
        if "failed" in found:
            yield f"| {preset} | {found['failed']} | | |"
        for part, ms in parts.items():
            yield f"| {preset} | {part} | {ms:.2f} | {ms / total:.1%} |"
        if launched:
            took = statistics.median(found["seconds"]) * 1e3
            idle = f"{1 - total / took:.1%} of {took:.1f} ms without a kernel"
            yield f"| {preset} | {launched:.0f} kernels | {total:.2f} | {idle} |"


def kernels(bench: GpuBench) -> Iterator[str]:
    """The kernels that SDPA takes, and the fold's error on them."""
    yield from attention.backends(attention_bench(bench, 4096))
    yield "\n| heads | dtype | the fold's error, nats (limit 1e-3) |\n|---|---|---|"
    for preset in dict.fromkeys(("tiny", *bench.presets)):
        config = configure(preset=preset).config.model
        for dtype in (torch.bfloat16, torch.float32):
            try:
                error = f"{self_test(bench.device, dtype, config):.1e}"
            except ModelError as rejection:
                error = str(rejection)
            yield f"| {config.n_heads} x {config.head_dim} | {dtype} | {error} |"


def attention_sides(bench: GpuBench) -> Iterator[str]:
    """ALiBi folded, left out, as a mask and in FlexAttention."""
    yield from attention.compare(attention_bench(bench, *(1024 * 2**n for n in range(5))))


def attention_bench(bench: GpuBench, *lengths: int) -> AttentionBench:
    """attention.py's comparison for the reference model's heads."""
    return AttentionBench(
        config=configure(preset=bench.presets[0]).config.model,
        device=torch.device(bench.device),
        lengths=[128] if bench.small else lengths,
        turns=3 if bench.small else 15,
        tokens=1 if bench.small else 16_384,
        compiled=not bench.small,
        dropout=0.0,
    )


def shards(bench: GpuBench) -> None:
    """Rows for the parts that train."""
    seq_len, vocab_size = (32, 512) if bench.small else (1024, 32_768)
    gpu_runs.make_shards(bench.work / "shards", rows=400, seq_len=seq_len, vocab_size=vocab_size)


def resume(bench: GpuBench) -> Iterator[str]:
    """A compiled run that is killed, and one that is not."""
    shards(bench)
    yield from gpu_runs.killed_and_resumed(bench.work, bench.device, bench.small, bench.left_s)


def golden(bench: GpuBench) -> Iterator[str]:
    """The device's own losses."""
    shards(bench)
    yield from gpu_runs.golden(bench.work, bench.device, bench.small, bench.golden, bench.out)


PARTS: dict[str, Callable[[GpuBench], Iterator[str]]] = {
    "step": step,
    "breakdown": breakdown,
    "kernels": kernels,
    "golden": golden,
    "resume": resume,
    "attention": attention_sides,
    "sweep": partial(sweep, kind="none"),
    "sweep-selective": partial(sweep, kind="selective"),
    "sweep-full": partial(sweep, kind="full"),
}

if __name__ == "__main__":
    main()
