"""The numbers of a step: added up over ranks in one reduction, read one step late, logged.

A number read at once makes the processor wait for the device. So each step sends a few to the host
and goes on. Flags travel with them (one rank was asked to stop, the main rank's clock says
checkpoint), so that all ranks act on the same flag at the same step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from model.config import flops_per_token
from model.loss import IGNORED
from trainer.config.train_plan import TrainPlan
from trainer.distributed.world import World
from trainer.metrics import goodput
from trainer.metrics.display import Display
from trainer.metrics.metrics import Journal
from trainer.session.state import State
from trainer.validation.validation import Score


class StepFlags(NamedTuple):
    """What a rank knows at a step and the others do not."""

    stop: bool  # it was asked to stop
    checkpoint: bool  # its clock says so
    skip: bool  # the update was skipped when this step was made before
    damaged: bool  # a row of this step, or of one before, could not be read
    budget: int  # what the main rank's budget asks for (trainer/session/budget.py)


class StepMetrics(NamedTuple):
    """A step's numbers, on the host. `loss` is the mean over the step's targets, in nats."""

    loss: float
    n_targets: int
    first_index: int  # the sample that the step began with
    flags: StepFlags  # of any rank
    skipped: bool  # the optimizer made no update
    logged: dict[str, float]  # `grad_norm`, and whatever else the loop wants in metrics.jsonl

    @property
    def grad_norm(self) -> float:
        """The norm of the full gradient before clipping."""
        return self.logged["grad_norm"]


LOSS, TARGETS = 0, 1
_FLAGS: Final = {name: place for place, name in enumerate(StepFlags._fields, start=2)}
"""Where the sums of a step are."""


class StepSums:
    """Sums of one step, on the device."""

    def __init__(self, device: torch.device) -> None:
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self._sums = torch.zeros(2 + len(_FLAGS), dtype=dtype, device=device)

    def add(self, loss_sum: Tensor, targets: Tensor) -> None:
        """Count one micro-batch."""
        self._sums[LOSS] += loss_sum.detach()
        self._sums[TARGETS] += (targets != IGNORED).sum()

    def reduce(self, world: World, flags: StepFlags) -> Tensor:
        """[7] over all ranks: loss sum, targets, and how many have each flag of StepFlags."""
        for place, flag in zip(_FLAGS.values(), flags, strict=True):
            if flag:  # a kernel less for each that is not
                self._sums[place] = float(flag)
        return world.all_reduce(self._sums)


def flagged(sums: Tensor, name: str) -> Tensor:
    """How many ranks have set a flag of StepFlags in a step, on the device. []"""
    return sums[_FLAGS[name]]


class PendingMetrics:
    """A step's numbers on their way to the host; `logged` are the same on all ranks."""

    def __init__(self, sums: Tensor, skip: Tensor, first_index: int, **logged: Tensor) -> None:
        values = torch.cat([sums, torch.stack([skip, *logged.values()]).to(sums.dtype)])
        self._first_index, self._names = first_index, tuple(logged)
        self._host = values.to("cpu", non_blocking=True)  # into pinned memory
        self._arrived = torch.cuda.Event() if values.is_cuda else None  # type: ignore[no-untyped-call]
        if self._arrived is not None:
            self._arrived.record()

    def read(self) -> StepMetrics:
        """The numbers, waiting for them if they are still under way."""
        if self._arrived is not None:
            self._arrived.synchronize()
        loss_sum, n_targets, stop, checkpoint, skip, damaged, budget, skipped, *logged = (
            self._host.tolist()
        )
        return StepMetrics(
            loss=loss_sum / n_targets if n_targets else float("nan"),
            n_targets=int(n_targets),
            first_index=self._first_index,
            flags=StepFlags(stop > 0, checkpoint > 0, skip > 0, damaged > 0, int(budget)),
            skipped=skipped > 0,
            logged=dict(zip(self._names, logged, strict=True)),
        )


CompletedStep = tuple[int, StepMetrics] | None
"""A step and its numbers, once they are on the host."""


@dataclass
class _Entry:
    """A step whose numbers are under way, and the state after it."""

    pending: PendingMetrics
    state: State
    lr: float
    waited_s: float
    scores: dict[str, Score] = field(default_factory=dict)


class MetricsLogger:
    """Takes in each step as it is sent off, and logs it when its numbers have arrived."""

    def __init__(self, plan: TrainPlan, journal: Journal, display: Display, state: State) -> None:
        self._plan, self._journal, self._display = plan, journal, display
        self._state = state
        self._entry: _Entry | None = None
        self._waited_s = 0.0
        self._logged = (state.step, state.time_s, 0.0)  # step, time_s, waited_s of the last line

    def submit(self, pending: PendingMetrics, lr: float, waited_s: float) -> CompletedStep:
        """Take in the step that the state has just made; the one before, now logged."""
        before, spent_s = self.flush(), self._state.spent_s
        spent_s["data"] = spent_s.get("data", 0.0) + waited_s - self._waited_s
        self._waited_s = waited_s
        self._entry = _Entry(pending, replace(self._state, spent_s=dict(spent_s)), lr, waited_s)
        return before

    def add_scores(self, scores: Mapping[str, Score]) -> None:
        """Log the held-out score of each source with the step under way."""
        if self._entry is not None:
            self._entry.scores.update(scores)

    def flush(self) -> CompletedStep:
        """The step under way and its numbers, logged; None if there is none."""
        if self._entry is None:
            return None
        entry, self._entry = self._entry, None
        metrics, config, step = entry.pending.read(), self._plan.config, entry.state.step
        regular = step % config.log_interval == 0 or step == entry.state.last_step(config.max_steps)
        if regular or entry.scores or metrics.skipped:
            self._log(metrics, entry)
        return step, metrics

    def _log(self, metrics: StepMetrics, entry: _Entry) -> None:
        (step, time_s, waited_s), state, config = self._logged, entry.state, self._plan.config
        self._logged = (state.step, state.time_s, entry.waited_s)
        last_step = state.last_step(config.max_steps)
        elapsed = max(1e-9, state.time_s - time_s)
        rate = (state.step - step) * self._plan.step_tokens / elapsed
        apart_s = sum(state.spent_s.get(kind, 0.0) for kind in ("checkpoint", "evaluation"))
        left_s = (last_step - state.step) * self._plan.step_tokens / rate
        left_s *= 1 + apart_s / max(1e-9, state.time_s)
        seconds = goodput.parts(state.time_s, state.spent_s)
        scores = entry.scores.items()
        bits = {name: s.bits_per_byte for name, s in scores if s.bits_per_byte is not None}
        line = {
            "step": state.step,
            "loss": _finite(metrics.loss),
            "lr": entry.lr,
            **{name: _finite(value) for name, value in metrics.logged.items()},
            "n_targets": metrics.n_targets,
            "next_index": state.next_index,
            "tokens": state.n_samples * config.model.seq_len,
            "tokens_per_s": round(rate, 1),
            "time_s": round(state.time_s, 3),
            "data_wait": round(min(1.0, (entry.waited_s - waited_s) / elapsed), 5),
            **self._derived(rate, sum(seconds.values()), left_s),
            **self._by_source("val_loss", "val", {name: s.loss for name, s in scores}),
            **self._by_source("val_bits_per_byte", "val_bits", bits),
            "spent_s": {part: round(value, 3) for part, value in seconds.items()},
            "ledger": self._state.data_use(state.next_index),
        }
        self._journal.metrics(line)
        self._display.step({**line, "max_steps": last_step, "eta_s": left_s})

    def _by_source(self, mean: str, by_source: str, values: dict[str, float]) -> dict[str, Any]:
        """The values of sources, and their mean in the mixture's weights."""
        weights = {name: w for name, w in self._plan.weights.items() if name in values}
        line: dict[str, Any] = {by_source: values} if values else {}
        if weights:
            total = sum(values[name] * weight for name, weight in weights.items())
            line[mean] = total / sum(weights.values())
        return line

    def _derived(self, rate: float, held_s: float, left_s: float) -> dict[str, float]:
        """MFU, by the causal count of FLOPs, memory and money, each only where it is known."""
        derived = {}
        config = self._plan.config
        if self._plan.peak_flops is not None:
            flops = flops_per_token(config.model, config.model.seq_len, causal=True)
            derived["mfu"] = round(rate * flops / self._plan.peak_flops, 5)
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # this rank's
            derived["peak_memory_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 3)
        if config.dollars_per_hour > 0:
            derived["dollars"] = round(held_s / 3600 * config.dollars_per_hour, 4)
            derived["dollars_to_go"] = round(left_s / 3600 * config.dollars_per_hour, 4)
        if config.max_dollars > 0:
            derived["dollars_left"] = round(config.max_dollars - derived["dollars"], 4)
        return derived


def _finite(value: float) -> float | None:
    """The value; None, which JSON can spell, for one that is not finite."""
    return value if math.isfinite(value) else None
