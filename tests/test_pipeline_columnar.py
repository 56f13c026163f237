"""The columnar encoder gives sentencepiece's ids, whatever the text and the vocabulary."""

import functools
import importlib.util
import io
import random
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

from pipeline.text.columnar import ColumnarEncoder, unfit_reason
from pipeline.text.tokenizer import Tokenizer, extend, train

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


def test_no_spelling_becomes_a_special_id() -> None:
    tokenizer = Tokenizer.default()
    kinds = tokenizer.proto.SentencePiece
    special = [
        i for i, p in enumerate(tokenizer.proto.pieces) if p.type in (kinds.CONTROL, kinds.UNKNOWN)
    ]
    every_control = [p.piece for p in tokenizer.proto.pieces if p.type == kinds.CONTROL]
    stream = ColumnarEncoder(tokenizer).encode(pa.array([" ".join([*SPELLINGS, *every_control])]))
    assert not np.isin(stream.tokens[1:-1], special).any()


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
def test_unfit_vocabularies_are_refused(options: dict[str, Any], reason: str) -> None:
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
    encoder._table = encoder._table.copy()
    encoder._table[ord("t") + 256 * ord("h")] = True
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
