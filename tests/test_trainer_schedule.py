from typing import Any

import pytest

from trainer.errors import ConfigError
from trainer.optimizer.schedule import Anneal, OptimConfig, lr_at

OPTIM = OptimConfig(lr=1.0, warmup_steps=10)


def test_warmup_is_linear_and_begins_above_zero() -> None:
    rates = [lr_at(step, OPTIM, 100) for step in range(10)]
    assert rates == pytest.approx([0.1 * (step + 1) for step in range(10)])


def test_cosine_goes_from_lr_to_a_tenth() -> None:
    assert lr_at(10, OPTIM, 100) == 1.0
    assert lr_at(55, OPTIM, 100) == pytest.approx(0.55)
    assert lr_at(100, OPTIM, 100) == pytest.approx(0.1)
    assert lr_at(10**6, OPTIM, 100) == pytest.approx(0.1)
    rates = [lr_at(step, OPTIM, 100) for step in range(10, 101)]
    assert rates == sorted(rates, reverse=True)


def test_linear_goes_down_by_the_same_each_step() -> None:
    linear = OptimConfig(lr=1.0, warmup_steps=10, schedule="linear")
    rates = [lr_at(step, linear, 100) for step in (10, 55, 100, 10**6)]
    assert rates == pytest.approx([1.0, 0.55, 0.1, 0.1])
    assert lr_at(33, linear, 100) == pytest.approx(1 - 0.9 * 23 / 90)


def test_min_lr_may_be_given() -> None:
    assert lr_at(100, OptimConfig(lr=1.0, min_lr=0.0, warmup_steps=0), 100) == pytest.approx(0.0)
    with pytest.raises(ConfigError, match="between 0 and lr"):
        OptimConfig(lr=1.0, min_lr=2.0)


def test_a_run_shorter_than_its_warmup() -> None:
    assert [lr_at(step, OPTIM, 5) for step in (0, 4)] == pytest.approx([0.1, 0.5])


def test_an_anneal_is_a_line_from_its_first_rate_to_the_least() -> None:
    anneal = Anneal(55, 10)
    assert anneal.last_step == 65
    assert lr_at(54, OPTIM, 100, anneal) == lr_at(54, OPTIM, 100)
    rates = [lr_at(step, OPTIM, 100, anneal) for step in (55, 60, 64, 65, 70)]
    assert rates == pytest.approx([0.55, 0.325, 0.145, 0.1, 0.1])
    assert lr_at(55, OPTIM, 100, Anneal(55, 0)) == pytest.approx(0.55)
    early = [lr_at(step, OPTIM, 100, Anneal(0, 4)) for step in range(3)]
    assert early == pytest.approx([0.1, 0.1, 0.1])  # begins at the least rate: nothing to go down
    below = [
        lr_at(step, OptimConfig(lr=1.0, warmup_steps=20), 100, Anneal(0, 4)) for step in (0, 3)
    ]
    assert below == pytest.approx([0.05, 0.05])  # begins below it, and never goes up


@pytest.mark.parametrize("lr", [0.0, -1.0, float("inf"), float("nan")])
def test_a_rate_is_a_number_above_zero(lr: float) -> None:
    with pytest.raises(ConfigError, match="must be a number above 0"):
        OptimConfig(lr=lr)


@pytest.mark.parametrize(
    "wrong",
    [{"beta1": 1.0}, {"beta1": -0.1}, {"beta2": 1.0}, {"beta2": -0.1}, {"warmup_steps": -1},
     {"decay_steps": -1}, {"weight_decay": -0.1}, {"eps": -1e-9}, {"grad_clip": -1.0}],
)  # fmt: skip
def test_a_value_that_cannot_be_is_named(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(ConfigError, match=rf"optim\..*{name}="):
        OptimConfig(**wrong)


def test_the_least_rate_may_be_the_rate() -> None:
    assert lr_at(50, OptimConfig(lr=1.0, min_lr=1.0, warmup_steps=0), 100) == 1.0
    with pytest.raises(ConfigError, match="between 0 and lr"):
        OptimConfig(lr=1.0, min_lr=-0.1)


def test_a_warmup_as_long_as_the_run_ends_it_at_the_rate() -> None:
    assert lr_at(10, OPTIM, 10) == pytest.approx(1.0)
    assert lr_at(10, OPTIM, 11) == 1.0 and lr_at(11, OPTIM, 11) == pytest.approx(0.1)


def test_a_run_is_extended_or_branched_from_its_stable_part_without_a_jump() -> None:
    trunk = OptimConfig(lr=1.0, warmup_steps=10, schedule="constant")
    branch = OptimConfig(lr=1.0, warmup_steps=10, schedule="wsd", decay_steps=50)
    assert [lr_at(step, trunk, 1000) for step in (0, 9, 10, 999)] == [0.1, 1, 1, 1]
    # 200 steps of the trunk, then down in 50: --set max_steps=250 optim.decay_steps=50
    assert [lr_at(step, branch, 250) for step in (10, 199, 200)] == [1, 1, 1]
    assert lr_at(225, branch, 250) == pytest.approx(0.55)
    assert lr_at(250, branch, 250) == pytest.approx(0.1)
    assert lr_at(199, branch, 500) == lr_at(449, branch, 500) == 1


def test_wsd_falls_in_the_last_tenth_and_any_schedule_in_the_steps_it_is_given() -> None:
    wsd = OptimConfig(lr=1.0, min_lr=0.0, warmup_steps=0, schedule="wsd")
    assert [lr_at(step, wsd, 100) for step in (89, 90, 95)] == [1, 1, pytest.approx(0.5)]
    cosine = OptimConfig(lr=1.0, min_lr=0.0, warmup_steps=20, decay_steps=40)
    assert [lr_at(step, cosine, 100) for step in (59, 60, 80)] == [1, 1, pytest.approx(0.5)]
    late = OptimConfig(lr=1.0, warmup_steps=80, decay_steps=40)  # warmup comes first
    assert lr_at(80, late, 100) == 1
