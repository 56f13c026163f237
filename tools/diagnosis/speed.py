"""What was measured, next to makers' figures: products, memory, all-reduce."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch.utils.benchmark import Timer

from model.config import count_params
from tools.diagnosis.collective import time_all_reduce
from tools.diagnosis.machine import CheckResult, Context
from trainer.config.accelerators import find_accelerator
from trainer.distributed.devices import device_name


class Stated(NamedTuple):
    """A figure of a device's maker, and the least share of it that is not suspicious."""

    rate: float
    what: str
    least: float
    source: str


def products(context: Context) -> Iterator[CheckResult]:
    """The rate of matrix products, next to what the maker states and what it measures."""
    precision = context.config.precision
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    known = find_accelerator(device_name(context.device)) if precision == "bf16" else None
    stated = []
    if known is not None:  # AMD measures 0.54 of an MI300X's peak: far below that it throttles
        text = f"{known.name}'s peak {known.bf16_tflops:g}"
        stated.append(Stated(known.bf16_tflops * 1e12, text, 0.4, known.source))
        if known.gemm_tflops is not None:
            text = f"the {known.gemm_tflops:g} that its maker measures"
            stated.append(Stated(known.gemm_tflops * 1e12, text, 0.8, known.gemm_source))
    rates = _on_each(context, lambda: product_rate(context.device, dtype))
    yield _compared("products", rates, f"TFLOP/s in {precision}", stated, "flops_per_s")


def bandwidth(context: Context) -> Iterator[CheckResult]:
    """The rate of copies within the device's memory, next to what the maker states."""
    stated = []
    if (known := find_accelerator(device_name(context.device))) is not None:
        text = f"{known.name}'s {known.memory_tb_s:g} TB/s"
        stated = [Stated(known.memory_tb_s * 1e12, text, 0.6, known.source)]
    rates = _on_each(context, lambda: memory_rate(context.device))
    text = "TB/s copied (read and written bytes both counted)"
    yield _compared("bandwidth", rates, text, stated, "bytes_per_s")


def _compared(
    topic: str, rates: list[float], unit: str, stated: list[Stated], key: str
) -> CheckResult:
    """The slowest device's rate against its maker's figures, of which the last decides."""
    rate = min(rates)
    figures = {key: rate, f"{key}_of_the_best": max(rates)}
    text = f"{rate / 1e12:.3g} {unit}"
    if len(rates) > 1:
        text += f" on device {rates.index(rate)}, the slowest (best: {max(rates) / 1e12:,.3g})"
    if not stated:
        text += "; no peak is known, so no MFU is shown"
        return CheckResult("note", topic, text, figures=figures)
    text = ", ".join([text, *(f"{rate / each.rate:.0%} of {each.what}" for each in stated)])
    good = rate >= stated[-1].least * stated[-1].rate
    fix = "" if good else "look for throttling, a power cap or other users of the device"
    sources = "; ".join(each.source for each in stated)
    return CheckResult("ok" if good else "warn", topic, text, fix, sources, figures)


def _on_each(context: Context, measure: Callable[[], float]) -> list[float]:
    """What is measured on every device of the run, one after another: one of eight may be slow."""
    if context.device != "cuda":
        return [measure()]
    found = []
    for number in range(min(context.nproc, torch.cuda.device_count())):
        with torch.cuda.device(number):
            found.append(measure())
    return found


def product_rate(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of square products."""
    n = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n**3 / _median_s(lambda: torch.mm(a, b), device)


def memory_rate(device: str) -> float:
    """Bytes a second of a copy within the device's memory, read and written bytes both counted."""
    n_bytes = (1 << 30) if device == "cuda" else (1 << 28)
    source = torch.ones(n_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * n_bytes / _median_s(lambda: target.copy_(source), device)


def _median_s(act: Callable[[], object], device: str) -> float:
    """Seconds of a call when warm, the median of half a second of calls."""
    wait = "; torch.accelerator.synchronize()" if device != "cpu" else ""
    names = {"act": act, "torch": torch}
    timer = Timer(f"act(){wait}", globals=names, num_threads=torch.get_num_threads())
    return float(timer.blocked_autorange(min_run_time=0.5).median)


def all_reduce(context: Context) -> Iterator[CheckResult]:
    """The rate at which ranks add up the gradients of one block, as nccl-tests defines it."""
    if context.nproc < 2:
        yield CheckResult("note", "all-reduce", "one process: there is nothing to exchange")
        return
    model, n = context.config.model, context.nproc
    one, two = (count_params(replace(model, n_layers=n_layers)) for n_layers in (1, 2))
    n_bytes = 4 * (two - one)
    seconds = time_all_reduce(context.device, n, n_bytes)
    algorithm = n_bytes / seconds
    bus = algorithm * 2 * (n - 1) / n
    figures = {"ranks": n, "bytes": n_bytes, "seconds": seconds}
    figures |= {"algorithm_bytes_per_s": algorithm, "bus_bytes_per_s": bus}
    text = (
        f"{n} ranks, {n_bytes / 1e6:,.1f} MB in {seconds * 1e3:,.1f} ms: "
        f"algorithm {algorithm / 1e9:,.3g} GB/s, bus {bus / 1e9:,.3g}"
    )
    source = "nccl-tests doc/PERFORMANCE.md: bus = algorithm x 2 (n - 1) / n"
    yield CheckResult("ok", "all-reduce", text, source=source, figures=figures)
