"""What ALiBi costs in attention, and what it gets wrong: folded, left out, a mask, FlexAttention.

    python tools/benchmarks/attention.py                            # `tiny`'s heads on the CPU
    python tools/benchmarks/attention.py --device cuda              # SummerLM-4B's, T = 1k .. 16k

Each side starts from q, k, v [B, T, H, head_dim] in bf16, applies RoPE and ends with causal
attention, compiled as a block is in training. The sides take turns, with fresh inputs each time;
a ratio is taken turn by turn. The error is that of the scores, in nats, against fp32 math over at
most 4,096 tokens (model/attention.py). On the CPU times are CPU time, on one thread.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

import model.attention
from attention_sides import (
    BASE,
    SIDES,
    Attention,
    AttentionBench,
    Heads,
    flexible_kernel,
    masked_kernel,
)
from measure import machine, spread
from model.attention import GROUP_ROWS
from model.config import ModelConfig, ModelError
from model.positions import FOLDED_DIMS
from trainer.config.config import configure
from trainer.distributed.devices import device_name, pick_device

WIDTHS, RATES = (96, 104, 128), (0.0, 1 / 16, 0.1)


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--preset", help="whose heads; summer-4b on a GPU, tiny on the CPU")
    parser.add_argument("--lengths", type=int, nargs="+")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=16_384, help="of a batch, on a GPU")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--eager", action="store_true")
    options = parser.parse_args()
    on_gpu = pick_device(options.device) == "cuda"
    preset = options.preset or ("summer-4b" if on_gpu else "tiny")
    print(machine("torch"), end="\n\n")
    if not on_gpu:
        torch.set_num_threads(1)
    bench = AttentionBench(
        config=configure(preset=preset).config.model,
        device=torch.device(pick_device(options.device)),
        lengths=options.lengths or [1024 * 2**n for n in range(5 if on_gpu else 3)],
        turns=options.turns,
        tokens=options.tokens if on_gpu else 1,
        compiled=not options.eager,
        dropout=options.dropout,
    )
    print("\n".join([*backends(bench), "", *compare(bench)]))


def backends(bench: AttentionBench) -> Iterator[str]:
    """Which kernel SDPA takes for which head and dropout rate, and what it takes, as a table."""
    name, heads, T = (
        device_name(bench.device.type),
        bench.config.n_heads,
        min(bench.lengths[-1], 4096),
    )
    yield f"**The kernel that SDPA takes: bf16, causal, {heads} heads, T = {T:,}, {name}**\n"
    yield "| head | dropout | kernel | forward and backward |\n|---|---|---|---|"
    for width, rate in product(WIDTHS, RATES):
        q, k, v = (part.transpose(1, 2) for part in random_heads(bench, T, width))
        options: dict[str, Any] = {"dropout_p": rate, "is_causal": True}
        kernel = partial(F.scaled_dot_product_attention, **options)
        with noted_if_it_fails() as reasons:
            took = [seconds(bench.device, partial(both_passes, kernel, (q, k, v)))
                    for _ in range(3)]  # fmt: skip
            reasons.append(f"{statistics.median(took) * 1e3:.3g} ms")
        chosen = SDPBackend(torch._fused_sdp_choice(q, k, v, **options)).name
        yield f"| {width} | {rate:g} | {chosen} | {reasons[-1]} |"


def compare(bench: AttentionBench) -> Iterator[str]:
    """The table of all sides at all lengths, line by line."""
    config, how = bench.config, "compiled" if bench.compiled else "eager"
    batch = f"{bench.tokens:,} tokens" if bench.tokens > 1 else "one row"
    yield (
        f"**{config.n_heads} heads of {config.head_dim}, batches of {batch}, bf16,"
        f" dropout {bench.dropout:g}, {how}, {device_name(bench.device.type)}**\n"
    )
    yield "| T | side | forward, ms | / base | with backward, ms | / base | error, nats |"
    yield "|---|---|---|---|---|---|---|"
    for length in bench.lengths:
        torch._dynamo.reset()  # every length is compiled for itself
        yield from rows_of(bench, replace(config, seq_len=length))


def rows_of(bench: AttentionBench, config: ModelConfig) -> Iterator[str]:
    """One line a side."""
    inputs = [random_heads(bench, config.seq_len, config.head_dim) for _ in range(4)]
    sides = {name: made(make, bench, config) for name, make in SIDES.items()}
    forward = in_turns(bench, {n: partial(one_pass, side) for n, side in sides.items()}, inputs)
    both = in_turns(bench, {n: partial(both_passes, side) for n, side in sides.items()}, inputs)
    for name in SIDES:
        cells = [f"{config.seq_len:,}", name]
        for took in (forward, both):
            cells += with_ratio(took[name], took[BASE])
        cells.append(error_of(name, bench, config))
        yield f"| {' | '.join(cells)} |"


def made(make: Callable[[AttentionBench, ModelConfig], Attention], *args: Any) -> Attention:
    """The side; one that cannot be had (no memory for a mask) says so when it is called."""
    try:
        return make(*args)
    except (RuntimeError, NotImplementedError) as failure:
        reason = failure

    def failing(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise reason

    return failing


def in_turns(
    bench: AttentionBench, calls: dict[str, Callable[[Heads], object]], inputs: list[Heads]
) -> dict[str, list[float] | str]:
    """Seconds of each turn of each side, or why there are none."""
    took: dict[str, list[float]] = {}
    failed: dict[str, list[float] | str] = {}
    for name, call in calls.items():
        with noted_if_it_fails() as reasons:
            for heads in inputs[:2]:  # compiled, and warm
                seconds(bench.device, partial(call, heads))
            took[name] = []
        if reasons:
            failed[name] = reasons[-1]
    for turn in range(bench.turns):
        heads = inputs[turn % len(inputs)]
        for name in took if turn % 2 else reversed(list(took)):
            took[name].append(seconds(bench.device, partial(calls[name], heads)))
    return {**took, **failed}


def with_ratio(took: list[float] | str, base: list[float] | str) -> list[str]:
    """Milliseconds, and the ratio to the base; or the reason why there is none."""
    if isinstance(took, str):
        return [took, ""]
    ratios = [] if isinstance(base, str) else [a / b for a, b in zip(took, base, strict=True)]
    milliseconds = f"{statistics.median(took) * 1e3:.3g}"
    return [milliseconds, spread(ratios, "x") if ratios and took is not base else ""]


@contextlib.contextmanager
def noted_if_it_fails() -> Iterator[list[str]]:
    """A list to which the reason is added if the block cannot be run here."""
    reasons: list[str] = []
    try:
        yield reasons
    except (RuntimeError, NotImplementedError) as failure:  # also of the compiler, and of memory
        text = " ".join(str(failure).split()) or type(failure).__name__
        reasons.append(f"no: {text.split('. ')[0][:80]}".replace("|", "/"))


def seconds(device: torch.device, call: Callable[[], object]) -> float:
    """What a call takes: between two events of the device, or in CPU time."""
    if device.type != "cuda":
        start = time.process_time()
        call()
        return time.process_time() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def random_heads(bench: AttentionBench, length: int, width: int) -> Heads:
    """New q, k and v in bf16, with gradients."""
    config = bench.config
    rows = max(1, bench.tokens // length)
    q, k, v = (
        torch.randn(rows, length, n, width, device=bench.device).bfloat16().requires_grad_()
        for n in (config.n_heads, config.kv_heads, config.kv_heads)
    )
    return q, k, v


def one_pass(side: Attention, heads: Heads) -> Tensor:
    """Forward, as in evaluation."""
    q, k, v = heads
    with torch.no_grad():
        return side(q.detach(), k.detach(), v.detach())  # FlexAttention looks, on the CPU


def both_passes(side: Attention, heads: Heads) -> tuple[Tensor, ...]:
    """Forward and backward."""
    out = side(*heads)
    return torch.autograd.grad(out, heads, torch.ones_like(out))


def error_of(name: str, bench: AttentionBench, config: ModelConfig) -> str:
    """Nats by which the side's scores are off, on this device."""
    length = max(GROUP_ROWS, min(config.seq_len, 4096) // GROUP_ROWS * GROUP_ROWS)
    config = replace(config, seq_len=length, alibi=name != BASE)
    kernels = {"bf16 mask": masked_kernel, "FlexAttention": flexible_kernel}
    folded_dims = torch.arange(FOLDED_DIMS, device=bench.device)
    with contextlib.ExitStack() as stack, noted_if_it_fails() as reasons:
        if name in kernels:
            kernel = kernels[name](config, bench.device)

            def attend(q: Tensor, k: Tensor, v: Tensor, *_: object) -> Tensor:
                return kernel(q.index_fill(-1, folded_dims, 0), k, v)  # no ALiBi but its own

            stack.enter_context(mock.patch.object(model.attention, "attend", attend))
        try:
            return f"{model.attention.self_test(bench.device, torch.bfloat16, config):.1e}"
        except ModelError as rejection:
            return str(rejection).split("off by ")[1].split(" nats")[0] + ", rejected"
    return reasons[-1]


if __name__ == "__main__":
    main()
