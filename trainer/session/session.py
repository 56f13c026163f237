"""What a process holds while it trains: opened, resumed and closed."""

from __future__ import annotations

import contextlib
import fcntl
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.optim import AdamW

from model.transformer import Transformer
from shards.files import publish_bytes
from shards.format import TOKENIZER
from shards.reader import ShardReader
from trainer.checkpoint import storage
from trainer.checkpoint.retention import abandon_after, mirror_of
from trainer.checkpoint.runs import CONFIG, EVENTS, checkpoints, newest_checkpoint
from trainer.config.config import differences, load_config, save_config
from trainer.config.plan import Plan
from trainer.data.batches import MicroBatches, Stretch
from trainer.data.loader import Loader
from trainer.distributed.world import World, make_deterministic
from trainer.errors import ConfigError
from trainer.faults.faults import alarm
from trainer.faults.guard import NOTHING_RECORDED, Recorded, recorded
from trainer.faults.inject import Faults, flip_a_bit
from trainer.metrics import goodput
from trainer.metrics.display import Screen
from trainer.metrics.metrics import Journal, read_lines
from trainer.optimizer.optimizer import make_optimizer
from trainer.session.ledger import refuse_repeats
from trainer.session.network import Network, build_network, filled_whole
from trainer.session.state import Found, State, find, fresh, state_from
from trainer.validation.text_bytes import read_text_bytes
from trainer.validation.validation import HeldOut


@dataclass(frozen=True, kw_only=True)
class Session:
    """One process's hold on a run."""

    plan: Plan
    run: Path
    world: World
    screen: Screen
    journal: Journal
    network: Network
    optimizer: AdamW
    recorded: Recorded
    first_index: int  # where it began or was resumed

    def tell(self, text: str, event: str, **facts: Any) -> None:
        """Show a line and write the event down."""
        self.screen.say(text)
        self.journal.event(event, **facts)


@contextlib.contextmanager
def claim(run: Path, world: World) -> Iterator[None]:
    """The run's folder, made and held by this job alone until it ends, however it ends."""
    with contextlib.ExitStack() as stack:

        def lock() -> None:
            run.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context((run / ".lock").open("w"))
            try:
                # of the process: a lock of the file handle would be inherited by loader workers
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise ConfigError(
                    f"{run} is being trained by another process: wait for it, stop it, "
                    "or give another --out"
                ) from None

        world.on_main(lock)
        yield


@contextlib.contextmanager
def begin(
    plan: Plan, run: Path, resume: str, world: World, screen: Screen, *, again: bool = False
) -> Iterator[tuple[Session, State]]:
    """The session and the state to go on from: that of a checkpoint, or of the very beginning.

    `again`: the same job goes on by itself, after a rank was lost or the run rolled back.
    """
    began, config = time.time(), plan.config
    if again and world.on_main(lambda: bool(checkpoints(run))):
        resume = "auto"
    mirror = mirror_of(run, config.checkpoint)
    found = find(run, resume, world, mirror)
    state = fresh(plan)
    notes: list[str] = []
    if found is not None:
        state, notes = state_from(found.record, plan)
    refuse_repeats(plan, state)
    if config.deterministic:
        make_deterministic(world.device)
    network = build_network(config, world)
    optimizer = make_optimizer(network.bare, config.optim)
    if found is not None:
        storage.restore(found.checkpoint, network.bare, optimizer, world)
    elif config.init_from:
        _start_from(Path(config.init_from), network.bare)
    anew = not again and world.on_main(lambda: _another_history(plan, run, resume))
    known = NOTHING_RECORDED if anew else world.on_main(lambda: recorded(run))
    state.leave_out(known.skipped)
    abandoned = world.on_main(lambda: abandon_after(run, state.step, mirror))
    notes += [f"! {name} is set aside: the run goes on from before it" for name in abandoned]
    world.on_main(lambda: _introduce(plan, run))
    session = Session(
        plan=plan,
        run=run,
        world=world,
        screen=screen,
        journal=Journal(run, state.step, writes=world.is_main, tensorboard=config.tensorboard),
        network=network,
        optimizer=optimizer,
        recorded=known,
        first_index=state.next_index,
    )
    saved = None if found is None else float(found.record.get("unix_s", began))
    goodput.count_start(state.spent_s, began, saved, read_lines(run / EVENTS))
    _announce(session, state, found, [*network.notes, *notes], {"anew": True} if anew else {})
    yield session, state


def _another_history(plan: Plan, run: Path, resume: str) -> bool:
    """Whether what events.jsonl says of earlier steps need not hold for those to come."""
    if not (run / CONFIG).exists():
        return False
    return resume not in ("auto", "never") or bool(differences(load_config(run), plan.config))


@contextlib.contextmanager
def open_loader(session: Session, state: State, faults: Faults) -> Iterator[Loader]:
    """The loader of the steps that are left, its workers ended with the block."""
    plan, rank = session.plan, session.world.rank
    stretch = Stretch(
        first_index=state.next_index,
        n_steps=max(0, plan.config.max_steps - state.step),
        shape=plan.shape,
        rank=rank,
        skipped=state.skipped,
    )
    readers = {name: ShardReader(folder) for name, folder in plan.folders.items()}
    order = state.order(plan.config.seed)
    for step in faults.rotten():
        number = (step - 1 - state.step) * plan.shape.grad_accum_steps
        located = order.locate(stretch.indices(order.seed, number)[:1])
        flip_a_bit(readers[order.sources[int(located.source[0])]], int(located.row[0]))
    batches = MicroBatches(order, readers, stretch)

    def tell(text: str) -> None:
        alarm(session.run, f"rank {rank}: {text}", "loader", rank=rank)

    loader = Loader(batches, plan.config.loader, session.world.device, plan.pad_id, tell)
    with contextlib.closing(loader):
        yield loader


def open_held_out(plan: Plan, world: World) -> HeldOut | None:
    """What the run scores while it trains; None if it scores nothing."""
    if not plan.config.validation.interval:
        return None
    opened: list[HeldOut] = []

    def read() -> None:
        opened.append(_read_held_out(plan, world))

    world.on_all(read)  # a damaged row stops all ranks: alone, one would leave the others waiting
    return opened[0] if opened[0].sources else None


def _read_held_out(plan: Plan, world: World) -> HeldOut:
    shards = Path(plan.config.shards)
    tokenizer = shards / next(iter(plan.sources)) / TOKENIZER
    return HeldOut(
        {name: shards / name for name in (*plan.sources, *plan.evaluated)},
        rows=plan.config.validation.rows,
        batch_size=plan.shape.micro_batch_size,
        pad_id=plan.pad_id,
        text_bytes=read_text_bytes(tokenizer, plan.tokenizer_sha256),
        world=world,
    )


def _start_from(source: Path, model: Transformer) -> None:
    """Give the model the weights of another run's newest checkpoint, or of one of its
    checkpoints."""
    checkpoint = newest_checkpoint(source)
    weights = storage.load_weights(checkpoint)
    with torch.no_grad(), filled_whole():
        for name, parameter in model.named_parameters():
            stored = weights.get(name)
            if stored is None or stored.shape != parameter.shape:
                raise ConfigError(
                    f"init_from={source}: its {name} is "
                    f"{'missing' if stored is None else tuple(stored.shape)}, this run's is "
                    f"{tuple(parameter.shape)}: use shards of its tokenizer and no --set model."
                )
            parameter.copy_(stored)


def _introduce(plan: Plan, run: Path) -> None:
    """Write what makes the run explain itself."""
    save_config(run, plan.config)
    tokenizer = next(iter(plan.folders.values())) / TOKENIZER
    if tokenizer.exists():
        publish_bytes(run / TOKENIZER, tokenizer.read_bytes())


def _announce(
    session: Session, state: State, found: Found | None, notes: list[str], mark: dict[str, bool]
) -> None:
    say = session.screen.say
    for note in notes:
        say(note)
    if found is None:
        text = f"{session.run}: starting at step 0"
        session.tell(text, "start", notes=notes, **mark, **_place(session, state))
        return
    for complaint in found.complaints:
        session.tell(
            f"! {complaint}; GOING ON FROM {found.checkpoint.name}", "fallback", reason=complaint
        )
    if state.phases[-1].first_index == state.next_index:
        weights = dict(state.phases[-1].weights)
        session.tell(f"the mixture is now {weights}", "mixture", step=state.step, weights=weights)
    if state.step >= state.last_step(session.plan.config.max_steps):
        say(f"{session.run}: already at step {state.step}; --set max_steps=N takes it further")
    else:
        checkpoint = str(found.checkpoint)
        text = f"resumed {checkpoint} at step {state.step}"
        session.tell(
            text, "resume", commit=checkpoint, notes=notes, **mark, **_place(session, state)
        )


def _place(session: Session, state: State) -> dict[str, Any]:
    """All that says which samples the steps from here on take, and on which rank."""
    phases = [[phase.first_index, dict(phase.weights)] for phase in state.phases]
    shape = session.plan.shape._asdict()
    place = {"step": state.step, "next_index": state.next_index, "skipped": state.skipped}
    return {**place, "phases": phases, "shape": shape}
