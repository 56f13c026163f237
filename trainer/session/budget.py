"""A budget in dollars: when to begin to anneal, so that the last checkpoint is inside it.

The clock decides, so the decision is saved with the state before the first annealed step: from
there on the learning rate is again a function of the step alone.
"""

from __future__ import annotations

from collections import deque
from itertools import pairwise
from typing import Final

from trainer.config.config import RunConfig
from trainer.metrics.goodput import Stopwatch, parts
from trainer.optimizer.schedule import Anneal
from trainer.session.state import State

ONE_IN: Final = 10
"""Of so many steps one anneals: MiniCPM (Hu et al., 2024) found a tenth to be enough."""

_RECENT: Final = 64  # steps by whose mean the next ones are judged
_LAPS: Final = 8  # of the last steps: the longest of them may come again
_DELAY: Final = 3  # steps between a request and what comes of it

NOTHING, ANNEAL, END = range(3)
"""What a budget asks for."""


class Budget:
    """The main rank's budget. On other ranks, and without `max_dollars`, it asks for nothing."""

    def __init__(self, config: RunConfig, state: State, watch: Stopwatch, is_main: bool) -> None:
        self._config, self._state, self._watch = config, state, watch
        self._active = is_main and config.max_dollars > 0
        self._marks: deque[tuple[int, float]] = deque(maxlen=_RECENT)

    def request(self) -> int:
        """What the money that is left asks for, before the next step is counted."""
        state, config = self._state, self._config
        if not self._active or state.step == 0:
            return NOTHING
        self._marks.append((state.step, state.time_s))
        step_s = self._step_s()
        laps = [b[1] - a[1] for a, b in pairwise(list(self._marks)[-_LAPS - 1 :])]
        checkpoint_s = self._watch.longest_s.get("checkpoint", step_s)
        reserve_s = _DELAY * max([step_s, *laps]) + 2 * checkpoint_s
        held_s = config.max_dollars / config.dollars_per_hour * 3600
        left_s = held_s - sum(parts(state.time_s, state.spent_s).values())
        if left_s <= reserve_s:
            return END
        affordable = (left_s - 2 * reserve_s) / step_s  # the beginning is saved too
        short = state.anneal is None and affordable < config.max_steps - state.step
        return ANNEAL if short and affordable <= annealing_steps(state.step) else NOTHING

    def _step_s(self) -> float:
        """Seconds of a step, with its share of checkpoints and evaluations."""
        state, (first, since), (last, until) = self._state, self._marks[0], self._marks[-1]
        many = last - first >= _RECENT // 4  # few steps may be those that compile
        lap = (until - since) / (last - first) if many else state.time_s / state.step
        apart = sum(state.spent_s.get(kind, 0.0) for kind in ("checkpoint", "evaluation"))
        return lap * (1 + apart / state.time_s)


def annealing_steps(step: int) -> int:
    """How many steps anneal a run that has made `step` steps."""
    return max(1, -(-step // (ONE_IN - 1)))


def apply_request(request: int, state: State, max_steps: int) -> str:
    """What a budget's request changes in the state, in words; nothing for one already granted."""
    if request == ANNEAL and state.anneal is None:
        n_steps = min(annealing_steps(state.step), max_steps - state.step)
        state.anneal = Anneal(state.step, n_steps)
        return f"the budget asks to anneal now: the last step is {state.step + n_steps}"
    if request == END and state.step < state.last_step(max_steps):
        first = state.step if state.anneal is None else state.anneal.first_step
        state.anneal = Anneal(first, state.step - first)
        return f"the budget is used up: step {state.step} is the last"
    return ""
