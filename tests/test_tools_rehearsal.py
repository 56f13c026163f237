"""What a rehearsal says of two runs is what their commits say."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tools.interruption import RehearsalError, compare_commits, last_step, train
from tools.rehearsal import Certificate, Outcome, rehearse


def make_commit(run: Path, step: int, digests: dict[str, str]) -> None:
    folder = run / "checkpoints" / f"step-{step}"
    folder.mkdir(parents=True)
    files = {name: {"bytes": 1, "sha256": digest} for name, digest in digests.items()}
    (folder / "COMMIT.json").write_text(json.dumps({"files": files}))


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
def test_commits_are_the_same_when_every_file_is(
    tmp_path: Path, there: dict[str, str], same: bool
) -> None:
    make_commit(tmp_path / "here", 4, {"a": "1", "b": "2"})
    make_commit(tmp_path / "there", 4, there)
    assert compare_commits(tmp_path / "here", tmp_path / "there", 4).identical is same
    with pytest.raises(RehearsalError, match="no commit of step 5"):
        compare_commits(tmp_path / "here", tmp_path / "there", 5)


def test_a_line_half_written_is_no_step(tmp_path: Path) -> None:
    assert last_step(tmp_path) == 0
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"step": 2}\n{"step": 3')
    assert last_step(tmp_path) == 2


def test_one_broken_promise_spoils_the_certificate() -> None:
    good = Outcome(
        fault="SIGKILL", hit_after_step=9, resumed_from=6, as_promised=True, identical=True
    )
    certificate = Certificate(
        command="summer-train", last_step=12, digests={}, versions={}, outcomes=(good, good)
    )
    assert certificate.kept and good.steps_lost == 3
    assert "NO" not in "".join(certificate.table())
    for spoiled in (replace(good, identical=False), replace(good, as_promised=False)):
        spoilt = replace(certificate, outcomes=(good, spoiled))
        assert not spoilt.kept
        assert "NO" in spoilt.table()[-1]


def test_a_run_that_cannot_start_is_named_with_its_reason(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(RehearsalError, match=r"exit code 1: error: .*no prepared source"):
        train(["--shards", str(tmp_path / "none"), "--preset", "tiny"], run)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "something").touch()
    with pytest.raises(RehearsalError, match="not empty"):
        rehearse([], tmp_path / "out", 0, lambda _: None)
