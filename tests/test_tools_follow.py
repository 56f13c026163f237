"""Beside training, and the evaluator's test of itself."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from tools.evaluate import main
from tools.evaluation.follow import card_of, follow
from tools.evaluation.scoring import Scorer
from tools.evaluation.selftest import run_checks
from tools.evaluation.suite import Outcome
from tools_samples import sample_text, write_run
from trainer.config.config import RunConfig, load_config, save_config


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps with checkpoints at 2 and 4."""
    run = tmp_path_factory.mktemp("follow") / "run"
    write_run(run, steps=(2, 4))
    config = load_config(run)
    save_config(run, RunConfig(model=config.model, mixture=config.mixture, max_steps=4))
    return run


@pytest.fixture
def run(source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(source, tmp_path / "run"))


def test_each_checkpoint_is_scored_once_as_it_appears(run: Path, tmp_path: Path) -> None:
    later, asked, waits = tmp_path / "later", [], []
    (run / "checkpoints/step-4").rename(later)

    def evaluate(checkpoint: Path, tasks: list[str]) -> list[Outcome]:
        asked.append((checkpoint.name, list(tasks)))
        return [Outcome(task, [{"task": task}], [task]) for task in tasks]

    def wait(_: float) -> None:
        waits.append(1)
        if len(waits) == 3:
            later.rename(run / "checkpoints/step-4")

    done = list(follow(run, ["a", "b"], evaluate, wait))  # type: ignore[arg-type]
    assert [(step, outcome.task) for step, outcome in done] == [
        (2, "a"),
        (2, "b"),
        (4, "a"),
        (4, "b"),
    ]
    assert asked == [("step-2", ["a", "b"]), ("step-4", ["a", "b"])]
    assert len(waits) == 3
    assert card_of(run / "checkpoints/step-4", "b").parent == run / "evaluations" / "step-4"
    card_of(run / "checkpoints/step-4", "b").unlink()
    asked.clear()
    assert len(list(follow(run, ["a", "b"], evaluate, wait))) == 1  # type: ignore[arg-type]
    assert asked == [("step-4", ["b"])]


def test_a_purged_checkpoint_is_passed_over_and_other_failures_are_not(run: Path) -> None:
    def purge(checkpoint: Path, tasks: list[str]) -> list[Outcome]:
        if checkpoint.name == "step-2":
            shutil.rmtree(checkpoint)
            raise FileNotFoundError(checkpoint)
        return [Outcome(task, [{}], []) for task in tasks]

    assert [step for step, _ in follow(run, ["a"], purge)] == [4]  # type: ignore[arg-type]

    def fail(checkpoint: Path, tasks: list[str]) -> list[Outcome]:
        raise OSError("no such text")

    with pytest.raises(OSError, match="no such text"):
        list(follow(run, ["b"], fail))  # type: ignore[arg-type]


def test_the_command_writes_cards_into_the_run(run: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.raw"
    text.write_text(sample_text()[:3000])
    arguments = ["wikitext2", "--follow", str(run), "--data", str(text), "--device", "cpu"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    for step in (2, 4):
        figures = json.loads((run / f"evaluations/step-{step}/wikitext2.json").read_text())
        assert figures[0]["model"]["model"].endswith(f"step {step}")
        assert "bits per byte" in (run / f"evaluations/step-{step}/wikitext2.md").read_text()
    result = CliRunner().invoke(main, [*arguments, "--run", str(run)])
    assert result.exit_code == 2 and "--follow names the run" in result.stderr


def test_the_evaluator_passes_its_own_test() -> None:
    checks = list(run_checks())
    assert [check.failure for check in checks] == [""] * 8
    result = CliRunner().invoke(main, ["selftest", "lambada"])
    assert result.exit_code == 2 and "stand alone" in result.stderr


def test_the_own_test_notices_a_wrong_scorer(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Scorer.judge

    def one_too_late(
        self: Scorer, inputs: torch.Tensor, targets: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return right(self, inputs.roll(-1, dims=1), targets)

    monkeypatch.setattr(Scorer, "judge", one_too_late)
    monkeypatch.setattr(
        "tools.evaluation.selftest._CHECKS",
        {name: check for name, check in _checks().items() if "bigrams" in name or "later" in name},
    )
    result = CliRunner().invoke(main, ["selftest"])
    assert result.exit_code == 1
    assert result.stdout.count("FAIL") == 2


def _checks() -> dict[str, object]:
    from tools.evaluation import selftest

    return dict(selftest._CHECKS)
