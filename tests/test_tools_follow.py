"""Evaluation during training: each checkpoint once, into the run's folder."""

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from tools.evaluate import main
from tools.evaluation.cards import Result, card_of, follow
from tools_samples import sample_text, write_run
from trainer.config.config import RunConfig, load_config, save_config

pytestmark = pytest.mark.usefixtures("one_thread")


def scored(task: str) -> list[Result]:
    return [Result(task=task, metrics={}, settings={}, model={})]


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

    def evaluate(checkpoint: Path, tasks: list[str]) -> list[list[Result]]:
        asked.append((checkpoint.name, list(tasks)))
        return list(map(scored, tasks))

    def wait(_: float) -> None:
        waits.append(1)
        if len(waits) == 3:
            later.rename(run / "checkpoints/step-4")

    done = list(follow(run, ["a", "b"], evaluate, wait))  # type: ignore[arg-type]
    assert [result.task for (result,) in done] == ["a", "b", "a", "b"]
    assert asked == [("step-2", ["a", "b"]), ("step-4", ["a", "b"])]
    assert len(waits) == 3
    assert card_of(run / "checkpoints/step-4", "b").parent == run / "evaluations" / "step-4"
    card_of(run / "checkpoints/step-4", "b").unlink()
    asked.clear()
    assert len(list(follow(run, ["a", "b"], evaluate, wait))) == 1  # type: ignore[arg-type]
    assert asked == [("step-4", ["b"])]


def test_a_deleted_checkpoint_is_skipped_and_other_failures_are_raised(run: Path) -> None:
    def purge(checkpoint: Path, tasks: list[str]) -> list[list[Result]]:
        if checkpoint.name == "step-2":
            shutil.rmtree(checkpoint)
            raise FileNotFoundError(checkpoint)
        return list(map(scored, tasks))

    assert len(list(follow(run, ["a"], purge))) == 1  # type: ignore[arg-type]
    assert card_of(run / "checkpoints/step-4", "a").is_file()

    def fail(checkpoint: Path, tasks: list[str]) -> list[list[Result]]:
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
        assert "bits_per_byte" in (run / f"evaluations/step-{step}/wikitext2.md").read_text()
    result = CliRunner().invoke(main, [*arguments, "--run", str(run)])
    assert result.exit_code == 2 and "--follow names the run" in result.stderr
