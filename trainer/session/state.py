"""What changes while a run trains, how it is written into a checkpoint, and how it is found
again."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from shards.versions import writer_of
from trainer.checkpoint import storage
from trainer.checkpoint.retention import newest_proven
from trainer.checkpoint.runs import RECORD, checkpoints
from trainer.checkpoint.storage import Record
from trainer.config.config import differences, from_stored, spell_value
from trainer.config.plan import Plan, SourceFacts
from trainer.data.mixture import DataOrder, Phase, leave_out
from trainer.distributed.world import World
from trainer.errors import CheckpointError, ConfigError
from trainer.faults.guard import add_skipped
from trainer.optimizer.schedule import Anneal


@dataclass(kw_only=True)
class State:
    """Where a run stands. The weights and moments are with the model and the optimizer."""

    step: int = 0
    next_index: int = 0
    time_s: float = 0.0  # spent in training steps, over all sessions
    refused_in_a_row: int = 0
    norms: list[float] = field(default_factory=list)  # the last accepted ones: the guard's window
    skipped: tuple[tuple[int, int], ...] = ()  # samples [begin, end) that the run leaves out
    phases: tuple[Phase, ...]
    data: dict[str, SourceFacts]  # of every source drawn so far, retired ones too
    anneal: Anneal | None = None  # a budget's end of the run, once it has begun
    spent_s: dict[str, float] = field(default_factory=dict)  # see trainer/metrics/goodput.py

    def advance(self, n_rows: int, seconds: float) -> None:
        """One more step of `n_rows` samples has been made."""
        self.step += 1
        self.next_index = self._place(n_rows - 1) + 1
        self.time_s += seconds

    def last_step(self, max_steps: int) -> int:
        """The step after which the run is complete."""
        return max_steps if self.anneal is None else min(max_steps, self.anneal.last_step)

    @property
    def first_index(self) -> int:
        """The sample that the next step begins with: `next_index`, unless that is left out."""
        return self._place(0)

    def _place(self, number: int) -> int:
        return int(leave_out(self.next_index, np.array(number), self.skipped))

    def leave_out(self, skipped: Sequence[tuple[int, int]]) -> None:
        """Leave out these stretches of samples too, those that are new."""
        for begin, end in skipped:
            if not self.skipped or end > self.skipped[-1][1]:
                self.skipped = add_skipped(self.skipped, begin, end)

    def _counts(self, order: DataOrder, index: int) -> dict[str, int]:
        """How often each source has been drawn before sample `index`, but for what was left out."""
        counts = order.counts(index)
        for begin, end in self.skipped:
            if end <= index:
                before, after = order.counts(begin), order.counts(end)
                counts = {name: n - after[name] + before[name] for name, n in counts.items()}
        return counts

    def order(self, seed: int) -> DataOrder:
        """The data order, past and to come."""
        rows = {name: facts.n_rows for name, facts in self.data.items()}
        return DataOrder(seed=seed, rows=rows, phases=self.phases)

    def ledger(self, order: DataOrder, index: int) -> dict[str, dict[str, Any]]:
        """Of each source, its rows, tokens and epochs before sample `index`."""
        counts = self._counts(order, index)
        return {
            name: {
                "rows": counts[name],
                "tokens": round(counts[name] * facts.tokens_per_row),
                "epochs": counts[name] / facts.n_rows,
            }
            for name, facts in self.data.items()
            if name in counts
        }

    def record(self, plan: Plan) -> Record:
        """What COMMIT.json says of the run; `storage.save` adds files and versions."""
        return {
            "step": self.step,
            "next_index": self.next_index,
            "time_s": self.time_s,
            "refused_in_a_row": self.refused_in_a_row,
            "norms": self.norms,
            "skipped": self.skipped,
            "phases": [[phase.first_index, dict(phase.weights)] for phase in self.phases],
            "data": {name: asdict(facts) for name, facts in self.data.items()},
            "tokenizer_sha256": plan.tokenizer_sha256,
            "ledger": self.ledger(self.order(plan.config.seed), self.next_index),
            "anneal": self.anneal,
            "spent_s": dict(self.spent_s),
            "unix_s": time.time(),  # when the run was in this state
            "world_size": plan.shape.world_size,
            "config": asdict(plan.config),
        }


def fresh(plan: Plan) -> State:
    """The state of a run that has not begun."""
    return State(phases=(Phase(0, plan.weights),), data=dict(plan.sources))


@dataclass(frozen=True, kw_only=True)
class Found:
    """A checkpoint to go on from."""

    checkpoint: Path
    record: Record
    complaints: tuple[str, ...]  # what was wrong with newer ones


def find(run: Path, resume: str, world: World, mirror: Path | None = None) -> Found | None:
    """The checkpoint that `--resume auto|never|PATH` means, proven; None to start at the
    beginning."""
    if resume == "never":
        if there := checkpoints(run):
            raise ConfigError(
                f"{run} holds a run with checkpoints up to {there[-1].name}: --resume never would "
                "mix two runs; give another --out, or remove it"
            )
        return None
    place = run if resume == "auto" else Path(resume)
    if (place / RECORD).exists():
        return Found(checkpoint=place, record=storage.prove(place, world), complaints=())
    found = newest_proven(place, world, mirror if resume == "auto" else None)
    if found is None:
        if resume == "auto":
            return None
        raise CheckpointError(f"--resume {resume}: no checkpoint there; name a run or its step-N")
    checkpoint, record, complaints = found
    return Found(checkpoint=checkpoint, record=record, complaints=tuple(complaints))


def state_from(record: Record, plan: Plan) -> tuple[State, list[str]]:
    """The state in a record, and the lines that say what differs from the plan.

    ConfigError for what must not: the model, the seed, the tokenizer, a source's content.
    """
    for key in ("config", "next_index", "tokenizer_sha256", "data", "phases"):
        if key not in record:
            raise ConfigError(
                f"this checkpoint (it has no {key}) holds weights and no training state: start "
                "from it with --set init_from=ITS_RUN and another --out"
            )
    where, writer = f"{RECORD} of step {record['step']}", writer_of(record)
    before = from_stored(type(plan.config), record["config"], where, writer)
    changes = differences(before, plan.config)
    for key, (old, new) in changes.items():
        if key.startswith("model.") or key == "seed":
            raise ConfigError(
                f"{key} is {spell_value(new)} and was {spell_value(old)} in this run: go on with "
                f"--set {key}={spell_value(old)} (or the same --preset: it was {before.preset}), "
                "or start anew with --out"
            )
    if record["tokenizer_sha256"] != plan.tokenizer_sha256:
        raise ConfigError(
            "the shards were made with another tokenizer than this run has learned; "
            "train on the old ones, or start anew with --out"
        )
    data = {
        name: from_stored(SourceFacts, facts, where, writer, f"data.{name}.")
        for name, facts in record["data"].items()
    }
    for name, facts in plan.sources.items():
        if data.setdefault(name, facts).root != facts.root:
            raise ConfigError(
                f"{plan.config.shards}/{name} is not the data this run has read (root "
                f"{facts.root[:12]}, was {data[name].root[:12]}): bring the old shards back, "
                "or start anew with --out"
            )
    state = State(
        step=int(record["step"]),
        next_index=int(record["next_index"]),
        time_s=float(record.get("time_s", 0.0)),
        refused_in_a_row=int(record.get("refused_in_a_row", 0)),
        norms=[float(norm) for norm in record.get("norms", [])],
        skipped=tuple((int(begin), int(end)) for begin, end in record.get("skipped", [])),
        phases=tuple(Phase(int(first), dict(weights)) for first, weights in record["phases"]),
        data=data,
        anneal=Anneal(*record["anneal"]) if record.get("anneal") else None,
        spent_s=dict(record.get("spent_s", {})),
    )
    if changes.keys() & {"max_dollars", "dollars_per_hour"}:
        state.anneal = None  # another budget decides anew
    if state.phases[-1].weights != plan.weights:
        state.phases += (Phase(state.next_index, plan.weights),)
        state.norms = []  # other data may have gradients of another size
    if "global_batch_tokens" in changes:
        state.norms = []
    return state, [f"changed: {key} was {old}, is {new}" for key, (old, new) in changes.items()]
