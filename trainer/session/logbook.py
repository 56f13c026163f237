"""A step's numbers made into a line: rates, money, time left; for the journal and the screen."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from model.config import flops_per_token
from trainer.config.config import RunConfig
from trainer.config.plan import TrainPlan
from trainer.metrics import goodput
from trainer.metrics.display import Screen
from trainer.metrics.metrics import Journal
from trainer.metrics.step_metrics import Late, Reading
from trainer.session.state import State
from trainer.validation.validation import Score

Arrived = tuple[int, Reading] | None
"""A step and its numbers, once they are on the host."""


@dataclass(kw_only=True)
class _Entry:
    """A step whose numbers are under way."""

    late: Late
    step: int
    next_index: int
    lr: float
    time_s: float
    waited_s: float
    spent_s: dict[str, float]
    last_step: int
    val: dict[str, Score]


class Logbook:
    """Takes in each step as it is sent off, and writes it down when its numbers have arrived."""

    def __init__(self, plan: TrainPlan, journal: Journal, screen: Screen, state: State) -> None:
        self._plan, self._journal, self._screen = plan, journal, screen
        self._state = state
        self._under_way: _Entry | None = None
        self._waited_s = 0.0
        self._written = (state.step, state.time_s, 0.0)  # step, time_s, waited_s of the last line

    def enter(self, late: Late, state: State, lr: float, waited_s: float) -> Arrived:
        """Take in the step that `state` has just made; the one before, now written."""
        before = self.settle()
        spent_s = state.spent_s
        spent_s["data"] = spent_s.get("data", 0.0) + waited_s - self._waited_s
        self._waited_s = waited_s
        self._under_way = _Entry(
            late=late,
            step=state.step,
            next_index=state.next_index,
            lr=lr,
            time_s=state.time_s,
            waited_s=waited_s,
            spent_s=dict(spent_s),
            last_step=state.last_step(self._plan.config.max_steps),
            val={},
        )
        return before

    def add(self, scores: Mapping[str, Score]) -> None:
        """Say the held-out score of each source at the step under way."""
        if self._under_way is not None:
            self._under_way.val.update(scores)

    def settle(self) -> Arrived:
        """The step under way and its numbers, written down; None if there is none."""
        if self._under_way is None:
            return None
        entry, self._under_way = self._under_way, None
        reading, config = entry.late.read(), self._plan.config
        regular = entry.step % config.log_interval == 0 or entry.step == entry.last_step
        if regular or entry.val or reading.refused:
            self._write(reading, entry)
        return entry.step, reading

    def _write(self, reading: Reading, entry: _Entry) -> None:
        step, time_s, waited_s = self._written
        self._written = (entry.step, entry.time_s, entry.waited_s)
        elapsed = max(1e-9, entry.time_s - time_s)
        rate = (entry.step - step) * self._plan.step_tokens / elapsed
        left_s = (entry.last_step - entry.step) * self._plan.step_tokens / rate
        seconds = goodput.parts(entry.time_s, entry.spent_s)
        line = {
            "step": entry.step,
            "loss": _finite(reading.loss),
            "lr": entry.lr,
            "grad_norm": _finite(reading.grad_norm),
            "n_targets": reading.n_targets,
            "next_index": entry.next_index,
            "tokens": entry.next_index * self._plan.config.model.seq_len,
            "tokens_per_s": round(rate, 1),
            "time_s": round(entry.time_s, 3),
            "data_wait": round(min(1.0, (entry.waited_s - waited_s) / elapsed), 5),
            **self._derived(rate, sum(seconds.values()), left_s),
            **self._held_out(entry.val),
            "spent_s": {part: round(value, 3) for part, value in seconds.items()},
            "ledger": self._state.data_use(entry.next_index),
        }
        self._journal.metrics(line)
        self._screen.step({**line, "max_steps": entry.last_step, "eta_s": left_s})

    def _held_out(self, scores: Mapping[str, Score]) -> dict[str, Any]:
        """The scores of sources, and their means in the mixture's weights."""
        losses = {name: score.loss for name, score in scores.items()}
        bits = {name: s.bits_per_byte for name, s in scores.items() if s.bits_per_byte is not None}
        line: dict[str, Any] = {}
        for mean, by_source, values in (
            ("val_loss", "val", losses),
            ("val_bits_per_byte", "val_bits", bits),
        ):
            weights = {n: w for n, w in self._plan.weights.items() if n in values}
            if weights:
                total = sum(values[name] * weight for name, weight in weights.items())
                line[mean] = total / sum(weights.values())
            if values:
                line[by_source] = values
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
