"""Which updates are skipped, which samples are left out, and that a replay does the same."""

import contextlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.checkpoint.runs import checkpoints, newest_checkpoint
from trainer.config.sections import GuardConfig
from trainer.data.batches import StepRange
from trainer.data.mixture import BatchShape, leave_out
from trainer.errors import ConfigError, TrainingError
from trainer.faults.guard import Guard
from trainer.metrics.metrics import GuardHistory, add_left_out, read_history, read_metrics
from trainer.optimizer.optimizer import finish_gradients, update
from trainer.train import train
from trainer_samples import find_events, log_of, small_plan, tensor_files

CPU = torch.device("cpu")
QUIET = [1.0, 1.1, 0.9, 1.0, 1.05, 0.95, 1.0, 1.1]


pytestmark = pytest.mark.usefixtures("one_thread")


def skips(guard: Guard, norm: float, flagged: float = 0.0) -> bool:
    return bool(guard.should_skip(torch.tensor(norm), torch.tensor(flagged)))


@pytest.mark.parametrize(
    ("norm", "expected"),
    [(1.0, False), (1.9, False), (2.5, True), (1e9, True), (0.01, False), (0.0, False),
     (math.nan, True), (math.inf, True)],
)  # fmt: skip
def test_a_spike_is_six_deviations_and_twice_the_mean(norm: float, expected: bool) -> None:
    assert skips(Guard(GuardConfig(window=8), QUIET, CPU), norm) is expected


def test_what_scatters_widely_is_no_spike() -> None:
    wide = [0.2, 5.0, 1.0, 0.3, 4.0, 0.5, 2.0, 1.0]
    assert not skips(Guard(GuardConfig(window=8), wide, CPU), 50.0)
    assert skips(Guard(GuardConfig(window=8, sigma=2), wide, CPU), 50.0)
    assert not skips(Guard(GuardConfig(window=8, sigma=0), QUIET, CPU), 1e30)


def test_nothing_is_a_spike_before_half_the_window_is_known() -> None:
    assert not skips(Guard(GuardConfig(window=16), QUIET[:7], CPU), 1e9)
    assert skips(Guard(GuardConfig(window=16), QUIET, CPU), 1e9)


def test_skipped_norms_do_not_enter_the_window() -> None:
    guard = Guard(GuardConfig(window=8), QUIET, CPU)
    assert [skips(guard, 1e9) for _ in range(20)] == [True] * 20
    assert skips(guard, 1.0, flagged=1.0)
    assert not skips(guard, 1.0)


def test_a_new_guard_made_from_the_norms_decides_the_same() -> None:
    rng = np.random.default_rng(0)
    norms = [float(np.float32(norm)) for norm in np.exp(rng.normal(size=60))]
    config = GuardConfig(window=16, sigma=1.5, ratio=1.0)
    guard, kept, decisions = Guard(config, [], CPU), list[float](), list[bool]()
    for norm in norms:
        bad = skips(guard, norm)
        assert skips(Guard(config, kept, CPU), norm) is bad
        decisions.append(bad)
        if not bad:
            kept = [*kept, norm][-16:]
    assert 3 < sum(decisions) < 30


class NoReading(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Fails for whatever makes the host wait for a value."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


def test_the_guard_reads_nothing_back(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the gradients to the update, with a norm that is NaN: no value reaches the host."""
    watched, steps = contextlib.ExitStack(), list[torch.Tensor]()

    def enter(*args: Any) -> torch.Tensor:
        watched.enter_context(NoReading())  # type: ignore[no-untyped-call]
        return finish_gradients(*args)

    def leave(optimizer: torch.optim.Optimizer, skip: torch.Tensor, **how: Any) -> None:
        update(optimizer, skip, **how)
        watched.close()
        steps.append(skip)

    monkeypatch.setattr("trainer.train.finish_gradients", enter)
    monkeypatch.setattr("trainer.train.update", leave)
    monkeypatch.setenv("SUMMER_FAULT", "nan:0:3")
    with watched:  # ends with the test, or every later one would fail
        train(small_plan(shards, max_steps=5, guard__window=8), tmp_path)
    assert [int(skip) for skip in steps] == [0, 0, 1, 0, 0]
    reading: Any = NoReading()  # type: ignore[no-untyped-call]
    with pytest.raises(AssertionError, match="waits for the device"), reading:
        bool(steps[0])


Ranges = st.lists(st.integers(1, 20), max_size=6).map(
    lambda gaps: [
        (sum(gaps[: 2 * k + 1]), sum(gaps[: 2 * k + 2])) for k in range(len(gaps) // 2)
    ]
)  # fmt: skip


@given(first=st.integers(0, 60), n=st.integers(1, 40), skipped=Ranges)
def test_what_is_left_out_is_all_that_is_missing(
    first: int, n: int, skipped: list[tuple[int, int]]
) -> None:
    """The naive definition: count on from `first`, passing over what is left out."""
    out = {index for begin, end in skipped for index in range(begin, end)}
    expected = [index for index in range(first, first + n + 200) if index not in out][:n]
    assert leave_out(first, np.arange(n), skipped).tolist() == expected


@given(skipped=Ranges, world_size=st.sampled_from([1, 2, 4]), done=st.integers(0, 3))
def test_the_steps_of_all_ranks_are_what_is_left(
    skipped: list[tuple[int, int]], world_size: int, done: int
) -> None:
    shape = BatchShape(8, 2, world_size)
    ranges = [
        StepRange(
            first_index=3, n_steps=4, shape=shape, rank=rank, skipped=tuple(skipped), done=done
        )
        for rank in range(world_size)
    ]
    drawn = [i for s in ranges for n in s.numbers for i in s.indices(0, n).tolist()]
    kept = leave_out(3, np.arange(32), skipped).tolist()
    if not done:
        assert sorted(drawn) == kept
    assert set(drawn) <= set(kept) and len(drawn) == 32 - done * 2 * world_size


def test_a_later_range_absorbs_what_it_covers() -> None:
    assert add_left_out([(2, 5), (8, 12)], 12, 20) == ((2, 5), (8, 12), (12, 20))
    assert add_left_out([(2, 5), (8, 12)], 6, 20) == ((2, 5), (6, 20))
    assert add_left_out([(2, 5), (8, 12)], 10, 20) == ((2, 5), (8, 10), (10, 20))


def poison(first: int, last: int, kind: str = "nan") -> str:
    return ",".join(f"{kind}:0:{step}" for step in range(first, last + 1))


def rolled_back_run(shards: Path, run: Path, patch: pytest.MonkeyPatch, **changes: Any) -> Any:
    """Steps 8 to 10 are bad, one more than may be: back to 6, without samples 48 to 87."""
    plan = small_plan(
        shards, max_steps=16, checkpoint__interval_steps=3, checkpoint__keep_last=9,
        guard__patience=2, guard__window=8, **changes,
    )  # fmt: skip
    with patch.context() as once:
        once.setenv("SUMMER_FAULT", poison(8, 10))
        assert train(plan, run).step == 16
    return plan


def test_bad_steps_that_persist_are_left_out_with_their_data(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    plan = rolled_back_run(shards, run, monkeypatch)
    [event] = find_events(run, "rollback")
    assert (event["to_step"], event["skipped"]) == (6, [48, 88])
    assert [(line["step"], line["next_index"]) for line in read_metrics(run)] == [
        *((step, 8 * step) for step in range(1, 7)),
        *((step, 8 * step + 40) for step in range(7, 17)),
    ]
    record = json.loads((newest_checkpoint(run) / "checkpoint.json").read_text())
    assert record["skipped"] == [[48, 88]]
    assert sum(entry["rows"] for entry in record["ledger"].values()) == 16 * 8

    # with its events in its folder a run does the same again, although nothing is injected any more
    again = tmp_path / "again"
    again.mkdir()
    (again / "events.jsonl").write_bytes((run / "events.jsonl").read_bytes())
    train(plan, again)
    assert log_of(again) == log_of(run)
    assert tensor_files(newest_checkpoint(again)) == tensor_files(newest_checkpoint(run))


def test_a_rollback_outlives_a_kill_before_the_next_checkpoint(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    plan = rolled_back_run(shards, run, monkeypatch)
    log, files = log_of(run), tensor_files(newest_checkpoint(run))
    for checkpoint in checkpoints(run):
        if checkpoint.name not in ("step-3", "step-6"):
            (checkpoint / "checkpoint.json").unlink()
    train(plan, run)
    assert (log_of(run), tensor_files(newest_checkpoint(run))) == (log, files)


def test_a_skipped_update_is_skipped_again_when_its_step_is_repeated(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever caused it is gone; the steps after the last checkpoint are made again all the
    same."""
    plan = small_plan(shards, max_steps=9, checkpoint__interval_steps=4, guard__window=8)
    run = tmp_path / "run"
    with monkeypatch.context() as once:
        once.setenv("SUMMER_FAULT", "nan:0:6,spike:0:9")
        train(plan, run)
    log, files = log_of(run), tensor_files(newest_checkpoint(run))
    assert [event["step"] for event in find_events(run, "skipped")] == [6, 9]
    assert find_events(run, "skipped")[1]["grad_norm"] > 1000
    (run / "checkpoints" / "step-8" / "checkpoint.json").unlink()
    (run / "checkpoints" / "step-9" / "checkpoint.json").unlink()
    made = small_plan(shards, max_steps=9, checkpoint__interval_steps=4, guard__window=8)
    said = list[str]()
    monkeypatch.setattr("trainer.train.Display.print", lambda self, text: said.append(text))
    train(made, run, resume="auto")
    assert "! step 6: update skipped, as it was before" in said
    assert len(find_events(run, "skipped")) == 2
    assert tensor_files(newest_checkpoint(run)) == files
    assert [line[0] for line in log_of(run)] == [line[0] for line in log]


def test_another_history_begins_with_another_configuration(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    rolled_back_run(shards, run, monkeypatch)
    assert read_history(run).left_out == ((48, 88),)
    assert len(read_history(run).skipped) == 3
    changed = small_plan(shards, max_steps=7, optim__lr=1e-3, checkpoint__keep_last=9)
    train(changed, run, resume=str(run / "checkpoints" / "step-3"))
    assert read_history(run) == GuardHistory()
    assert log_of(run)[-1][-1] == 7 * 8


def test_rollbacks_end(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUMMER_FAULT", poison(3, 30))
    plan = small_plan(
        shards, max_steps=40, checkpoint__interval_steps=2, guard__patience=1,
        guard__max_rollbacks=2,
    )  # fmt: skip
    with pytest.raises(TrainingError, match=r"after 2 rollbacks; the run is saved: go on from"):
        train(plan, tmp_path)
    assert [event["to_step"] for event in find_events(tmp_path, "rollback")] == [2, 4]
    assert newest_checkpoint(tmp_path).name == "step-11"


@pytest.mark.parametrize("key", ["window=2", "sigma=-1", "ratio=0.5", "patience=0"])
def test_a_guard_that_cannot_be(key: str, shards: Path) -> None:
    name, _, value = key.partition("=")
    with pytest.raises(ConfigError, match=rf"guard\.{name}={value}.*must be at least"):
        small_plan(shards, 1, **{f"guard__{name}": value})


def test_every_limit_of_the_guard_s_options() -> None:
    least = {"window": 8, "sigma": 0, "ratio": 1, "patience": 1, "max_rollbacks": 0}
    least["hang_timeout_s"] = 0
    GuardConfig(**least)
    for key, value in least.items():
        with pytest.raises(ConfigError, match=f"guard.{key}={value - 1}"):
            GuardConfig(**{key: value - 1})


def test_the_guard_s_defaults_are_the_published_rule_s() -> None:
    assert GuardConfig() == GuardConfig(
        window=128, sigma=6.0, ratio=2.0, patience=20, max_rollbacks=3, hang_timeout_s=600.0
    )


def test_a_spike_lies_so_many_sample_deviations_above_the_mean() -> None:
    """Of the logarithms, with n - 1 below the sum; one norm just below, one just above."""
    logs = np.log([1.0, 2.0, 4.0, 1.0, 2.0, 4.0, 1.0, 2.0])
    limit = np.exp(logs.mean() + 2.5 * logs.std(ddof=1))
    config = GuardConfig(window=16, sigma=2.5, ratio=1.0)
    for factor, expected in ((0.999, False), (1.001, True)):
        guard = Guard(config, np.exp(logs).tolist(), CPU)
        assert skips(guard, float(limit * factor)) is expected


def test_a_norm_of_zero_is_accepted_and_does_not_enter_the_window() -> None:
    guard = Guard(GuardConfig(window=8), QUIET, CPU)
    assert not any(skips(guard, 0.0) for _ in range(8))
    assert skips(guard, 2.5)
    for _ in range(8):  # small ones do: now 0.5 is the spike
        skips(guard, 0.1)
    assert skips(guard, 0.5)
