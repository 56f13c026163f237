"""Which rank holds up the others: seen in lines that stop, or go on while a loop does not."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from trainer.faults.heartbeat import RANKS, STACKS, Heartbeat, Watchdog
from trainer.metrics.metrics import read_events
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
        self.watchdog = Watchdog(run, replace(ALONE, world_size=world_size), TIMEOUT_S)

    def _leave(self, code: int) -> None:
        raise LeftError(code)

    def write(self, rank: int, count: int, pid: int | None = None, **facts: object) -> None:
        host = self.watchdog._own.host
        beat = Heartbeat(rank=rank, pid=pid or os.getpid(), host=host, count=count)
        beat = replace(beat, **{"step": 7, "doing": "gradient", **facts})  # type: ignore[arg-type]
        (self.run / RANKS / f"{rank}.json").write_text(json.dumps(asdict(beat)))

    def pass_time(self, seconds: float, others: Callable[[int], None]) -> None:
        for number in range(int(seconds / 5)):
            self.now += 5
            self.watchdog._write()
            others(number)
            self.watchdog._check()

    def event(self) -> dict[str, object]:
        [event] = read_events(self.run)
        return event


def test_a_rank_whose_line_stops_is_named_within_the_timeout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    watched = Watched(tmp_path, monkeypatch)
    watched.watchdog.mark(7, "gradient")
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        watched.write(2, 5, pid=other.pid)
        monkeypatch.setattr("trainer.faults.heartbeat.os.getppid", os.getpid)
        with pytest.raises(LeftError):
            watched.pass_time(400, lambda n: watched.write(1, n, doing="checkpoint"))
        watched.watchdog.mark(8, "data")
        other.communicate(b"\n")
    assert watched.now - 100 <= TIMEOUT_S + 10
    assert watched.event()["lost"] == 2
    assert watched.killed == [other.pid]
    assert "rank 2 (process" in capfd.readouterr().err
    assert "_check" in (tmp_path / STACKS / "rank-0.txt").read_text()


def test_ranks_that_have_left_or_have_not_come_are_not_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = Watched(tmp_path, monkeypatch)
    watched.write(2, 5, doing="left")  # and rank 1 has not said anything yet
    watched.pass_time(400, lambda n: None)
    assert not (tmp_path / "events.jsonl").exists()


def test_a_loop_without_progress_is_named_by_who_is_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every thread is alive; rank 2 has not come out of its loader."""
    watched = Watched(tmp_path, monkeypatch)

    def others(count: int) -> None:
        watched.write(1, count, step=9)
        watched.write(2, count, step=9, doing="data")

    watched.watchdog.mark(8, "gradient")
    watched.watchdog.mark(9, "gradient")
    with pytest.raises(LeftError):
        watched.pass_time(400, others)
    assert TIMEOUT_S <= watched.now - 100 <= TIMEOUT_S + 20  # later than a rank that is lost
    assert "rank 2 holds up the others" in str(watched.event()["text"])


def test_one_process_alone_is_watched_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(tmp_path, monkeypatch, world_size=1)
    watched.watchdog.mark(8, "data")
    watched.pass_time(400, lambda n: None)  # its first step, which compiles
    watched.watchdog.mark(9, "checkpoint")
    watched.pass_time(400, lambda n: None)  # a checkpoint may take its time
    watched.watchdog.mark(9, "data")
    with pytest.raises(LeftError):
        watched.pass_time(400, lambda n: None)
    assert "the loop makes no progress, since" in str(watched.event()["text"])
