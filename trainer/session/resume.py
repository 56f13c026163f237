"""Opens a session where a run goes on from: its folder is read once, by the main rank, for all."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from model.transformer import Transformer
from shards.files import publish_bytes, sha256_file
from shards.format import TOKENIZER_FILES, tokenizer_path
from shards.reader import ShardReader
from trainer.checkpoint import storage
from trainer.checkpoint.retention import invalidate_after, mirror_of, newest_intact, resumable
from trainer.checkpoint.runs import (
    CONFIG,
    EVENTS,
    METRICS,
    checkpoints,
    is_checkpoint,
    newest_checkpoint,
)
from trainer.config.config import differences, load_config, save_config
from trainer.config.train_plan import TrainPlan, describe_plan, summarise_plan
from trainer.data.batches import MicroBatches, StepRange
from trainer.data.loader import Loader
from trainer.distributed.world import World
from trainer.errors import CheckpointError, ConfigError
from trainer.faults.inject import Faults, flip_a_bit
from trainer.metrics import goodput, metrics
from trainer.metrics.display import Display
from trainer.metrics.metrics import NEW_HISTORY, GuardHistory, Journal, RunEvent
from trainer.optimizer.optimizer import make_optimizer
from trainer.session import state as states
from trainer.session.network import KERNEL_NOTE, build_network, fill_shards
from trainer.session.state import Session, State, initial_state, state_from
from trainer.validation.validation import HeldOutScorer, read_token_bytes


class RunHistory(NamedTuple):
    """What the folder of a run says of it so far."""

    candidates: list[Path]  # checkpoints to go on from, the newest first
    fallbacks: list[str]  # why none is taken from the run itself
    events: list[dict[str, Any]]
    guard: GuardHistory  # skipped updates and rollbacks that hold for the steps to come
    alive_unix_s: float  # when a log was last written
    new_history: bool  # what events.jsonl says of earlier steps need not hold for them


class ResumePoint(NamedTuple):
    """The state to go on from, and the checkpoint that holds its weights and moments."""

    checkpoint: Path | None  # None: the beginning
    state: State
    notes: list[str]  # what differs from the configuration so far
    fallbacks: list[str]  # what is wrong with newer checkpoints
    saved_unix_s: float | None  # when the run was in that state


@contextlib.contextmanager
def begin(
    plan: TrainPlan, run: Path, resume: str, world: World, display: Display, *, restarted: bool
) -> Iterator[tuple[Session, State]]:
    """The session and the state to go on from: that of a checkpoint, or of the very beginning.

    `restarted`: the same job goes on by itself, after a rank was lost or the run rolled back.
    """
    began, config = time.time(), plan.config
    history = world.on_main(lambda: read_run_history(plan, run, resume, restarted=restarted))
    point = find_checkpoint(plan, history, world)
    state = point.state
    if not restarted:
        for line in summarise_plan(plan):
            display.print(line)
    states.check_max_epochs(plan, state)
    network = build_network(config, world)
    optimizer = make_optimizer(network.bare, config.optim)
    if point.checkpoint is not None:
        storage.restore(point.checkpoint, network.bare, optimizer, world)
    elif config.init_from:
        _load_initial_weights(plan, network.bare)
    state.leave_out(history.guard.left_out)
    set_aside, saved = world.on_main(lambda: _prepare_folder(plan, run, state.step))
    session = Session(
        plan=plan,
        run=run,
        world=world,
        display=display,
        journal=Journal(run, state.step, writes=world.is_main, tensorboard=config.tensorboard),
        network=network,
        optimizer=optimizer,
        history=history.guard,
        first_index=state.next_index,
        saved=saved,
    )
    goodput.count_start(
        state.spent_s, began, point.saved_unix_s, history.events, history.alive_unix_s
    )
    aside = [f"! {name} is set aside: the run goes on from before it" for name in set_aside]
    mark = {NEW_HISTORY: True} if history.new_history else {}
    _announce(session, point, [*network.notes, *point.notes, *aside], mark)
    yield session, state


def show_plan(plan: TrainPlan, state: State, tokens_per_s: float | None, display: Display) -> None:
    """Print what the run will do from a state on; the rate is that of its last logged step."""
    for line in (*describe_plan(plan, tokens_per_s), *states.describe_data_use(plan, state)):
        display.print(line)


def _prepare_folder(plan: TrainPlan, run: Path, step: int) -> tuple[list[str], list[Path]]:
    """The names of later checkpoints, now set aside, and those that stay; config.json is new."""
    set_aside = invalidate_after(run, step, mirror_of(run, plan.config.checkpoint))
    save_config(run, plan.config)
    shards = next(iter(plan.folders.values()))
    for name in TOKENIZER_FILES:
        if (shards / name).exists():
            publish_bytes(run / name, (shards / name).read_bytes())
    return set_aside, checkpoints(run)


def check_start(plan: TrainPlan, run: Path, resume: str) -> None:
    """ConfigError for what would end a real start of this plan after a dry run showed it."""
    history = read_run_history(plan, run, resume, restarted=False)
    if plan.config.init_from and not history.candidates:
        _check_initial(plan)


def _check_initial(plan: TrainPlan) -> Path:
    """The checkpoint to start from; ConfigError unless it is of the same ids and shapes."""
    source = Path(plan.config.init_from)
    checkpoint, path = newest_checkpoint(source), tokenizer_path(source)
    theirs = storage.read_record(checkpoint).get("tokenizer_sha256")
    if theirs is None and path.exists():  # weights from elsewhere
        theirs = sha256_file(path)
    if theirs not in (None, plan.tokenizer_sha256):
        raise ConfigError(
            f"init_from={source}: its tokenizer is not that of the shards, so its ids mean other "
            f"text; prepare them with --tokenizer {path}"
        )
    with torch.device("meta"):
        ours, shapes = (
            {name: tuple(weight.shape) for name, weight in Transformer(model).named_parameters()}
            for model in (plan.config.model, load_config(source).model)
        )
    for name, shape in ours.items():
        if shapes.get(name) != shape:
            raise ConfigError(
                f"init_from={source}: its {name} is {shapes.get(name, 'missing')}, this run's is "
                f"{shape}: use shards of its tokenizer and no --set model."
            )
    return checkpoint


def _load_initial_weights(plan: TrainPlan, model: Transformer) -> None:
    """Give the model the weights of another run's newest checkpoint."""
    weights = storage.load_weights(_check_initial(plan))
    with torch.no_grad(), fill_shards():
        for name, parameter in model.named_parameters():
            if name not in weights or weights[name].shape != parameter.shape:
                raise ConfigError(
                    f"init_from={plan.config.init_from}: {name} is not what its {CONFIG} says: put "
                    "that file back which belongs to the weights"
                )
            parameter.copy_(weights[name])


def _announce(
    session: Session, point: ResumePoint, notes: list[str], mark: dict[str, bool]
) -> None:
    state, say = point.state, session.display.print
    # all that says which samples the steps from here on take, and on which rank
    facts = {"step": state.step, "next_index": state.next_index, "skipped": state.skipped}
    phases = [[phase.first_index, dict(phase.weights)] for phase in state.order.phases]
    facts |= {"phases": phases, "shape": session.plan.shape._asdict()}
    for note in notes:
        if not note.startswith(KERNEL_NOTE):  # that is for the log
            say(note)
    if point.checkpoint is None:
        text = f"{session.run}: starting at step 0"
        session.log(text, RunEvent.START, notes=notes, **mark, **facts)
        return
    for reason in point.fallbacks:
        text = f"! {reason}; GOING ON FROM {point.checkpoint.name}"
        session.log(text, RunEvent.FALLBACK, reason=reason)
    if phases[-1][0] == state.next_index:
        text = f"the mixture is now {phases[-1][1]}"
        session.log(text, RunEvent.MIXTURE, step=state.step, weights=phases[-1][1])
    if state.step >= state.last_step(session.plan.config.max_steps):
        say(f"{session.run}: already at step {state.step}; --set max_steps=N takes it further")
    else:
        facts = {"commit": str(point.checkpoint), "notes": notes, **mark, **facts}
        session.log(f"resumed {point.checkpoint} at step {state.step}", RunEvent.RESUME, **facts)


def read_run_history(plan: TrainPlan, run: Path, resume: str, *, restarted: bool) -> RunHistory:
    """The history that `--resume auto|never|PATH` goes on with; ConfigError where it cannot."""
    own = checkpoints(run)
    if restarted and own:
        resume = "auto"
    if resume == "never" and own:
        raise ConfigError(
            f"{run} holds a run with checkpoints up to {own[-1].name}: --resume never would "
            "mix two runs; give another --out, or remove it"
        )
    named = resume not in ("auto", "never")
    new_history = not restarted and (run / CONFIG).exists()
    if new_history and not named:
        new_history = bool(differences(load_config(run), plan.config))
    guard = GuardHistory() if new_history else metrics.read_history(run)
    found = _candidates(plan, run, resume)
    logs = [run / name for name in (METRICS, EVENTS) if (run / name).exists()]
    alive = max((log.stat().st_mtime for log in logs), default=0.0)
    return RunHistory(*found, metrics.read_events(run), guard, alive, new_history)


def find_checkpoint(plan: TrainPlan, history: RunHistory, world: World) -> ResumePoint:
    """The newest intact checkpoint of a history, verified by all ranks; else the beginning."""
    found = newest_intact(history.candidates, history.fallbacks, world)
    if found is None:
        return ResumePoint(None, initial_state(plan), [], [], None)
    checkpoint, record, fallbacks = found
    saved_unix_s = float(record.get("unix_s", time.time()))
    return ResumePoint(checkpoint, *state_from(record, plan), fallbacks, saved_unix_s)


def peek_state(plan: TrainPlan, run: Path, resume: str) -> State:
    """The state that a run would go on from, by its newest readable record; nothing is verified."""
    for checkpoint in _candidates(plan, run, resume)[0]:
        try:
            return state_from(storage.read_record(checkpoint), plan)[0]
        except CheckpointError:
            continue  # reported when it is to be loaded
    return initial_state(plan)


def measured_rate(run: Path) -> float | None:
    """Tokens a second of a run's last logged step, if it has one."""
    lines = metrics.read_metrics(run)
    rate = lines[-1].get("tokens_per_s") if lines else None
    return rate if isinstance(rate, float) and 0 < rate < math.inf else None


def _candidates(plan: TrainPlan, run: Path, resume: str) -> tuple[list[Path], list[str]]:
    if resume in ("auto", "never"):
        return resumable(run, mirror_of(run, plan.config.checkpoint))
    place = Path(resume)
    found = [place] if is_checkpoint(place) else checkpoints(place)[::-1]
    if not found:
        raise CheckpointError(f"--resume {resume}: no checkpoint there; name a run or its step-N")
    return found, []


@contextlib.contextmanager
def resume_loader(session: Session, state: State, faults: Faults) -> Iterator[Loader]:
    """The loader of the steps that are left, its workers ended with the block."""
    plan, rank = session.plan, session.world.rank
    steps = StepRange(
        first_index=state.next_index,
        n_steps=max(0, plan.config.max_steps - state.step),
        shape=plan.shape,
        rank=rank,
        skipped=state.skipped,
    )
    readers = {name: ShardReader(folder) for name, folder in plan.folders.items()}
    order = state.order
    for step in faults.bit_flip_steps():
        number = (step - 1 - state.step) * plan.shape.grad_accum_steps
        located = order.locate(steps.indices(order.seed, number)[:1])
        flip_a_bit(readers[order.sources[int(located.source[0])]], int(located.row[0]))
    batches = MicroBatches(order, readers, steps)

    def log(text: str) -> None:
        text = f"! rank {rank}: {text}"
        metrics.report_rank_failure(session.run, text, RunEvent.LOADER, rank=rank)

    loader = Loader(batches, plan.config.loader, session.world.device, plan.pad_id, log)
    with contextlib.closing(loader):
        yield loader


def open_held_out(plan: TrainPlan, world: World) -> HeldOutScorer | None:
    """What the run scores while it trains; None if it scores nothing."""
    if not plan.config.validation.interval:
        return None
    shards, opened = Path(plan.config.shards), list[HeldOutScorer]()

    def read() -> None:
        scorer = HeldOutScorer(
            {name: shards / name for name in (*plan.sources, *plan.evaluated)},
            rows=plan.config.validation.rows,
            batch_size=plan.shape.micro_batch_size,
            pad_id=plan.pad_id,
            token_bytes=read_token_bytes(shards / next(iter(plan.sources)), plan.tokenizer_sha256),
            world=world,
        )
        opened.append(scorer)

    world.on_all(read)  # a damaged row stops all ranks: alone, one would leave the others waiting
    return opened[0] if opened[0].sources else None
