"""The ledger: what each source gave, in metrics, checkpoints and plans; and the end of a source."""

import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trainer.checkpoint.runs import newest_checkpoint
from trainer.config.config import configure
from trainer.errors import ConfigError
from trainer.metrics.metrics import read_metrics
from trainer.session.resume import peek_state
from trainer.session.state import check_max_epochs, initial_state
from trainer.start import Request, start
from trainer.train import train
from trainer_samples import make_shards, set_texts, small_plan

ROWS = {"fineweb": 60, "pg19": 12, "python-docs": 5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards, and a run in three phases: fineweb and pg19; pg19 and python-docs; pg19 alone."""
    root = tmp_path_factory.mktemp("ledger")
    shards = make_shards(root / "shards", fineweb=60, pg19=12, python_docs=5)
    train(small_plan(shards, max_steps=3, mixture__python_docs=0), root / "run")
    changes: dict[str, Any] = {"mixture__fineweb": 0, "mixture__python-docs": 3, "mixture__pg19": 1}
    train(small_plan(shards, max_steps=5, **changes), root / "run")
    changes |= {"mixture__python-docs": 0, "global_batch_tokens": 512}
    train(small_plan(shards, max_steps=7, **changes), root / "run")
    return root


def test_every_line_says_what_each_source_gave(folder: Path) -> None:
    lines = read_metrics(folder / "run")
    assert [line["next_index"] for line in lines] == [8, 16, 24, 32, 40, 56, 72]
    changes: dict[str, Any] = {
        "mixture__fineweb": 0,
        "mixture__pg19": 1,
        "global_batch_tokens": 512,
    }
    plan = small_plan(folder / "shards", max_steps=7, **changes)
    state = peek_state(plan, folder / "run", "auto")
    order = state.order
    located = order.locate(np.arange(72))
    names = [order.sources[number] for number in located.source]
    for line in lines:
        counts = Counter(names[: line["next_index"]])
        for name, entry in line["ledger"].items():
            assert entry["rows"] == counts[name]
            assert entry["tokens"] == 32 * counts[name]
            assert entry["epochs"] == counts[name] / ROWS[name]
        assert sum(entry["rows"] for entry in line["ledger"].values()) == line["next_index"]
    record = json.loads((newest_checkpoint(folder / "run") / "checkpoint.json").read_text())
    assert record["ledger"] == lines[-1]["ledger"]
    assert "fineweb" not in names[24:]
    assert "python-docs" not in names[:24] + names[40:]


def test_no_row_comes_twice_in_an_epoch_whatever_changed(folder: Path) -> None:
    """Across two changes of mixture, one of them with another batch size."""
    plan = small_plan(folder / "shards", mixture__fineweb=0, mixture__pg19=1)
    order = peek_state(plan, folder / "run", "auto").order
    located = order.locate(np.arange(72))
    seen = Counter(zip(*(column.tolist() for column in located), strict=True))
    assert set(seen.values()) == {1}
    for number, name in enumerate(order.sources):
        for epoch in range(located.epoch[located.source == number].max()):
            here = (located.source == number) & (located.epoch == epoch)
            assert sorted(located.row[here]) == list(range(ROWS[name]))


def dry_run(folder: Path, run: str, **changes: Any) -> str:
    stream = io.StringIO()
    given: dict[str, Any] = {"preset": "tiny", "sets": tuple(set_texts(**changes))}
    given["shards"] = str(folder / "shards")
    request = Request(configured=configure(**given), **given, out=folder / run, dry_run=True)
    assert start(request, stream) == 0
    return stream.getvalue()


def test_a_dry_run_shows_the_ledger_at_the_end(folder: Path) -> None:
    said = dry_run(folder, "new", max_steps=40)
    assert "data use fineweb: 274 sequences, 8,768 tokens, 4.57 epochs at the end" in said
    assert "so far" not in said
    said = dry_run(folder, "run", max_steps=9, mixture__fineweb=0)
    assert (
        "data use fineweb: 21 sequences, 672 tokens, 0.35 epochs at the end (so far 21 seq" in said
    )
    assert "data use pg19: " in said and "(so far 39 sequences" in said


def test_max_epochs_refuses(folder: Path) -> None:
    def refuse(**changes: Any) -> None:
        plan = small_plan(folder / "shards", **changes)
        check_max_epochs(plan, initial_state(plan))

    refuse(max_steps=10, max_epochs__pg19=1)
    with pytest.raises(ConfigError, match=r"pg19 would be seen 0\.75 times, max_epochs\.pg19=0\.5"):
        refuse(max_epochs__pg19=0.5)
    with pytest.raises(ConfigError, match=r"max_epochs\.arxiv=1\.0: no such source is drawn"):
        refuse(max_epochs__arxiv=1)


def test_max_epochs_counts_what_the_run_has_really_drawn(folder: Path, tmp_path: Path) -> None:
    """A source drawn alone from the middle on: less than if it had been from the beginning."""
    shards = folder / "shards"
    train(small_plan(shards, max_steps=6, mixture__pg19=0), tmp_path)
    late: dict[str, Any] = {"max_steps": 9, "mixture__fineweb": 0, "mixture__pg19": 1}
    plan = small_plan(shards, max_epochs__pg19=2, **late)
    assert peek_state(plan, tmp_path, "auto").data_use_at_end(plan)["pg19"]["epochs"] == 2.0
    with pytest.raises(ConfigError, match=r"pg19 would be seen 2 times, max_epochs\.pg19=1\.5"):
        train(small_plan(shards, max_epochs__pg19=1.5, **late), tmp_path)
    train(plan, tmp_path)
    with pytest.raises(ConfigError, match=r"pg19 would be seen 2\.67 times"):
        dry_run(folder, str(tmp_path), **{**late, "max_steps": 10, "max_epochs.pg19": 2})
