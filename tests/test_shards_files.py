"""Publishing: complete or absent, first writer wins, nothing of the dead stays."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from shards.errors import SummerError, one_line_failures
from shards.files import create_once, publish, publish_bytes, remove_abandoned


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "a"
    publish_bytes(path, b"old")
    with pytest.raises(RuntimeError), publish(path) as file:
        file.write(b"new")
        raise RuntimeError
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_first_writer_wins(tmp_path: Path) -> None:
    assert create_once(tmp_path / "a", b"first")
    assert not create_once(tmp_path / "a", b"second")
    assert (tmp_path / "a").read_bytes() == b"first"
    assert len(list(tmp_path.iterdir())) == 1


WRITER = """
import sys, time, pathlib
from shards.files import publish
with publish(pathlib.Path(sys.argv[1])) as file:
    file.write(b"half"); file.flush()
    print("writing", flush=True)
    time.sleep(60)
"""


def test_temporaries_are_removed_once_their_writer_is_dead(tmp_path: Path) -> None:
    path = tmp_path / "a"
    child = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE)
    assert child.stdout is not None and child.stdout.readline() == b"writing\n"
    assert remove_abandoned(tmp_path) == 0
    assert len(list(tmp_path.iterdir())) == 1
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert not path.exists()
    assert remove_abandoned(tmp_path) == 1
    assert list(tmp_path.iterdir()) == []


def test_failures_are_one_line_and_exit_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    @one_line_failures(KeyError)
    def command(error: Exception) -> None:
        raise error

    for error in (
        SummerError("a: 3 is\n wrong; do b"),
        FileNotFoundError(2, "No such file", "x"),
        KeyError("k"),
    ):
        with pytest.raises(SystemExit) as exit_info:
            command(error)
        assert exit_info.value.code == 1
    assert capsys.readouterr().err.splitlines() == [
        "error: a: 3 is wrong; do b",
        "error: x: No such file",
        "error: 'k'",
    ]
    with pytest.raises(ZeroDivisionError):
        command(ZeroDivisionError())
