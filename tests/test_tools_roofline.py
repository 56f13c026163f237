"""A step's arithmetic holds what one H100 and one H200 measured, and grows as the work does."""

import json
from dataclasses import replace

import pytest
from click.testing import CliRunner

from tools.plan import main
from tools.roofline import StepPart, step_parts
from trainer.config.accelerators import Accelerator, find_accelerator
from trainer.config.config import RunConfig, configure


def device(name: str) -> Accelerator:
    found = find_accelerator(name)
    assert found is not None
    return found


def config_of(preset: str = "summer-4b", *sets: str) -> RunConfig:
    return configure(preset=preset, sets=["global_batch_tokens=16384", *sets]).config


def by_name(parts: list[StepPart]) -> dict[str, StepPart]:
    return {part.name: part for part in parts}


@pytest.mark.parametrize(
    ("name", "sets", "rates"),
    [  # tools/benchmarks/RESULTS.md, steps of two micro-batches of two sequences
        ("H200", (), (14388, 14724, 16206, 16894)),
        ("H100", ("model.n_layers=20",), (21621, 22149, 24508, 25559)),
    ],
)
def test_what_was_measured_lies_in_the_range(
    name: str, sets: tuple[str, ...], rates: tuple[int, ...]
) -> None:
    parts = step_parts(config_of("summer-4b", *sets), device(name), 1, 2)
    slow, fast = sum(part.slow_s for part in parts), sum(part.fast_s for part in parts)
    assert all(fast < 16384 / rate < slow for rate in rates)
    assert fast * 2 > slow  # a range that says something


def test_each_part_of_an_h200s_step_lies_in_its_range() -> None:
    parts = by_name(step_parts(config_of(), device("H200"), 1, 2))
    step_s, shares = 1.145, {"GEMM": 0.482, "attention": 0.327, "loss": 0.015, "optimizer": 0.044}
    for name, share in shares.items():
        assert parts[name].fast_s < share * step_s < parts[name].slow_s, name
    assert parts["exchange"] == StepPart("exchange", 0.0, 0.0)


def test_more_work_takes_more_time() -> None:
    known = device("H200")
    plain = by_name(step_parts(config_of(), known, 1, 2))
    small = by_name(step_parts(config_of(), known, 1, 1))
    assert small["pointwise"].fast_s > plain["pointwise"].fast_s  # weights are cast twice as often
    full = by_name(step_parts(config_of("summer-4b", "activation_checkpointing=full"), known, 1, 2))
    assert full["GEMM"].fast_s == pytest.approx(plain["GEMM"].fast_s * 8 / 6)
    assert full["attention"].fast_s == pytest.approx(plain["attention"].fast_s * 9 / 7)
    two = by_name(step_parts(config_of(), known, 2, 2))
    assert two["GEMM"].fast_s == pytest.approx(plain["GEMM"].fast_s / 2)
    n_bytes = 4 * 4_479_912_960  # an all-reduce between two sends each gradient once
    assert two["exchange"].slow_s == pytest.approx(n_bytes / 2e11)
    assert two["exchange"].fast_s == 0.0  # hidden by the backward pass
    sliced = replace(config_of(), shard_degree=2)
    scattered = by_name(step_parts(sliced, known, 2, 2))
    assert scattered["exchange"].slow_s == pytest.approx(n_bytes / 2e11)  # one micro-batch
    assert scattered["optimizer"].fast_s == pytest.approx(plain["optimizer"].fast_s / 2)


def test_the_makers_own_figure_is_the_faster_rate() -> None:
    parts = by_name(step_parts(config_of(), device("MI300X"), 1, 2))
    assert parts["GEMM"].slow_s == pytest.approx(parts["GEMM"].fast_s / 0.75)


def test_the_command_prints_parts_that_add_up() -> None:
    arguments = ["--device", "mi300x", "--devices", "8", "--roofline"]
    printed = CliRunner().invoke(main, arguments).output
    assert "a step by part: ARITHMETIC" in printed and "25% .. 41% of the peak" in printed
    plan = json.loads(CliRunner().invoke(main, [*arguments, "--json"]).output)
    fast = [ends[0] for ends in plan["roofline_s"].values()]
    assert f"{sum(fast) * 1e3:,.0f} .. " in printed
    assert "by part" not in CliRunner().invoke(main, arguments[:-1]).output
    unknown = CliRunner().invoke(main, ["--device", "abacus", "--roofline"])
    assert unknown.exit_code == 0 and "withheld" in unknown.output
