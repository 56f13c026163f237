"""A Hub that rejects, stalls, cuts short, hangs up or dies changes no byte."""

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from conftest import REPOSITORY
from hub_server import COMMIT, HubServer, Repo
from pipeline.errors import SourceError
from pipeline.inputs.hub import PatientFile
from pipeline_samples import TEXTS, contents, write_jsonl, write_parquet

FAULTS = ["429", "500", "503", "stall", "cut", "close"]
PATIENCE_S = 2.0

READ_ON = """
import sys, time, types
from dataclasses import replace
from pathlib import Path
from huggingface_hub import constants
from pipeline.inputs import hub
from pipeline.errors import SourceError
from pipeline.inputs.sources import SourceOverrides, find
from pipeline_samples import prepared, request
longest_pause_s = 0.01
sleep, time.sleep = time.sleep, lambda seconds: sleep(min(seconds, 0.01))  # of huggingface_hub
hub.time = types.SimpleNamespace(
    sleep=lambda seconds: sleep(min(seconds, longest_pause_s)), monotonic=time.monotonic
)
constants.HF_HUB_DOWNLOAD_TIMEOUT = 0.1
hub.BLOCK_BYTES = 1 << 12
hub.HubInputs.__init__.__defaults__ = ("", float(sys.argv[1]))
for line in sys.stdin:
    out, pause = line.split()
    longest_pause_s = float(pause)
    source = find("mine", SourceOverrides(dataset="org/name"))
    wanted = replace(request(Path(out), "unused"), source=source, data_files=())
    try:
        print(prepared(wanted).facts.revision, flush=True)
    except SourceError as error:
        print(error, flush=True)
"""


class Reader:
    """Prepares a source from the Hub in another process, as often as asked; what it says."""

    def __init__(self, hub: HubServer, home: Path) -> None:
        path = os.pathsep.join([str(REPOSITORY / "tests"), str(REPOSITORY)])
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error::ResourceWarning", "-c", READ_ON, str(PATIENCE_S)],
            env={**os.environ, **hub.environment(home), "PYTHONPATH": path},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip

    def prepare(self, out: Path, longest_pause_s: float = 0.01) -> str:
        assert self.process.stdin is not None and self.process.stdout is not None
        print(out, longest_pause_s, file=self.process.stdin, flush=True)
        return self.process.stdout.readline().strip()


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubServer]:
    for number in range(3):
        rows = TEXTS[number * 100 : number * 100 + 100]
        write_parquet(tmp_path / "repo" / "data" / f"train-{number}.parquet", rows, group=25)
    write_jsonl(tmp_path / "repo" / "data" / "train-3.jsonl", TEXTS)
    files = contents(tmp_path / "repo")
    parquet = {name: data for name, data in files.items() if name.endswith("parquet")}
    with HubServer({"org/name": Repo(parquet)}) as server:
        yield server


@pytest.fixture
def reader(hub: HubServer, tmp_path: Path) -> Iterator[Reader]:
    made = Reader(hub, tmp_path / "home")
    with made.process:
        yield made
        assert made.process.stdin is not None
        made.process.stdin.close()


def test_storms_change_no_byte(hub: HubServer, reader: Reader, tmp_path: Path) -> None:
    assert reader.prepare(tmp_path / "calm") == COMMIT
    for seed in range(4):
        rng = random.Random(seed)
        storm = ["", *rng.choices([*FAULTS, "", "", ""], k=40)]
        hub.faults[:] = storm
        assert reader.prepare(tmp_path / f"{seed}") == COMMIT, (seed, storm)
        assert len(hub.faults) < 20  # most of the storm has been lived through
        assert contents(tmp_path / f"{seed}") == contents(tmp_path / "calm")


def test_a_dead_hub_is_given_up_in_time_and_its_commit_is_kept(
    hub: HubServer, reader: Reader, tmp_path: Path
) -> None:
    assert reader.prepare(tmp_path / "calm") == COMMIT
    assert hub.asked.count("") == 1 and set(hub.asked) == {"", COMMIT}
    hub.faults[:] = [*[""] * 12, "die"]
    message = reader.prepare(tmp_path / "out", 60)
    assert "start the same command again when the Hub is well" in message
    assert "(tried for " in message
    assert (tmp_path / "out" / "mine" / "units.json").exists()
    hub.dead, hub.head = False, "f" * 40  # meanwhile somebody has pushed
    hub.asked.clear()
    assert reader.prepare(tmp_path / "out") == COMMIT
    assert set(hub.asked) == {COMMIT}
    assert contents(tmp_path / "out") == contents(tmp_path / "calm")


class Unsteady(PatientFile):
    """Reads from bytes; each read fails as often as it is asked to, or gives too little."""

    def __init__(self, data: Any, failures: Any, patience_s: Any = 60.0) -> None:
        super().__init__("hf://datasets/org/name@main/a", len(data), patience_s)
        self.data, self.failures = data, failures

    def _read(self, wanted: Any) -> Any:
        if self.failures:
            raise self.failures.pop()
        return self.data[self._at : self._at + wanted]


def test_reading_goes_on_from_the_byte_where_it_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    data = bytes(range(256)) * 40
    with Unsteady(data, [ConnectionError("reset"), TimeoutError()]) as file:
        assert file.read(1000) == data[:1000]
        file.failures = [OSError("5 bytes came where 9 were asked for")]
        assert file.seek(-300, 2) == len(data) - 300 and file.read() == data[-300:]
        assert file.read(1) == b""


def test_patience_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    clock = SimpleNamespace(sleep=slept.append, monotonic=lambda: sum(slept))
    monkeypatch.setattr("pipeline.inputs.hub.time", clock)
    with (
        Unsteady(b"data", [ConnectionError("reset by peer")] * 999, patience_s=100.0) as file,
        pytest.raises(SourceError, match=r"reset by peer \(tried for 100 s\): start the same"),
    ):
        file.read(1)
    assert slept == [1, 2, 4, 8, 16, 30, 30, 9]
