"""What a run has drawn from each source, and what it will have drawn at its end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainer.checkpoint.runs import RECORD, checkpoints
from trainer.checkpoint.storage import read_record
from trainer.config.plan import Plan
from trainer.errors import CheckpointError, ConfigError
from trainer.session.state import State, fresh, state_from

Ledger = dict[str, dict[str, Any]]


def standing(plan: Plan, run: Path, resume: str) -> State:
    """The state that a run would go on from, by what its newest readable checkpoint says."""
    place = run if resume in ("auto", "never") else Path(resume)
    for checkpoint in [place] if (place / RECORD).exists() else reversed(checkpoints(place)):
        try:
            return state_from(read_record(checkpoint), plan)[0]
        except CheckpointError:
            continue  # told when it is to be loaded
    return fresh(plan)


def at_end(plan: Plan, state: State) -> Ledger:
    """The ledger after the run's last step."""
    steps = max(0, state.last_step(plan.config.max_steps) - state.step)
    end = state.next_index + steps * plan.shape.global_batch_size
    return state.ledger(state.order(plan.config.seed), end)


def refuse_repeats(plan: Plan, state: State) -> None:
    """ConfigError if a source would be drawn more often than `max_epochs` allows."""
    ledger = at_end(plan, state)
    for name, limit in plan.config.max_epochs.items():
        if name not in ledger:
            raise ConfigError(
                f"max_epochs.{name}={limit}: no such source is drawn; "
                f"there are: {', '.join(ledger)}"
            )
        if (epochs := ledger[name]["epochs"]) > limit:
            raise ConfigError(
                f"{name} would be seen {epochs:.3g} times, max_epochs.{name}={limit}: prepare more "
                "of it, lower its share, or train for fewer steps"
            )


def describe_ledger(plan: Plan, state: State) -> Iterator[str]:
    """Of each source what the run will have drawn, and what it has, in lines for people."""
    now = state.ledger(state.order(plan.config.seed), state.next_index)
    for name, end in at_end(plan, state).items():
        so_far = f" (so far {_spell(now[name])})" if state.step else ""
        yield f"ledger {name}: {_spell(end)} at the end{so_far}"


def _spell(entry: dict[str, Any]) -> str:
    return f"{entry['rows']:,} rows, {entry['tokens']:,} tokens, {entry['epochs']:.3g} epochs"
