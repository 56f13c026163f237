"""Perplexity of real (small) models on real text: every figure is worked out a second time."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model.attention import KVCache
from pipeline.errors import SourceError
from pipeline.inputs.sources import Source
from shards.errors import SummerError
from tools.errors import EvaluationError
from tools.evaluation.perplexity import evaluate_corpus, measure_perplexity, perplexity
from tools.evaluation.protocols import IGNORED, PLANS, Protocol, plan_windows
from tools.evaluation.scoring import Scorer, check_context, score
from tools.evaluation.tasks import TaskOptions
from tools.evaluation.wikitext import (
    EvaluationText,
    detokenized,
    from_raw,
    from_rows,
    pages_of,
    read_text,
)
from tools.models.loading import max_context
from tools.models.tokenizers import Vocabulary
from tools_samples import (
    SEQ_LEN,
    sample_loaded,
    sample_text,
    sample_tokenizer,
)

WIKITEXT_SHA256 = "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08"
RAW = " \n = A title = \n \n Some words , and more . \n Naïve 日本語 🙂 words \n"
pytestmark = pytest.mark.usefixtures("one_thread")
ROWS = ["", " = A title = \n", "", " Some words , and more . \n", " Naïve 日本語 🙂 words \n"]


def uniform_loaded() -> Any:
    """A model that finds every id equally likely."""
    loaded = sample_loaded()
    with torch.no_grad():
        loaded.model.embedding.weight.zero_()
    return loaded


# ---- the text


def test_rows_and_raw_text_are_the_same_text() -> None:
    assert from_rows(ROWS) == from_raw(RAW)
    assert from_raw(RAW).raw == RAW
    assert from_raw(RAW).joined == "\n\n".join(ROWS)
    assert from_raw(RAW).n_words == len(RAW.split()) == 14
    assert from_raw("no end of line").joined == "no end of line"


def test_wikitext_has_its_known_size_from_every_kind_of_file(shared: Path, tmp_path: Path) -> None:
    raw = read_text(shared / "wikitext-2" / "wiki.test.raw")
    assert (raw.n_bytes, raw.n_words) == (1_290_590, 241_211)
    assert raw.sha256 == WIKITEXT_SHA256
    assert len(raw.joined.encode()) == 1_296_370
    parquet = read_text(shared / "wikitext-2/wikitext-2-raw-v1/test-00000-of-00001.parquet")
    assert parquet == raw
    jsonl = tmp_path / "test.jsonl"
    rows = [line + "\n" if line.strip() else "" for line in raw.raw.split("\n")[:-1]]
    jsonl.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    assert read_text(jsonl) == raw


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("bad.raw", b"good\xff", "no UTF-8 at byte 4"),
        ("bad.jsonl", b'{"text": "a"}\n{"txt": "b"}\n', "row 1 has no text"),
        ("bad.parquet", b"PAR1 no", "damaged"),
    ],
)
def test_a_text_that_cannot_be_read_is_named(
    tmp_path: Path, name: str, content: bytes, words: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(SummerError, match=words):
        read_text(path)
    with pytest.raises(SummerError, match="is a folder"):
        read_text(tmp_path)


def test_pieces_spell_the_text_byte_for_byte() -> None:
    vocabulary = Vocabulary.of(sample_tokenizer())
    for text in (RAW, "日本語 🙂\x00", "  two spaces ▁ and \t tabs", "</s>"):
        spelled = b"".join(vocabulary.pieces[i] for i in vocabulary.encode(text))
        assert spelled.decode().replace("▁", " ") == " " + text.replace("▁", " ")
    for control in (0, vocabulary.bos_id, vocabulary.eos_id):
        assert control is not None and vocabulary.pieces[control] == b""


# ---- perplexity


@pytest.mark.parametrize("name", list(PLANS))
def test_a_uniform_model_has_perplexity_v(name: Any) -> None:
    loaded = uniform_loaded()
    text = from_raw(sample_text()[:3000])
    result = measure_perplexity(loaded, text, Protocol(name=name, context=SEQ_LEN, bos_id=1))
    assert result["token_perplexity"] == pytest.approx(512, rel=1e-6)
    bits = math.log2(512) * result["scored_tokens"]
    n_bytes = len(text.raw.encode()) * result["scored_share"]
    assert result["bits_per_byte"] == pytest.approx(bits / n_bytes, rel=1e-6)
    assert result["byte_perplexity"] == pytest.approx(2 ** result["bits_per_byte"], rel=1e-6)
    n_words = sum(piece.n_words for piece in text.pieces(name)) * result["scored_share"]
    assert result["word_perplexity"] == pytest.approx(2 ** (bits / n_words), rel=1e-5)


def test_a_freshly_initialised_transformer_is_near_perplexity_v() -> None:
    loaded = sample_loaded()
    loaded.model.init_weights(seed=3)
    result = measure_perplexity(loaded, from_raw(sample_text()[:6000]), Protocol(context=SEQ_LEN))
    assert result["token_perplexity"] is not None and 400 < result["token_perplexity"] < 650


@pytest.mark.parametrize("bos", ["never", "start", "window"])
@pytest.mark.parametrize("name", ["disjoint", "stride"])
def test_the_scored_share_is_that_of_the_scored_ids_bytes(name: Any, bos: Any) -> None:
    loaded = uniform_loaded()
    text = from_raw(RAW * 5)
    result = measure_perplexity(
        loaded, text, Protocol(name=name, context=SEQ_LEN, bos=bos, bos_id=1), limit=3
    )
    ids = loaded.vocabulary.encode(text.joined)
    sizes = [len(loaded.vocabulary.pieces[i]) for i in ids]
    assert sum(sizes) == len(text.joined.encode()) + 1  # the dummy prefix
    shift = bos == "start"  # text ids that the stream holds less
    room = SEQ_LEN - (bos == "window")
    if name == "disjoint":
        scored = [
            place
            for place in range(len(ids))
            if place + shift < 3 * room and ((place + shift) % room or bos == "window")
        ]
    else:
        last = min(len(ids), 2 * (SEQ_LEN // 2) + room - shift)
        scored = list(range(0 if bos == "start" else 1, last))
    assert result["scored_tokens"] == len(scored)
    assert result["scored_share"] == sum(sizes[place] for place in scored) / sum(sizes)
    assert result["scored_bytes"] == result["scored_share"] * text.n_bytes


@pytest.mark.parametrize("name", list(PLANS))
def test_the_score_is_the_models_own_loss(name: Any) -> None:
    loaded = sample_loaded()
    text = from_raw(RAW + sample_text()[:2000])
    protocol = Protocol(name=name, context=SEQ_LEN, bos_id=1)
    pieces = [np.array(loaded.vocabulary.encode(p.text)) for p in text.pieces(name)]
    expected, n_scored = 0.0, 0
    with torch.no_grad():
        for window in plan_windows(pieces, protocol):
            inputs, targets = map(torch.from_numpy, window)
            expected += float(loaded.model(inputs[None], targets[None]))
            n_scored += int((targets != IGNORED).sum())
    result = measure_perplexity(loaded, text, protocol)
    assert result["nats"] == pytest.approx(expected, rel=1e-6)
    assert result["token_perplexity"] == pytest.approx(math.exp(expected / n_scored))


def test_the_score_does_not_depend_on_the_batch() -> None:
    loaded = sample_loaded(n_kv_heads=1)
    text = from_raw(sample_text()[:4000])
    protocol = Protocol(name="stride", context=48, stride=7)
    alone, together = (
        measure_perplexity(loaded, text, protocol, batch_tokens=size)["nats"]
        for size in (1, 48 * 50)
    )
    assert together == pytest.approx(alone, rel=1e-6)


def test_bf16_is_autocast_and_close() -> None:
    loaded = sample_loaded()
    text = from_raw(sample_text()[:2000])
    protocol = Protocol(context=SEQ_LEN)
    narrow = measure_perplexity(dataclasses.replace(loaded, dtype="bf16"), text, protocol)
    exact = measure_perplexity(loaded, text, protocol)
    assert narrow["nats"] != exact["nats"]
    assert narrow["nats"] == pytest.approx(exact["nats"], rel=0.02)
    assert narrow.model["dtype"] == "bf16"


def test_a_context_beyond_training_is_allowed_and_said_up_to_the_exact_limit() -> None:
    loaded = sample_loaded()
    text = from_raw(sample_text()[:6000])
    assert not measure_perplexity(loaded, text, Protocol(context=SEQ_LEN))["beyond_training"]
    assert measure_perplexity(loaded, text, Protocol(context=5 * SEQ_LEN))["beyond_training"]
    assert max_context(loaded.model.config) == 16_448
    check_context(loaded, 16_448)
    with pytest.raises(EvaluationError, match=r"context 16,449: .* up to 16,448"):
        measure_perplexity(loaded, text, Protocol(context=16_449))
    without_alibi = sample_loaded(alibi=False)
    assert max_context(without_alibi.model.config) is None


def test_limit_and_tail_are_reported() -> None:
    loaded = uniform_loaded()
    text = from_raw(sample_text()[:4000])
    n_ids = len(loaded.vocabulary.encode(text.joined))
    result = measure_perplexity(loaded, text, Protocol(context=SEQ_LEN), limit=2)
    assert (result["windows"], result["limit"]) == (2, 2)
    assert result["tail_dropped"] == n_ids % SEQ_LEN
    assert result["text_tokens"] == n_ids
    said = "note      with a limit each protocol scores another stretch of the text"
    assert said in result.notes
    result = measure_perplexity(loaded, text, Protocol(context=SEQ_LEN))
    assert said not in result.notes
    with pytest.raises(EvaluationError, match="the text is empty"):
        measure_perplexity(loaded, EvaluationText("", ""), Protocol(context=SEQ_LEN))


def test_logits_and_transformer_scorers_agree() -> None:
    loaded = sample_loaded(tie_embeddings=False)
    ids = np.array(sample_tokenizer().encode(sample_text()[:1500]))
    plan = plan_windows([ids], Protocol(context=SEQ_LEN))
    by_logits = score(Scorer.of_logits(loaded.model.logits), plan)
    assert score(Scorer.of(loaded), plan).nats == pytest.approx(by_logits.nats, rel=1e-6)


def test_the_score_does_not_depend_on_the_cache() -> None:
    """Ids fed one by one into a cache, or three at a time, score as the whole does."""
    loaded = sample_loaded()
    ids = np.array(sample_tokenizer().encode(sample_text()[:900]))
    plan = plan_windows([ids], Protocol(name="lm-eval", context=SEQ_LEN, bos_id=1))

    def cached(tokens: torch.Tensor, at_once: int) -> torch.Tensor:
        config = loaded.model.config
        cache = KVCache(config, len(tokens), SEQ_LEN, torch.device("cpu"), torch.float32)
        chunks = torch.split(tokens, at_once, dim=1)
        return torch.cat([loaded.model.logits(chunk, cache) for chunk in chunks], dim=1)

    whole = score(Scorer.of(loaded), plan).nats
    for at_once in (1, 3):
        by_cache = Scorer.of_logits(lambda tokens, n=at_once: cached(tokens, n))  # type: ignore[misc]
        assert score(by_cache, plan).nats == pytest.approx(whole, rel=1e-5)


def test_pages_are_cut_at_titles_and_detokenized() -> None:
    raw = " \n = A = \n \n One @-@ two , three . \n = = S = = \n = B = \n \n ( x ) it 's \n"
    pages = pages_of(raw)
    assert [page.split("\n")[0] for page in pages] == [" = A = ", " = B = "]
    assert detokenized(pages[0]) == " = A =\n\nOne-two, three.\n== S == "
    assert detokenized(pages[1]) == " = B =\n\n(x) it's\n"
    assert from_raw(raw).pieces("llama.cpp")[0].text == raw[:-1]


def test_a_title_begins_and_ends_with_a_sign() -> None:
    page = " = A = \n = no title \n neither = \n"
    assert pages_of(page) == [page]


def test_each_corpus_is_asked_of_the_hub_under_its_own_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def unreachable(source: Source) -> Any:
        asked = f"{source.dataset} ({source.config}), {source.split}"
        raise SourceError(f"{asked}: name a file with --data-files")

    monkeypatch.setattr("tools.evaluation.datasets.hub_inputs", unreachable)
    for corpus, number in (("wikitext2", 2), ("wikitext103", 103)):
        asked = f"Salesforce/wikitext (wikitext-{number}-raw-v1), test"
        with pytest.raises(EvaluationError) as error:
            read_text(corpus=corpus)
        assert str(error.value) == f"{asked}: name a file with --data FILE"


def test_the_harness_counts_of_wikitext(shared: Path) -> None:
    pieces = read_text(shared / "wikitext-2" / "wiki.test.raw").pieces("lm-eval")
    assert len(pieces) == 62
    assert sum(piece.n_words for piece in pieces) == 241_335  # an empty one at each page's ends
    assert sum(piece.n_bytes for piece in pieces) == 1_290_590 - 62 - 1


def test_a_perplexity_that_is_no_number_is_none() -> None:
    assert perplexity(2.0, 4) == pytest.approx(math.exp(0.5))
    assert perplexity(1e6, 1) is None  # one endless word
    assert perplexity(1.0, 0) is None  # no word at all
    assert perplexity(709.0, 1) == pytest.approx(math.exp(709.0))
    assert perplexity(709.5, 1) is None


def test_what_has_no_figure_has_no_error_either() -> None:
    loaded = sample_loaded()
    text = from_raw(sample_text()[:400])
    one = measure_perplexity(loaded, text, Protocol(context=SEQ_LEN), limit=1)
    assert one["token_perplexity"] is not None
    for name in ("token_perplexity", "bits_per_byte"):
        assert one.to_json()[f"{name}_error"] is None  # a single window
    with torch.no_grad():
        loaded.model.embedding.weight.mul_(1e5)
    endless = measure_perplexity(loaded, text, Protocol(context=SEQ_LEN)).to_json()
    assert endless["token_perplexity"] is endless["token_perplexity_error"] is None
    assert endless["bits_per_byte"] > 1000 and endless["bits_per_byte_error"] is not None


def test_batches_are_as_large_as_asked_for_and_progress_is_reported(tmp_path: Path) -> None:
    loaded, seen = sample_loaded(), []
    path = tmp_path / "text.raw"
    path.write_text(sample_text()[:1000])
    options = TaskOptions(data=path, batch_tokens=2 * SEQ_LEN, limit=7)
    [result] = evaluate_corpus(loaded, "wikitext103", options, lambda *step: seen.append(step))
    assert (result.task, result["windows"]) == ("wikitext103", 7)
    assert seen == [(2, 7), (4, 7), (6, 7), (7, 7)]
    assert 0 <= result["time_s"] < 600


def test_without_a_bos_lm_eval_alone_starts_with_eos(tmp_path: Path) -> None:
    loaded, path = sample_loaded(), tmp_path / "text.raw"
    path.write_text(RAW * 4)
    bare = dataclasses.replace(
        loaded, vocabulary=dataclasses.replace(loaded.vocabulary, bos_id=None)
    )
    results = evaluate_corpus(bare, "wikitext2", TaskOptions(data=path, all_protocols=True))
    found = {result["protocol"]: result["bos"] for result in results}
    assert found == {
        "disjoint": "never", "stride": "never", "lm-eval": "start", "llama.cpp": "never",
    }  # fmt: skip
    with_eos = Protocol(name="lm-eval", context=SEQ_LEN, bos_id=loaded.vocabulary.eos_id)
    assert results[2]["nats"] == measure_perplexity(loaded, from_raw(RAW * 4), with_eos)["nats"]
