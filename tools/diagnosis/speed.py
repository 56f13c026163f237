"""What was measured, next to makers' figures: products, memory, all-reduce, training steps."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from typing import Final, NamedTuple

import torch
from torch import Tensor
from torch.profiler import record_function
from torch.utils.benchmark import Timer

from model.config import count_params, flops_per_token
from tools.diagnosis.collective import time_all_reduce
from tools.diagnosis.machine import CheckResult, Context
from trainer.config import memory
from trainer.config.config import RunConfig
from trainer.distributed.devices import (
    device_memory_bytes,
    device_name,
    find_accelerator,
    keep_freed_memory,
)
from trainer.distributed.world import World
from trainer.optimizer.optimizer import finish_gradients, make_optimizer, update
from trainer.session.network import Network, autocast, build_network

STEPS: Final = 20
_STEPS_S: Final = 30.0  # for all of them; at least three are made
_LONGEST_S: Final = 5.0  # for one step at the rate of large products: really 2 to 7 times longer


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
    context.measured["product_flops_per_s"] = min(rates)
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
    algorithm = context.measured["exchange_bytes_per_s"] = n_bytes / seconds
    bus = algorithm * 2 * (n - 1) / n
    figures = {"ranks": n, "bytes": n_bytes, "seconds": seconds}
    figures |= {"algorithm_bytes_per_s": algorithm, "bus_bytes_per_s": bus}
    text = (
        f"{n} ranks, {n_bytes / 1e6:,.1f} MB in {seconds * 1e3:,.1f} ms: "
        f"algorithm {algorithm / 1e9:,.3g} GB/s, bus {bus / 1e9:,.3g}"
    )
    source = "nccl-tests doc/PERFORMANCE.md: bus = algorithm x 2 (n - 1) / n"
    yield CheckResult("ok", "all-reduce", text, source=source, figures=figures)


class TrialTimes(NamedTuple):
    """Seconds of one micro-batch and of one update of the model that was tried."""

    micro_batch: float
    update: float


def expected(context: Context) -> Iterator[CheckResult]:
    """The tokens a second to expect, an estimate from real steps on one device."""
    trial = trial_config(context)
    if trial is None:
        text = "no rate is estimated: no layer of it fits one device and trains in seconds"
        yield CheckResult("note", "expected", text)
        return
    config, model = context.config, context.config.model
    parts = step_parts(context, trial, time_steps(trial, context.device))
    tokens = max(1, config.global_batch_tokens // model.seq_len) * model.seq_len
    rate = context.measured["tokens_per_s"] = tokens / sum(parts.values())
    figures = {"tokens_per_s": rate}
    listed = ", ".join(f"{name} {seconds:.3g} s" for name, seconds in parts.items())
    text = (
        f"about {rate:,.0f} tokens/s, an ESTIMATE (from real steps of {trial.model.n_layers} of "
        f"{model.n_layers} layers, {trial.micro_batch_size} sequences at a time): a step of "
        f"{tokens:,} tokens = {listed}; without data, checkpoints and validation"
    )
    known = find_accelerator(device_name(context.device))
    if known is None or config.precision != "bf16":
        text, source = f"{text}; MFU withheld: no peak is known", ""
    else:
        peak, source = known.bf16_tflops * 1e12 * context.nproc, known.source
        figures["mfu"] = rate * flops_per_token(model, model.seq_len) / peak
        text = f"{text}; {figures['mfu']:.1%} MFU (causal attention, nothing recomputed)"
    yield CheckResult("note", "expected", text, source=source, figures=figures)


def step_parts(context: Context, trial: RunConfig, times: TrialTimes) -> dict[str, float]:
    """Seconds of each part of a step of the run, from those of a trial on one device.

    If the trial has fewer layers, micro-batches are scaled by FLOPs and the update by parameters.
    Of the exchange of gradients, what the last backward pass (two thirds of its micro-batch) does
    not cover counts, at least a block's part; on the CPU all, as there is nothing to cover it with.
    """
    model, seq_len = context.config.model, context.config.model.seq_len
    n_passes = max(1, context.config.global_batch_tokens // seq_len) / (trial.micro_batch_size or 1)
    together = 1 if context.device == "cpu" else context.nproc  # ranks on one CPU share its cores
    more = flops_per_token(model, seq_len) / flops_per_token(trial.model, seq_len)
    parts = {
        "forward and backward": n_passes / together * more * times.micro_batch,
        "update": times.update * count_params(model) / count_params(trial.model),
    }
    if rate := context.measured.get("exchange_bytes_per_s"):
        exchange = 4 * count_params(model) / rate
        covered = 0.0 if context.device == "cpu" else 2 / 3 * more * times.micro_batch
        parts["exchange"] = max(exchange - covered, exchange / model.n_layers)
    return parts


def trial_config(context: Context) -> RunConfig | None:
    """The run with as many layers as fit one device and train in seconds; None if not even one.

    `micro_batch_size` is the run's, halved only where it is too much for a single layer.
    """
    config, device = replace(context.config, shard_degree=1), context.device
    limit = device_memory_bytes(device, context.nproc)
    on_rank = max(1, config.global_batch_tokens // config.model.seq_len // context.nproc)
    size = config.micro_batch_size or memory.largest_micro_batch(config, on_rank, device, limit)
    longest = _LONGEST_S * context.measured.get("product_flops_per_s", 0.0)
    for n_rows, n_layers in product(_halved(size or 1), _halved(config.model.n_layers)):
        model = replace(config.model, n_layers=n_layers)
        trial = replace(config, model=model, micro_batch_size=n_rows)
        flops = n_rows * model.seq_len * flops_per_token(model, model.seq_len)
        if flops <= longest and memory.fits(memory.memory_by_part(trial, n_rows, device), limit):
            return trial
    return None


def _halved(n: int) -> list[int]:
    """n, half of it, and so on to 1."""
    return [n >> shift for shift in range(n.bit_length())]


def time_steps(config: RunConfig, device: str) -> TrialTimes:
    """The median times of up to twenty steps of one micro-batch, by the trainer's own parts."""
    place, size = torch.device(device), config.micro_batch_size or 1
    if device == "cpu":
        keep_freed_memory()
    world = World(rank=0, local_rank=0, world_size=1, local_world_size=1, device=place)
    step = TrialStep(config, build_network(config, world), place, size)
    tokens = torch.randint(config.model.vocab_size, (size, config.model.seq_len), device=place)
    acts = (lambda: step.micro_batch(tokens, tokens), step.update)
    steps: list[list[float]] = []
    ends_at = float("inf")
    while len(steps) < STEPS + 2 and (len(steps) < 5 or time.perf_counter() < ends_at):
        steps.append([])
        for act in acts:
            start = time.perf_counter()
            act()
            if device != "cpu":
                torch.accelerator.synchronize()
            steps[-1].append(time.perf_counter() - start)
        if len(steps) == 2:  # compiled, and warm
            ends_at = time.perf_counter() + _STEPS_S
    return TrialTimes(*(statistics.median(column) for column in zip(*steps[2:], strict=True)))


class TrialStep:
    """The two parts of an optimizer step of one micro-batch of `n_rows`, as in training."""

    def __init__(self, config: RunConfig, network: Network, device: torch.device, n_rows: int):
        self._config, self._network, self._device = config, network, device
        self.optimizer = make_optimizer(network.bare, config.optim)
        self._key = torch.zeros(n_rows, 2, dtype=torch.int32, device=device)
        self._rejected = torch.zeros((), device=device)
        self._n = n_rows * config.model.seq_len
        self._n_targets = torch.tensor(float(self._n), device=device)

    def micro_batch(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """The loss of tokens and targets [B, T], its gradients left in the parameters."""
        with autocast(self._config, self._device):
            loss: Tensor = self._network.model(tokens, targets, self._key) / self._n
        torch.autograd.backward(loss)
        return loss

    def update(self) -> None:
        """Clip, and move the weights."""
        with record_function("finish_gradients"):
            finish_gradients(self.optimizer, self._n, self._n_targets, self._config.optim)
        update(self.optimizer, self._rejected)
