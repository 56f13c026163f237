"""Progress: how far the work is, what is left, and how that is written."""

import gzip
import heapq
import io
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline import progress
from pipeline.estimate import Estimate, estimate, take_sample
from pipeline.prepare import load_or_create_plan, prepare
from pipeline.progress import PrepareDisplay, ProgressEstimator
from pipeline.text.encode import make_encoder
from pipeline.units.executors import Executor
from pipeline.units.job import NO_LIMIT, Amount, Limit, PrepareJob, UnitProgress
from pipeline_samples import WORDS, corpus, request, tokenizer, write_jsonl, write_parquet

MB = 1_000_000


def ahead(n_units: int, limit: Limit = NO_LIMIT) -> Estimate:
    """Units of 64 MB."""
    return Estimate(
        units=dict.fromkeys(range(n_units), 64 * MB), limit=limit, read_bytes=0,
        tokens=0, disk_bytes=0, seconds=0,
    )  # fmt: skip


def work(
    estimator: ProgressEstimator, n_units: int, workers: int, yield_: float
) -> Iterator[float]:
    """Workers of 20 MB/s that begin one after the other and are slow at first; the time, by steps.

    `yield_` is what a planned byte gives: files hold more than text, or less than they unpack to.
    """
    rng = random.Random(n_units * workers)
    ahead = iter(range(n_units))
    free = [(1.0 + worker / workers, worker, None, 0.0) for worker in range(workers)]
    new = set(range(workers))
    while free:
        now, worker, unit, text = heapq.heappop(free)
        if unit is None or text >= 64 * MB * yield_:
            if unit is not None:
                estimator.unit_done(unit)
            if (unit := next(ahead, None)) is None:
                continue
            text = 0.0
        else:
            text += 8 * MB
        estimator.progressed(
            UnitProgress(unit, int(text), Amount(int(text) // 4000, int(text) // 4)), now
        )
        takes = 0.4 * rng.uniform(0.8, 1.2) * (3 if worker in new else 1)
        if text:
            new.discard(worker)
        heapq.heappush(free, (now + takes, worker, unit, text))  # type: ignore[misc]
        yield now


@pytest.mark.parametrize("workers", [1, 2, 16])
@pytest.mark.parametrize("yield_", [0.5, 1.0, 2.0])
def test_what_is_left_is_true_once_the_rate_is_steady(workers: int, yield_: float) -> None:
    n_units = 20 * workers
    estimator = ProgressEstimator(ahead(n_units))
    message = [(now, estimator.share, estimator.seconds_left(now + 0.1))
            for now in work(estimator, n_units, workers, yield_)]  # fmt: skip
    end = message[-1][0]
    assert estimator.share == 1.0 and estimator.text_bytes >= n_units * 64 * MB * yield_
    for now, share, left in message:
        if share > 0.12:  # with the smallest units the first, slow steps are a tenth
            true = end - now - 0.1
            a_unit = 64 * yield_ / 20  # who gets the last one is not foreseen
            assert left is not None and abs(left - true) < 0.15 * true + a_unit / 2


def test_a_rate_that_halves_is_followed_soon() -> None:
    estimator, now = ProgressEstimator(ahead(100)), 0.0
    for unit in range(75):
        estimator.progressed(UnitProgress(unit), now)
        now += 1.0 if unit < 50 else 2.0
        estimator.progressed(UnitProgress(unit, 64 * MB), now)
        estimator.unit_done(unit)
    left = estimator.seconds_left(now)
    assert left is not None and left == pytest.approx(50, rel=0.05)


def test_a_restarted_unit_counts_once() -> None:
    estimator = ProgressEstimator(ahead(2))
    estimator.progressed(UnitProgress(0), 0)
    estimator.progressed(UnitProgress(0, 48 * MB, Amount(5, 50)), 1)
    estimator.progressed(UnitProgress(0), 2)  # its machine was lost
    assert (estimator.share, estimator.done) == (0.0, Amount())
    estimator.progressed(UnitProgress(0, 64 * MB, Amount(7, 70)), 3)
    estimator.unit_done(0)
    assert (estimator.share, estimator.done) == (0.5, Amount(7, 70))
    estimator.unit_done(0)  # reported twice
    assert estimator.share == 0.5


def test_the_last_unit_is_waited_for() -> None:
    """Fifteen of sixteen workers have nothing left to do."""
    estimator = ProgressEstimator(ahead(16))
    for unit in range(16):
        estimator.progressed(UnitProgress(unit), 0)
        estimator.progressed(UnitProgress(unit, 8 * MB), 5)
    for unit in range(15):
        estimator.progressed(UnitProgress(unit, 64 * MB), 10)
        estimator.unit_done(unit)
    estimator.progressed(UnitProgress(15, 16 * MB), 10)
    assert estimator.seconds_left(10) == pytest.approx(30)


def test_a_limit_is_what_the_work_is_measured_by() -> None:
    estimator = ProgressEstimator(ahead(1000, Limit(documents=400, tokens=10**9)))
    for at in range(1, 5):
        estimator.progressed(UnitProgress(at, 64 * MB, Amount(50, 1000)), at)
    assert estimator.share == 0.5 and estimator.seconds_left(4) == pytest.approx(4)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def output_of(tmp_path: Path, stream: io.StringIO, **changes: Any) -> str:
    corpus(tmp_path / "in")
    screen = PrepareDisplay(stream)
    prepare(request(tmp_path / "out", str(tmp_path / "in"), **changes), Executor(), screen)
    screen.close()
    return stream.getvalue()


def test_a_log_file_gets_a_line_now_and_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # as some CI sets it
    monkeypatch.setattr(progress, "PLAIN_INTERVAL_S", 0.0)
    lines = output_of(tmp_path, io.StringIO()).splitlines()
    assert not any(ord(character) < 32 for line in lines for character in line)
    assert any(re.search(r"\d%, 0:\d\d:\d\d left, 1/.*documents.*MB/s", line) for line in lines)
    assert lines[-1].startswith(f"{lines[-1].split('/')[0]}/{lines[-1].split('/')[0]} units")


def test_between_its_times_a_log_file_gets_nothing(tmp_path: Path) -> None:
    lines = output_of(tmp_path, io.StringIO()).splitlines()
    assert sum("MB/s" in line for line in lines) == 1


def test_a_terminal_has_one_line_that_moves(tmp_path: Path) -> None:
    shown = output_of(tmp_path, Terminal())
    assert "\x1b[" in shown and "to read" in shown and shown.count(" units, ") > 1


def test_under_a_limit_the_units_have_no_number(tmp_path: Path) -> None:
    lines = output_of(tmp_path, io.StringIO(), limit=Limit(documents=40)).splitlines()
    assert "as far as the limit reaches" in lines[3] and " units, 40 documents" in lines[-1]
    assert "/" not in lines[-1].split(" units")[0]


@pytest.mark.parametrize("kind", ["fields", "gz", "parquet", "plain"])
def test_the_text_is_estimated_from_what_the_sample_held(tmp_path: Path, kind: str) -> None:
    """79 MB of lines with 0.1 MB of text were announced as 50 MB of work."""
    texts = [f"{number} {WORDS}" for number in range(4000)]
    path = tmp_path / "a.jsonl"
    if kind == "parquet":
        path = write_parquet(tmp_path / "a.parquet", texts * 20)  # a dictionary of 4,000 texts
        texts = texts * 20
    elif kind == "plain":
        write_jsonl(path, texts)
    else:
        other = "x" * 3000 if kind == "fields" else "x"
        lines = [json.dumps({"other": other, "text": text}) + "\n" for text in texts]
        path.write_text("".join(lines))
    if kind == "gz":
        path = tmp_path / "a.jsonl.gz"
        path.write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    wanted = request(tmp_path / "out", str(path), unit_bytes=1 << 28)
    inputs, plan = load_or_create_plan(wanted, tmp_path / "out" / "mine")
    job = PrepareJob(tmp_path / "out" / "mine", plan, inputs)
    sample = take_sample(job, make_encoder(tokenizer()), None)
    found = estimate(plan, range(len(plan.units)), sample, NO_LIMIT, 1)
    held = sum(len(text) for text in texts) * sample.tokens / sample.text_bytes
    assert 0.8 < found.tokens / held < 1.25
