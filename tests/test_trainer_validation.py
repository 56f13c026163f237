"""What is watched while a run trains changes nothing: held-out scores, bytes of text, profiles."""

import functools
import hashlib
import json
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import pipeline_samples
from model.transformer import Transformer
from pipeline.text.tokenizer import Tokenizer
from shards.format import TOKEN_BYTES, TOKENIZER
from shards.reader import ShardReader
from trainer.checkpoint.runs import newest_checkpoint
from trainer.checkpoint.storage import load_weights
from trainer.config.sections import parse_steps
from trainer.errors import ConfigError
from trainer.metrics.metrics import read_metrics
from trainer.train import train
from trainer.validation.validation import Ids, count_bytes, read_token_bytes, token_bytes_of
from trainer_samples import small_plan

TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    "small": pipeline_samples.tokenizer,
    "default": Tokenizer.default,
}
WATCHED: dict[str, Any] = {
    "validation__interval": 2,
    "validation__rows": 5,
    "tensorboard": "true",
    "log_interval": 1,
    "profile_steps": '"2-3"',
    "dollars_per_hour": 20,
    "checkpoint__interval_steps": 2,
    "loader__num_workers": 1,
}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sources with held-out rows, and one that is all held out."""
    root = tmp_path_factory.mktemp("watched")
    texts = pipeline_samples.TEXTS
    for name, part, fraction in (
        ("fineweb", texts[:150], 0.1),
        ("pg19", texts[150:250], 0.2),
        ("wikitext2", texts[250:], 1.0),
    ):
        file = pipeline_samples.write_jsonl(root / f"{name}.jsonl", part)
        column: dict[str, Any] = {"val_fraction": fraction, "seq_len": 64}
        wanted = pipeline_samples.request(root / "shards", str(file), name, **column)
        pipeline_samples.prepared(wanted)
    return root / "shards"


def bits_of(reader: ShardReader, model: Transformer) -> tuple[float, float]:
    """Nats a target and bits a byte of all held-out rows, the bytes counted in decoded text."""
    tokenizer, nats, n_targets, n_bytes = pipeline_samples.tokenizer(), 0.0, 0, 0
    for row in reader.rows(np.arange(reader.n_rows))[0].astype(np.int64):
        ids = row[row != 0]
        targets = torch.from_numpy(ids[1:])[None]
        with torch.no_grad():
            nats += model(torch.from_numpy(ids[:-1])[None], targets).item()
        n_targets += len(ids) - 1
        begins = [0, *(place for place in np.flatnonzero(ids == 1) if place), len(ids)]
        texts = [tokenizer.decode(ids[first:last]) for first, last in pairwise(begins)]
        n_bytes += sum(map(len, texts)) - len(tokenizer.decode(ids[:1]))  # the text is ASCII
    return nats / n_targets, nats / math.log(2) / n_bytes


def test_held_out_rows_and_evaluation_texts_are_scored(shards: Path, tmp_path: Path) -> None:
    plan = small_plan(
        shards, max_steps=2, validation__interval=2, validation__rows=999, precision="fp32"
    )
    assert (set(plan.weights), plan.evaluated) == ({"fineweb", "pg19"}, ("wikitext2",))
    train(plan, tmp_path)
    model = Transformer(plan.config.model)
    model.load_state_dict(load_weights(newest_checkpoint(tmp_path)))
    line = read_metrics(tmp_path)[-1]
    assert set(line["val"]) == set(line["val_bits"]) == {"fineweb", "pg19", "wikitext2"}
    for name in line["val"]:
        loss, bits = bits_of(ShardReader(shards / name, "val"), model)
        assert line["val"][name] == pytest.approx(loss, rel=1e-5)
        assert line["val_bits"][name] == pytest.approx(bits, rel=1e-5)
    total = sum(plan.weights.values())
    for mean, by_source in (("val_loss", "val"), ("val_bits_per_byte", "val_bits")):
        weighted = sum(line[by_source][name] * w for name, w in plan.weights.items()) / total
        assert line[mean] == pytest.approx(weighted)


def test_an_evaluation_text_of_another_row_length_is_named(shards: Path, tmp_path: Path) -> None:
    for name in ("fineweb", "pg19"):
        (tmp_path / name).symlink_to(shards / name)
    file = pipeline_samples.write_jsonl(tmp_path / "wiki.jsonl", pipeline_samples.TEXTS[:20])
    request: dict[str, Any] = {"val_fraction": 1.0, "seq_len": 32}
    pipeline_samples.prepared(pipeline_samples.request(tmp_path, str(file), "wikitext2", **request))
    plan = small_plan(tmp_path)
    assert plan.evaluated == ()
    assert any(note.startswith("wikitext2 is not scored: it has rows of 32") for note in plan.notes)


def test_token_bytes_need_their_tokenizer(tmp_path: Path) -> None:
    model = pipeline_samples.tokenizer().model
    digest, of_model = hashlib.sha256(model).hexdigest(), token_bytes_of(model).tolist()

    def read(digest: str) -> Any:
        table = read_token_bytes(tmp_path, digest)
        return table if table is None else table.tolist()

    assert read(digest) is None
    (tmp_path / TOKENIZER).write_bytes(model)
    assert (read("0" * 64), read(digest)) == (None, of_model)  # as in folders of version 0.1
    (tmp_path / TOKEN_BYTES).write_bytes(b"damaged")
    assert read(digest) == of_model
    np.save(tmp_path / TOKEN_BYTES, np.array(of_model, np.uint16) + 1)
    assert read(digest) == (np.array(of_model) + 1).tolist()


@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
@example("  two spaces, \u2581 and \u00e4\U0001f600\n\n\tend ")
@settings(max_examples=60, deadline=None)
def test_bytes_of_ids_are_those_of_their_text(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]()
    ids = np.array([tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id])
    ids = np.concatenate([ids, ids])  # the second document begins after an EOS and a BOS
    counted = count_bytes(token_bytes(name), ids[1:], ids[:-1])
    assert counted.sum() == 2 * len(tokenizer.decode(ids[: len(ids) // 2].tolist()).encode())


@functools.cache
def token_bytes(name: str) -> Ids:
    return token_bytes_of(TOKENIZERS[name]().model)


def test_watching_changes_nothing(shards: Path, tmp_path: Path) -> None:
    """Weights and moments by their digests, and every loss, with all watching on and all off."""
    pytest.importorskip("tensorboard")
    common: dict[str, Any] = {"max_steps": 6, "optim__lr": 1e-2, "micro_batch_size": 4}
    quiet: dict[str, Any] = {"tensorboard": "false", "log_interval": 1}
    train(small_plan(shards, **common, **quiet), tmp_path / "off")
    train(small_plan(shards, **common, **WATCHED), tmp_path / "on")
    runs = [tmp_path / "off", tmp_path / "on"]
    records = [json.loads((newest_checkpoint(run) / "checkpoint.json").read_text()) for run in runs]
    assert records[0]["files"] == records[1]["files"]
    keys = ("step", "loss", "lr", "grad_norm", "n_targets", "next_index", "ledger")
    logs = [[[line[k] for k in keys] for line in read_metrics(r)] for r in runs]
    assert logs[0] == logs[1]
    lines = read_metrics(tmp_path / "on")
    assert [line["step"] for line in lines if "val" in line] == [2, 4, 6]
    assert lines[-1]["dollars"] > 0
    assert list((tmp_path / "on" / "tensorboard").glob("events.*"))
    trace = json.loads((tmp_path / "on" / "profile" / "steps-2-3.json").read_text())
    assert sum("AdamW.step" in event.get("name", "") for event in trace["traceEvents"]) == 2
    assert "Self CPU" in (tmp_path / "on" / "profile" / "steps-2-3.txt").read_text()
    assert not (tmp_path / "off" / "profile").exists()


def test_steps_to_profile() -> None:
    assert list(parse_steps("")) == []
    assert list(parse_steps("7")) == [7]
    assert list(parse_steps("7-9")) == [7, 8, 9]
    with pytest.raises(
        ConfigError, match="profile_steps=soon: write a step, 10, or first and last"
    ):
        parse_steps("soon")
    for text in ("12-10", "0", "0-3"):
        with pytest.raises(ConfigError, match=f"profile_steps={text}: steps count from 1"):
            parse_steps(text)
