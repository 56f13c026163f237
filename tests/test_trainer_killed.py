"""SIGKILL at the points of a checkpoint, a purge and a copy: the run goes on as if it had not
been."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from trainer.checkpoint.retention import mirror_of
from trainer.checkpoint.runs import checkpoints
from trainer.train import train
from trainer_samples import (
    RecordingDisplay,
    free_ports,
    log_of,
    set_texts,
    small_plan,
    tensor_files,
)

pytestmark = pytest.mark.usefixtures("one_thread")

CHANGES: dict[str, Any] = {
    "max_steps": 8,
    "checkpoint__interval_steps": 2,
    "checkpoint__asynchronous": "true",
}


@pytest.fixture(scope="module")
def trainer() -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, str(Path(__file__).with_name("checkpoint_process.py"))]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


def ask(process: subprocess.Popen[str], **request: Any) -> tuple[int, int]:
    """Exit status and points seen of one run."""
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(json.dumps(request) + "\n")
    process.stdin.flush()
    code, seen = json.loads(process.stdout.readline())
    return code, seen


@pytest.mark.slow
def test_killed_at_every_point_of_a_checkpoint(
    shards: Path, tmp_path: Path, trainer: subprocess.Popen[str]
) -> None:
    """From step 4 to 6: checkpoint 6 is written while training goes on, 2 is purged, 6 is
    mirrored."""
    mirror = tmp_path / "mirror"
    changes = {**CHANGES, "checkpoint__mirror": mirror}
    plan, full, base = small_plan(shards, **changes), tmp_path / "full", tmp_path / "base"
    train(plan, full)
    expected = {checkpoint.name: tensor_files(checkpoint) for checkpoint in checkpoints(full)}
    request = {"set": set_texts(**changes), "shards": str(shards), "run": str(tmp_path / "run")}
    assert ask(trainer, **request, stop_at=4, point=-1, watch=[]) == (0, 0)
    (tmp_path / "run").rename(base)
    expected |= {checkpoint.name: tensor_files(checkpoint) for checkpoint in checkpoints(base)}
    (mirror / "run").rename(tmp_path / "base-mirror")
    found: list[str] = []
    point, ends = 0, 0
    while not ends:
        run = tmp_path / "run"
        shutil.copytree(base, run)
        shutil.copytree(tmp_path / "base-mirror", mirror / "run")
        code, ends = ask(trainer, **request, stop_at=6, point=point, watch=["/step-6", "/step-2"])
        assert code == (0 if ends else -9)
        copy = mirror_of(run, plan.config.checkpoint)
        assert copy is not None
        for checkpoint in [
            *checkpoints(run),
            *checkpoints(copy),
        ]:  # where a record is, all else is
            assert tensor_files(checkpoint) == expected[checkpoint.name], point
        assert len(checkpoints(run)) >= 2, point
        assert len(checkpoints(copy)) >= 1, point
        said = RecordingDisplay()
        assert train(plan, run, display=said).step == 8
        assert "GOING ON FROM" not in said
        found.append(commits_resumed(said))
        assert log_of(run)[4:] == log_of(full)[4:]
        assert tensor_files(checkpoints(run)[-1]) == expected["step-8"], point
        assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-6", "step-8"]
        assert [checkpoint.name for checkpoint in checkpoints(copy)] == ["step-6", "step-8"]
        shutil.rmtree(run)
        shutil.rmtree(copy)
        point += 1
    assert point > 40  # points of a checkpoint, a purge and a copy
    assert found == sorted(found)  # up to the record the older one is loaded
    assert set(found) == {"step-4", "step-6"}


@pytest.mark.slow
@pytest.mark.parametrize("dies", [0, 1])
def test_a_rank_killed_at_points_of_a_checkpoint_of_two(
    shards: Path, tmp_path: Path, trainer: subprocess.Popen[str], dies: int
) -> None:
    """Rank 0 publishes and purges, rank 1 writes its share; the other waits for the dead."""
    full, base, run = (tmp_path / name for name in ("full", "base", "run"))
    request = {"set": set_texts(**CHANGES), "shards": str(shards), "ranks": 2, "dies": dies}

    def go(folder: Path, stop_at: int, point: int = -1) -> tuple[int, int]:
        [port] = free_ports(1)
        kill = {"stop_at": stop_at, "point": point, "watch": ["/step-6", "/step-2"]}
        return ask(trainer, **request, **kill, run=str(folder), port=port)

    assert go(full, 8)[0] == go(base, 4)[0] == 0
    expected = {
        checkpoint.name: tensor_files(checkpoint)
        for checkpoint in [*checkpoints(full), *checkpoints(base)]
    }
    shutil.copytree(base, run)
    code, ends = go(run, 6)
    assert code == 0 and ends > 8
    found = []
    for point in points_of_two(ends):
        shutil.rmtree(run)
        shutil.copytree(base, run)
        assert go(run, 6, point) == (-9, 0)
        found.append(checkpoints(run)[-1].name)
        assert len(checkpoints(run)) >= 2, point
        for checkpoint in checkpoints(run):
            assert tensor_files(checkpoint) == expected[checkpoint.name], point
        assert go(run, 8)[0] == 0
        assert log_of(run)[4:] == log_of(full)[4:]
        assert tensor_files(checkpoints(run)[-1]) == expected["step-8"], point
    assert found == sorted(found)
    assert set(found) == ({"step-4"} if dies else {"step-4", "step-6"})


def points_of_two(n: int) -> range:
    """Some of them, for the time each takes; all were tried when this was written."""
    return range(2, n, 3)


def commits_resumed(said: RecordingDisplay) -> str:
    [line] = [line for line in said.lines if line.startswith("resumed ")]
    return line.split(" at ")[0].rpartition("/")[2]
