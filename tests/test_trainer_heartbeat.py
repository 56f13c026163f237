"""Who holds up the others: told from lines that stop, or that go on while a loop does not."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from trainer.faults.heartbeat import RANKS, STACKS, Beat, Heart
from trainer.metrics.metrics import read_lines
from trainer_samples import ALONE

TIMEOUT_S = 80.0  # a beat each five seconds


class LeftError(Exception):
    """In place of the end of the process."""


class Watched:
    """Rank 0 of three, whose clock and neighbours are ours."""

    def __init__(self, run: Path, patch: pytest.MonkeyPatch, world_size: int = 3) -> None:
        (run / RANKS).mkdir()
        self.now, self.run, self.killed = 100.0, run, list[int]()
        patch.setattr("trainer.faults.heartbeat.time.monotonic", lambda: self.now)
        patch.setattr("trainer.faults.heartbeat.time.sleep", lambda seconds: None)
        patch.setattr("trainer.faults.heartbeat.os._exit", self._leave)
        patch.setattr(
            "trainer.faults.heartbeat.os.kill", lambda pid, number: self.killed.append(pid)
        )
        self.heart = Heart(run, replace(ALONE, world_size=world_size), TIMEOUT_S)

    def _leave(self, code: int) -> None:
        raise LeftError(code)

    def hear(self, rank: int, count: int, pid: int | None = None, **facts: object) -> None:
        beat = Beat(rank=rank, pid=pid or os.getpid(), host=self.heart._own.host, count=count)
        beat = replace(beat, **{"step": 7, "doing": "gradient", **facts})  # type: ignore[arg-type]
        (self.run / RANKS / f"{rank}.json").write_text(json.dumps(asdict(beat)))

    def pass_time(self, seconds: float, hear: Callable[[int], None]) -> None:
        for number in range(int(seconds / 5)):
            self.now += 5
            self.heart._beat()
            hear(number)
            self.heart._look_around()

    def event(self) -> dict[str, object]:
        [event] = read_lines(self.run / "events.jsonl")
        return event


def test_a_rank_whose_line_stops_is_named_within_the_timeout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    watched = Watched(tmp_path, monkeypatch)
    watched.heart.mark(7, "gradient")
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        watched.hear(2, 5, pid=other.pid)
        monkeypatch.setattr("trainer.faults.heartbeat.os.getppid", os.getpid)
        with pytest.raises(LeftError):
            watched.pass_time(400, lambda n: watched.hear(1, n, doing="checkpoint"))
        watched.heart.mark(8, "data")
        other.communicate(b"\n")
    assert watched.now - 100 <= TIMEOUT_S + 10
    assert watched.event()["lost"] == 2
    assert watched.killed == [other.pid]
    assert "rank 2 (process" in capfd.readouterr().err
    assert "_look_around" in (tmp_path / STACKS / "rank-0.txt").read_text()


def test_a_rank_that_is_gone_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as other:
        pass
    watched = Watched(tmp_path, monkeypatch)
    watched.hear(2, 5, pid=other.pid)
    with pytest.raises(LeftError):
        watched.pass_time(400, lambda n: watched.hear(1, n))
    assert watched.now - 100 <= 20
    assert watched.killed == []


def test_ranks_that_have_left_or_have_not_come_are_nobodys_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = Watched(tmp_path, monkeypatch)
    watched.hear(2, 5, doing="left")  # and rank 1 has not said anything yet
    watched.pass_time(400, lambda n: None)
    assert not (tmp_path / "events.jsonl").exists()


def test_a_loop_that_stands_still_is_named_by_who_is_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every thread is alive; rank 2 has not come out of its loader."""
    watched = Watched(tmp_path, monkeypatch)

    def hear(count: int) -> None:
        watched.hear(1, count, step=9)
        watched.hear(2, count, step=9, doing="data")

    watched.heart.mark(8, "gradient")
    watched.heart.mark(9, "gradient")
    with pytest.raises(LeftError):
        watched.pass_time(400, hear)
    assert TIMEOUT_S <= watched.now - 100 <= TIMEOUT_S + 20  # later than a rank that is lost
    assert "rank 2 holds up the others" in str(watched.event()["text"])


def test_one_process_alone_is_watched_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(tmp_path, monkeypatch, world_size=1)
    watched.heart.mark(8, "data")
    watched.pass_time(400, lambda n: None)  # its first step, which compiles
    watched.heart.mark(9, "checkpoint")
    watched.pass_time(400, lambda n: None)  # a checkpoint may take its time
    watched.heart.mark(9, "data")
    with pytest.raises(LeftError):
        watched.pass_time(400, lambda n: None)
    assert "the loop stands still, since" in str(watched.event()["text"])
