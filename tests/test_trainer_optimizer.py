"""Every target weighs the same, only matrices decay, and a bad gradient changes nothing."""

import math

import pytest
import torch
from torch import nn

from trainer.faults.guard import Guard, GuardConfig
from trainer.optimizer.optimizer import finish_gradients, make_optimizer, set_lr, update
from trainer.optimizer.schedule import OptimConfig


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
    update(optimizer, guard.refuse(norm, torch.tensor(0.0)))
    before = [tensor.clone() for tensor in (toy.matrix, toy.norm)]
    moments = [state["exp_avg"].clone() for state in optimizer.state.values()]
    with_gradients(toy, value)
    norm = finish_gradients(optimizer, 9, torch.tensor(n_targets), OptimConfig())
    update(optimizer, guard.refuse(norm, torch.tensor(0.0)))
    assert torch.equal(toy.matrix, before[0])
    assert torch.equal(toy.norm, before[1])
    for state, moment in zip(optimizer.state.values(), moments, strict=True):
        assert torch.equal(state["exp_avg"], moment)
        assert state["step"].item() == 1  # bias correction counts updates, not steps


def test_the_learning_rate_reaches_every_group() -> None:
    optimizer = make_optimizer(Toy(), OptimConfig())
    assert set_lr(optimizer, 0.125) == 0.125
    assert {group["lr"] for group in optimizer.param_groups} == {0.125}
