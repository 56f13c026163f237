"""A step's numbers made into a line: rates, money, time left; for the journal and the display."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from model.config import flops_per_token
from trainer.config.config import RunConfig
from trainer.config.plan import TrainPlan
from trainer.metrics import goodput
from trainer.metrics.display import Display
from trainer.metrics.metrics import Journal
from trainer.metrics.step_metrics import PendingMetrics, StepMetrics
from trainer.session.state import State
from trainer.validation.validation import Score

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
        left_s = (last_step - state.step) * self._plan.step_tokens / rate
        seconds = goodput.parts(state.time_s, state.spent_s)
        line = {
            "step": state.step,
            "loss": _finite(metrics.loss),
            "lr": entry.lr,
            **{name: _finite(value) for name, value in metrics.logged.items()},
            "n_targets": metrics.n_targets,
            "next_index": state.next_index,
            "tokens": state.next_index * config.model.seq_len,
            "tokens_per_s": round(rate, 1),
            "time_s": round(state.time_s, 3),
            "data_wait": round(min(1.0, (entry.waited_s - waited_s) / elapsed), 5),
            **self._derived(rate, sum(seconds.values()), left_s),
            **self._held_out(entry.scores),
            "spent_s": {part: round(value, 3) for part, value in seconds.items()},
            "ledger": self._state.data_use(state.next_index),
        }
        self._journal.metrics(line)
        self._display.step({**line, "max_steps": last_step, "eta_s": left_s})

    def _held_out(self, scores: Mapping[str, Score]) -> dict[str, Any]:
        """The scores of sources, and their means in the mixture's weights."""
        losses = {name: score.loss for name, score in scores.items()}
        bits = {name: s.bits_per_byte for name, s in scores.items() if s.bits_per_byte is not None}
        return {
            **self._by_source("val_loss", "val", losses),
            **self._by_source("val_bits_per_byte", "val_bits", bits),
        }

    def _by_source(self, mean: str, by_source: str, values: dict[str, float]) -> dict[str, Any]:
        weights = {name: w for name, w in self._plan.weights.items() if name in values}
        line: dict[str, Any] = {by_source: values} if values else {}
        if weights:
            total = sum(values[name] * weight for name, weight in weights.items())
            line[mean] = total / sum(weights.values())
        return line

    def _derived(self, rate: float, held_s: float, left_s: float) -> dict[str, float]:
        """MFU, by the causal count of FLOPs, and money, each only where it is known."""
        derived = {}
        config = self._plan.config
        if self._plan.peak_flops is not None:
            flops = flops_per_token(config.model, config.model.seq_len, causal=True)
            derived["mfu"] = round(rate * flops / self._plan.peak_flops, 5)
        if config.dollars_per_hour > 0:
            derived["dollars"] = round(held_s / 3600 * config.dollars_per_hour, 4)
            derived["dollars_to_go"] = round(left_s / 3600 * config.dollars_per_hour, 4)
        if config.max_dollars > 0:
            derived["dollars_left"] = round(config.max_dollars - derived["dollars"], 4)
        return derived


def spent_line(seconds: Mapping[str, float], config: RunConfig) -> str:
    """Where the run's seconds went, and its dollars."""
    text = f"time: {goodput.describe(seconds)}"
    if config.dollars_per_hour > 0:
        text += f"; $ {sum(seconds.values()) / 3600 * config.dollars_per_hour:.2f}"
    return text


def _finite(value: float) -> float | None:
    """The value; None, which JSON can spell, for one that is not finite."""
    return value if math.isfinite(value) else None
