"""The columnar encoder gives sentencepiece's ids, whatever the text and the vocabulary."""

import functools
import importlib.util
import io
import json
import random
import subprocess
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sentencepiece
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.text import columnar, slices
from pipeline.text.columnar import ColumnarEncoder, unfit_reason
from pipeline.text.encode import PlainEncoder
from pipeline.text.slices import SlicedEncoder
from pipeline.text.tokenizer import Tokenizer, extend, train
from pipeline_samples import TEXTS
from pipeline_samples import tokenizer as small_tokenizer

SPELLINGS = [
    "<s>", "</s>", "<unk>", "[INST]", "[/INST]", "<0x0A>", "[REFERENCE_DOC_1]", "[control_9]",
]  # fmt: skip
CHARACTERS = list(
    " \u2581  aeobnt.,;(){}=_\n\t\r0129AZ\x00\x7fé\u0301ß中文字の한😀👩\u200d\u202e\ufeff\u2028"
)
ALPHABET = [*CHARACTERS, *SPELLINGS, "the", " of", "def ", "    ", "return", "ing", "://", "\r\n"]


def mistral(version: str) -> Tokenizer:
    """One of Mistral's vocabularies, with no symbol that text could become."""
    spec = importlib.util.find_spec("mistral_common")
    assert spec is not None and spec.origin is not None
    (path,) = (Path(spec.origin).parent / "data").glob(version)
    return Tokenizer(extend(path.read_bytes(), []), version)


def trained() -> Tokenizer:
    """A small vocabulary of our own, learnt from this file."""
    return Tokenizer(train(Path(__file__).read_text().splitlines(), 420), "trained")


TOKENIZERS = {
    "v1": lambda: mistral("tokenizer.model.v1"),
    "v2": lambda: mistral("*240216.model.v2"),
    "v3": lambda: mistral("*240323.model.v3"),
    "extended": Tokenizer.default,
    "trained": trained,
}


def assert_same(encoder: ColumnarEncoder, tokenizer: Tokenizer, texts: list[str]) -> None:
    """One call of the encoder against sentencepiece on every text."""
    stream = encoder.encode(pa.array(texts, pa.string()))
    expected = [[tokenizer.bos_id, *ids, tokenizer.eos_id] for ids in tokenizer.encode_all(texts)]
    joined = np.fromiter(chain.from_iterable(expected), stream.tokens.dtype)
    if not np.array_equal(stream.tokens, joined):
        found = np.split(stream.tokens, stream.starts[1:])
        different = [
            text
            for text, here, there in zip(texts, found, expected, strict=True)
            if here.tolist() != there
        ]
        raise AssertionError(f"{len(different)} texts differ, the first is {different[0][:200]!r}")
    lengths = np.array([len(ids) for ids in expected], np.int64)
    np.testing.assert_array_equal(stream.starts, np.cumsum(lengths) - lengths)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_fuzzed_strings(name: str) -> None:
    """200,000 strings of characters and words that touch every special case."""
    tokenizer = TOKENIZERS[name]()
    encoder = ColumnarEncoder(tokenizer)
    generator = random.Random(name)
    for _ in range(20):
        texts = [
            "".join(generator.choices(ALPHABET, k=generator.randrange(12))) for _ in range(10_000)
        ]
        assert_same(encoder, tokenizer, texts)


@given(st.lists(st.text(max_size=40), max_size=8))
@settings(max_examples=300, deadline=None)
def test_any_text(texts: list[str]) -> None:
    tokenizer, encoder = default_pair()
    assert_same(encoder, tokenizer, texts)


@functools.cache
def default_pair() -> tuple[Tokenizer, ColumnarEncoder]:
    tokenizer = Tokenizer.default()
    return tokenizer, ColumnarEncoder(tokenizer)


def test_special_sizes() -> None:
    tokenizer = Tokenizer.default()
    encoder = ColumnarEncoder(tokenizer)
    assert_same(encoder, tokenizer, [])
    assert_same(encoder, tokenizer, [""])
    assert_same(encoder, tokenizer, ["", "a", "", "", " "])
    assert_same(encoder, tokenizer, [" " * 100_000, "\u2581" * 1000, "a" * 50_000, "\n" * 9999])
    assert_same(encoder, tokenizer, ["x" * 1_000_000])


def test_words_are_forgotten_without_a_change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.text.columnar._CACHED_WORDS", 50)
    monkeypatch.setattr("pipeline.text.columnar._BATCHES", 0)
    tokenizer = Tokenizer.default()
    encoder = ColumnarEncoder(tokenizer)
    generator = random.Random(0)
    for _ in range(30):
        texts = ["".join(generator.choices(ALPHABET, k=40)) for _ in range(20)]
        assert_same(encoder, tokenizer, texts)
        assert len(encoder._words) <= 50


def test_large_vocabulary_gives_uint32() -> None:
    base = Tokenizer.default()
    wide = Tokenizer(extend(base.model, [f"[extra_{i}]" for i in range(33_700)]), "wide")
    assert wide.vocab_size > 1 << 16
    encoder = ColumnarEncoder(wide)
    assert encoder.dtype == np.dtype("<u4")
    assert_same(encoder, wide, ["The quick brown fox", "", "第七章"])


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"model_type": "unigram"}, "no BPE"),
        ({"normalization_rule_name": "nmt_nfkc"}, "normalizes"),
        ({"remove_extra_whitespaces": True}, "spaces"),
        ({"add_dummy_prefix": False}, "spaces"),
        ({"treat_whitespace_as_suffix": True}, "spaces"),
    ],
)
def test_unfit_vocabularies_are_rejected(options: dict[str, Any], reason: str) -> None:
    settings_: dict[str, Any] = {
        "model_type": "bpe", "normalization_rule_name": "identity", "add_dummy_prefix": True,
        "remove_extra_whitespaces": False, "treat_whitespace_as_suffix": False, **options,
    }  # fmt: skip
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(Path(__file__).read_text().splitlines()), model_writer=out,
        vocab_size=400, byte_fallback=True, minloglevel=2, **settings_,
    )  # fmt: skip
    tokenizer = Tokenizer(out.getvalue(), "unfit")
    assert reason in (unfit_reason(tokenizer) or "")
    with pytest.raises(ValueError, match=reason):
        ColumnarEncoder(tokenizer)


def test_the_table_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    """One pair of bytes too many where text may be cut, and the comparison above notices."""
    tokenizer = Tokenizer.default()
    encoder = ColumnarEncoder(tokenizer)
    encoder.table = encoder.table.copy()
    encoder.table[ord("t") + 256 * ord("h")] = True
    with pytest.raises(AssertionError, match="texts differ"):
        assert_same(encoder, tokenizer, ["the other one"])


def test_real_text(shared: Path) -> None:
    """Web pages, code, 388 languages, and the files made to break things."""
    tokenizer = Tokenizer.default()
    encoder = ColumnarEncoder(tokenizer)
    fineweb = pq.read_table(next((shared / "fineweb").rglob("*.parquet")), columns=["text"])
    assert_same(encoder, tokenizer, fineweb["text"].to_pylist()[:300])
    for path in sorted((shared / "the-stack-dedup").rglob("*.parquet")):
        assert_same(encoder, tokenizer, pq.read_table(path)["content"].to_pylist()[:40])
    udhr = zstandard.ZstdDecompressor().stream_reader(
        (shared / "multilingual/udhr.jsonl.zst").open("rb")
    )
    lines = io.TextIOWrapper(udhr, "utf-8", newline="\n").read().split("\n")
    assert_same(encoder, tokenizer, [line[:3000] for line in lines])
    for path in sorted((shared / "nasty").iterdir()):
        assert_same(encoder, tokenizer, [path.read_bytes().decode()[:200_000]])


# ------------------------------------------------------------------ long texts, in slices

LONG = "".join(
    [
        *TEXTS[:20],
        "\n\n  def f(x):\n\treturn [x, 17]\n" * 20,
        "漢字かな交じり文。" * 60,
        "aGVsbG8gd29ybGQx" * 40,
        " " * 300,
        "▁ ▁▁ x" * 30,
        "</s><s>[INST]" * 20,
        "\U0001f600\u200d\u0301" * 40,
    ]
)


@pytest.fixture
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slices, "SLICE_BYTES", 40)
    for module in (slices, columnar):
        monkeypatch.setattr(module, "WINDOW", 16)


@pytest.mark.parametrize("vocabulary", [Tokenizer.default(), small_tokenizer()])
def test_slices_give_the_ids_of_the_whole(vocabulary: Tokenizer, small_slices: None) -> None:
    rng = random.Random(3)
    sliced, complete = SlicedEncoder(vocabulary), ColumnarEncoder(vocabulary)
    for _ in range(200):
        texts = []
        for _ in range(rng.randint(1, 4)):
            first = rng.randrange(len(LONG))
            texts.append(LONG[first : first + rng.choice([0, 5, 50, 200, 900])])
        array = pa.array(["left out", *texts], pa.large_string())[1:]
        found, wanted = sliced.encode(array), complete.encode(array)
        assert found.tokens.tolist() == wanted.tokens.tolist(), texts
        assert found.starts.tolist() == wanted.starts.tolist()


def test_a_long_text_is_really_cut(small_slices: None) -> None:
    encoder = SlicedEncoder(Tokenizer.default())
    text = pa.scalar(LONG, pa.large_string())
    cuts = list(encoder._slices(np.frombuffer(text.as_buffer(), "u1")))
    assert len(cuts) > 50 and cuts[-1][1] == len(LONG.encode())
    assert {left_out for _, _, left_out in cuts} == {0, 1}  # both kinds of places


def test_the_plain_encoder_gives_the_same_stream() -> None:
    texts = pa.array([*TEXTS[:30], "", " ", LONG], pa.large_string())
    plain = PlainEncoder(Tokenizer.default())
    slow, fast = plain.encode(texts), SlicedEncoder(Tokenizer.default()).encode(texts)
    assert slow.tokens.tolist() == fast.tokens.tolist()
    assert slow.starts.tolist() == fast.starts.tolist()
    assert slow.tokens.dtype == fast.tokens.dtype
    assert len(plain.encode(texts[:0]).tokens) == 0


PEAK = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""  # from a small process: a child's peak counts what its parent held when it was forked


@pytest.mark.slow
def test_a_line_of_a_hundred_megabytes_takes_less_than_a_gigabyte(tmp_path: Path) -> None:
    text = (" ".join(TEXTS) * 1500).replace("\n", " ")[:100_000_000]
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}) + "\n")
    command = [sys.executable, "-c", "from pipeline.cli import main; main()", "tokenize",
               "--source", "mine", "--data-files", str(tmp_path / "a.jsonl"),
               "--out", str(tmp_path), "--workers", "1", "--json"]  # fmt: skip
    peak = subprocess.run([sys.executable, "-c", PEAK, *command], stdout=subprocess.PIPE)
    assert peak.returncode == 0 and len(text) == 100_000_000
    assert int(peak.stdout.split()[-1]) < 1_000_000  # kB


@settings(deadline=None, max_examples=100)
@given(st.text(alphabet="ab .\n\u6f22\u00e9", max_size=60), st.integers(2, 9))
def test_a_word_too_long_is_named_and_no_other(text: str, limit: int) -> None:
    """The longest word is that of the encoder's own cuts, whatever the window."""
    encoder = SlicedEncoder(small_tokenizer())
    data = np.frombuffer(text.encode(), np.uint8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slices, "WINDOW", 4)
        words = encoder._encoder._cut(np.concatenate([[255], data]).astype(np.uint8))
        wanted = max((len(word.as_py()) for word in words if word.as_py() != b"\xff"), default=0)
        assert encoder._longest(data) == wanted
        patch.setattr(slices, "LONGEST_WORD", limit)
        found = encoder.unfit(pa.array(["a b", text], pa.large_string()))
        assert found == ({1: "a word above 4 MiB"} if wanted > limit else {})
