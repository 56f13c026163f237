"""Scores of real (small) models on real text: every figure is worked out a second time here."""

import dataclasses
import gzip
import json
import lzma
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from model.transformer import Transformer
from pipeline.tokenizer import Tokenizer, train
from shards.errors import SummerError
from shards.reader import read_manifest
from tools.baselines import Unigram, compressed_sizes, count_training_ids
from tools.errors import EvaluationError, LoadingError
from tools.evaluate import main
from tools.heldout import evaluate_heldout, held_out_documents
from tools.loading import Choice, load, max_context, sha256_of_weights
from tools.perplexity import Perplexity, measure
from tools.protocols import Protocol, make_plan
from tools.scoring import Scorer, score
from tools.vocabulary import Vocabulary
from tools.wikitext import EvaluationText, from_raw, from_rows, read_text
from tools_samples import (
    SEQ_LEN,
    sample_loaded,
    sample_text,
    sample_tokenizer,
    write_run,
    write_shards,
)

WIKITEXT_SHA256 = "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08"
RAW = " \n = A title = \n \n Some words , and more . \n Naïve 日本語 🙂 words \n"
ROWS = ["", " = A title = \n", "", " Some words , and more . \n", " Naïve 日本語 🙂 words \n"]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate") / "runs" / "sample"
    write_run(folder)
    return folder


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.raw"
    path.write_text(sample_text()[:8000], encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("shards")
    pieces = [sample_text()[begin : begin + 300] for begin in range(0, 24_000, 300)]
    write_shards(root / "code", train_texts=pieces[:40], val_texts=[*pieces[40:46], "ü" * 9, "x"])
    write_shards(root / "more", train_texts=pieces[50:70], val_texts=pieces[70:73])
    return root


def command(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


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
    vocabulary = Vocabulary.of_sentencepiece(sample_tokenizer())
    for text in (RAW, "日本語 🙂\x00", "  two spaces ▁ and \t tabs", "</s>"):
        spelled = b"".join(vocabulary.pieces[i] for i in vocabulary.encode(text))
        assert spelled.decode().replace("▁", " ") == " " + text.replace("▁", " ")
    for control in (0, vocabulary.bos_id, vocabulary.eos_id):
        assert control is not None and vocabulary.pieces[control] == b""


# ---- perplexity


@pytest.mark.parametrize("name", ["disjoint", "stride"])
def test_a_uniform_model_has_perplexity_v(name: Any) -> None:
    loaded = uniform_loaded()
    text = from_raw(sample_text()[:3000])
    result = measure(loaded, text, Protocol(name=name, context=SEQ_LEN))
    assert result.token_perplexity == pytest.approx(512, rel=1e-6)
    bits = math.log2(512) * result.scored_tokens
    n_bytes = len(text.raw.encode()) * result.scored_share
    assert result.bits_per_byte == pytest.approx(bits / n_bytes, rel=1e-6)
    assert result.byte_perplexity == pytest.approx(2**result.bits_per_byte, rel=1e-6)
    n_words = len(text.raw.split()) * result.scored_share
    assert result.word_perplexity == pytest.approx(2 ** (bits / n_words), rel=1e-5)


def test_a_freshly_initialised_transformer_is_near_perplexity_v() -> None:
    loaded = sample_loaded()
    loaded.model.init_weights(seed=3)
    result = measure(loaded, from_raw(sample_text()[:6000]), Protocol(context=SEQ_LEN))
    assert 400 < result.token_perplexity < 650


@pytest.mark.parametrize("bos", ["never", "start", "window"])
@pytest.mark.parametrize("name", ["disjoint", "stride"])
def test_the_scored_share_is_that_of_the_scored_ids_bytes(name: Any, bos: Any) -> None:
    loaded = uniform_loaded()
    text = from_raw(RAW * 5)
    result = measure(loaded, text, Protocol(name=name, context=SEQ_LEN, bos=bos, bos_id=1), limit=3)
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
    assert result.scored_tokens == len(scored)
    assert result.scored_share == sum(sizes[place] for place in scored) / sum(sizes)
    assert result.scored_bytes == result.scored_share * text.n_bytes


def direct_nats(model: Transformer, ids: list[int], context: int) -> float:
    """The nats of disjoint windows by the model's own loss, one window at a time."""
    total = 0.0
    with torch.no_grad():
        for begin in range(0, len(ids) - context + 1, context):
            window = torch.tensor([ids[begin : begin + context]])
            total += float(model(window[:, :-1], window[:, 1:]))
    return total


def test_the_score_is_the_models_own_loss() -> None:
    loaded = sample_loaded()
    text = from_raw(sample_text()[:4000])
    result = measure(loaded, text, Protocol(context=SEQ_LEN))
    expected = direct_nats(loaded.model, list(loaded.vocabulary.encode(text.joined)), SEQ_LEN)
    assert result.nats == pytest.approx(expected, rel=1e-6)
    assert result.token_perplexity == pytest.approx(math.exp(expected / result.scored_tokens))


def test_the_score_does_not_depend_on_the_batch() -> None:
    loaded = sample_loaded(n_kv_heads=1)
    text = from_raw(sample_text()[:4000])
    protocol = Protocol(name="stride", context=48, stride=7)
    alone, together = (
        measure(loaded, text, protocol, batch_tokens=size).nats for size in (1, 48 * 50)
    )
    assert together == pytest.approx(alone, rel=1e-6)


def test_bf16_is_autocast_and_close() -> None:
    loaded = sample_loaded()
    text = from_raw(sample_text()[:2000])
    protocol = Protocol(context=SEQ_LEN)
    narrow = measure(dataclasses.replace(loaded, dtype="bf16"), text, protocol)
    exact = measure(loaded, text, protocol)
    assert narrow.nats != exact.nats
    assert narrow.nats == pytest.approx(exact.nats, rel=0.02)
    assert narrow.model["dtype"] == "bf16"


def test_a_context_beyond_training_is_allowed_and_said_up_to_the_exact_limit() -> None:
    loaded = sample_loaded()
    text = from_raw(sample_text()[:6000])
    assert not measure(loaded, text, Protocol(context=SEQ_LEN)).beyond_training
    assert measure(loaded, text, Protocol(context=5 * SEQ_LEN)).beyond_training
    assert max_context(loaded.model.config) == 16_448
    with pytest.raises(EvaluationError, match=r"context 16,449: .* up to 16,448"):
        measure(loaded, text, Protocol(context=16_449))
    without_alibi = sample_loaded(alibi=False)
    assert max_context(without_alibi.model.config) is None


def test_limit_and_tail_are_reported() -> None:
    loaded = uniform_loaded()
    text = from_raw(sample_text()[:4000])
    n_ids = len(loaded.vocabulary.encode(text.joined))
    result = measure(loaded, text, Protocol(context=SEQ_LEN), limit=2)
    assert (result.windows, result.limit) == (2, 2)
    assert result.tail_dropped == n_ids % SEQ_LEN
    assert result.text_tokens == n_ids
    with pytest.raises(EvaluationError, match="the text is empty"):
        measure(loaded, EvaluationText("", ""), Protocol(context=SEQ_LEN))


def test_logits_and_transformer_scorers_agree() -> None:
    loaded = sample_loaded(tie_embeddings=False)
    plan = make_plan(sample_tokenizer().encode(sample_text()[:1500]), Protocol(context=SEQ_LEN))
    by_logits = score(Scorer.of_logits(loaded.model.logits), plan)
    assert score(loaded.scorer, plan).nats == pytest.approx(by_logits.nats, rel=1e-6)


# ---- held-out documents


def test_documents_come_back_whole_across_rows_and_chunks(
    shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = read_manifest(shards / "code")
    tokenizer = sample_tokenizer()
    expected = [sample_text()[begin : begin + 300] for begin in range(12_000, 13_800, 300)]
    for rows_at_once in (1, 2, 256):
        monkeypatch.setattr("tools.heldout._ROWS_AT_ONCE", rows_at_once)
        documents = list(held_out_documents(shards / "code", manifest))
        assert [tokenizer.decode(ids) for ids in documents] == [*expected, "ü" * 9, "x"]
        assert all((ids[0], ids[-1]) == (1, 2) for ids in documents)
        assert all((ids[1:] != 1).all() for ids in documents)


def test_held_out_figures_are_those_worked_out_by_hand(shards: Path) -> None:
    loaded = sample_loaded()
    result = evaluate_heldout(loaded, shards, context=20)
    assert [source.source for source in result.sources] == ["code", "more"]
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
        counts = np.ones(len(loaded.vocabulary))
        for path in (shards / name).glob("00000-[0-9]*[0-9].npy"):
            np.add.at(counts, np.load(path), 1)
        counts[[0, 1]] = 1  # padding and BOS are no targets
        surprise = -np.log2(counts / counts.sum())
        bits[name] = sum(surprise[ids[1:]].sum() for ids in documents)
        found = next(source for source in result.sources if source.source == name)
        assert found.bytes == len(texts)
        assert found.tokens == sum(len(ids) - 1 for ids in documents)
        assert found.model == pytest.approx(nats[name] / math.log(2) / len(texts), rel=1e-6)
        assert found.unigram == pytest.approx(bits[name] / len(texts), rel=1e-9)
        assert found.gzip == pytest.approx(8 * len(gzip.compress(texts, 9)) / len(texts))
        xz = lzma.compress(texts, preset=9 | lzma.PRESET_EXTREME)
        assert found.xz == pytest.approx(8 * len(xz) / len(texts))
    assert result.total.bytes == sum(n_bytes.values())
    assert result.total.model == pytest.approx(
        sum(nats.values()) / math.log(2) / sum(n_bytes.values()), rel=1e-6
    )
    assert result.total.unigram == pytest.approx(sum(bits.values()) / sum(n_bytes.values()))
    assert result.below_unigram == pytest.approx(1 - result.total.model / result.total.unigram)


def test_limit_takes_the_first_documents_of_each_source(shards: Path) -> None:
    result = evaluate_heldout(sample_loaded(), shards, limit=2)
    assert [source.documents for source in result.sources] == [2, 2]
    assert result.total.documents == 4


def test_shards_of_another_tokenizer_are_refused(shards: Path) -> None:
    other = Vocabulary.of_sentencepiece(
        Tokenizer(train(sample_text().splitlines()[:200], 400), "other")
    )
    loaded = dataclasses.replace(sample_loaded(), vocabulary=other)
    with pytest.raises(EvaluationError, match="made with the tokenizer sample"):
        evaluate_heldout(loaded, shards)


def test_sources_without_held_out_documents_are_named(tmp_path: Path) -> None:
    write_shards(tmp_path / "s", train_texts=["some text"], val_texts=[])
    with pytest.raises(EvaluationError, match="no document is held out in s"):
        evaluate_heldout(sample_loaded(), tmp_path)


def test_a_unigram_knows_frequencies_and_rules_nothing_out() -> None:
    unigram = Unigram.from_counts([7, 1, 0, 0])
    assert np.exp(-unigram.nats) == pytest.approx(np.array([8, 2, 1, 1]) / 12)
    assert unigram.total_nats([0, 3]) == pytest.approx(math.log(12 / 8) + math.log(12))


def test_counts_of_a_large_source_are_a_spread_sample(shards: Path) -> None:
    manifest = read_manifest(shards / "code")
    all_counts = count_training_ids(shards / "code", manifest, 500)
    some = count_training_ids(shards / "code", manifest, 500, max_rows=10)
    assert 10 * SEQ_LEN * 0.9 <= some.sum() <= 10 * SEQ_LEN < all_counts.sum()
    assert (some <= all_counts).all()


def test_compressed_sizes_are_those_of_the_whole_text() -> None:
    pieces = [sample_text()[begin : begin + 500].encode() for begin in range(0, 9000, 500)]
    sizes, whole = compressed_sizes(pieces), b"".join(pieces)
    assert sizes.raw == len(whole)
    assert sizes.gzip == len(gzip.compress(whole, 9))
    assert sizes.xz == len(lzma.compress(whole, preset=9 | lzma.PRESET_EXTREME))


# ---- the models


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


def damage(run: Path, kind: str) -> None:
    commit = run / "checkpoints" / "step-4"
    if kind == "flipped bit":
        path = next(path for path in commit.iterdir() if "model-00001" in path.name)
        content = bytearray(path.read_bytes())
        content[-5] ^= 1
        path.write_bytes(content)
    elif kind == "truncated":
        path = next(path for path in commit.iterdir() if "model-00001" in path.name)
        path.write_bytes(path.read_bytes()[:-100])
    elif kind == "other tokenizer":
        lines = sample_text().splitlines()[:300]
        (run / "tokenizer.model").write_bytes(train(lines, 380))
    elif kind == "no tokenizer":
        (run / "tokenizer.model").unlink()
    elif kind == "other shape":
        config = json.loads((run / "config.json").read_text())
        config["model"]["d_ff"] = 96
        (run / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("flipped bit", "damaged"),
        ("truncated", "damaged"),
        ("other tokenizer", "has 380 entries and the weights are made for 512"),
        ("no tokenizer", "has no tokenizer.model"),
        ("other shape", "do not fit the configuration"),
    ],
)
def test_a_damaged_run_gives_one_line(
    tmp_path: Path, text_file: Path, kind: str, words: str
) -> None:
    run = tmp_path / "run"
    write_run(run, steps=(4,))
    damage(run, kind)
    result = command("wikitext2", "--run", run, "--data", text_file, "--device", "cpu")
    assert result.exit_code == 1
    assert words in result.stderr
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert result.stdout == ""


# ---- the command


def test_the_command_prints_a_card(run: Path, text_file: Path) -> None:
    result = command("wikitext2", "--run", run, "--data", text_file, "--device", "cpu")
    assert result.exit_code == 0, result.stderr
    for words in ("token perplexity", "bits per byte", "step 4", "protocol  disjoint", "sha256"):
        assert words in result.stdout
    longer = command("wikitext2", "--run", run, "--data", text_file, "--context", 64)
    assert "is beyond training" in longer.stdout


def test_json_holds_every_figure(run: Path, text_file: Path) -> None:
    arguments = ("--run", run, "--data", text_file, "--protocol", "stride", "--stride", 8)
    result = command("wikitext2", *arguments, "--limit", 9, "--json", "--device", "cpu")
    figures = json.loads(result.stdout)
    assert set(figures) == {field.name for field in dataclasses.fields(Perplexity)}
    assert (figures["protocol"], figures["stride"], figures["windows"]) == ("stride", 8, 9)
    assert figures["text_bytes"] == len(text_file.read_bytes())
    assert figures["text_words"] == len(text_file.read_text(encoding="utf-8").split())
    assert figures["model"]["parameters"] > 0


def test_wikitext_figures_reach_json(run: Path, shared: Path) -> None:
    data = shared / "wikitext-2" / "wiki.test.raw"
    result = command("wikitext2", "--run", run, "--data", data, "--limit", 3, "--json")
    figures = json.loads(result.stdout)
    assert (figures["text_bytes"], figures["text_words"]) == (1_290_590, 241_211)
    assert figures["text_sha256"] == WIKITEXT_SHA256


def test_heldout_prints_a_table_and_json(run: Path, shards: Path) -> None:
    result = command("heldout", "--run", run, "--shards", shards, "--device", "cpu")
    assert result.exit_code == 0, result.stderr
    for words in ("unigram", "code", "more", "all", "ABOVE the unigram"):
        assert words in result.stdout
    figures = json.loads(command("heldout", "--run", run, "--shards", shards, "--json").stdout)
    assert [source["source"] for source in figures["sources"]] == ["code", "more"]
    assert figures["total"]["gzip"] > 0


def test_two_tasks_are_two_lines_of_json(run: Path, shards: Path, text_file: Path) -> None:
    both = ("wikitext2", "heldout", "--run", run, "--shards", shards, "--data", text_file)
    lines = command(*both, "--json").stdout.splitlines()
    assert [json.loads(line)["task"] for line in lines] == ["wikitext2", "heldout"]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("sudoku",), 2, "wikitext2"),
        ((), 2, "TASK"),
        (("wikitext2", "--limit", "0"), 2, "--limit"),
        (("wikitext2", "--data", "nowhere.raw"), 1, "nowhere.raw"),
        (("wikitext2", "--data", "TEXT", "--context", "16449"), 1, "up to 16,448"),
        (("wikitext2", "--data", "TEXT", "--context", "9000"), 1, "choose a smaller --context"),
        (("wikitext2", "--data", "TEXT", "--stride", "4"), 1, "disjoint windows have none"),
        (("heldout", "--shards", "nowhere"), 1, "nowhere"),
    ],
)
def test_wrong_input_is_one_clear_line(
    run: Path, text_file: Path, arguments: tuple[str, ...], code: int, words: str
) -> None:
    given = [str(text_file) if argument == "TEXT" else argument for argument in arguments]
    result = command(*given, "--run", run, "--device", "cpu")
    assert result.exit_code == code
    assert words in result.stderr
    if code == 1:
        assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


@pytest.mark.parametrize("module", ["evaluate", "generate", "plan", "report"])
def test_help_is_instant(module: str) -> None:
    """Under half a second of CPU, which importing torch alone would exceed."""
    import resource

    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    code = f"import sys; from tools.{module} import main; sys.argv = ['summer', '--help']; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0 and "Example: summer-" in done.stdout
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5
