"""Where seconds went, and a budget that ends a run in time: on a clock that the tests set."""

import json
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.checkpoint.runs import checkpoints, newest_checkpoint
from trainer.checkpoint.storage import load_weights
from trainer.data.mixture import DataOrder
from trainer.errors import ConfigError
from trainer.metrics import goodput
from trainer.metrics.goodput import Stopwatch, count_start, parts
from trainer.metrics.metrics import read_events, read_metrics
from trainer.optimizer.schedule import Anneal, OptimConfig, lr_at
from trainer.session.budget import ANNEAL, END, annealing_steps, apply_request
from trainer.session.save import CheckpointSaver
from trainer.session.state import State, initial_state
from trainer.train import train
from trainer_samples import small_plan

pytestmark = pytest.mark.usefixtures("one_thread")


class Clock:
    """A clock that the tests move."""

    def __init__(self) -> None:
        self.now = 1e9
        self.slower = 1

    def perf_counter(self) -> float:
        return self.now

    time = perf_counter


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(goodput, "time", clock)
    return clock


def test_a_pause_belongs_to_its_kind_and_to_no_lap(clock: Clock) -> None:
    watch = Stopwatch({"evaluation": 1.0})
    clock.now += 3
    with watch.within("communication"):
        clock.now += 2
    with watch.paused("evaluation"):
        clock.now += 10
    clock.now += 1
    assert watch.lap() == 6
    assert watch.lap() == 0
    assert watch.spent_s == {"evaluation": 11.0, "communication": 2.0}
    assert watch.longest_s == {"evaluation": 10.0, "communication": 2.0}
    assert parts(6.0, watch.spent_s)["compute"] == 4.0
    assert sum(parts(6.0, watch.spent_s).values()) == 17.0


def events(*named: tuple[str, float]) -> list[dict[str, Any]]:
    return [{"event": kind, "unix_s": 1e9 + at} for kind, at in named]


@pytest.mark.parametrize(
    ("past", "saved", "alive", "kind", "lost"),
    [
        ([], None, 0, "start", 5),
        ([], 900, 0, "start", 5),  # resumed from another run
        ([("start", 100)], None, 950, "restarts", 855),  # killed before its first checkpoint
        ([("start", 100), ("checkpoint", 501)], 500, 950, "restarts", 455),  # killed
        ([("start", 100), ("checkpoint", 501), ("stopped", 502)], 500, 502, "restarts", 7),
        (
            [("start", 1), ("stopped", 502), ("resume", 702), ("checkpoint", 801)],
            800,
            950,
            "restarts",
            155,
        ),
        ([("start", 1), ("stopped", 502), ("resume", 702)], 500, 950, "restarts", 255),
        ([("start", 1), ("checkpoint", 501)], 500, 2000, "restarts", 505),  # a copied log
    ],
)
def test_time_in_which_nothing_ran_is_not_lost(
    clock: Clock,
    past: list[tuple[str, float]],
    saved: float | None,
    alive: float,
    kind: str,
    lost: float,
) -> None:
    """A machine that was away for a weekend used up max_dollars."""
    clock.now += 1005  # the process came at 1000 and is about to make its first step
    spent: dict[str, float] = {}
    since = None if saved is None else 1e9 + saved
    count_start(spent, 1e9 + 1000, since, events(*past), 1e9 + alive)
    assert spent == {kind: lost}


def test_every_second_of_a_run_is_somewhere(shards: Path, tmp_path: Path) -> None:
    """The parts add up to what passed on the wall, and go on where the last checkpoint left
    them."""
    began = time.time()
    changes: dict[str, Any] = {"checkpoint__interval_steps": 2, "validation__interval": 3}
    train(small_plan(shards, max_steps=4, **changes), tmp_path)
    passed = time.time() - began
    train(small_plan(shards, max_steps=6, **changes), tmp_path)
    lines = read_metrics(tmp_path)
    for line in lines:
        spent = line["spent_s"]
        assert list(spent) == [
            *("compute", "data", "communication", "checkpoint", "evaluation", "start", "restarts")
        ]
        assert sum(spent.values()) >= line["time_s"]
    assert lines[2]["spent_s"]["evaluation"] == 0 < lines[3]["spent_s"]["evaluation"]
    assert lines[3]["spent_s"]["restarts"] == 0 < lines[4]["spent_s"]["restarts"]
    for before, after in pairwise(lines):
        assert all(after["spent_s"][part] >= value for part, value in before["spent_s"].items()
                   if part != "compute")  # fmt: skip
    done = [line for line in read_events(tmp_path) if line["event"] == "done"]
    assert sum(done[0]["spent_s"].values()) == pytest.approx(passed, rel=0.2)


def test_annealing_is_a_line_down_to_min_lr() -> None:
    optim = OptimConfig(lr=1.0, warmup_steps=10)
    anneal = Anneal(first_step=50, n_steps=10)
    assert [lr_at(step, optim, 100, anneal) for step in range(50)] == [
        lr_at(step, optim, 100) for step in range(50)
    ]
    start = lr_at(50, optim, 100)
    rates = [lr_at(step, optim, 100, anneal) for step in range(50, 61)]
    assert rates == pytest.approx([0.1 + (start - 0.1) * (1 - n / 10) for n in range(11)])
    assert lr_at(3, optim, 100, Anneal(2, 4)) == pytest.approx(0.3 - 0.2 / 4)


@given(st.integers(0, 10**6), st.integers(1, 10**6))
@settings(deadline=None)
def test_a_tenth_of_the_steps_anneal(step: int, more: int) -> None:
    n_steps = annealing_steps(step)
    assert n_steps == 1 or (n_steps - 1) / (step + n_steps - 1) < 0.1 <= n_steps / (step + n_steps)
    state = State(step=step, order=DataOrder(seed=0, rows={}, phases=()), data={})
    assert "anneal" in apply_request(ANNEAL, state, step + more)
    assert state.last_step(step + more) == min(step + n_steps, step + more)
    assert apply_request(ANNEAL, state, step + more) == ""


def metered(clock: Clock, monkeypatch: pytest.MonkeyPatch, *, slows: bool) -> None:
    """Let each step and each checkpoint take so long; `slows`: each step four times, once saved."""
    advance, checkpoint = Stopwatch.lap, CheckpointSaver.checkpoint

    def lap(watch: Stopwatch) -> float:
        clock.now += 10 * clock.slower
        return advance(watch)

    def saved(saver: CheckpointSaver, **how: Any) -> None:
        clock.now += 5
        clock.slower = 4 if slows else 1
        checkpoint(saver, **how)

    monkeypatch.setattr(Stopwatch, "lap", lap)
    monkeypatch.setattr(CheckpointSaver, "checkpoint", saved)


def test_a_budget_anneals_checkpoints_and_ends_inside_itself(
    shards: Path, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    metered(clock, monkeypatch, slows=False)
    money: dict[str, Any] = {"dollars_per_hour": 36, "max_dollars": 6}  # a cent a second: 600 s
    plan = small_plan(shards, max_steps=1000, **money)
    outcome = train(plan, tmp_path / "full")
    assert not outcome.stopped
    happened = read_events(tmp_path / "full")
    (anneal,) = [event for event in happened if event["event"] == "anneal"]
    first, n_steps = anneal["anneal"]
    assert outcome.step == first + n_steps
    assert n_steps == annealing_steps(first)
    assert [checkpoint.name for checkpoint in checkpoints(tmp_path / "full")] == [
        f"step-{first}", f"step-{outcome.step}"
    ]  # fmt: skip
    lines = read_metrics(tmp_path / "full")
    assert [line["lr"] for line in lines] == [
        lr_at(step, plan.config.optim, 1000, Anneal(first, n_steps)) for step in range(len(lines))
    ]
    assert lines[-1]["dollars_left"] == pytest.approx(6 - lines[-1]["dollars"], abs=1e-3)
    spent = 0.01 * sum(happened[-1]["spent_s"].values())
    assert 5 < spent <= 6
    # killed while it annealed: the recorded beginning is replayed, whatever the clock says now
    full, parted = tmp_path / "full", tmp_path / "parted"
    train(plan, parted, resume=str(full / "checkpoints" / f"step-{first}"))
    a, b = load_weights(newest_checkpoint(full)), load_weights(newest_checkpoint(parted))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not train(plan, parted).stopped  # complete: nothing is added
    assert newest_checkpoint(parted).name == f"step-{outcome.step}"


def test_a_budget_that_runs_out_early_ends_the_annealing(
    shards: Path, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    metered(clock, monkeypatch, slows=True)
    plan = small_plan(shards, max_steps=1000, dollars_per_hour=36, max_dollars=8)
    assert train(plan, tmp_path).step > 30
    happened = read_events(tmp_path)
    assert [event["event"] for event in happened].count("anneal") == 2
    assert 600 < sum(happened[-1]["spent_s"].values()) <= 800
    record = json.loads((newest_checkpoint(tmp_path) / "checkpoint.json").read_text())
    assert sum(record["anneal"]) == record["step"]
    state = initial_state(plan)
    assert "used up: step 0 is the last" in apply_request(END, state, 1000)
    assert state.last_step(1000) == 0
    # another budget is another decision
    more = small_plan(shards, max_steps=1000, dollars_per_hour=36, max_dollars=12)
    assert train(more, tmp_path).step > record["step"]


def test_a_budget_needs_a_price(shards: Path) -> None:
    with pytest.raises(ConfigError, match=r"max_dollars=5\.0: give the price too"):
        small_plan(shards, max_dollars=5)
