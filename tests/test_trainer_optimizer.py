"""Every target weighs the same, only matrices decay, and a bad gradient changes nothing."""

import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer, Rprop

from model.config import count_params
from trainer.checkpoint.runs import newest_checkpoint
from trainer.config.config import RunConfig, differences, from_stored
from trainer.config.memory import memory_by_part
from trainer.config.sections import GuardConfig
from trainer.errors import ConfigError
from trainer.faults.guard import Guard
from trainer.metrics.metrics import read_metrics
from trainer.optimizer.optimizer import (
    OPTIMIZERS,
    finish_gradients,
    make_optimizer,
    optimizer_bytes,
    set_lr,
    update,
)
from trainer.optimizer.schedule import OptimConfig
from trainer.train import train
from trainer_samples import events_of, make_shards, small_plan, tensor_files


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.ones(3, 2))
        self.norm = nn.Parameter(torch.ones(3))


def with_gradients(toy: Toy, value: float) -> None:
    for parameter in toy.parameters():
        parameter.grad = torch.full_like(parameter, value)


def test_only_matrices_decay() -> None:
    toy = Toy()
    optimizer = make_optimizer(toy, OptimConfig(lr=0.5, weight_decay=0.1))
    with_gradients(toy, 0.0)
    optimizer.step()
    assert torch.equal(toy.matrix, torch.full((3, 2), 0.95))
    assert torch.equal(toy.norm, torch.ones(3))


def test_gradients_end_per_true_target() -> None:
    toy = Toy()
    optimizer = make_optimizer(toy, OptimConfig())
    with_gradients(toy, 2.0 / 100)  # a sum of 2 over 100 expected targets, of which 25 are real
    norm = finish_gradients(optimizer, 100, torch.tensor(25.0), OptimConfig(grad_clip=0.0))
    assert toy.matrix.grad is not None
    assert toy.matrix.grad.flatten().tolist() == pytest.approx([2 / 25] * 6)
    assert norm.item() == pytest.approx(2 / 25 * math.sqrt(9))


def test_clipping_by_the_true_norm() -> None:
    toy = Toy()
    optimizer = make_optimizer(toy, OptimConfig())
    with_gradients(toy, 1.0)
    norm = finish_gradients(optimizer, 100, torch.tensor(50.0), OptimConfig(grad_clip=0.5))
    assert norm.item() == pytest.approx(6.0)
    assert toy.norm.grad is not None
    assert toy.norm.grad.tolist() == pytest.approx([0.5 / 3] * 3, rel=1e-5)


@pytest.mark.parametrize(("value", "n_targets"), [(math.nan, 9.0), (math.inf, 9.0), (1.0, 0.0)])
def test_a_gradient_that_is_not_finite_changes_nothing(value: float, n_targets: float) -> None:
    toy = Toy()
    optimizer = make_optimizer(toy, OptimConfig(lr=0.5))
    with_gradients(toy, 1.0)
    guard = Guard(GuardConfig(), [], torch.device("cpu"))
    norm = finish_gradients(optimizer, 9, torch.tensor(9.0), OptimConfig())
    update(optimizer, guard.should_skip(norm, torch.tensor(0.0)))
    before = [tensor.clone() for tensor in (toy.matrix, toy.norm)]
    moments = [state["exp_avg"].clone() for state in optimizer.state.values()]
    with_gradients(toy, value)
    norm = finish_gradients(optimizer, 9, torch.tensor(n_targets), OptimConfig())
    update(optimizer, guard.should_skip(norm, torch.tensor(0.0)))
    assert torch.equal(toy.matrix, before[0])
    assert torch.equal(toy.norm, before[1])
    for state, moment in zip(optimizer.state.values(), moments, strict=True):
        assert torch.equal(state["exp_avg"], moment)
        assert state["step"].item() == 1  # bias correction counts updates, not steps


def test_a_new_optimizer_is_at_its_beginning_and_changes_nothing() -> None:
    toy = Toy()
    with_gradients(toy, 3.0)
    optimizer = make_optimizer(toy, OptimConfig(weight_decay=0.1, eps=0.0))
    for parameter in toy.parameters():
        assert torch.equal(parameter, torch.ones_like(parameter))
        assert parameter.grad is not None and bool((parameter.grad == 3.0).all())
        state = optimizer.state[parameter]
        assert list(state) == ["step", "exp_avg", "exp_avg_sq"]
        assert not any(value.any() for value in state.values())
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]


def test_the_learning_rate_reaches_every_group() -> None:
    optimizer = make_optimizer(Toy(), OptimConfig())
    assert set_lr(optimizer, 0.125) == 0.125
    assert {group["lr"] for group in optimizer.param_groups} == {0.125}


class Lion(Optimizer):
    """Chen et al., Symbolic discovery of optimization algorithms (2023), as anyone would add it."""

    def __init__(self, groups: Any, lr: float, beta1: float, beta2: float) -> None:
        super().__init__(groups, {"lr": lr, "beta1": beta1, "beta2": beta2})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in (each for each in group["params"] if each.grad is not None):
                if not (state := self.state[parameter]):
                    state["exp_avg"] = torch.zeros_like(parameter)
                sign = state["exp_avg"].lerp(parameter.grad, 1 - group["beta1"]).sign()
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.sub_(group["lr"] * sign)
                state["exp_avg"].lerp_(parameter.grad, 1 - group["beta2"])


OTHERS: dict[str, Callable[[Any, OptimConfig], Optimizer]] = {
    "lion": lambda groups, config: Lion(groups, config.lr, config.beta1, config.beta2),
    "sgd": lambda groups, config: SGD(groups, config.lr, config.beta1),
    "fused-sgd": lambda groups, config: SGD(groups, config.lr, config.beta1, fused=True),
    "rprop": lambda groups, config: Rprop(groups, config.lr),
}


@pytest.fixture(params=OTHERS)
def other(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of an optimizer that is a row of the table now."""
    if request.param in OTHERS:
        monkeypatch.setitem(OPTIMIZERS, request.param, OTHERS[request.param])
    return str(request.param)


@pytest.mark.parametrize("other", ["lion", "sgd", "fused-sgd"], indirect=True)
def test_another_optimizer_is_a_row(other: str) -> None:
    """Its first update is that of a new instance, and a skipped one leaves every bit as it was."""
    toy, plain, config = Toy(), Toy(), OptimConfig(name=other, lr=0.5)
    optimizer = make_optimizer(toy, config)
    expected = OTHERS[other]([{"params": list(plain.parameters()), "weight_decay": 0.0}], config)
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    plan, n_bytes = RunConfig(optim=config), 4 if other == "fused-sgd" else 12
    assert memory_by_part(plan, 1, "cpu")["moments"] == n_bytes * count_params(plan.model)
    for value in (0.5, 2.0):
        with_gradients(toy, value)
        with_gradients(plain, value)
        update(optimizer, torch.tensor(0.0))
        expected.step()
        assert torch.equal(toy.matrix, plain.matrix) and torch.equal(toy.norm, plain.norm)
    before = [tensor.clone() for tensor in tensors_of(toy, optimizer)]
    for value in (math.nan, 1e9):
        with_gradients(toy, value)
        update(optimizer, torch.tensor(1.0))
        assert all(map(torch.equal, tensors_of(toy, optimizer), before))
    assert len(before) == 4  # a moment of each parameter


def tensors_of(toy: Toy, optimizer: Optimizer) -> list[Tensor]:
    moments = [value for state in optimizer.state.values() for value in state.values()]
    return [*(parameter.detach() for parameter in toy.parameters()), *moments]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("other", ["lion", *OPTIMIZERS], indirect=True)
def test_each_optimizer_trains_is_guarded_and_resumes_bit_for_bit(
    other: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards, run = make_shards(tmp_path / "shards"), tmp_path / "run"
    changes: dict[str, Any] = {"max_steps": 7, "checkpoint__interval_steps": 4, "optim__lr": 1e-3}
    plan = small_plan(shards, optim__name=other, **changes)
    with monkeypatch.context() as once:
        once.setenv("SUMMER_FAULT", "nan:0:2")
        train(plan, run)
    assert events_of(run).count("skipped") == 1
    losses = [line["loss"] for line in read_metrics(run)]
    assert losses[-1] < losses[0] and math.isfinite(losses[-1])
    files = tensor_files(newest_checkpoint(run))
    (newest_checkpoint(run) / "checkpoint.json").unlink()
    assert newest_checkpoint(run).name == "step-4"
    train(plan, run)
    assert tensor_files(newest_checkpoint(run)) == files
    monkeypatch.setitem(OPTIMIZERS, "another", OTHERS["sgd"])
    with pytest.raises(ConfigError, match=rf"optim\.name is another and was {other} in this run"):
        train(small_plan(shards, optim__name="another", **changes), run)


@pytest.mark.parametrize("other", ["rprop"], indirect=True)
def test_an_optimizer_that_could_not_be_resumed_is_an_error(other: str) -> None:
    with pytest.raises(ConfigError, match=r"optim.name=rprop: its state 'step_size' must be a ten"):
        make_optimizer(Toy(), OptimConfig(name=other))


@pytest.mark.parametrize("key", ["name", "schedule"])
def test_an_unknown_row_is_named(key: str) -> None:
    rows: dict[str, Any] = {"name": "adamv", "schedule": "cosin"}
    near = {"name": "adamw", "schedule": "cosine"}[key]
    with pytest.raises(ConfigError, match=rf"optim.{key}={rows[key]}: did you mean {near}\? there"):
        optimizer_bytes(OptimConfig(**{key: rows[key]}))  # as the plan asks


def test_a_run_from_before_there_was_a_choice_goes_on() -> None:
    stored = asdict(RunConfig())
    for key in ("name", "schedule"):
        del stored["optim"][key]
    before = from_stored(RunConfig, stored, "config.json", "0.1.0")
    assert before == RunConfig()
    linear = RunConfig(optim=OptimConfig(schedule="linear"))
    assert differences(before, linear) == {"optim.schedule": ("cosine", "linear")}


def test_clipping_a_tiny_gradient_never_makes_it_larger() -> None:
    """torch's own rule: the limit over the norm and 1e-6, at most 1."""
    for limit, factor in ((1e-6, 0.25), (1.0, 1.0)):
        toy = Toy()
        with_gradients(toy, 1e-6)  # the norm of nine is 3e-6
        optimizer = make_optimizer(toy, OptimConfig())
        finish_gradients(optimizer, 1, torch.tensor(1.0), OptimConfig(grad_clip=limit))
        assert toy.matrix.grad is not None
        assert toy.matrix.grad.flatten().tolist() == pytest.approx([1e-6 * factor] * 6, rel=1e-5)


def test_an_optimizer_is_made_on_the_device_of_its_weights() -> None:
    toy = Toy()
    with torch.device("meta"):
        optimizer = make_optimizer(toy, OptimConfig())
        optimizer_bytes.cache_clear()
        assert optimizer_bytes(OptimConfig()) == 8
    assert all(not value.is_meta for value in tensors_of(toy, optimizer))


@pytest.mark.parametrize("key", ["weight_decay", "eps", "grad_clip", "warmup_steps"])
def test_no_option_may_be_negative_and_each_may_be_zero(key: str) -> None:
    options: dict[str, Any] = {key: 0}
    assert getattr(OptimConfig(**options), key) == 0
    with pytest.raises(ConfigError, match=rf"optim.{key}=-1"):
        OptimConfig(**options | {key: -1})


@pytest.mark.parametrize(("beta1", "beta2"), [(1.0, 0.5), (0.5, 1.0), (-0.1, 0.5), (0.5, -0.1)])
def test_each_beta_lies_below_one(beta1: float, beta2: float) -> None:
    assert OptimConfig(beta1=0, beta2=0).beta2 == 0
    with pytest.raises(ConfigError, match=r"must lie in \[0, 1\)"):
        OptimConfig(beta1=beta1, beta2=beta2)
