"""The arithmetic of a run on paper, checked against figures worked out by hand."""

import json
from typing import Any

import pytest
from click.testing import CliRunner, Result

from shards.errors import SummerError
from tools.plan import main
from tools.planning import plan_cost


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


def test_the_reference_run_costs_what_its_author_reports() -> None:
    """Nine days on eight devices at $2.31 an hour each is $3,992; 95 % of it is the plan."""
    plan = plan_cost(dollars_per_hour=2.31)
    assert plan["parameters"] == 4_479_912_960
    assert plan["flops_per_token"] == pytest.approx(29.29e9, rel=1e-3)
    assert plan["tokens"] == 80_000 * 1_048_576
    assert plan["tokens_per_s"] == pytest.approx(8 * 1307.4e12 * 0.32 / 29.29e9, rel=1e-3)
    assert plan["days"] is not None and 8.3 < plan["days"] < 8.7
    assert plan["dollars"] == pytest.approx(plan["days"] * 24 * 8 * 2.31)
    assert plan["dollars"] is not None and plan["dollars"] < 9 * 24 * 8 * 2.31
    assert plan["fits"] is True
    assert plan["checkpoint_bytes"] == 12 * plan["parameters"]
    assert plan["shard_bytes"] == 80_000 * 256 * (2 * 4096 + 16)
    assert plan["memory_bytes"]["weights"] == 4 * plan["parameters"]


def test_days_and_tokens_are_two_ways_to_say_one_thing() -> None:
    by_days = plan_cost(preset="summer-1b", days=2.0)
    by_tokens = plan_cost(preset="summer-1b", tokens=by_days["tokens"])
    assert by_tokens["days"] == pytest.approx(2.0)
    assert by_tokens["steps"] == by_days["steps"]


def test_an_unknown_device_gets_no_rates() -> None:
    plan = plan_cost(device="abacus", dollars_per_hour=1.0)
    assert {plan[name] for name in ("tokens_per_s", "days", "dollars", "fits")} == {None}
    assert plan["memory_bytes"]["weights"] > 0
    result = run("--device", "abacus")
    assert result.exit_code == 0
    assert "withheld: no peak is known for 'abacus'" in result.output
    assert "days and" in result.output and "$" not in result.output


def test_the_speed_is_always_called_an_assumption() -> None:
    assert "an assumption, not a measurement" in run("--mfu", "0.4").output
    printed = json.loads(run("--preset", "tiny", "--devices", "1", "--json").output)
    assert printed["mfu_is"] == "an assumption, not a measurement"
    assert printed["assumed_mfu"] == 0.32
    assert printed["parameters"] == 12_194_048


def test_devices_too_small_for_all_states_share_them() -> None:
    """80 GB hold a half of weights, gradients and moments, and all that is not divided."""
    plan = plan_cost(device="h100")
    assert (plan["shard_degree"], plan["fits"]) == (2, True)
    assert plan["memory_bytes"]["moments"] == 4 * plan["parameters"]
    assert "sequences at a time, --set shard_degree=2:" in run("--device", "h100").output
    assert "shard_degree" not in run("--device", "mi300x").output
    assert "does NOT fit" in run("--device", "l4").output


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tokens": 5, "days": 1.0}, "give one of them"),
        ({"mfu": 1.5}, "mfu 1.5"),
        ({"devices": 0}, "devices 0"),
        ({"days": -1.0}, "days -1.0"),
        ({"dollars_per_hour": -2.0}, "dollars_per_hour -2.0"),
        ({"devices": 7}, "cannot share equally"),
        ({"device": "abacus", "days": 3.0}, "or a device with a peak; known: MI355X"),
        ({"device": "mi300", "days": 3.0}, "did you mean mi300x"),
        ({"preset": "summer-4"}, "did you mean summer-4b"),
    ],
)
def test_an_impossible_request_is_rejected(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(SummerError, match=words):
        plan_cost(**changes)


def test_failures_are_one_line() -> None:
    for arguments in (("--devices", "7"), ("--preset", "huge"), ("--mfu", "0")):
        result = run(*arguments)
        assert result.exit_code == 1
        assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert run("--devices", "many").exit_code == 2
