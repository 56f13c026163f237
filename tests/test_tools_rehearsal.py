"""What a rehearsal says of two runs is what their checkpoints say."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tools.errors import RehearsalError
from tools.rehearsal.certificate import MEANINGS, Certificate, Row, publish, table
from tools.rehearsal.rehearsal import INTERVAL, STRETCHES, Rehearsal, prepare, rehearse
from tools.rehearsal.runs import compare_checkpoints, last_step, train
from trainer.faults.inject import KINDS


def make_checkpoint(run: Path, step: int, digests: dict[str, str]) -> None:
    folder = run / "checkpoints" / f"step-{step}"
    folder.mkdir(parents=True)
    files = {name: {"bytes": 1, "sha256": digest} for name, digest in digests.items()}
    (folder / "checkpoint.json").write_text(json.dumps({"files": files}))


@pytest.mark.parametrize(
    ("there", "same"),
    [
        ({"a": "1", "b": "2"}, True),
        ({"a": "1", "b": "3"}, False),
        ({"a": "1"}, False),
        ({"a": "1", "b": "2", "c": "3"}, False),
        ({}, False),
    ],
)
def test_checkpoint_are_the_same_when_every_file_is(
    tmp_path: Path, there: dict[str, str], same: bool
) -> None:
    make_checkpoint(tmp_path / "here", 4, {"a": "1", "b": "2"})
    make_checkpoint(tmp_path / "there", 4, there)
    assert compare_checkpoints(tmp_path / "here", tmp_path / "there", 4).identical is same
    with pytest.raises(RehearsalError, match="no checkpoint of step 5"):
        compare_checkpoints(tmp_path / "here", tmp_path / "there", 5)


def test_a_line_half_written_is_no_step(tmp_path: Path) -> None:
    assert last_step(tmp_path) == 0
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"step": 2}\n{"step": 3')
    assert last_step(tmp_path) == 2


def good_certificate() -> Certificate:
    rows = tuple(
        Row(fault=fault, step=9, detected=True, recovered=True, steps_lost=3, identical=True)
        for fault in MEANINGS
    )
    return Certificate(
        command="summer-train", steps=12, seconds=1.0, versions={"torch": "2"}, data={"a": "f00"},
        digests={"weights": ("1", "1")}, scores={"hurt": 2.5, "undisturbed": 2.5}, rows=rows,
    )  # fmt: skip


def test_one_broken_promise_spoils_the_certificate(tmp_path: Path) -> None:
    good = good_certificate()
    assert good.kept and "NO" not in "".join(table(good))
    row = good.rows[0]
    broken = [
        replace(row, detected=False), replace(row, recovered=False), replace(row, identical=False),
    ]  # fmt: skip
    spoilt = [
        *(replace(good, rows=(each, *good.rows[1:])) for each in broken),
        replace(good, rows=good.rows[1:]),  # a fault that was not rehearsed
        replace(good, digests={}),
        replace(good, digests={"weights": ("1", "2")}),
        replace(good, scores={"hurt": 2.5, "undisturbed": 2.6}),
    ]
    for certificate in spoilt:
        assert not certificate.kept
        assert table(certificate)[-1] == "every promise kept: NO"
        publish(certificate, tmp_path)
        assert json.loads((tmp_path / "certificate.json").read_text())["kept"] is False
        assert "PROMISES BROKEN" in (tmp_path / "certificate.md").read_text()


def test_the_page_says_what_was_found(tmp_path: Path) -> None:
    publish(good_certificate(), tmp_path)
    page = (tmp_path / "certificate.md").read_text()
    for part in (*MEANINGS, *MEANINGS.values(), "| weights | `1` | `1` |", "| a | `f00` |"):
        assert part in page


def test_every_fault_on_order_is_rehearsed() -> None:
    source = (Path(__file__).parents[1] / "tools" / "rehearsal" / "rehearsal.py").read_text()
    assert not [kind for kind in KINDS if f"{kind}:" not in source]


def test_steps_are_hit_between_two_checkpoint_and_chosen_by_the_seed() -> None:
    plans = [
        Rehearsal(shards=None, preset="tiny", sets=(), out=Path(), seed=seed).steps
        for seed in range(20)
    ]
    assert len({tuple(steps) for steps in plans}) > 10
    for steps in plans:
        assert len(steps) == STRETCHES
        assert all(2 <= step - n * INTERVAL < INTERVAL for n, step in enumerate(steps))


def test_a_run_that_cannot_start_is_named_with_its_reason(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(RehearsalError, match=r"exit code 1: error: .*no prepared source"):
        train(["--shards", str(tmp_path / "none"), "--preset", "tiny"], run)


def test_what_is_rehearsed_is_a_copy_in_an_empty_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "something").touch()
    taken = Rehearsal(shards=None, preset="tiny", sets=(), out=tmp_path / "out", seed=0)
    with pytest.raises(RehearsalError, match="not empty"):
        rehearse(taken, lambda _: None)
    monkeypatch.setattr("tools.rehearsal.rehearsal._MOST_BYTES", 3)
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "big").write_bytes(b"four")
    large = replace(taken, shards=tmp_path / "shards", out=tmp_path / "new")
    with pytest.raises(RehearsalError, match="is copied, because a bit of it is flipped"):
        prepare(large)
