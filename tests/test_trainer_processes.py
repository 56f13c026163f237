"""Real processes: killed, stopped, multiplied, and the command's own words."""

import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from trainer.checkpoint import storage
from trainer.checkpoint.runs import checkpoints, newest_checkpoint
from trainer.cli import main
from trainer.distributed.world import STOP_SIGNALS
from trainer.metrics.metrics import read_metrics
from trainer_samples import make_shards, set_texts

LIMIT_S = 240


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("shards"), fineweb=300, the_stack=90, slimorca=9)


def command(shards: Path, run: Path, *flags: str, sets: Sequence[str]) -> list[str]:
    start = [sys.executable, "-m", "trainer.cli", "--shards", str(shards), "--preset", "tiny"]
    return [*start, "--out", str(run), *flags, *(text for s in sets for text in ("--set", s))]


def finish(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments, capture_output=True, text=True, timeout=LIMIT_S, check=False)


def started(arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as file:
        return subprocess.Popen(arguments, stdout=file, stderr=subprocess.STDOUT)


def wait_for_step(process: subprocess.Popen[bytes], run: Path, step: int) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not any(line["step"] >= step for line in read_metrics(run)):
        assert process.poll() is None, "the run ended before that step"
        assert time.monotonic() < deadline
        time.sleep(0.01)


def log_of(run: Path) -> list[tuple[int, float, float]]:
    lines = read_metrics(run)
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines]


def files_of(checkpoint: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in checkpoint.glob("*.safetensors")}


@pytest.mark.slow
def test_killed_at_a_random_step_it_ends_with_the_same_bits(shards: Path, tmp_path: Path) -> None:
    """bf16, compiled, dropout everywhere, accumulation, loader workers, kill -9."""
    sets = set_texts(
        compile="true", max_steps=14, micro_batch_size=4, checkpoint__interval_steps=3,
        loader__num_workers=2, model__attention_dropout=0.1,
    )  # fmt: skip
    full = command(shards, tmp_path / "full", sets=sets)
    result = finish(full)
    assert result.returncode == 0, result.stderr
    killed = tmp_path / "killed"
    process = started(command(shards, killed, sets=sets), tmp_path / "log")
    try:
        wait_for_step(process, killed, random.randrange(1, 12))
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL
    result = finish(command(shards, killed, sets=sets))
    assert result.returncode == 0, result.stderr
    assert log_of(killed) == log_of(tmp_path / "full")
    assert [step for step, _, _ in log_of(killed)] == list(range(1, 15))
    assert files_of(newest_checkpoint(killed)) == files_of(newest_checkpoint(tmp_path / "full"))
    assert "Traceback" not in (tmp_path / "log").read_text()


@pytest.mark.slow
def test_two_processes_draw_the_same_samples_and_agree(shards: Path, tmp_path: Path) -> None:
    sets = set_texts(
        precision="fp32", max_steps=10, micro_batch_size=2, loader__num_workers=1,
        checkpoint__interval_steps=5, validation__interval=5,
    )  # fmt: skip
    alone, both = tmp_path / "alone", tmp_path / "both"
    result = finish(command(shards, alone, sets=sets))
    assert result.returncode == 0, result.stderr
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    result = finish([*torchrun, *command(shards, both, sets=sets)[1:]])
    assert result.returncode == 0, result.stderr
    for one, other in zip(log_of(alone), log_of(both), strict=True):
        assert one[0] == other[0]
        assert one[1:] == pytest.approx(other[1:], rel=1e-6)
    records = [storage.read_record(newest_checkpoint(run)) for run in (alone, both)]
    assert records[0]["ledger"] == records[1]["ledger"]
    assert records[0]["next_index"] == records[1]["next_index"]
    # what two ranks wrote, one can load: it goes on from there
    for run in (alone, both):
        result = finish(command(shards, run, sets=[*sets, "max_steps=12"]))
        assert result.returncode == 0, result.stderr
    assert [step for step, _, _ in log_of(both)] == list(range(1, 13))
    for one, other in zip(log_of(alone), log_of(both), strict=True):
        assert one == pytest.approx(other, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_asked_to_stop_two_ranks_checkpoint_and_say_75(
    shards: Path, tmp_path: Path, number: signal.Signals
) -> None:
    sets = set_texts(max_steps=5000, loader__num_workers=1)
    run = tmp_path / "run"
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored if the tests run under nohup
    process = started(command(shards, run, "--nproc", "2", sets=sets), tmp_path / "log")
    signal.signal(signal.SIGHUP, before)
    try:
        wait_for_step(process, run, 3)
        process.send_signal(number)
        assert process.wait(60) == 75, (tmp_path / "log").read_text()
    finally:
        process.kill()
        process.wait()
    log = (tmp_path / "log").read_text()
    assert "saved: the same command goes on" in log
    assert "torchrun --standalone --max-restarts=3 --nnodes=1 --nproc-per-node=2 -m trainer" in log
    assert "Traceback" not in log
    assert checkpoints(run)[-1].name == f"step-{log_of(run)[-1][0]}"


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "tinny"], "error: no preset 'tinny'; did you mean tiny?"),
        (["--preset", "tiny", "--set", "max_step=3"], "error: unknown key max_step; did you mean"),
        (
            ["--preset", "tiny", "--set", "mixture.pg=3"],
            "error: mixture.pg=3.0: that source is not",
        ),
        (
            ["--preset", "tiny", "--nnodes", "two"],
            "error: --nnodes two: give a number of machines, or least:most as in 1:2",
        ),
        (
            ["--preset", "tiny", "--resume", "nowhere"],
            "error: --resume nowhere: no checkpoint there",
        ),
        (["--preset", "tiny", "--nnodes", "2", "--nproc", "1"], "say where the machines meet"),
        (["--preset", "tiny", "--set", "device=mps"], "error: device mps: torch"),
        (["--preset", "tiny", "--nproc", "3"], "ranks cannot share evenly"),
    ],
)
def test_wrong_input_is_one_line(
    shards: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    result = invoke("--shards", str(shards), "--out", str(tmp_path / "run"), *arguments)
    assert result.exit_code == 1
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_no_shards_is_one_line(tmp_path: Path) -> None:
    result = invoke("--shards", str(tmp_path / "nothing"))
    assert result.exit_code == 1
    assert "no prepared source in this folder" in result.stderr
    assert invoke("--no-such-flag").exit_code == 2


def test_a_dry_run_plans_and_leaves_nothing(shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    sets = [text for s in set_texts() for text in ("--set", s)]
    result = invoke(
        "--shards", str(shards), "--preset", "tiny", "--dry-run", "--out", str(run), *sets
    )
    assert result.exit_code == 0, result.stderr
    for part in ("source slimorca: 5.9% of samples, 9 rows", "epochs at the end", "parameters"):
        assert part in result.stdout
    assert not run.exists()


def test_without_a_name_a_run_is_called_after_its_preset(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sets = [text for s in set_texts(max_steps=1) for text in ("--set", s)]
    for _ in range(2):
        result = invoke("--shards", str(shards), "--preset", "tiny", *sets, "--resume", "never")
        assert result.exit_code == 0, result.stderr
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["tiny", "tiny-2"]
    result = invoke("--shards", str(shards), "--preset", "tiny", *sets)
    assert "runs/tiny: already at step 1" in result.stdout


def test_help_is_instant() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = finish([sys.executable, "-m", "trainer.cli", "--help"])
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert "Example: summer-train --shards shards/ --preset tiny" in result.stdout
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5
