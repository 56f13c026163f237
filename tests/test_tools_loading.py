"""Runs and commits as models, and what is said when there are none."""

from pathlib import Path

import pytest
import torch

from shards.errors import SummerError
from tools.errors import LoadingError
from tools.loading import Choice, load, sha256_of_weights
from tools_samples import (
    write_run,
)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate") / "runs" / "sample"
    write_run(folder)
    return folder


def test_a_run_is_loaded_at_its_newest_commit_and_a_commit_by_name(run: Path) -> None:
    newest = load(Choice(run=run, device="cpu"))
    assert newest.name.endswith("sample, step 4")
    older = load(Choice(checkpoint=run / "checkpoints" / "step-2", device="cpu"))
    assert older.name.endswith("sample, step 2")
    assert older.weights_sha256 != newest.weights_sha256
    assert newest.weights_sha256 == sha256_of_weights(dict(newest.model.named_parameters()))
    assert not newest.model.training
    assert newest.dtype == "fp32"


def test_without_a_name_the_newest_run_is_taken(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run.parents[1])
    assert load(Choice(device="cpu")).name == "runs/sample, step 4"
    monkeypatch.chdir(run)
    with pytest.raises(SummerError, match="summer-train"):
        load(Choice(device="cpu"))


def test_a_model_that_is_not_there_or_does_not_fit_is_named(run: Path, tmp_path: Path) -> None:
    with pytest.raises(LoadingError, match="name one of --run"):
        load(Choice(run=run, checkpoint=run))
    with pytest.raises(LoadingError, match=r"no COMMIT\.json there"):
        load(Choice(checkpoint=run))
    with pytest.raises(SummerError, match="no run of summer-train"):
        load(Choice(run=tmp_path))
    with pytest.raises(LoadingError, match="torch sees no GPU here"):
        load(Choice(run=run, device="cuda"))
