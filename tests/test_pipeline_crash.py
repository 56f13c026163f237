"""`summer-prep` killed with SIGKILL: at each point of a run, at random moments, beside another."""

import csv
import itertools
import json
import lzma
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import crash_process
from conftest import REPOSITORY
from pipeline.text.exclude import Exclusion
from pipeline_samples import TEXTS, byte_level, contents, tokenizer, write_jsonl
from shards.files import is_temporary

TURNS = [[{"from": "human", "value": text}, {"from": "gpt", "value": "yes, so"}] for text in TEXTS]
NEVER = -1


class Stage:
    """`summer-prep tokenize` of one small source, in processes forked from a warm one."""

    def __init__(self, place: Path, tokenizer: Path, *options: str) -> None:
        self.place, self.tokenizer, self.options = place, tokenizer, options
        self.limited = "--max-documents" in options
        self.outs = (place / f"{n}" for n in itertools.count())
        environment = {**os.environ, "PYTHONPATH": f"{REPOSITORY / 'tests'}:{REPOSITORY}"}
        self.server = subprocess.Popen(
            [sys.executable, crash_process.__file__, *self.arguments(place / "warm", 1)],
            env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        assert self.run(place / "complete", 2) == 0, self.errors(place / "complete")
        began = time.monotonic()
        self.run(next(self.outs), 2)
        self.seconds = time.monotonic() - began
        self.expected = files(place / "complete")

    def ask(self, **order: Any) -> int:
        assert self.server.stdin is not None and self.server.stdout is not None
        print(json.dumps(order), file=self.server.stdin, flush=True)
        return int(self.server.stdout.readline())

    def arguments(self, out: Path, workers: int) -> list[str]:
        fixed = ["--tokenizer", self.tokenizer, "--seq-len", 64, "--val-fraction", 0.3]
        chosen = ["--out", out, "--workers", workers, "--check-encoding", 1]
        return ["tokenize", *map(str, [*fixed, *chosen]), *self.options]

    def start(self, out: Path, workers: int = 1, **how: Any) -> int:
        """Its pid; see crash_process.py for what else it can be asked."""
        defaults = {"log": f"{out}.log", "stop": NEVER, "where": "main", "spoil": "nothing"}
        return self.ask(**{"start": self.arguments(out, workers), **defaults, **how})

    def wait(self, pid: int) -> int:
        return self.ask(wait=pid)

    def run(self, out: Path, workers: int = 1, **how: Any) -> int:
        """The exit code, once the process and its workers are gone."""
        return self.wait(self.start(out, workers, **how))

    def events(self, out: Path) -> list[list[str]]:
        """[[what was done, to which file, its new name]], in order."""
        return [line.split("\t") for line in Path(f"{out}.log").read_text().splitlines()]

    def errors(self, out: Path) -> str:
        return Path(f"{out}.log.err").read_text()

    def check_visible(self, out: Path) -> None:
        """Whatever is visible is complete, and what it lists is there."""
        seen = {name: data for name, data in files(out).items() if not is_temporary(Path(name))}
        other = [name for name in seen if seen[name] != self.expected.get(name)]
        if not self.limited:  # units begun ahead are not cut yet
            assert other == []
        for name in set(seen) - set(other):
            assert required_by(name, self.expected) <= set(seen), name

    def go_on(self, out: Path, workers: int) -> None:
        """The same command once more makes everything what it should be."""
        assert self.run(out, workers) == 0, self.errors(out)
        assert files(out) == self.expected


def files(out: Path) -> dict[str, bytes]:
    """What a source's folder holds; nothing if it is not there yet."""
    return {name.split("/")[-1]: data for name, data in contents(out).items()}


def required_by(name: str, names: Any) -> set[str]:
    """What must be there when `name` is: all if it is the manifest, a unit's if its unit_record."""
    if name == "manifest.json":
        return set(names) - {name}
    if not (name.endswith(".json") and name[0].isdigit()):
        return set()
    unit = name.removesuffix(".json")
    mine = {other for other in names if other.startswith((f"{unit}-", f"{unit}."))}
    common = {"units.json", "tokenizer.model", "tokenizer.json", "excluded.ngrams"}
    return ({*mine, *common} & set(names) | {"units.json"}) - {name}


def make_stage(place: Path, kind: str) -> Iterator[Stage]:
    chat = kind == "chat"
    for number in range(2 if chat else 5):
        rows: list[Any] = [*(TURNS if chat else TEXTS)[number * 20 :][: 10 if chat else 20], 7]
        name = place / "in" / f"{number}.jsonl"
        write_jsonl(name, rows[number == 1 :], "conversations" if chat else "text")
    vocabulary = place / "small.model"
    vocabulary.write_bytes(tokenizer().model)
    options = {"chat": ["--loss-mask"], "limited": ["--max-documents", "47"]}.get(kind, [])
    if kind == "formats":
        vocabulary, options = other_formats(place)
    source = ["--source", "slimorca" if chat else "mine", "--data-files", str(place / "in")]
    made = Stage(place, vocabulary, *source, *options)
    if kind != "formats":
        assert "00001.rejected.jsonl" in made.expected and "00001-val-000.npy" in made.expected
    else:
        assert b"shares 13 words with tale" in b"".join(made.expected.values())
    assert ("00001-000.mask.npy" in made.expected) == chat
    with made.server:
        yield made
        assert made.server.stdin is not None
        made.server.stdin.close()


def other_formats(place: Path) -> tuple[Path, list[str]]:
    """An array of JSON, csv and xz among the files; a tokenizer.json and a list to leave out."""
    array, table, packed = (place / "in" / f"{number}.jsonl" for number in (0, 2, 4))
    records = [json.loads(line) for line in array.read_text().splitlines()]
    array.with_suffix(".json").write_text(json.dumps(records))
    with table.with_suffix(".csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerows(
            [["text"], *([json.loads(line)["text"]] for line in table.read_text().splitlines())]
        )
    packed.with_suffix(".jsonl.xz").write_bytes(lzma.compress(packed.read_bytes()))
    for path in (array, table, packed):
        path.unlink()
    vocabulary, listed = place / "tokenizer.json", place / "tale.ngrams"
    vocabulary.write_bytes(byte_level("llama3"))
    front, _, behind = TEXTS[41].partition(", number 41.")
    item = " ".join([*front.split()[-6:], "number", "41", *behind.split()[:6]])
    listed.write_bytes(Exclusion.of({"tale": [item]}).data)
    return vocabulary, ["--exclude", str(listed)]


@pytest.fixture(scope="module")
def masked(tmp_path_factory: Any) -> Iterator[Stage]:
    """Every kind of file: train and held out, masks, rejected records."""
    yield from make_stage(tmp_path_factory.mktemp("masked"), "chat")


@pytest.fixture(scope="module")
def limited(tmp_path_factory: Any) -> Iterator[Stage]:
    yield from make_stage(tmp_path_factory.mktemp("limited"), "limited")


@pytest.fixture(scope="module")
def formats(tmp_path_factory: Any) -> Iterator[Stage]:
    """Lines, lines in xz, csv, an array of JSON; a tokenizer.json; documents left out."""
    yield from make_stage(tmp_path_factory.mktemp("formats"), "formats")


@pytest.fixture(params=["masked", "limited", "formats"])
def stage(request: Any) -> Any:
    return request.getfixturevalue(request.param)


def killed_at(stage: Stage, points: list[int], **how: Any) -> list[Path]:
    """Runs, side by side, that died when they came to these points."""
    outs = [next(stage.outs) for _ in points]
    pids = [stage.start(out, stop=p, **how) for out, p in zip(outs, points, strict=True)]
    assert [stage.wait(pid) for pid in pids] == [-signal.SIGKILL] * len(points)
    return outs


def test_a_run_killed_at_any_point_goes_on_to_the_same_bytes(masked: Stage) -> None:
    rng = random.Random(0)
    out = next(masked.outs)
    assert masked.run(out) == 0
    points = len(masked.events(out))
    for some in ([n for n in (first, first + 1) if n < points] for first in range(0, points, 2)):
        outs = killed_at(masked, some)
        list(map(masked.check_visible, outs))
        pids = [masked.start(out, rng.choice([1, 1, 2, 3])) for out in outs]
        assert [masked.wait(pid) for pid in pids] == [0] * len(outs)
        for out, point in zip(outs, some, strict=True):
            assert files(out) == masked.expected, point


def durability_faults(events: list[list[str]], complete: Any) -> set[str]:
    """What a loss of power could have undone or left half, by what was flushed and when."""
    flushed: set[str] = set()
    visible: set[str] = set()
    durable: set[str] = set()  # visible since before the folder was flushed
    found = set()
    for event, name, *other in events:
        if event == "open" and not is_temporary(Path(name)):
            found.add("a visible name is written to")
        elif event in ("write", "half"):
            flushed.discard(name)
        elif event == "fsync" and is_temporary(Path(name)):
            flushed.add(name)
        elif event == "fsync":
            durable = set(visible)
        elif event in ("replace", "link"):
            if name not in flushed:
                found.add("a file is published that was not flushed")
            if not required_by(other[0], {*complete, *visible}) <= durable:
                found.add("a file is published before what it lists")
            visible.add(other[0])
        elif event == "unlink" and name in visible:
            if any(name in required_by(unit_record, [name]) for unit_record in durable):
                found.add("a file is removed before what lists it")
            visible.discard(name)
    if durable != set(complete):
        found.add("a folder is not flushed")
    return found


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ("nothing", ""),
        ("no rename", "a visible name is written to"),
        ("no flush", "a file is published that was not flushed"),
        ("no flush of the folder", "a folder is not flushed"),
        ("unit record first", "a file is published before what it lists"),
    ],
)
def test_what_is_published_outlives_a_loss_of_power(
    masked: Stage, spoil: str, message: str
) -> None:
    out = next(masked.outs)
    assert masked.run(out, spoil=spoil) == 0 and files(out) == masked.expected
    found = durability_faults(masked.events(out), masked.expected)
    assert (message in found) if message else not found


def test_what_is_taken_back_outlives_a_loss_of_power(limited: Stage) -> None:
    out = next(limited.outs)
    assert limited.run(out, 3) == 0
    assert any(event == "unlink" and name[0].isdigit() for event, name, *_ in limited.events(out))
    assert not durability_faults(limited.events(out), limited.expected)


@pytest.mark.parametrize(
    ("spoil", "event"),
    [
        ("no rename", ["half", "00000-000.npy"]),
        ("unit record first", ["open", "00000-val-000.rows.npy"]),
    ],
)
def test_a_wrong_order_of_writes_is_noticed(masked: Stage, spoil: str, event: list[str]) -> None:
    """The test above that kills at each point is no formality."""
    out = next(masked.outs)
    assert masked.run(out, spoil=spoil) == 0
    events = masked.events(out)
    (point,) = [n for n, (what, name, *_) in enumerate(events)
                if what == event[0] and event[1] in name]  # fmt: skip
    (out,) = killed_at(masked, [point], spoil=spoil)
    with pytest.raises(AssertionError):
        masked.check_visible(out)


def test_a_repair_killed_at_any_point_is_repaired(masked: Stage) -> None:
    rng = random.Random(3)

    def harmed() -> tuple[Path, list[str]]:
        out = Path(shutil.copytree(masked.place / "complete", next(masked.outs)))
        (source,) = out.iterdir()
        (source / "00001-000.mask.npy").unlink()
        return out, ["repair", str(source), "--data-files", str(masked.place / "in")]

    out, command = harmed()
    assert masked.run(out, start=command) == 0 and files(out) == masked.expected
    for point in rng.sample(range(len(masked.events(out))), 20):
        out, command = harmed()
        assert masked.run(out, start=command, stop=point) == -signal.SIGKILL
        assert masked.run(out, start=command) == 0, masked.errors(out)
        assert files(out) == masked.expected, point


def test_a_run_killed_at_random_moments_goes_on_to_the_same_bytes(stage: Stage) -> None:
    rng = random.Random(1)
    begun = 0
    for _ in range(25):
        while True:
            out = next(stage.outs)
            pid = stage.start(out, rng.choice([1, 2, 3]))
            time.sleep(rng.uniform(0, 1.2) * stage.seconds)
            os.killpg(pid, signal.SIGKILL)
            if stage.wait(pid) == -signal.SIGKILL:
                break
        begun += out.exists()
        stage.check_visible(out)
        stage.go_on(out, rng.choice([1, 2, 3]))
    assert begun > 10


@pytest.mark.parametrize("seed", range(4))
def test_a_worker_that_dies_alone_costs_no_byte(stage: Stage, seed: int) -> None:
    rng = random.Random(seed)
    out = next(stage.outs)
    assert stage.run(out, 2, where="worker", stop=rng.randrange(50)) == 1
    assert "a worker process was ended from outside" in stage.errors(out).splitlines()[-1]
    assert not [name for name in files(out) if is_temporary(Path(name))]
    stage.check_visible(out)
    stage.go_on(out, rng.choice([1, 3]))


@pytest.mark.parametrize("seed", range(6))
def test_two_runs_at_once_end_well(stage: Stage, seed: int) -> None:
    rng = random.Random(seed)
    out = next(stage.outs)
    pids = []
    for workers in rng.sample([1, 2, 3], 2):
        pids.append(stage.start(out, workers))
        time.sleep(rng.choice([0, 0.3]) * rng.random() * stage.seconds)
    assert [stage.wait(pid) for pid in pids] == [0, 0], stage.errors(out)
    assert files(out) == stage.expected


@pytest.mark.parametrize("seed", range(10))
def test_a_run_killed_while_another_works_does_no_damage(stage: Stage, seed: int) -> None:
    rng = random.Random(seed)
    out = next(stage.outs)
    killed = stage.start(out, rng.choice([1, 3]), stop=rng.randrange(200))
    other = stage.start(out, rng.choice([1, 3]))
    stage.wait(killed)
    assert stage.wait(other) == 0, stage.errors(out)
    stage.check_visible(out)
    assert "manifest.json" in files(out)
    stage.go_on(out, 1)
