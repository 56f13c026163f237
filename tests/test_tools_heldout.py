"""Held-out documents are found complete; scores and baselines are worked out a second time."""

import dataclasses
import gzip
import lzma
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.text.tokenizer import Tokenizer
from pipeline.text.tokenizer import train as learn
from shards.reader import read_manifest
from shards_samples import make_source
from tools.errors import EvaluationError
from tools.evaluation.cards import to_text
from tools.evaluation.heldout import (
    compressed_sizes,
    count_training_ids,
    evaluate_heldout,
    held_out_documents,
    not_known_unseen,
    shards_of,
    unigram_nats,
)
from tools.evaluation.tasks import TaskOptions
from tools.models.tokenizers import Vocabulary
from tools_samples import (
    SEQ_LEN,
    sample_loaded,
    sample_text,
    sample_tokenizer,
    write_shards,
    write_two_sources,
)
from trainer.checkpoint.runs import newest_checkpoint
from trainer.train import train
from trainer_samples import make_shards, small_plan

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_two_sources(tmp_path_factory.mktemp("shards"))


def test_documents_are_complete_across_rows_and_chunks(
    shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = read_manifest(shards / "code")
    tokenizer = sample_tokenizer()
    expected = [sample_text()[begin : begin + 300] for begin in range(12_000, 13_800, 300)]
    for rows_at_once in (1, 2, 256):
        monkeypatch.setattr("tools.evaluation.heldout._ROWS_AT_ONCE", rows_at_once)
        documents = list(held_out_documents(shards / "code", manifest))
        assert [tokenizer.decode(ids) for ids in documents] == [*expected, "ü" * 9, "x"]
        assert all((ids[0], ids[-1]) == (1, 2) for ids in documents)
        assert all((ids[1:] != 1).all() for ids in documents)


def test_held_out_figures_are_those_worked_out_by_hand(shards: Path) -> None:
    loaded = sample_loaded()
    result = evaluate_heldout(loaded, TaskOptions(shards=shards, context=20))
    assert [source["source"] for source in result["sources"]] == ["code", "more"]
    nats, bits, n_bytes = {}, {}, {}
    for name in ("code", "more"):
        manifest = read_manifest(shards / name)
        documents = list(held_out_documents(shards / name, manifest))
        texts = "".join(sample_tokenizer().decode(ids) for ids in documents).encode()
        n_bytes[name] = len(texts)
        nats[name] = 0.0
        with torch.no_grad():
            for ids in map(torch.tensor, documents):
                for begin in range(0, len(ids) - 1, 20):
                    inputs, targets = ids[begin:-1][:20], ids[begin + 1 :][:20]
                    nats[name] += float(loaded.model(inputs[None], targets[None]))
        counts = np.zeros(len(loaded.vocabulary))
        for path in (shards / name).glob("00000-[0-9]*[0-9].npy"):
            np.add.at(counts, np.load(path), 1)
        counts[[0, 1]] = 0  # padding and BOS are no targets
        kinds = len(set(counts.nonzero()[0]))
        unseen = kinds / (len(counts) - kinds)
        cost = -np.log2(np.where(counts > 0, counts, unseen) / (counts.sum() + kinds))
        bits[name] = sum(cost[ids[1:]].sum() for ids in documents)
        found = next(source for source in result["sources"] if source["source"] == name)
        assert found["bytes"] == len(texts)
        assert found["tokens"] == sum(len(ids) - 1 for ids in documents)
        assert found["model"] == pytest.approx(nats[name] / math.log(2) / len(texts), rel=1e-6)
        assert found["unigram"] == pytest.approx(bits[name] / len(texts), rel=1e-9)
        assert found["gzip"] == pytest.approx(8 * len(gzip.compress(texts, 9)) / len(texts))
        xz = lzma.compress(texts, preset=9 | lzma.PRESET_EXTREME)
        assert found["xz"] == pytest.approx(8 * len(xz) / len(texts))
    assert result["total"]["bytes"] == sum(n_bytes.values())
    assert result["total"]["model"] == pytest.approx(
        sum(nats.values()) / math.log(2) / sum(n_bytes.values()), rel=1e-6
    )
    assert result["total"]["unigram"] == pytest.approx(sum(bits.values()) / sum(n_bytes.values()))
    below = 1 - result["total"]["model"] / result["total"]["unigram"]
    assert result["below_unigram"] == pytest.approx(below)


def test_limit_takes_the_first_documents_of_each_source(shards: Path) -> None:
    result = evaluate_heldout(sample_loaded(), TaskOptions(shards=shards, limit=2))
    assert [source["documents"] for source in result["sources"]] == [2, 2]
    assert result["total"]["documents"] == 4


def test_shards_of_another_tokenizer_are_rejected(shards: Path) -> None:
    other = Vocabulary.of(Tokenizer(learn(sample_text().splitlines()[:200], 400), "other"))
    loaded = dataclasses.replace(sample_loaded(), vocabulary=other)
    with pytest.raises(EvaluationError, match="made with the tokenizer sample"):
        evaluate_heldout(loaded, TaskOptions(shards=shards))


def test_sources_without_held_out_documents_are_named(tmp_path: Path) -> None:
    write_shards(tmp_path / "s", train_texts=["some text"], val_texts=[])
    with pytest.raises(EvaluationError, match="no document is held out in s"):
        evaluate_heldout(sample_loaded(), TaskOptions(shards=tmp_path))
    write_shards(tmp_path / "t", train_texts=["some text"], val_texts=["more text"])
    result = evaluate_heldout(sample_loaded(), TaskOptions(shards=tmp_path))
    assert (result["without"], result["total"]["documents"]) == (["s"], 1)
    assert "Nothing is held out of s." in to_text([result])


def test_a_unigram_has_the_frequencies_and_no_zero() -> None:
    for counts, shares in (
        ([7, 1, 0, 0], [0.7, 0.1, 0.1, 0.1]),  # ten, two of them set aside for the unseen
        ([3, 1], [0.75, 0.25]),
        ([0, 0], [0.5, 0.5]),
    ):
        assert np.exp(-unigram_nats(counts)) == pytest.approx(shares)


def test_counts_of_a_large_source_are_a_spread_sample(shards: Path) -> None:
    manifest = read_manifest(shards / "code")
    all_counts = count_training_ids(shards / "code", manifest, 500)
    some = count_training_ids(shards / "code", manifest, 500, max_rows=10)
    assert 10 * SEQ_LEN * 0.9 <= some.sum() <= 10 * SEQ_LEN < all_counts.sum()
    assert (some <= all_counts).all()


def test_compressed_sizes_are_those_of_the_joined_text() -> None:
    pieces = [sample_text()[begin : begin + 500].encode() for begin in range(0, 9000, 500)]
    text = b"".join(pieces)
    xz = lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)
    assert compressed_sizes(pieces).tolist() == [len(text), len(gzip.compress(text, 9)), len(xz)]


def test_what_a_run_may_have_read_is_not_called_unseen(tmp_path: Path) -> None:
    """Documents that a run had trained on were scored as held out, from another preparation."""
    own = make_shards(tmp_path / "shards", fineweb=60)
    train(small_plan(own, max_steps=1), tmp_path / "runs" / "main")
    checkpoint = newest_checkpoint(tmp_path / "runs" / "main")
    assert shards_of(checkpoint) == own
    assert not_known_unseen(checkpoint, own) == []
    other = make_shards(tmp_path / "other", pg19=1, fineweb=60)  # other text by its seed
    assert not_known_unseen(checkpoint, other) == ["fineweb", "pg19"]
    assert not_known_unseen(None, own) == ["fineweb"]
    make_source(own / "wikitext2", n_rows=0, n_val_rows=8, seq_len=32)
    assert not_known_unseen(checkpoint, own) == []
    (tmp_path / "moved").mkdir()
    own.rename(tmp_path / "moved" / "shards")
    (tmp_path / "runs" / "main").rename(tmp_path / "moved" / "main")
    assert shards_of(newest_checkpoint(tmp_path / "moved" / "main")) == tmp_path / "moved/shards"


def test_the_result_says_so(shards: Path) -> None:
    result = evaluate_heldout(sample_loaded(), TaskOptions(shards=shards))  # of no run
    assert result.settings["not_known_unseen"] == ["code", "more"]
    assert any("is NOT known to be unseen" in note for note in result.notes)
