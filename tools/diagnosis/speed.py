"""What was measured, beside what makers state: products, memory, all-reduce, the run's own rate."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Final

import torch

from model.config import count_params, flops_per_token
from tools.diagnosis import rates
from tools.diagnosis.collective import measure_exchange
from tools.diagnosis.expected_rate import MFU_CONVENTION, expect
from tools.diagnosis.findings import Finding, Subject
from tools.errors import ToolError
from trainer.distributed.devices import device_name, find_accelerator

LEAST_SHARE_OF_PEAK: Final = 0.4
"""AMD measures 0.54 of an MI300X's peak in bf16 products; far below that something throttles."""
LEAST_SHARE_OF_MEASURED: Final = 0.8
LEAST_SHARE_OF_BANDWIDTH: Final = 0.6


def products(subject: Subject) -> Iterator[Finding]:
    """The rate of matrix products, beside what the maker states and what it measures."""
    dtype = torch.bfloat16 if subject.config.precision == "bf16" else torch.float32
    all_rates = _on_each(subject, lambda: rates.product_rate(subject.device, dtype))
    rate = subject.measured["product_flops_per_s"] = min(all_rates)
    figures = {"flops_per_s": rate, "flops_per_s_of_the_best": max(all_rates)}
    text = f"{rate / 1e12:.3g} TFLOP/s in {str(dtype).removeprefix('torch.')}"
    text += _spread(all_rates, 1e12)
    known = find_accelerator(device_name(subject.device))
    if known is None or dtype != torch.bfloat16:
        text = f"{text}; no peak is known, so no MFU is shown"
        yield Finding("note", "products", text, figures=figures)
        return
    share = rate / (known.bf16_tflops * 1e12)
    text, source = f"{text}, {share:.0%} of {known.name}'s peak {known.bf16_tflops:g}", known.source
    good = share >= LEAST_SHARE_OF_PEAK
    if known.gemm_tflops is not None:
        reached = rate / (known.gemm_tflops * 1e12)
        text = f"{text}, {reached:.0%} of the {known.gemm_tflops:g} that its maker measures"
        good, source = reached >= LEAST_SHARE_OF_MEASURED, f"{source}; {known.gemm_source}"
    mend = "" if good else "look for throttling, a power cap or other users of the device"
    yield Finding("ok" if good else "warn", "products", text, mend, source, figures)


def _on_each(subject: Subject, measure: Callable[[], float]) -> list[float]:
    """What is measured on every device of the run, one after another: one of eight may be slow."""
    if subject.device != "cuda":
        return [measure()]
    found = []
    for number in range(min(subject.nproc, torch.cuda.device_count())):
        with torch.cuda.device(number):
            found.append(measure())
    return found


def _spread(found: list[float], unit: float) -> str:
    slowest = found.index(min(found))
    best = max(found) / unit
    return f" on device {slowest}, the slowest (best: {best:,.3g})" if len(found) > 1 else ""


def bandwidth(subject: Subject) -> Iterator[Finding]:
    """The rate of copies within the device's memory, beside what the maker states."""
    all_rates = _on_each(subject, lambda: rates.memory_rate(subject.device))
    rate = subject.measured["memory_bytes_per_s"] = min(all_rates)
    figures = {"bytes_per_s": rate, "bytes_per_s_of_the_best": max(all_rates)}
    text = f"{rate / 1e9:,.3g} GB/s copied (read and written bytes both counted)"
    text += _spread(all_rates, 1e9)
    known = find_accelerator(device_name(subject.device))
    if known is None:
        yield Finding("note", "bandwidth", text, figures=figures)
        return
    share = rate / (known.memory_tb_s * 1e12)
    text = f"{text}, {share:.0%} of {known.name}'s {known.memory_tb_s:g} TB/s"
    good = share >= LEAST_SHARE_OF_BANDWIDTH
    mend = "" if good else "look for other users of the device"
    yield Finding("ok" if good else "warn", "bandwidth", text, mend, known.source, figures)


def all_reduce(subject: Subject) -> Iterator[Finding]:
    """The rate at which ranks add up the gradients of one block."""
    if subject.nproc < 2:
        yield Finding("note", "all-reduce", "one process: there is nothing to exchange")
        return
    model = subject.config.model
    one, two = (count_params(replace(model, n_layers=n)) for n in (1, 2))
    n_bytes = 4 * (two - one)
    try:
        exchange = measure_exchange(subject.device, subject.nproc, n_bytes)
    except ToolError as error:
        yield Finding("fail", "all-reduce", str(error))
        return
    subject.measured["exchange_bytes_per_s"] = exchange.algorithm_rate
    figures = {
        "ranks": exchange.n_ranks, "bytes": exchange.n_bytes, "seconds": exchange.seconds,
        "algorithm_bytes_per_s": exchange.algorithm_rate, "bus_bytes_per_s": exchange.bus_rate,
    }  # fmt: skip
    text = (
        f"{exchange.n_ranks} ranks, {n_bytes / 1e6:,.1f} MB in {exchange.seconds * 1e3:,.1f} ms: "
        f"algorithm {exchange.algorithm_rate / 1e9:,.3g} GB/s, bus {exchange.bus_rate / 1e9:,.3g}"
    )
    source = "nccl-tests doc/PERFORMANCE.md: bus = algorithm x 2 (n - 1) / n"
    yield Finding("ok", "all-reduce", text, source=source, figures=figures)


def expected(subject: Subject) -> Iterator[Finding]:
    """The tokens a second to expect, labelled as the estimate that they are."""
    if not subject.measured.get("fits"):
        yield Finding("note", "expected", "no rate is estimated: the preset does not fit")
        return
    if not {"product_flops_per_s", "memory_bytes_per_s"} <= subject.measured.keys():
        yield Finding("note", "expected", "no rate is estimated: nothing could be measured")
        return
    expectation = expect(subject)
    rate = expectation.tokens_per_s
    subject.measured["tokens_per_s"] = rate
    parts = ", ".join(f"{name} {time:.3g} s" for name, time in expectation.seconds.items())
    text = (
        f"about {rate:,.0f} tokens/s, an ESTIMATE ({expectation.how}): a step of "
        f"{expectation.tokens:,} tokens = {parts}; without data, checkpoints and validation"
    )
    figures = {"tokens_per_s": rate, "tokens_per_s_by_rates_alone": expectation.by_rates_alone}
    known = find_accelerator(device_name(subject.device))
    if known is None or subject.config.precision != "bf16":
        yield Finding(
            "note", "expected", f"{text}; MFU withheld: no peak is known", figures=figures
        )
        return
    model = subject.config.model
    needed = rate * flops_per_token(model, model.seq_len)
    mfu = needed / (known.bf16_tflops * 1e12 * subject.nproc)
    text = f"{text}; {mfu:.1%} MFU ({MFU_CONVENTION})"
    figures = {**figures, "mfu": mfu}
    yield Finding("note", "expected", text, source=known.source, figures=figures)
