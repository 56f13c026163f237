"""Every injected fault, with real processes where a process is what fails."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shards.errors import ShardError
from shards.reader import ShardReader
from trainer.checkpoint.runs import checkpoints, newest_checkpoint
from trainer.errors import ConfigError
from trainer.faults.inject import KINDS, Fault, flip_a_bit, parse_faults
from trainer.metrics.display import Display
from trainer.metrics.metrics import read_metrics
from trainer.train import train
from trainer_samples import find_events, log_of, make_shards, set_texts, small_plan, tensor_files

LIMIT_S = 200
SETS: dict[str, Any] = {
    "max_steps": 14,
    "checkpoint__interval_steps": 3,
    "checkpoint__keep_last": 9,
    "checkpoint__asynchronous": "false",  # so that it is known which checkpoint a kill leaves
}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("shards"), fineweb=300, pg19=90)


def command_of(shards: Path, run: Path, **changes: Any) -> list[str]:
    """`summer-train --nproc 2`, with one loader worker each."""
    sets = [text for change in set_texts(loader__num_workers=1, **changes)
            for text in ("--set", change)]  # fmt: skip
    return [sys.executable, "-m", "trainer.cli", "--shards", str(shards), "--preset", "tiny",
            "--nproc", "2", "--out", str(run), *sets]  # fmt: skip


def two_ranks(
    shards: Path, run: Path, fault: str = "", **changes: Any
) -> subprocess.CompletedProcess[str]:
    """How that ended with these faults."""
    command = command_of(shards, run, micro_batch_size=2, **SETS, **changes)
    environment = {**os.environ, "SUMMER_FAULT": fault}
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=LIMIT_S, check=False
    )


@pytest.fixture(scope="module")
def undisturbed(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "undisturbed"
    result = two_ranks(shards, run)
    assert result.returncode == 0, result.stderr
    return run


def assert_same(run: Path, other: Path) -> None:
    assert log_of(run) == log_of(other)
    assert tensor_files(newest_checkpoint(run)) == tensor_files(newest_checkpoint(other))


@pytest.mark.slow
def test_a_killed_and_a_stopped_rank_cost_a_restart_each(
    shards: Path, tmp_path: Path, undisturbed: Path
) -> None:
    run, timeout_s = tmp_path / "run", 6.0
    result = two_ranks(
        shards, run, "sigkill:1:5,sigstop:1:8", guard__hang_timeout_s=timeout_s
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    resumes = [event["step"] for event in find_events(run, "resume")]
    assert resumes == [3, 6], result.stdout + result.stderr
    [hung] = find_events(run, "hung")
    assert (hung["lost"], hung["step"]) == (1, 8)
    assert timeout_s <= hung["silent_s"] <= 2 * timeout_s
    assert "rank 1 (process" in result.stderr and "stopped) has shown no sign" in result.stderr
    assert "backward" in (run / "stacks" / "rank-0.txt").read_text()
    assert "Traceback" not in result.stderr
    assert_same(run, undisturbed)


@pytest.mark.slow
def test_asked_to_stop_and_a_flipped_row_end_in_a_checkpoint(
    shards: Path, tmp_path: Path, undisturbed: Path
) -> None:
    """One rank knows, all ranks act; torchrun starts nothing again; the same command goes on."""
    run = tmp_path / "run"
    result = two_ranks(shards, run, "sigterm:1:4")
    assert result.returncode == 75, result.stderr
    stopped_at = find_events(run, "stopped")[0]["step"]
    assert stopped_at in (4, 5) and newest_checkpoint(run).name == f"step-{stopped_at}"
    before = {path: path.read_bytes() for path in shards.glob("*/*.npy")}
    result = two_ranks(shards, run, "bit-flip:1:9")
    flipped = [path for path, data in before.items() if path.read_bytes() != data]
    try:
        assert result.returncode == 1, result.stderr
        assert len(flipped) == 1
        last = result.stderr.strip().splitlines()[-1]
        assert last.startswith("error: ") and f"{flipped[0]} row " in last
        assert f"`summer-prep repair {flipped[0].parent}` makes it again" in last
        assert "the run is saved at step 8 and goes on from there" in last
        assert newest_checkpoint(run).name == "step-8"
        assert [event["step"] for event in find_events(run, "resume")] == [stopped_at]
    finally:
        flipped[0].write_bytes(before[flipped[0]])
    result = two_ranks(shards, run)
    assert result.returncode == 0, result.stderr
    assert_same(run, undisturbed)


@pytest.mark.slow
def test_a_flipped_held_out_row_stops_all_ranks_before_the_first_step(
    shards: Path, tmp_path: Path
) -> None:
    """It is read by rank 1 alone, which must not leave rank 0 waiting for it."""
    copy = tmp_path / "shards"
    shutil.copytree(shards, copy)
    reader = ShardReader(copy / "fineweb", "val")
    assert reader.n_rows > 2
    flip_a_bit(reader, 2)  # the first row of the second batch
    result = two_ranks(copy, tmp_path / "run", validation__interval=2, validation__rows=10**6)
    assert result.returncode == 1, result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and f"`summer-prep repair {copy / 'fineweb'}`" in last
    assert len(find_events(tmp_path / "run", "start")) == 1  # nothing was tried again
    assert not log_of(tmp_path / "run")


def injected(
    fault: str, shards: Path, run: Path, patch: pytest.MonkeyPatch, **changes: Any
) -> None:
    """The run in this process, with these faults."""
    patch.setenv("SUMMER_FAULT", fault)
    try:
        train(small_plan(shards, **{**SETS, **changes}), run)
    finally:
        patch.delenv("SUMMER_FAULT")


def test_a_worker_that_dies_is_named_and_replaced(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    one_reader = {"loader__num_workers": 1}
    train(small_plan(shards, **SETS, **one_reader), tmp_path / "full")
    injected("worker:0:5", shards, tmp_path / "hit", monkeypatch, **one_reader)
    [event] = find_events(tmp_path / "hit", "loader")
    assert event["rank"] == 0 and "a loader worker died" in event["text"]
    assert "! rank 0: a loader worker died" in capfd.readouterr().err
    assert_same(tmp_path / "hit", tmp_path / "full")
    with pytest.raises(ConfigError, match=r"there is none; set loader\.num_workers=1"):
        injected("worker:0:1", shards, tmp_path / "none", monkeypatch)


def test_a_flipped_row_stops_one_process_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also a row of the very first step: the checkpoint then holds what the run began with."""
    for step in (1, 5, 14):
        shards = make_shards(tmp_path / f"shards{step}", fineweb=300, pg19=90)
        run = tmp_path / f"run{step}"
        train(small_plan(shards, **SETS), tmp_path / f"full{step}")
        before = {path: path.read_bytes() for path in shards.glob("*/*.npy")}
        with pytest.raises(ShardError, match=f"summer-prep repair.*saved at step {step - 1} "):
            injected(f"bit-flip:0:{step}", shards, run, monkeypatch)
        for path, data in before.items():
            path.write_bytes(data)
        train(small_plan(shards, **SETS), run)
        assert_same(run, tmp_path / f"full{step}")


def test_a_disk_that_fills_up_costs_a_checkpoint(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(small_plan(shards, **SETS), tmp_path / "full")
    injected("full-disk:0:5", shards, tmp_path / "hit", monkeypatch)
    [failed] = find_events(tmp_path / "hit", "checkpoint failed")
    assert failed["step"] == 6
    assert [int(c.name[5:]) for c in checkpoints(tmp_path / "hit")] == [3, 9, 12, 14]
    assert_same(tmp_path / "hit", tmp_path / "full")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for the checkpoints of little more than one step."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root can mount a small disk")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_is_full_in_earnest(shards: Path, tmp_path: Path, small_disk: Path) -> None:
    """One checkpoint fits, the second does not: training goes on until room is made."""
    filler = small_disk / "filler"
    train(small_plan(shards, **SETS), tmp_path / "full")
    size = sum(path.stat().st_size for path in newest_checkpoint(tmp_path / "full").iterdir())
    room = os.statvfs(small_disk)
    filler.write_bytes(b"x" * (room.f_bavail * room.f_frsize - size - size // 2 - (1 << 20)))

    class MakesRoom(Display):
        """A person who reads the display."""

        def print(self, text: str) -> None:
            if "TRAINING GOES ON" in text:
                filler.unlink(missing_ok=True)

    train(small_plan(shards, **SETS), small_disk / "run", display=MakesRoom())
    assert [event["step"] for event in find_events(small_disk / "run", "checkpoint failed")] == [6]
    assert_same(small_disk / "run", tmp_path / "full")


def test_no_fault_happens_twice(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    injected("sigterm:0:4", shards, tmp_path, monkeypatch)
    assert newest_checkpoint(tmp_path).name == "step-5"
    (tmp_path / "checkpoints" / "step-5" / "checkpoint.json").unlink()  # step 4 is made again
    injected("sigterm:0:4", shards, tmp_path, monkeypatch)
    assert newest_checkpoint(tmp_path).name == "step-14"


def test_faults_are_parsed_or_rejected() -> None:
    assert parse_faults("") == ()
    assert parse_faults("rot:1:2") == (Fault("bit-flip", 1, 2),)  # as version 0.1 called it
    assert parse_faults("nan:0:3, full-disk:12:40") == (
        Fault("nan", 0, 3),
        Fault("full-disk", 12, 40),
    )
    for wrong in ("nan", "nan:0", "nan:x:3", "nan:0:0", "gremlin:0:3", "nan:0:3:4"):
        with pytest.raises(
            ConfigError, match=rf"SUMMER_FAULT={wrong}: .* kinds are {', '.join(KINDS)}"
        ):
            parse_faults(wrong)


@pytest.mark.slow
def test_a_signal_to_the_launcher_reaches_a_checkpoint(shards: Path, tmp_path: Path) -> None:
    """SIGINT to the whole group, as Ctrl-C does it."""
    command = command_of(shards, tmp_path / "run", max_steps=5000)
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + LIMIT_S
        while len(read_metrics(tmp_path / "run")) < 3:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(60) == 75, (tmp_path / "log").read_text()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_an_unknown_fault_is_one_line(shards: Path, tmp_path: Path) -> None:
    result = two_ranks(shards, tmp_path, "gremlin:0:1")
    assert result.returncode == 1
    assert len(result.stderr.strip().splitlines()) == 1
    assert "kinds are nan, spike, sigterm" in result.stderr


@pytest.mark.parametrize("fault", ["sigkill:1:3", "nan:0:15"])
def test_a_fault_that_would_never_happen_is_an_error(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setenv("SUMMER_FAULT", fault)
    with pytest.raises(ConfigError, match=f"{fault} would never happen: .* 0 to 0 .* 1 to 14"):
        train(small_plan(shards, **SETS), tmp_path / "run")
    assert not (tmp_path / "run").exists()
