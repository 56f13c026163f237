"""Two models on the same items: the difference has the error of the pairs."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from click.testing import Result as Done

from pipeline.text.tokenizer import Tokenizer, train
from shards.format import TOKENIZER
from tools.evaluate import main
from tools.evaluation.cards import Metric, Result
from tools.evaluation.compare import compare, spec_of
from tools.models.hf_folder import write_folder
from tools_samples import sample_model, sample_text, sample_tokenizer, write_run
from trainer.config.config import RunConfig, save_config


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose checkpoints at steps 2 and 4 are two random models."""
    run = tmp_path_factory.mktemp("runs") / "r"
    write_run(run)
    return run


@pytest.fixture(scope="module")
def text(run: Path) -> Path:
    path = run.parent / "wiki.raw"
    path.write_text(f" = A page = \n\n{sample_text()[:6000]}\n")
    return path


@pytest.fixture(scope="module")
def questions(run: Path) -> Path:
    path = run.parent / "piqa.jsonl"
    words = sample_text().split()
    rows = [
        {
            "query": " ".join(words[n : n + 4]),
            "choices": [words[n + 5], words[n + 9]],
            "gold": n % 2,
        }
        for n in range(0, 300, 10)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def command(*arguments: object) -> Done:
    return CliRunner().invoke(main, [*map(str, arguments), "--device", "cpu"])


def scored(**samples: list[float]) -> Result:
    """A result of some task, whose metrics are the sums of these samples."""
    model = {"model": "m", "tokenizer_sha256": "0"}
    metrics = {name: sum(values) for name, values in samples.items()}
    return Result(task="t", metrics=metrics, settings={}, model=model, samples=samples)


def difference(result: Result, name: str) -> Metric:
    found = result.metrics[name]
    assert isinstance(found, Metric)
    return found


def test_the_error_is_that_of_paired_differences() -> None:
    """Two of four answers differ, one each way; and all differ by the same: no error at all."""
    one, other = [1.0, 0.0, 1.0, 1.0], [1.0, 1.0, 0.0, 1.0]
    quarter = [value / 4 for value in one], [value / 4 for value in other]
    found = difference(compare([scored(acc=quarter[0]), scored(acc=quarter[1])]), "acc_1")
    differences = np.array(other) - np.array(one)
    assert found.value == pytest.approx(0.0)
    assert found.stderr == pytest.approx(differences.std(ddof=1) / math.sqrt(4))
    shifted = difference(compare([scored(x=[0.1, 0.5]), scored(x=[0.2, 0.6])]), "x_1")
    assert shifted.value == pytest.approx(0.2) and shifted.stderr == pytest.approx(0.0)
    alone = difference(compare([scored(x=[0.1]), scored(x=[0.3])]), "x_1")
    assert alone.value == pytest.approx(0.2) and alone.stderr is None


def test_runs_checkpoints_and_folders_are_compared_on_the_same_windows(
    run: Path, text: Path, tmp_path: Path
) -> None:
    two, four = (run / "checkpoints" / f"step-{step}" for step in (2, 4))
    hub = tmp_path / "hf"
    hub.mkdir()
    model = sample_model(seed=4, alibi=False)
    write_folder(hub, model.config, model.state_dict(), sample_tokenizer())
    given = ("--task", "wikitext2", "--data", text, "--json")
    result = command("compare", two, run, hub, *given)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    figures = [json.loads(command("wikitext2", "--data", text, "--json", *named).stdout)
               for named in (("--checkpoint", two), ("--run", run), ("--hf", hub))]  # fmt: skip
    bits = [each["bits_per_byte"] for each in figures]
    assert [each["bits_per_byte"] for each in found["scores"]] == bits
    assert found["bits_per_byte_1"] == pytest.approx(bits[1] - bits[0])
    assert found["bits_per_byte_2"] == pytest.approx(bits[2] - bits[0])
    assert 0 < found["bits_per_byte_1_error"] < sum(f["bits_per_byte_error"] for f in figures[:2])
    same = json.loads(command("compare", four, run, *given).stdout)
    assert same["bits_per_byte_1"] == same["bits_per_byte_1_error"] == 0.0
    shown = command("compare", two, run, *given[:-1]).stdout
    assert "compare wikitext2" in shown and "step 2" in shown and " ± " in shown


def test_answers_are_compared_one_by_one(run: Path, questions: Path) -> None:
    two = run / "checkpoints" / "step-2"
    given = ("--data", questions, "--context", 64)
    result = command("compare", two, run, "--task", "piqa", "--json", *given)
    assert result.exit_code == 0, result.output
    right = []
    for named in (("--checkpoint", two), ("--run", run)):
        log = questions.with_suffix(".log")
        assert command("piqa", *named, *given, "--log-items", log).exit_code == 0
        items = map(json.loads, log.read_text().splitlines())
        right.append(np.array([float(item["right"]) for item in items]))
    found, differences = json.loads(result.stdout), right[1] - right[0]
    assert found["pairs"] == len(differences) == 30 and differences.any()
    assert found["acc_1"] == pytest.approx(differences.mean())
    assert found["acc_1_error"] == pytest.approx(differences.std(ddof=1) / math.sqrt(30))


def test_what_cannot_be_compared_is_said_in_one_line(run: Path, text: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    write_run(other)
    tokenizer = Tokenizer(train(sample_text().upper().splitlines(), 500), "other")
    (other / TOKENIZER).write_bytes(tokenizer.model)
    longer = tmp_path / "longer"
    write_run(longer)
    save_config(longer, RunConfig(model=sample_model(seq_len=64).config, mixture={"s": 1.0}))
    for arguments, code, said in (
        ((run,), 2, "compare A B --task NAME"),
        ((run, run), 2, "compare A B --task NAME"),
        ((run, run, "--task", "heldout"), 2, "not heldout"),
        ((run, run, "--task", "wikitext2", "--follow", run), 2, "--follow does not go"),
        ((run, run, "--task", "wikitext2", "--all-protocols"), 2, "--all-protocols does not go"),
        ((run, run, "--task", "wikitext2", "--nproc", 2), 2, "--nproc does not go"),
        ((run, other, "--task", "wikitext2"), 1, "other tokenizers"),
        ((run, longer, "--task", "wikitext2"), 1, "context 32 and 64: give it"),
        ((run, tmp_path / "nothing", "--task", "wikitext2"), 1, "nothing"),
    ):
        result = command("compare", *arguments, "--data", text)
        assert (result.exit_code, said in result.output) == (code, True), result.output
        assert "Traceback" not in result.output
    assert spec_of(run / "checkpoints" / "step-2").checkpoint == run / "checkpoints" / "step-2"
