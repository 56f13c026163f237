"""Everything that must be measured on a GPU, in parts of at most eight minutes each.

    tools/benchmarks/gpu.sh --out results              # all of it, on one NVIDIA or AMD GPU
    tools/benchmarks/gpu.sh --parts step breakdown     # some parts
    tools/benchmarks/gpu.sh --device cpu --small       # no figures: is the script sound?

A part is a process that writes OUT/<part>.md line by line, so what was measured stays when it is
cut off; one that fails says so there, and the next goes on. Nothing is downloaded, and no shards
are needed. The folder defaults to $OUT, then to build/gpu.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import multiprocessing
import os
import re
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import attention
from measure import cpu_name, machine, parse, spread
from step import made_up, settle, shares, timed, utilisation
from step_sides import Work, ours
from tools.diagnosis.trial import write_shards
from tools.rehearsal.processes import compare_checkpoints, train_with_faults
from trainer.config.config import configure
from trainer.config.memory import USABLE, memory_by_part
from trainer.config.resolve import make_plan
from trainer.distributed.devices import device_memory_bytes, device_name, kernel_kind
from trainer.distributed.world import join_world
from trainer.metrics.metrics import read_metrics
from trainer.train import train

SMALL = ["model.n_layers=2", "model.vocab_size=512", "model.seq_len=64", "compile=false"]
GOLDEN_STEPS = 20


@dataclass(frozen=True)
class GpuBench:
    """What every part is given."""

    device: str
    small: bool
    out: Path
    work: Path  # removed afterwards
    golden: Path

    @property
    def presets(self) -> tuple[str, str]:
        """The reference model, as deep as memory allows, and a smaller one whole."""
        return ("tiny", "tiny") if self.small else ("summer-4b", "summer-1b")

    def fitting(self, preset: str, sets: Sequence[str]) -> tuple[str, ...]:
        """`--set` texts that leave out blocks until a step of two rows fits, none where all do."""
        config = configure(preset=preset, sets=sets).config
        limit = USABLE * device_memory_bytes(self.device)
        for depth in range(config.model.n_layers, 0, -1):
            shorter = replace(config, model=replace(config.model, n_layers=depth))
            if sum(memory_by_part(shorter, 2, kernel_kind(self.device)).values()) < limit:
                break
        return () if depth == config.model.n_layers else (f"model.n_layers={depth}",)


def main() -> None:
    """Run the parts that were asked for, each in a process of its own."""
    options = parse(
        __doc__,
        device={"choices": ("cuda", "cpu"), "default": "cuda"},
        small={"default": False, "help": "tiny shapes: no figures"},
        parts={"nargs": "+", "choices": PARTS, "default": list(PARTS)},
        out=Path(os.environ.get("OUT", "build/gpu")),
        golden=Path(__file__).with_name("golden"),
        minutes={"default": 8.0, "help": "for each part"},
    )
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU here: --device cpu --small only checks the script")
    options.out.mkdir(parents=True, exist_ok=True)
    failed, context = [], multiprocessing.get_context("spawn")
    for part in options.parts:
        process = context.Process(target=run_part, args=(part, options))
        process.start()
        process.join()
        if process.exitcode:
            failed.append(part)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}; the reasons are in {options.out}")


def run_part(part: str, options: argparse.Namespace) -> None:
    """Write one part's file, and print it; exit code 1 if it failed."""
    start = time.monotonic()
    signal.signal(signal.SIGALRM, _time_is_up)
    signal.alarm(int(60 * options.minutes))
    with tempfile.TemporaryDirectory() as work, (options.out / f"{part}.md").open("w") as file:

        def write(line: str) -> None:
            print(line, flush=True)
            print(line, file=file, flush=True)

        write(f"## {part}\n\n{headline(options.device)}\n")
        bench = GpuBench(options.device, options.small, options.out, Path(work), options.golden)
        try:
            for line in PARTS[part](bench):
                write(line)
        except TimeoutError:
            write(f"\n**Cut off after {options.minutes:g} minutes.**")
        except Exception as failure:  # whatever it is: it belongs into the file
            write(f"\n**FAILED: {type(failure).__name__}: {str(failure)[:500]}**")
            sys.exit(1)
        write(f"\n{time.monotonic() - start:.0f} s\n")


def _time_is_up(*_: object) -> None:
    raise TimeoutError


def headline(device: str) -> str:
    """What it is measured on."""
    if device == "cpu":
        return f"**Not run on a GPU.** {machine('torch')}"
    runtime = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    return f"{device_name(device)}, {runtime}; {machine('torch', 'triton')}"


def measured(
    bench: GpuBench, preset: str, rows: int, *sets: str, accumulated: int = 2, profiled: int = 0
) -> dict[str, Any]:
    """A step of the preset's network on random tokens: seconds, memory, where the time goes."""
    torch._dynamo.reset()
    gc.collect()  # the model before this one
    torch.cuda.empty_cache()
    sets = (*(SMALL if bench.small else ()), f"device={bench.device}", *sets)
    sets = (*sets, *(shallower := bench.fitting(preset, ["activation_checkpointing=none"])))
    config = configure(preset=preset, sets=sets).config
    with join_world(config.device) as world:
        config = replace(config, micro_batch_size=rows)
        start, work = time.perf_counter(), Work(config, world, rows, accumulated)
        side, batches = ours(work), made_up(work)
        loss = float(side.step(*batches[0]).detach())
        cold_s = time.perf_counter() - start
        took = [timed(side, batches, 1 if bench.small else 4) for _ in range(3)]
        if on_gpu := world.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            side.step(*batches[0])
            settle()
        planned = memory_by_part(config, rows, kernel_kind(world.device.type))
        rates = [accumulated * rows * config.model.seq_len / s for s in took]
        found = shares(side, batches, profiled, world.device) if profiled else ({}, 0.0)
        return {
            "step_ms": statistics.median(took) * 1e3,
            "tokens/s": spread(rates, ""),
            "causal": utilisation(work, rates),
            "peak": f"{torch.cuda.max_memory_allocated() / 1e9:.1f}" if on_gpu else "",
            "planned": f"{sum(planned.values()) / 1e9:.1f}",
            "cold": f"{cold_s:.0f}",
            "loss": f"{loss:.3f}",
            "model": " ".join((preset, *shallower)).replace("model.", ""),
            "parts": found[0],
            "launched": found[1],
        }


STEP_HEADER = (
    "Two micro-batches an update.\n\n| model | rows | recomputed | attention dropout | strict |"
    " tokens/s | causal FLOPs | peak GB | planned | cold s | first loss |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|"
)


def step_line(
    bench: GpuBench, preset: str, rows: int, kind: str, dropout: float, strict: str = "auto"
) -> str:
    """A full step of a preset at T = 4,096, with AdamW, as a line of the table."""
    sets = [f"activation_checkpointing={kind}", f"model.attention_dropout={dropout}"]
    start = f"| {rows} | {kind} | {dropout:g} | {strict} |"
    try:
        found = measured(bench, preset, rows, *sets, f"deterministic={strict}")
    except RuntimeError as failure:
        return f"| {preset} {start} {attention.reason_of(failure)} | | | | | |"
    names = ("tokens/s", "causal", "peak", "planned", "cold", "loss")
    return f"| {found['model']} {start} {' | '.join(found[name] for name in names)} |"


def step(bench: GpuBench) -> Iterator[str]:
    """The models' steps with all on and without attention dropout, bit-exact (`auto`) and not."""
    yield STEP_HEADER
    for preset, strict, dropout in itertools.product(bench.presets, ("auto", "false"), (0.1, 0.0)):
        yield step_line(bench, preset, 2, "none", dropout, strict)


def sweep(bench: GpuBench, kind: str) -> Iterator[str]:
    """Rows a micro-batch, with one kind of recomputation, as far as memory goes."""
    yield STEP_HEADER
    for rows in (1, 2, 4, 8, 16):
        yield (line := step_line(bench, bench.presets[0], rows, kind, 0.1))
        if "emory" in line:  # and the next is larger
            break


def breakdown(bench: GpuBench) -> Iterator[str]:
    """Milliseconds of each part of a step, with the share of the kernels' time."""
    yield "| model | part | ms a step | share |\n|---|---|---|---|"
    for preset in bench.presets:
        try:
            found = measured(bench, preset, 2, profiled=3)
        except RuntimeError as failure:
            yield f"| {preset} | {attention.reason_of(failure)} | | |"
            continue
        preset, total = found["model"], sum(found["parts"].values())
        for part, ms in found["parts"].items():
            yield f"| {preset} | {part} | {ms:.2f} | {ms / total:.1%} |"
        if launched := found["launched"]:
            idle = f"{1 - total / found['step_ms']:.1%} of {found['step_ms']:.1f} ms without one"
            yield f"| {preset} | {launched:.0f} kernels | {total:.2f} | {idle} |"


def attention_bench(bench: GpuBench, *lengths: int) -> attention.AttentionBench:
    """attention.py's comparison, in its small form or on a GPU."""
    turns = 3 if bench.small else 15
    return attention.AttentionBench.on(
        bench.device, [128] if bench.small else lengths, turns, compiled=not bench.small
    )


def make_shards(bench: GpuBench) -> str:
    """A folder of one source of arithmetic sequences, which can be learnt."""
    seq_len, vocab_size = (32, 512) if bench.small else (1024, 32_768)
    first, stride = np.random.default_rng(0).integers(0, vocab_size, (2, 400, 1))
    tokens = 3 + (first + (1 + stride % 7) * np.arange(seq_len)) % (vocab_size - 3)
    write_shards(bench.work / "shards" / "fineweb", tokens, vocab_size)
    return str(bench.work / "shards")


def run_sets(bench: GpuBench) -> list[str]:
    """`--set` texts of a run that takes seconds."""
    model = "n_layers=2 d_model=32 n_heads=2 d_ff=64"
    rest = "compile=false global_batch_tokens=256 loader.num_workers=0"
    saved = "validation.interval=0 checkpoint.interval_steps=4 checkpoint.asynchronous=false"
    if not bench.small:
        model, rest = "n_layers=6 d_model=768 n_heads=8 d_ff=2688", "global_batch_tokens=32768"
    return [
        *(f"model.{text}" for text in model.split()),
        *rest.split(),
        f"model.attention_dropout={0.1 if bench.device == 'cuda' else 0.0}",
        f"device={bench.device}",
        f"max_steps={GOLDEN_STEPS}",
        "micro_batch_size=4",
        *saved.split(),
    ]


def resume(bench: GpuBench) -> Iterator[str]:
    """Whether a compiled run that is killed twice ends with the bits of an uninterrupted one.

    Each compiles for itself.
    """
    arguments = ["--shards", make_shards(bench), "--preset", "tiny"]
    for text in run_sets(bench):
        arguments += ["--set", text]
    runs = {bench.work / "uninterrupted": "", bench.work / "killed": "sigkill:0:6,sigkill:0:13"}
    starts = dict.fromkeys(runs, 1)
    for run, faults in runs.items():
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(bench.work / f"{run.name}-compiled")
        while train_with_faults(arguments, run, faults, limit_s=600):
            starts[run] += 1
            if starts[run] > 4:
                raise RuntimeError(run.with_suffix(".log").read_text()[-500:])
    one, other = runs
    same = compare_checkpoints(one, other, GOLDEN_STEPS).identical
    losses = [[line["loss"] for line in read_metrics(run)] for run in runs]
    yield "| a run killed twice, and one that was not | |\n|---|---|"
    yield f"| weights and moments | {'the same bits' if same else 'DIFFERENT'} |"
    yield f"| losses | {'the same bits' if losses[0] == losses[1] else 'DIFFERENT'} |"
    yield f"| starts | {' and '.join(map(str, starts.values()))} |"


def golden(bench: GpuBench) -> Iterator[str]:
    """The losses of a fixed run, compared with the device's file, or written to that file."""
    sets = run_sets(bench)
    configured = configure(preset="tiny", sets=sets, shards=make_shards(bench))
    train(make_plan(configured, 1), bench.work / "run")
    losses = [line["loss"] for line in read_metrics(bench.work / "run")]
    device = device_name("cuda") if bench.device == "cuda" else cpu_name()
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    name = f"{slug}{'-small' if bench.small else ''}.json"
    found = {"torch": torch.__version__, "sets": sets, "losses": losses}
    (bench.out / name).write_text(json.dumps(found, indent=1) + "\n")
    known = bench.golden / name
    if not known.exists():
        yield f"{name}: new, {losses[0]:.6f} to {losses[-1]:.6f}: copy it into {bench.golden}"
        return
    old = json.loads(known.read_text())
    if old["sets"] != sets:
        yield f"{name}: of another run ({known}): remove it to write a new one"
        return
    worst = max(abs(a - b) / a for a, b in zip(old["losses"], losses, strict=True))
    verdict = "the same bits" if worst == 0.0 else f"DIFFERENT by up to {worst:.1e} relative"
    yield (
        f"{name} (torch {old['torch']}; here {torch.__version__}): {verdict} in {len(losses)} steps"
    )


PARTS: dict[str, Callable[[GpuBench], Iterator[str]]] = {
    "step": step,
    "breakdown": breakdown,
    "kernels": lambda bench: attention.backends(attention_bench(bench, 4096)),
    "golden": golden,
    "resume": resume,
    "attention": lambda bench: attention.compare(
        attention_bench(bench, *(1024 * 2**n for n in range(5)))
    ),
    "sweep": partial(sweep, kind="none"),
    "sweep-selective": partial(sweep, kind="selective"),
    "sweep-full": partial(sweep, kind="full"),
}

if __name__ == "__main__":
    main()
