"""One optimizer step, ours and the peers' at equal sizes: time, memory, and where it goes.

    python tools/benchmarks/step.py                        # on the CPU, T = 256 and 1,024
    python tools/benchmarks/step.py --device cuda --layers 12 --width 768 --tokens 32768

Each side runs forward, backward, clipping and fused AdamW under bf16 autocast over fp32 weights, on
the same tokens. Ours has RoPE, ALiBi, LayerScale, and dropout of 0.1 on branches and embedding (and
what `--attention-dropout` says in the kernel); the peers have RoPE alone. The sides take turns in
one process, a few steps each, all with the C library's allocator as `summer-train` sets it; a ratio
is taken turn by turn. Memory is that of tensors, at the height of a step. The peers' rows need
transformers and litgpt.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import statistics
import time
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from gpu_step import shares
from measure import machine, spread
from model.config import ModelConfig, flops_per_token
from step_sides import SIDES, Side, Work
from trainer.distributed.devices import (
    device_name,
    find_accelerator,
    keep_freed_memory,
    pick_device,
)

NO_PARTS = ("kernels launched", "wall, profiled")


def main() -> None:
    """Measure what was asked for, and print tables."""
    options = arguments()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    print(machine("torch", "transformers", "litgpt"), end="\n\n")
    for context in options.context:
        work = work_of(options, context)
        print(f"{describe(work)}\n")
        print("\n".join(compare(options, work)), end="\n\n")
        print("\n".join(breakdown(work)), end="\n\n")


def arguments() -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=32_768)
    parser.add_argument("--context", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--tokens", type=int, default=8192, help="a step")
    parser.add_argument("--attention-dropout", type=float, default=0.0)
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--steps", type=int, default=2, help="a turn")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    return parser.parse_args()


def work_of(options: argparse.Namespace, context: int) -> Work:
    """The model and the rows of one comparison."""
    config = ModelConfig(
        vocab_size=options.vocab,
        seq_len=context,
        n_layers=options.layers,
        d_model=options.width,
        n_heads=options.heads,
        d_ff=options.width * 7 // 2,
        attention_dropout=options.attention_dropout,
    )
    rows = max(1, options.tokens // context)
    return Work(config, rows, pick_device(options.device), not options.eager)


def describe(work: Work) -> str:
    """The comparison in one line."""
    config = work.config
    how = "compiled" if work.compiled else "eager"
    return (
        f"**{config.n_layers} layers, d = {config.d_model}, {config.n_heads} heads, V ="
        f" {config.vocab_size:,}, T = {config.seq_len:,}, {work.rows} rows a step, bf16, {how},"
        f" {device_name(work.device)}**"
    )


def compare(options: argparse.Namespace, work: Work) -> Iterator[str]:
    """The table of all sides, line by line."""
    batches = made_up(work, 4)
    sides = dict(opened(options.sides, work))
    losses = {name: warmed(side, batches) for name, side in sides.items()}
    took: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(options.turns):
        order = list(sides) if turn % 2 else list(reversed(sides))
        for name in order:
            took[name].append(timed(sides[name], batches, options.steps))
    yield (
        "| side | tokens/s | ours / side | " + utilisation_header(work) + " | peak memory | loss |"
    )
    yield "|---|---|---|---|---|---|"
    peaks = {name: peak_mb(side, batches[0], work) for name, side in sides.items()}
    for name in sides:
        rates = [work.rows * work.config.seq_len / s for s in took[name]]
        ratios = [theirs / mine for theirs, mine in zip(took[name], took["ours"], strict=True)]
        ratio = "" if name == "ours" else spread(ratios, "x")
        share = "" if name == "ours" else f" ({peaks['ours'] / peaks[name]:.2f}x)"
        yield (
            f"| {name} | {spread(rates, '')} | {ratio} | {utilisation(work, rates)} |"
            f" {peaks[name]:,.0f} MB{share} | {losses[name]:.3f} |"
        )


def opened(names: list[str], work: Work) -> Iterator[tuple[str, Side]]:
    """The sides whose packages are installed."""
    for name in names:
        try:
            yield name, SIDES[name](work)
        except ImportError as lack:
            print(f"left out, {name}: {lack}\n")


def made_up(work: Work, n: int) -> list[tuple[Tensor, Tensor]]:
    """Batches of random tokens, with targets that follow from them."""
    generator = torch.Generator().manual_seed(0)
    shape = (work.rows, work.config.seq_len)
    tokens = [
        torch.randint(work.config.vocab_size, shape, generator=generator).to(work.device)
        for _ in range(n)
    ]
    return [(batch, batch.roll(-1, dims=1)) for batch in tokens]


def warmed(side: Side, batches: list[tuple[Tensor, Tensor]]) -> float:
    """The first step's loss, after two rounds of all batches."""
    first = float(side.step(*batches[0]).detach())
    for batch in batches[1:] * 2:
        side.step(*batch)
    return first


def timed(side: Side, batches: list[tuple[Tensor, Tensor]], steps: int) -> float:
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


def utilisation_header(work: Work) -> str:
    """The name of the column of utilisation, with its convention."""
    known = find_accelerator(device_name(work.device))
    return f"causal MFU of {known.bf16_tflops:g} TFLOP/s" if known else "causal TFLOP/s"


def utilisation(work: Work, rates: list[float]) -> str:
    """Model FLOPs utilisation where the device's peak is known, else the FLOPs alone."""
    known = find_accelerator(device_name(work.device))
    flops = statistics.median(rates) * flops_per_token(work.config, work.config.seq_len)
    return f"{flops / known.bf16_tflops / 1e12:.1%}" if known else f"{flops / 1e12:.3f}"


def peak_mb(side: Side, batch: tuple[Tensor, Tensor], work: Work) -> float:
    """MB of tensors at a step's height: weights and moments, and what the step adds to them."""
    held = [*side.model.parameters(), *side.model.buffers()]
    for state in side.optimizer.state.values():
        held += [value for value in state.values() if isinstance(value, Tensor)]
    kept = sum(tensor.numel() * tensor.element_size() for tensor in held)
    return (kept + added_by_a_step(side, batch, work)) / 2**20


def added_by_a_step(side: Side, batch: tuple[Tensor, Tensor], work: Work) -> int:
    """Bytes of tensors that a step holds at once at most, by the allocator's own account."""
    if work.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        side.step(*batch)
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        side.step(*batch)
    assert profiler.profiler is not None
    changes = [
        (event.start_ns(), int(event.nbytes()))
        for event in profiler.profiler.kineto_results.events()
        if event.name() == "[memory]"
    ]
    return max(itertools.accumulate(n_bytes for _, n_bytes in sorted(changes)))


def breakdown(work: Work) -> Iterator[str]:
    """Where our step's time goes, by the profiler."""
    side, batches = SIDES["ours"](work), made_up(work, 4)
    warmed(side, batches)
    found = shares(lambda n: side.step(*batches[n % 4]), 4, torch.device(work.device))
    parts = {part: ms for part, ms in found.items() if part not in NO_PARTS}
    total = sum(parts.values())
    listed = ", ".join(f"{part} {ms / total:.0%}" for part, ms in parts.items())
    yield f"where our step of {total:,.0f} ms goes (profiled): {listed}"


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
