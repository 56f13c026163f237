"""What a process holds of a run; its state, which changes in each step; the checkpoint's record."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from torch.optim import Optimizer

from shards.files import open_plain
from shards.versions import writer_of
from trainer.checkpoint.storage import Record
from trainer.config.config import differences, from_stored, spell_value
from trainer.config.train_plan import SourceFacts, TrainPlan
from trainer.data.mixture import DataOrder, Phase, leave_out
from trainer.distributed.world import World
from trainer.errors import ConfigError
from trainer.metrics.display import Display
from trainer.metrics.metrics import GuardHistory, Journal, add_left_out
from trainer.optimizer.schedule import Anneal, lr_at
from trainer.session.network import Network

DataUse = dict[str, dict[str, Any]]
"""Of each source: rows, tokens, epochs."""


_MAY_CHANGE: Final = ("model.dropout", "model.attention_dropout")  # no weight depends on them
_AS_IT_IS: Final = ("step", "next_index", "time_s", "refused_in_a_row", "norms", "skipped")
"""Fields that a record holds under their names."""


@dataclass(kw_only=True)
class State:
    """The state of a run, without weights and moments: the model and the optimizer hold those."""

    step: int = 0
    next_index: int = 0
    time_s: float = 0.0  # spent in training steps, over all starts
    refused_in_a_row: int = 0  # updates skipped without one between them
    norms: list[float] = field(default_factory=list)  # the last accepted ones: the guard's window
    skipped: tuple[tuple[int, int], ...] = ()  # samples [begin, end) that the run leaves out
    order: DataOrder  # past and to come
    data: dict[str, SourceFacts]  # of every source drawn so far, retired ones too
    anneal: Anneal | None = None  # a budget's end of the run, once it has begun
    spent_s: dict[str, float] = field(default_factory=dict)  # see trainer/metrics/goodput.py

    def advance(self, n_rows: int, seconds: float) -> None:
        """Count one more step, of `n_rows` samples."""
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

    @property
    def n_samples(self) -> int:
        """Samples drawn so far; those left out were not."""
        return self.next_index - sum(
            end - begin for begin, end in self.skipped if end <= self.next_index
        )

    def _place(self, number: int) -> int:
        return int(leave_out(self.next_index, np.array(number), self.skipped))

    def leave_out(self, skipped: Sequence[tuple[int, int]]) -> None:
        """Leave out these ranges of samples too, those that are new."""
        for begin, end in skipped:
            if not self.skipped or end > self.skipped[-1][1]:
                self.skipped = add_left_out(self.skipped, begin, end)

    def data_use(self, index: int) -> DataUse:
        """What the run has drawn of each source before sample `index`, skipped ranges left out."""
        counts = self.order.counts(index)
        for begin, end in self.skipped:
            if end <= index:
                before, after = self.order.counts(begin), self.order.counts(end)
                counts = {name: n - after[name] + before[name] for name, n in counts.items()}
        return {
            name: {
                "rows": counts[name],
                "tokens": round(counts[name] * facts.tokens_per_row),
                "epochs": counts[name] / facts.n_rows,
            }
            for name, facts in self.data.items()
            if name in counts
        }

    def data_use_at_end(self, plan: TrainPlan) -> DataUse:
        """What the run will have drawn of each source after its last step."""
        steps = max(0, self.last_step(plan.config.max_steps) - self.step)
        return self.data_use(self.next_index + steps * plan.shape.global_batch_size)

    def record(self, plan: TrainPlan) -> Record:
        """What a checkpoint's record says of the run; `storage.save` adds files and versions."""
        return {
            **{key: getattr(self, key) for key in _AS_IT_IS},
            "phases": [[phase.first_index, dict(phase.weights)] for phase in self.order.phases],
            "data": {name: asdict(facts) for name, facts in self.data.items()},
            "tokenizer_sha256": plan.tokenizer_sha256,
            "ledger": self.data_use(self.next_index),
            "anneal": self.anneal,
            "spent_s": dict(self.spent_s),
            "unix_s": time.time(),  # when the run was in this state
            "world_size": plan.shape.world_size,
            "config": asdict(plan.config),
        }


@dataclass(frozen=True, kw_only=True)
class Session:
    """What a process holds of a run."""

    plan: TrainPlan
    run: Path
    world: World
    display: Display
    journal: Journal
    network: Network
    optimizer: Optimizer
    history: GuardHistory
    first_index: int  # where it began or was resumed
    saved: list[Path]  # the checkpoints that the run had then, oldest first

    def log(self, text: str, event: str, **facts: Any) -> None:
        """Show a line and write the event down."""
        self.display.print(text)
        self.journal.event(event, **facts)


@contextlib.contextmanager
def claim(run: Path, world: World) -> Iterator[None]:
    """The run's folder, made and held by this job alone until it ends, however it ends."""
    with contextlib.ExitStack() as stack:

        def lock() -> None:
            run.mkdir(parents=True, exist_ok=True)
            _check_own_files(run)
            file = stack.enter_context(open_plain(run / ".lock", os.O_RDWR | os.O_CREAT))
            try:
                # of the process: a lock of the file handle would be inherited by loader workers
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    return  # a file system without locks: NFS, Lustre
                raise ConfigError(
                    f"{run} is being trained by another process: wait for it, stop it, "
                    "or give another --out"
                ) from None

        world.on_main(lock)
        yield


def _check_own_files(run: Path) -> None:
    """ConfigError for a link in a run's folder: what is written or removed would lie elsewhere."""
    for path in run.rglob("*"):
        if path.is_symlink():
            raise ConfigError(
                f"{path} is a link, and a run writes and removes in its own folder alone: put what "
                "it names there, or give another --out"
            )


def initial_state(plan: TrainPlan) -> State:
    """The state of a run that has not begun."""
    order = _order(plan, dict(plan.sources), (Phase(0, plan.weights),))
    return State(order=order, data=dict(plan.sources))


def state_from(record: Record, plan: TrainPlan) -> tuple[State, list[str]]:
    """The state in a record, and the lines that say what differs from the plan.

    ConfigError for what must not differ: the model, the seed, the tokenizer, a source's content.
    """
    for key in ("config", "next_index", "tokenizer_sha256", "data", "phases"):
        if key not in record or record[key] == []:
            raise ConfigError(
                f"this checkpoint (it has no {key}) holds weights and no training state: start "
                "from it with --set init_from=ITS_RUN and another --out"
            )
    where, writer = f"the record of step {record['step']}", writer_of(record)
    before = from_stored(type(plan.config), record["config"], where, writer)
    changes = differences(before, plan.config)
    for key, (old, new) in changes.items():
        if (key.startswith("model.") and key not in _MAY_CHANGE) or key in ("seed", "optim.name"):
            raise ConfigError(
                f"{key} is {spell_value(new)} and was {spell_value(old)} in this run: go on with "
                f"--set {key}={spell_value(old)} (or the same --preset: it was {before.preset}), "
                "or start a new run with --out"
            )
    data = {
        name: from_stored(SourceFacts, facts, where, writer, f"data.{name}.")
        for name, facts in record["data"].items()
    }
    _check_data(record, data, plan)
    phases = tuple(Phase(int(first), dict(weights)) for first, weights in record["phases"])
    next_index, norms = int(record["next_index"]), [float(n) for n in record.get("norms", [])]
    new_phase = phases[-1].weights != plan.weights
    if new_phase:
        phases += (Phase(next_index, plan.weights),)
    if new_phase or "global_batch_tokens" in changes:
        norms = []  # gradients may have another size
    another_budget = changes.keys() & {"max_dollars", "dollars_per_hour"}
    anneal = None if another_budget else record.get("anneal")
    state = State(
        step=int(record["step"]),
        next_index=next_index,
        time_s=float(record.get("time_s", 0.0)),
        refused_in_a_row=int(record.get("refused_in_a_row", 0)),
        norms=norms,
        skipped=tuple((int(begin), int(end)) for begin, end in record.get("skipped", [])),
        order=_order(plan, data, phases),
        data=data,
        anneal=Anneal(*anneal) if anneal else None,
        spent_s=dict(record.get("spent_s", {})),
    )
    changes.pop("shards", None)  # where they lie: that they are the same is checked by their hash
    notes = [f"changed: {key} was {old}, is {new}" for key, (old, new) in changes.items()]
    was, now = (
        lr_at(state.step, c.optim, c.max_steps, state.anneal) for c in (before, plan.config)
    )
    if was != now:
        notes.append(f"! the learning rate jumps: {was:.3g} was next, {now:.3g} is")
    return state, notes


def _check_data(record: Record, data: dict[str, SourceFacts], plan: TrainPlan) -> None:
    """ConfigError for another tokenizer or changed sources; new sources are added to `data`."""
    if record["tokenizer_sha256"] != plan.tokenizer_sha256:
        raise ConfigError(
            "the shards were made with another tokenizer than this run has learned; "
            "train on the old ones, or start a new run with --out"
        )
    for name, facts in plan.sources.items():
        if data.setdefault(name, facts).root != facts.root:
            raise ConfigError(
                f"{plan.config.shards}/{name} is not the data this run has read (dataset hash "
                f"{facts.root[:12]}, was {data[name].root[:12]}): bring the old shards back, "
                "or start a new run with --out"
            )


def _order(plan: TrainPlan, data: dict[str, SourceFacts], phases: tuple[Phase, ...]) -> DataOrder:
    rows = {name: facts.n_rows for name, facts in data.items()}
    if unknown := {name for phase in phases for name in phase.weights} - rows.keys():
        raise ConfigError(
            f"the checkpoint's record draws {unknown.pop()!r} and says nothing of it: it is "
            "damaged, use another"
        )
    return DataOrder(seed=plan.config.seed, rows=rows, phases=phases)


def check_max_epochs(plan: TrainPlan, state: State) -> None:
    """ConfigError if a source would be drawn more often than `max_epochs` allows."""
    data_use = state.data_use_at_end(plan)
    for name, limit in plan.config.max_epochs.items():
        if name not in data_use:
            raise ConfigError(
                f"max_epochs.{name}={limit}: no such source is drawn; "
                f"there are: {', '.join(data_use)}"
            )
        if (epochs := data_use[name]["epochs"]) > limit:
            raise ConfigError(
                f"{name} would be seen {epochs:.3g} times, max_epochs.{name}={limit}: prepare more "
                "of it, lower its share, or train for fewer steps"
            )


def describe_data_use(plan: TrainPlan, state: State) -> Iterator[str]:
    """Of each source what the run will have drawn, and what it has, in lines for people."""
    now = state.data_use(state.next_index)
    for name, end in state.data_use_at_end(plan).items():
        so_far = f" (so far {_spell(now[name])})" if state.step else ""
        yield f"data use {name}: {_spell(end)} at the end{so_far}"


def _spell(use: dict[str, Any]) -> str:
    return f"{use['rows']:,} sequences, {use['tokens']:,} tokens, {use['epochs']:.3g} epochs"
