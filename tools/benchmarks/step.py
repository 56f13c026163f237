"""One optimizer step, ours and the peers' at equal sizes: time, memory, and where it goes.

    python tools/benchmarks/step.py                        # on the CPU, T = 256 and 1,024
    python tools/benchmarks/step.py --device cuda --set model.n_layers=12 model.d_model=768
    python tools/benchmarks/step.py --context 64 --tokens 256 --turns 2 --set compile=false

Each side runs forward, backward, clipping and fused AdamW under bf16 autocast over fp32 weights, on
the same tokens. Ours has RoPE, ALiBi, LayerScale, and dropout of 0.1 on branches and embedding; the
peers have RoPE alone. The sides take turns in one process, a few steps each, all with the C
library's allocator as `summer-train` sets it; a ratio is taken turn by turn. Memory is that of
tensors, at the height of a step. The peers' rows need transformers and litgpt.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from measure import in_turns, machine, parse, ratios, spread
from model.config import flops_per_token
from step_sides import SIDES, Side, Work
from trainer.config.accelerators import find_accelerator
from trainer.config.config import configure
from trainer.distributed.devices import device_name, keep_freed_memory
from trainer.distributed.world import join_world

SHAPE = ("model.n_layers=6", "model.d_model=384", "model.d_ff=1344")
KERNELS = {  # the first part whose word is in a kernel's name, or a CPU operator's, takes it
    "attention": ("attention", "flash", "fmha", "sdp", "attn", "cudnn_generated"),
    "GEMM": ("gemm", "nvjet", "cutlass", "cublas", "cijk", "wgmma", "mm", "linear", "mkldnn"),
    "optimizer": ("adam", "multi_tensor", "foreach", "lpnorm"),
    "copies": ("memcpy", "memset", "copy"),
}
WITHIN = {
    "linear_cross_entropy": "loss",
    "Optimizer.step": "optimizer",
    "finish_gradients": "optimizer",
}
REST = "pointwise and norms"
Batches = list[tuple[Tensor, Tensor]]


def main() -> None:
    """Measure what was asked for, and print tables."""
    options = parse(
        __doc__,
        device="auto",
        context=[256, 1024],
        tokens={"default": 8192, "help": "a step"},
        turns=9,
        steps={"default": 2, "help": "a turn"},
        sides={"nargs": "+", "choices": SIDES, "default": list(SIDES)},
        set={"nargs": "+", "default": [], "metavar": "KEY=VALUE", "help": "as summer-train's"},
    )
    keep_freed_memory()
    print(machine("torch", "transformers", "litgpt"), end="\n\n")
    with join_world(options.device) as world:
        for context in options.context:
            sets = [*SHAPE, f"model.seq_len={context}", *options.set]
            config = configure(preset="tiny", sets=sets).config
            work = Work(config, world, max(1, options.tokens // context))
            model, how = config.model, "compiled" if config.compile else "eager"
            print(
                f"**{model.n_layers} layers, d = {model.d_model}, {model.n_heads} heads, V ="
                f" {model.vocab_size:,}, T = {context:,}, {work.rows} rows a step, bf16, {how},"
                f" {device_name(world.device.type)}**\n"
            )
            print("\n".join(compare(options, work)), end="\n\n")


def compare(options: argparse.Namespace, work: Work) -> Iterator[str]:
    """The table of all sides, line by line, and where our step's time goes."""
    batches = made_up(work)
    sides = dict(opened(options.sides, work))
    losses = {name: warmed(side, batches) for name, side in sides.items()}
    calls = {name: partial(timed, side, batches, options.steps) for name, side in sides.items()}
    took = in_turns(calls, options.turns)
    peaks = {name: peak_mb(side, batches[0], work.device) for name, side in sides.items()}
    tokens = batches[0][0].numel()
    yield "| side | tokens/s | ours / side | causal FLOPs | peak memory | first loss |"
    yield "|---|---|---|---|---|---|"
    for name in sides:
        rates = [tokens / s for s in took[name]]
        other = name != "ours" and "ours" in sides
        ratio = ratios(took[name], took["ours"]) if other else ""
        share = f" ({peaks['ours'] / peaks[name]:.2f}x)" if other else ""
        yield (
            f"| {name} | {spread(rates, '')} | {ratio} | {utilisation(work, rates)} |"
            f" {peaks[name]:,.0f} MB{share} | {losses[name]:.3f} |"
        )
    if "ours" in sides:
        parts, _ = shares(sides["ours"], batches, 4, work.device)
        total = sum(parts.values())
        listed = ", ".join(f"{part} {ms / total:.0%}" for part, ms in parts.items())
        yield f"\nwhere our step of {total:,.0f} ms goes (profiled): {listed}"


def opened(names: list[str], work: Work) -> Iterator[tuple[str, Side]]:
    """The sides whose packages are installed."""
    for name in names:
        try:
            yield name, SIDES[name](work)
        except ImportError as lack:
            print(f"left out, {name}: {lack}\n")


def made_up(work: Work) -> Batches:
    """Four batches of random tokens, with targets that follow from them."""
    generator = torch.Generator().manual_seed(0)
    model = work.config.model
    shape = (4, work.rows, model.seq_len)
    tokens = torch.randint(model.vocab_size, shape, generator=generator).to(work.device)
    return [(batch, batch.roll(-1, dims=1)) for batch in tokens]


def warmed(side: Side, batches: Batches) -> float:
    """The first step's loss, after two rounds of all batches."""
    first = float(side.step(*batches[0]).detach())
    for batch in batches[1:] * 2:
        side.step(*batch)
    return first


def timed(side: Side, batches: Batches, steps: int) -> float:
    """Seconds a step. One step first, as another side has just had the caches."""
    side.step(*batches[-1])
    settle()
    start = time.perf_counter()
    for number in range(steps):
        side.step(*batches[number % len(batches)])
    settle()
    return (time.perf_counter() - start) / steps


def settle() -> None:
    """Wait until the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def utilisation(work: Work, rates: list[float]) -> str:
    """Model FLOPs utilisation where the device's peak is known, else TFLOP/s."""
    known = find_accelerator(device_name(work.device.type))
    model = work.config.model
    flops = statistics.median(rates) * flops_per_token(model, model.seq_len)
    if known is None:
        return f"{flops / 1e12:.3f} TFLOP/s"
    return f"{flops / known.bf16_tflops / 1e12:.1%} of {known.bf16_tflops:g} TFLOP/s"


def peak_mb(side: Side, batch: tuple[Tensor, Tensor], device: torch.device) -> float:
    """MB of tensors at a step's height, by the allocator's account: held, and what it adds."""
    held = [*side.model.parameters(), *side.model.buffers()]
    for state in side.optimizer.state.values():
        held += [value for value in state.values() if isinstance(value, Tensor)]
    kept = sum(tensor.numel() * tensor.element_size() for tensor in held)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        side.step(*batch)
        return (kept + torch.cuda.max_memory_allocated() - before) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        side.step(*batch)
    assert profiler.profiler is not None
    changes = sorted(
        (event.start_ns(), int(event.nbytes()))
        for event in profiler.profiler.kineto_results.events()
        if event.name() == "[memory]"
    )
    return (kept + max(itertools.accumulate(n_bytes for _, n_bytes in changes))) / 2**20


def shares(
    side: Side, batches: Batches, steps: int, device: torch.device
) -> tuple[dict[str, float], float]:
    """Milliseconds a step of each part, and kernels launched a step, by the profiler."""
    on_gpu = device.type == "cuda"
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=kinds) as profiler:
        for number in range(steps):
            side.step(*batches[number % len(batches)])
        settle()
    took: Counter[str] = Counter()
    operators = {event.id: event for event in profiler.events() or () if not event.is_async}
    if not on_gpu:
        for event in operators.values():
            took[part_of(event, event.name)] += event.self_cpu_time_total
        return {part: us / 1e3 / steps for part, us in took.most_common()}, 0.0
    assert profiler.profiler is not None
    kernels = [
        event
        for event in profiler.profiler.kineto_results.events()
        if event.device_type() == DeviceType.CUDA and not event.is_user_annotation()
    ]
    for kernel in kernels:  # each once, with the operator that launched it
        launcher = operators.get(kernel.linked_correlation_id())
        took[part_of(launcher, kernel.name())] += kernel.duration_ns() / 1e3
    parts = {part: us / 1e3 / steps for part, us in took.most_common()}
    return parts, len(kernels) / steps


def part_of(operator: Any, kernel: str) -> str:
    """The part of the step that a kernel belongs to, by its name and by who launched it."""
    while operator is not None:
        for word, part in WITHIN.items():
            if word in operator.name:
                return part
        operator = operator.cpu_parent
    name = kernel.lower()
    return next((part for part, words in KERNELS.items() if any(w in name for w in words)), REST)


if __name__ == "__main__":
    main()
