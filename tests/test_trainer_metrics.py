"""The logs: complete lines, no line twice, and nothing lost when the disk is full."""

import errno
import io
import json
import os
import re
from pathlib import Path

import pytest

from trainer.metrics import metrics
from trainer.metrics.display import Display, step_line
from trainer.metrics.metrics import (
    GuardHistory,
    Journal,
    drop_lines_after,
    read_events,
    read_history,
    read_metrics,
)

VALUES = {
    "step": 3,
    "max_steps": 60,
    "loss": 2.5,
    "lr": 1e-3,
    "grad_norm": 0.5,
    "tokens_per_s": 12_345.6,
    "data_wait": 0.001,
    "eta_s": 61.2,
}


def test_lines_after_the_step_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3]
    drop_lines_after(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    Journal(tmp_path, 1, writes=True, tensorboard=False).metrics({"step": 2, "loss": 1.0})
    assert read_metrics(tmp_path) == [{"step": 1}, {"step": 2, "loss": 1.0}]


def test_only_the_main_rank_writes(tmp_path: Path) -> None:
    journal = Journal(tmp_path, 0, writes=False, tensorboard=True)
    journal.metrics({"step": 1})
    journal.event("start")
    assert list(tmp_path.iterdir()) == []


def test_lines_wait_for_a_disk_with_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path, 0, writes=True, tensorboard=False)
    journal.metrics({"step": 1})
    write = os.write

    def half(handle: int, data: bytes) -> int:
        return write(handle, data[:3])

    def full(handle: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "full")

    for step, failure in ((2, half), (3, full)):
        monkeypatch.setattr(os, "write", failure)
        journal.metrics({"step": step})
        assert [line["step"] for line in read_metrics(tmp_path)] == [1]
    monkeypatch.undo()
    journal.metrics({"step": 4})
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4]


def test_events_have_a_time(tmp_path: Path) -> None:
    Journal(tmp_path, 0, writes=True, tensorboard=False).event("start", step=0)
    event = json.loads((tmp_path / "events.jsonl").read_text())
    assert (event["event"], event["step"]) == ("start", 0)
    assert event["unix_s"] > 1.6e9


def test_events_of_version_0_1_have_todays_names(tmp_path: Path) -> None:
    old = {"commit": "checkpoint", "commit refused": "checkpoint failed", "refused": "skipped",
           "mirror refused": "mirror failed", "purge refused": "purge failed"}  # fmt: skip
    lines = [{"event": name, "first_index": n} for n, name in enumerate((*old, "rollback"))]
    text = "".join(json.dumps({**line, "skipped": [8, 16]}) + "\n" for line in lines)
    (tmp_path / "events.jsonl").write_text(text)
    assert [line["event"] for line in read_events(tmp_path)] == [*old.values(), "rollback"]
    assert read_history(tmp_path) == GuardHistory(frozenset({2}), ((8, 16),), 1)


def test_tensorboard_is_written_too(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    journal = Journal(tmp_path, 0, writes=True, tensorboard=True)
    journal.metrics({"step": 1, "loss": 2.0, "grad_norm": None, "val": {"fineweb": 3.0}})
    written = list((tmp_path / "tensorboard").glob("events.*"))
    assert len(written) == 1
    assert b"val/fineweb" in written[0].read_bytes()


def test_a_step_in_one_line() -> None:
    assert step_line(VALUES, 200) == (
        "step 3/60 · ETA 0:01:01 · loss 2.5000 · 12,346 tokens/s · grad norm 0.50 · "
        "lr 1.00e-03 · data wait 0.1 %"
    )
    more = {"mfu": 0.412, "dollars": 1.5, "dollars_to_go": 2.25, "val_loss": 3.0}
    line = step_line({**VALUES, **more, "loss": None}, 200)
    assert "loss not finite" in line
    assert "MFU 41.2 % (causal)" in line
    assert "$ 1.50 (+ 2.25)" in line
    spent = step_line({**VALUES, **more, "dollars_left": 8.5}, 200)
    assert "$ 1.50 (+ 2.25, 8.50 left)" in spent
    assert "held-out 3.0000" in line


@pytest.mark.parametrize("width", [1, 40, 80, 100])
def test_a_line_is_as_wide_as_its_place_and_loses_whole_fields(width: int) -> None:
    every = step_line(VALUES, 1000).split(" · ")
    fields = step_line(VALUES, width).split(" · ")
    assert fields == every[: len(fields)]
    assert len(step_line(VALUES, width)) <= width or len(fields) == 1
    longer = " · ".join(every[: len(fields) + 1])
    assert len(longer) > width or fields == every
    assert len(step_line(VALUES)) <= 80


def test_a_stream_that_is_no_terminal_gets_plain_lines() -> None:
    stream = io.StringIO()
    display = Display(stream)
    display.print("hello")
    display.step(VALUES)
    display.close()
    assert stream.getvalue().splitlines() == ["hello", step_line(VALUES)]


def test_a_terminal_gets_a_live_line(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    stream = Terminal()
    display = Display(stream)
    display.wait("compiling ...")
    display.step(VALUES)
    display.print("[a] word")
    display.step({**VALUES, "step": 4, "val_loss": 3.0})
    display.step({**VALUES, "step": 60})
    display.print("done")
    display.close()
    shown = stream.getvalue()
    for text in ("compiling ...", "[a] word", "step 4/60", "held-out 3.0000", "step 60/60"):
        assert text in shown
    assert re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]|\s", "", shown.rpartition("done")[2]) == ""


def test_a_torn_line_ends_before_the_next_and_damaged_ones_are_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Power lost, or copied while it was written: a later start, report or trace goes on."""
    good = b'{"event": "start", "unix_s": 1.0}\n'
    torn = [b'{"event": "che', b"\0" * 700 + b"\n", b"[1]\n", b'{"event": 3, "unix_s": 1}\n']
    torn += [b"[" * 100_000 + b"\n", b'{"unix_s": 2.0}\n', b"\xff\xfe\n"]
    for number, tail in enumerate(torn):
        run = tmp_path / str(number)
        run.mkdir()
        (run / "events.jsonl").write_bytes(good + tail)
        journal = Journal(run, 0, writes=True, tensorboard=False)
        journal.event("done")
        assert [event["event"] for event in read_events(run)] == ["start", "done"], tail[:20]
    assert "damaged lines left out: 1" in caplog.text


def test_nothing_is_said_of_a_line_under_way(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"step": 2')
    assert [line["step"] for line in read_metrics(tmp_path)] == [1]
    assert caplog.text == ""


@pytest.mark.parametrize("when", ["opened", "written"])
def test_what_fails_in_tensorboard_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, when: str
) -> None:
    """A full disk ended a run that would have gone on."""

    def full(*of: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    opened = full if when == "opened" else lambda run, step: full
    monkeypatch.setattr(metrics, "_tensorboard", opened)
    journal = Journal(tmp_path, 0, writes=True, tensorboard=True)
    for step in (3, 4):
        journal.metrics({**VALUES, "step": step})
    assert [line["step"] for line in read_metrics(tmp_path)] == [3, 4]
    assert caplog.text.count("TensorBoard has failed") == 1


def test_with_a_checkpoint_both_logs_are_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = list[str]()
    monkeypatch.setattr(
        os, "fsync", lambda handle: synced.append(os.readlink(f"/proc/self/fd/{handle}"))
    )
    journal = Journal(tmp_path, 0, writes=True, tensorboard=False)
    journal.metrics(VALUES)
    journal.event("loader")
    assert synced == []
    journal.event("checkpoint")
    assert {Path(name).name for name in synced} == {"metrics.jsonl", "events.jsonl"}
