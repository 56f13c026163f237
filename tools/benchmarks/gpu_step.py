"""One configuration's training step, measured in a process of its own: gpu.py starts these.

    python tools/benchmarks/gpu_step.py '{"preset": "summer-1b", "rows": 8}'

The network is the one that `summer-train` builds; tokens are random, so no shards are needed. The
last line printed is JSON.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from model.config import count_params, flops_per_token
from trainer.config.config import configure
from trainer.data.mixture import key_of
from trainer.distributed.devices import device_name, find_accelerator
from trainer.distributed.world import join_world, make_deterministic
from trainer.optimizer.optimizer import finish_gradients, make_optimizer, update
from trainer.session.network import autocast, build_network, reseed_attention_dropout

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


def main() -> None:
    """Measure what the first argument says."""
    print(json.dumps(measured(**json.loads(sys.argv[1]))))


def measured(
    *,
    preset: str,
    rows: int,
    sets: Sequence[str] = (),
    steps: int = 8,
    accumulate: int = 1,
    profiled: int = 0,
) -> dict[str, Any]:
    """Seconds of each step, peak memory, the loss, and where the time goes if `profiled` is > 0."""
    config = configure(preset=preset, sets=sets).config
    with join_world(config.device) as world:
        if config.deterministic:
            make_deterministic(world.device)
        start = time.perf_counter()
        step = make_step(config, world, rows, accumulate)
        loss = float(step(0))
        cold_s = time.perf_counter() - start
        for number in (1, 2):
            step(number)
        took = timed(step, steps, world.device)
        tokens = rows * accumulate * config.model.seq_len
        rate = tokens / statistics.median(took)
        known = find_accelerator(device_name(world.device.type))
        peak = known.bf16_tflops * 1e12 if known else None
        causal, square = (
            flops_per_token(config.model, config.model.seq_len, causal=c) for c in (True, False)
        )
        return {
            "parameters": count_params(config.model),
            "tokens": tokens,
            "seconds": took,
            "tokens_per_s": rate,
            "causal_mfu": rate * causal / peak if peak else None,
            "square_mfu": rate * square / peak if peak else None,
            "peak_gb": peak_memory_gb(world.device),
            "first_loss": loss,
            "cold_s": cold_s,
            "parts": shares(step, profiled, world.device) if profiled else {},
        }


def make_step(config: Any, world: Any, rows: int, accumulate: int) -> Callable[[int], Any]:
    """A complete optimizer step, as trainer/train.py makes it: it returns the last loss."""
    network = build_network(config, world)
    print(*network.notes, sep="\n")
    optimizer = make_optimizer(network.bare, config.optim)
    model, device = config.model, world.device
    shape = (4, rows, model.seq_len)
    batches = torch.randint(model.vocab_size, shape, device=device)  # taken in turn
    tokens_a_step = rows * accumulate * model.seq_len
    n_targets = torch.tensor(float(tokens_a_step), device=device)
    not_rejected = torch.zeros((), device=device)
    place = torch.arange(2 * rows, dtype=torch.int32, device=device).view(rows, 2)

    def step(number: int) -> Any:
        for micro_step in range(accumulate):
            tokens = batches[(number + micro_step) % len(batches)]
            reseed_attention_dropout(config, number, micro_step, 0)
            key = place + key_of(config.seed, "benchmark", number, micro_step) % 2**30
            with autocast(config, device):
                loss = network.model(tokens, tokens.roll(-1, dims=1), key)
            (loss / tokens_a_step).backward()
        with record_function("finish_gradients"):
            finish_gradients(optimizer, tokens_a_step, n_targets, config.optim)
        update(optimizer, not_rejected)
        return loss.detach() * accumulate / tokens_a_step

    return step


def timed(step: Callable[[int], Any], steps: int, device: torch.device) -> list[float]:
    """Seconds of each step, taken by the device where it has a clock; nothing waits in between."""
    if device.type != "cuda":
        marks = [time.perf_counter()]
        for number in range(steps):
            step(3 + number)
            marks.append(time.perf_counter())
        return [after - before for before, after in pairwise(marks)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]  # type: ignore[no-untyped-call]
    torch.cuda.reset_peak_memory_stats()
    events[0].record()
    for number in range(steps):
        step(3 + number)
        events[number + 1].record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) / 1e3 for before, after in pairwise(events)]


def peak_memory_gb(device: torch.device) -> float | None:
    """The most that tensors took on the device since the clock was started."""
    return torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else None


def shares(step: Callable[[int], Any], steps: int, device: torch.device) -> dict[str, float]:
    """Milliseconds a step of each part, and in all, by the profiler."""
    on_gpu = device.type == "cuda"
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    start = time.perf_counter()
    with profile(activities=kinds) as profiler:
        for number in range(steps):
            step(20 + number)
        if on_gpu:
            torch.cuda.synchronize()
    took: Counter[str] = Counter()
    launches = 0
    for event in profiler.events() or ():
        if on_gpu:
            for kernel in event.kernels:  # those that this operator itself launched
                took[part_of(event, kernel.name)] += kernel.duration
                launches += 1
        else:
            took[part_of(event, event.name)] += event.self_cpu_time_total
    found = {part: us / 1e3 / steps for part, us in took.most_common()}
    wall_ms = (time.perf_counter() - start) * 1e3 / steps
    return {**found, "kernels launched": launches / steps, "wall, profiled": wall_ms}


def part_of(event: Any, kernel: str) -> str:
    """The part of the step that this kernel of an operator belongs to."""
    ancestor = event
    while ancestor is not None:
        for word, part in WITHIN.items():
            if word in ancestor.name:
                return part
        ancestor = ancestor.cpu_parent
    name = kernel.lower()
    return next((part for part, words in KERNELS.items() if any(w in name for w in words)), REST)


if __name__ == "__main__":
    main()
