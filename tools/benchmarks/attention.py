"""What ALiBi costs in attention, and what it gets wrong: folded, left out, a mask, FlexAttention.

    python tools/benchmarks/attention.py                            # `tiny`'s heads on the CPU
    python tools/benchmarks/attention.py --device cuda --lengths 1024 4096 16384   # SummerLM-4B's
    python tools/benchmarks/attention.py --lengths 128 --turns 2 --eager

Each side starts from q, k, v [B, T, H, head_dim] in bf16, applies RoPE and ends with causal
attention, compiled as a block is in training. The sides take turns, with fresh inputs each time;
a ratio is taken turn by turn. The fold's error is that of the scores, in nats, against fp32 math
over at most 4,096 tokens (model/attention.py). On the CPU times are CPU time, on one thread.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from measure import cpu_seconds, in_turns, machine, parse, ratios
from model.attention import attend, fold
from model.config import ModelConfig, ModelError
from model.positions import PositionTables, alibi_slopes
from model.self_test import self_test
from trainer.config.config import configure
from trainer.distributed.devices import device_name, pick_device

WIDTHS, RATES = (96, 104, 128), (0.0, 1 / 16, 0.1)
BASE = "without ALiBi"
Heads = tuple[Tensor, Tensor, Tensor]
"""q, k and v [B, T, H, head_dim]."""

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class AttentionBench:
    """What to compare: heads of a preset, lengths, and how often."""

    config: ModelConfig
    device: torch.device
    lengths: Sequence[int]
    turns: int
    compiled: bool

    @classmethod
    def on(cls, device: str, lengths: Sequence[int], turns: int, compiled: bool) -> AttentionBench:
        """SummerLM-4B's heads on a GPU, `tiny`'s on the CPU."""
        preset = "summer-4b" if device == "cuda" else "tiny"
        config = configure(preset=preset).config.model
        return cls(config, torch.device(device), lengths, turns, compiled)

    def heads(self, length: int, width: int) -> Heads:
        """New q, k and v in bf16, with gradients: 16,384 tokens on a GPU, else one row."""
        rows = max(1, 16_384 // length) if self.device.type == "cuda" else 1
        q, k, v = (
            torch.randn(rows, length, n, width, device=self.device).bfloat16().requires_grad_()
            for n in (self.config.n_heads, self.config.kv_heads, self.config.kv_heads)
        )
        return q, k, v


def main() -> None:
    """Print both tables."""
    options = parse(__doc__, device="auto", lengths=[1024, 2048, 4096], turns=7, eager=False)
    device = pick_device(options.device)
    print(machine("torch"), end="\n\n")
    if device != "cuda":
        torch.set_num_threads(1)
    bench = AttentionBench.on(device, options.lengths, options.turns, not options.eager)
    print("\n".join([*backends(bench), "", *compare(bench)]))


def backends(bench: AttentionBench) -> Iterator[str]:
    """Which kernel SDPA takes for which head and dropout rate, and what it takes, as a table."""
    n_heads, T = bench.config.n_heads, min(bench.lengths[-1], 4096)
    name = device_name(bench.device.type)
    yield f"**The kernel that SDPA takes: bf16, causal, {n_heads} heads, T = {T:,}, {name}**\n"
    yield "| head | dropout | kernel | forward and backward |\n|---|---|---|---|"
    for width, rate in product(WIDTHS, RATES):
        q, k, v = (part.transpose(1, 2) for part in bench.heads(T, width))
        options: dict[str, Any] = {"dropout_p": rate, "is_causal": True}
        kernel = partial(F.scaled_dot_product_attention, **options)
        call = partial(seconds, bench.device, partial(one_pass, kernel, (q, k, v), backward=True))
        reason = why_not(call)
        took = reason or f"{statistics.median(call() for _ in range(3)) * 1e3:.3g} ms"
        chosen = SDPBackend(torch._fused_sdp_choice(q, k, v, **options)).name
        yield f"| {width} | {rate:g} | {chosen} | {took} |"
    for dtype in (torch.bfloat16, torch.float32):
        try:
            found = str(self_test(bench.device, dtype, bench.config))
        except ModelError as rejection:
            found = str(rejection)
        yield f"\nThe kernel in {dtype}: {found}"


def compare(bench: AttentionBench) -> Iterator[str]:
    """The table of all sides at all lengths, line by line."""
    config, how = bench.config, "compiled" if bench.compiled else "eager"
    name = device_name(bench.device.type)
    yield f"**{config.n_heads} heads of {config.head_dim}, bf16, dropout 0, {how}, {name}**\n"
    yield "| T | side | forward, ms | / base | with backward, ms | / base |"
    yield "|---|---|---|---|---|---|"
    for length in bench.lengths:
        torch._dynamo.reset()  # every length is compiled for itself
        yield from rows_of(bench, replace(config, seq_len=length))


def rows_of(bench: AttentionBench, config: ModelConfig) -> Iterator[str]:
    """One line a side, with the reason where it cannot be run here."""
    made: dict[str, Attend] = {}
    cells = {name: [f"{config.seq_len:,}", name] for name in SIDES}
    for name, make in SIDES.items():
        if reason := why_not(lambda name=name, make=make: made.update({name: make(bench, config)})):  # type: ignore[misc]
            cells[name] += [reason, "", "", ""]
    for backward in (False, True):
        calls = {name: partial(timed, bench, config, side, backward) for name, side in made.items()}
        reasons = {name: why_not(call) for name, call in calls.items()}  # compiled, and warm
        took = in_turns({name: calls[name] for name in calls if not reasons[name]}, bench.turns)
        for name, reason in reasons.items():
            if reason:
                cells[name] += [reason, ""]
                continue
            ratio = ratios(took[name], took[BASE]) if name != BASE and BASE in took else ""
            cells[name] += [f"{statistics.median(took[name]) * 1e3:.3g}", ratio]
    return (f"| {' | '.join(line)} |" for line in cells.values())


def timed(bench: AttentionBench, config: ModelConfig, side: Attend, backward: bool) -> float:
    """Seconds of one call on new inputs, after a first one."""
    heads = bench.heads(config.seq_len, config.head_dim)
    one_pass(side, heads, backward=backward)
    return seconds(bench.device, partial(one_pass, side, heads, backward=backward))


def why_not(call: Callable[[], object]) -> str:
    """The reason why a call cannot be made here; empty if it can."""
    try:
        call()
    except (RuntimeError, NotImplementedError) as failure:  # also of the compiler, and of memory
        return reason_of(failure)
    return ""


def reason_of(failure: Exception) -> str:
    """Its first sentence, to stand in a table."""
    text = " ".join(str(failure).split()) or type(failure).__name__
    return f"no: {text.split('. ')[0][:80]}".replace("|", "/")


def seconds(device: torch.device, call: Callable[[], object]) -> float:
    """What a call takes: between two events of the device, or in CPU time."""
    if device.type != "cuda":
        return cpu_seconds(call)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def one_pass(side: Attend, heads: Heads, *, backward: bool) -> None:
    """Forward, as in evaluation, or forward and backward."""
    if not backward:
        heads = tuple(part.detach() for part in heads)  # type: ignore[assignment]
    with torch.set_grad_enabled(backward):
        out = side(*heads)
        if backward:
            torch.autograd.grad(out, heads, torch.ones_like(out))


def folded(bench: AttentionBench, config: ModelConfig) -> Attend:
    """Ours."""
    positions = PositionTables(config).to(bench.device)(0, config.seq_len)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(*fold(q, k, v, positions, config), config)[..., : config.head_dim]

    return torch.compile(attention, dynamic=False) if bench.compiled else attention


def without_alibi(bench: AttentionBench, config: ModelConfig) -> Attend:
    """The same call for a model with RoPE alone."""
    return folded(bench, replace(config, alibi=False))


def masked(bench: AttentionBench, config: ModelConfig) -> Attend:
    """ALiBi and the triangle as a bf16 mask [H, T, T], made beforehand."""
    mask, options = alibi_mask(config, bench.device), kernel_options(config)
    return rotated(
        bench, config, partial(F.scaled_dot_product_attention, attn_mask=mask, **options)
    )


def flexible(bench: AttentionBench, config: ModelConfig) -> Attend:
    """FlexAttention with ALiBi in score_mod and a causal block mask; without compiling, no."""
    if not bench.compiled:
        raise NotImplementedError("FlexAttention makes all scores unless it is compiled")
    scale, T = config.head_dim**-0.5, config.seq_len
    slopes = alibi_slopes(config.n_heads, config.head_dim).to(bench.device) * scale
    causal = create_block_mask(
        lambda b, h, i, j: i >= j, None, None, T, T, device=bench.device.type
    )

    def alibi(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        biased: Tensor = score + slopes[h] * (j - i)
        return biased

    kernel = partial(flex_attention, score_mod=alibi, block_mask=causal, **kernel_options(config))
    return rotated(bench, config, kernel)


def kernel_options(config: ModelConfig) -> dict[str, Any]:
    """What both kernels of torch are given."""
    return {"scale": config.head_dim**-0.5, "enable_gqa": config.kv_heads != config.n_heads}


def rotated(bench: AttentionBench, config: ModelConfig, kernel: Callable[..., Any]) -> Attend:
    """RoPE, heads put before positions, then the kernel."""
    config = replace(config, alibi=False)
    positions = PositionTables(config).to(bench.device)(0, config.seq_len)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = kernel(*fold(q, k, v, positions, config))
        return out

    return torch.compile(attention, dynamic=False) if bench.compiled else attention


def alibi_mask(config: ModelConfig, device: torch.device) -> Tensor:
    """[1, H, T, T] in bf16, made head by head: all at once in fp32 would take twice the memory."""
    slopes = (alibi_slopes(config.n_heads, config.head_dim) * config.head_dim**-0.5).tolist()
    position = torch.arange(config.seq_len, device=device)
    distance = (position - position[:, None]).float()
    distance = distance.masked_fill(distance > 0, -torch.inf)
    return torch.stack([(slope * distance).bfloat16() for slope in slopes])[None]


SIDES: dict[str, Callable[[AttentionBench, ModelConfig], Attend]] = {
    BASE: without_alibi,
    "folded": folded,
    "bf16 mask": masked,
    "FlexAttention": flexible,
}

if __name__ == "__main__":
    main()
