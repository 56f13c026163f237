"""What a rehearsal says of two runs is what their checkpoints say."""

import json
import os
import random
import time
from dataclasses import replace
from pathlib import Path

import pytest

from shards.errors import SummerError
from shards_samples import make_source
from tools.errors import ToolError
from tools.rehearsal.certificate import FAULTS, Certificate, FaultResult, publish, table
from tools.rehearsal.processes import (
    POLL_S,
    compare_checkpoints,
    last_step,
    train,
    training_process,
)
from tools.rehearsal.rehearsal import INTERVAL, N_INTERVALS, Rehearsal, check_inputs, rehearse
from trainer.checkpoint.runs import RECORD
from trainer.faults.inject import KINDS
from trainer.metrics.metrics import read_metrics
from trainer_samples import make_shards, set_texts


def make_checkpoint(run: Path, step: int, digests: dict[str, str]) -> None:
    folder = run / "checkpoints" / f"step-{step}"
    folder.mkdir(parents=True)
    files = {name: {"bytes": 1, "sha256": digest} for name, digest in digests.items()}
    (folder / RECORD).write_text(json.dumps({"files": files}))


@pytest.mark.parametrize(
    ("other", "same"),
    [
        ({"a": "1", "b": "2"}, True),
        ({"a": "1", "b": "3"}, False),
        ({"a": "1"}, False),
        ({"a": "1", "b": "2", "c": "3"}, False),
        ({}, False),
    ],
)
def test_checkpoints_are_identical_if_every_file_is(
    tmp_path: Path, other: dict[str, str], same: bool
) -> None:
    make_checkpoint(tmp_path / "one", 4, {"a": "1", "b": "2"})
    make_checkpoint(tmp_path / "other", 4, other)
    assert compare_checkpoints(tmp_path / "one", tmp_path / "other", 4).identical is same
    with pytest.raises(ToolError, match="no checkpoint of step 5"):
        compare_checkpoints(tmp_path / "one", tmp_path / "other", 5)


def test_a_line_half_written_is_no_step(tmp_path: Path) -> None:
    assert last_step(tmp_path) == 0
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"step": 2}\n{"step": 3')
    assert last_step(tmp_path) == 2


def good_certificate() -> Certificate:
    rows = tuple(
        FaultResult(
            fault=fault, step=9, detected=True, recovered=True, steps_lost=3, identical=True
        )
        for fault in FAULTS
    )
    return Certificate(
        command="summer-train", steps=12, seconds=1.0, versions={"torch": "2"}, data={"a": "f00"},
        bit_exact=False,
        digests={"weights": ("1", "1")}, scores={"faulted": 2.5, "uninterrupted": 2.5}, rows=rows,
    )  # fmt: skip


def test_one_broken_promise_spoils_the_certificate(tmp_path: Path) -> None:
    good = good_certificate()
    assert good.kept and "NO" not in "".join(table(replace(good, bit_exact=True)))
    row = good.rows[0]
    broken = [
        replace(row, detected=False), replace(row, recovered=False), replace(row, identical=False),
    ]  # fmt: skip
    spoilt = [
        *(replace(good, rows=(each, *good.rows[1:])) for each in broken),
        replace(good, rows=good.rows[1:]),  # a fault that was not rehearsed
        replace(good, digests={}),
        replace(good, digests={"weights": ("1", "2")}),
        replace(good, scores={"faulted": 2.5, "uninterrupted": 2.6}),
    ]
    for certificate in spoilt:
        assert not certificate.kept
        assert table(certificate)[-1] == "every promise kept: NO"
        publish(certificate, tmp_path)
        assert json.loads((tmp_path / "certificate.json").read_text())["kept"] is False
        assert "PROMISES BROKEN" in (tmp_path / "certificate.md").read_text()


def test_the_page_says_what_was_found(tmp_path: Path) -> None:
    publish(good_certificate(), tmp_path)
    page = (tmp_path / "certificate.md").read_text()
    promises = [case.promise for case in FAULTS.values()]
    for part in (*FAULTS, *promises, "| weights | `1` | `1` |", "| a | `f00` |"):
        assert part in page
    assert "passes repeat bit for bit, as the run itself says: NO" in page
    assert json.loads((tmp_path / "certificate.json").read_text())["bit_exact"] is False
    assert any(
        "not recorded" in line for line in table(replace(good_certificate(), bit_exact=None))
    )


def test_every_kind_of_fault_is_rehearsed_at_its_step() -> None:
    assert {case.order.split(":")[0] for case in FAULTS.values()} - {""} == set(KINDS)
    taken = Rehearsal(shards=None, preset="tiny", sets=(), out=Path(), seed=0)
    cases = [FAULTS[name] for name in ("worker dies", "mixture changed", "rank killed")]
    assert taken.orders(cases) == f"worker:0:{taken.steps[0]},sigkill:1:{taken.steps[1]}"


def test_steps_are_hit_between_two_checkpoints_and_chosen_by_the_seed() -> None:
    plans = [
        Rehearsal(shards=None, preset="tiny", sets=(), out=Path(), seed=seed).steps
        for seed in range(20)
    ]
    assert len({tuple(steps) for steps in plans}) > 10
    for steps in plans:
        assert len(steps) == N_INTERVALS
        assert all(2 <= step - n * INTERVAL < INTERVAL for n, step in enumerate(steps))


def test_a_run_that_cannot_start_is_named_with_its_reason(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(ToolError, match=r"exit code 1: error: .*no prepared source"):
        train(["--shards", str(tmp_path / "none"), "--preset", "tiny"], run)


@pytest.mark.slow
def test_a_run_is_killed_when_a_condition_is_met_and_goes_on(tmp_path: Path) -> None:
    """One that ends before it is an error, exit code 0 or not."""
    run, seen = tmp_path / "run", list[int]()
    arguments = ["--shards", str(make_shards(tmp_path / "shards")), "--preset", "tiny"]
    changes = {"max_steps": 300, "checkpoint__interval_steps": 2, "log_interval": 1}
    arguments += [f"--set={change}" for change in set_texts(**changes)]
    train(arguments, run, seen.append, until=lambda: last_step(run) >= 4)
    assert 4 <= last_step(run) < 300 and seen == sorted(seen)
    arguments += [f"--set=max_steps={(last := last_step(run) + 2)}"]
    with pytest.raises(ToolError, match="training ended early with exit code 0"):
        train(arguments, run, until=lambda: False)
    assert last_step(run) == last


def test_what_is_rehearsed_is_a_copy_in_an_empty_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "something").touch()
    taken = Rehearsal(shards=None, preset="tiny", sets=(), out=tmp_path / "out", seed=0)
    with pytest.raises(ToolError, match="not empty"):
        rehearse(taken, lambda _: None)
    monkeypatch.setattr("tools.rehearsal.rehearsal._MOST_BYTES", 3)
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "big").write_bytes(b"four")
    large = replace(taken, shards=tmp_path / "shards", out=tmp_path / "new")
    with pytest.raises(ToolError, match="is copied, because a bit of it is flipped"):
        check_inputs(large)


def test_settings_that_are_wrong_are_found_before_anything_is_made(tmp_path: Path) -> None:
    good = Rehearsal(shards=None, preset="tiny", sets=(), out=tmp_path / "out", seed=0)
    check_inputs(good)
    for name in ("one", "other"):
        make_source(tmp_path / "shards" / name, n_val_rows=0)
    for changes, words in (
        ({"preset": "tinny"}, "did you mean tiny"),
        ({"sets": ("optim.ler=1",)}, "optim.lr"),
        ({"shards": tmp_path / "none"}, "no prepared source"),
        ({"shards": tmp_path / "shards"}, "no document is held out"),
        ({"shards": make_shards(tmp_path / "one", pg19=2)}, "needs two sources"),
    ):
        with pytest.raises(SummerError, match=words):
            rehearse(replace(good, **changes), lambda _: pytest.fail("work has begun"))
        assert not good.out.exists()


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_with_the_bits_of_an_uninterrupted_one(
    tmp_path: Path,
) -> None:
    """In a step, while a checkpoint is written or removed, before the first step. `make soak`."""
    kills, chooser = int(os.environ.get("SUMMER_SOAK_KILLS", "2")), random.Random(0)
    arguments = ["--shards", str(make_shards(tmp_path / "shards")), "--preset", "tiny"]
    steps = 40 + 30 * kills  # a life is some twenty steps, on an idle machine
    changes = {"max_steps": steps, "checkpoint__interval_steps": 3, "log_interval": 1}
    arguments += [text for change in set_texts(**changes) for text in ("--set", change)]
    twin, killed, first_s, began = tmp_path / "twin", tmp_path / "killed", [], time.monotonic()
    train(arguments, twin, lambda step: first_s.extend([time.monotonic() - began] * bool(step)))
    done = 0
    for _ in range(kills):
        with training_process(arguments, killed) as process:
            ends_at = time.monotonic() + chooser.uniform(0.2, 1.6) * first_s[0]
            while time.monotonic() < ends_at and process.poll() is None:
                time.sleep(POLL_S)
        assert process.returncode in (0, -9), killed.with_suffix(".log").read_text()
        done += process.returncode == -9
    print(f"{done} kills, the last at step {last_step(killed)} of {steps}")
    train(arguments, killed)
    assert done and compare_checkpoints(twin, killed, steps).identical
    logs = [[(line["step"], line["loss"], line["grad_norm"]) for line in read_metrics(run)]
            for run in (twin, killed)]  # fmt: skip
    assert logs[0] == logs[1]
