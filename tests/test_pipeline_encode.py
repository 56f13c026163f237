"""The comparison with sentencepiece stops at the first text whose ids differ."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipeline.errors import TokenizerError
from pipeline.text import encode
from pipeline.text.chat import Encoded
from pipeline.text.encode import CheckedEncoder, PlainEncoder, make_encoder
from pipeline.text.slices import SlicedEncoder
from pipeline.text.tokenizer import Tokenizer
from pipeline_samples import TEXTS, tokenizer

CLEAN = ["one dog", "", "two cats and a dog"]


class WrongEncoder:
    """Gives another last id to every text that holds a Z."""

    note = "wrongly"

    def unfit(self, texts: pa.Array) -> dict[int, str]:
        return {}

    def encode(self, texts: pa.Array) -> Encoded:
        right = make_encoder(tokenizer()).encode(texts)
        tokens, starts = right.tokens, right.starts
        ends = [*starts[1:].tolist(), len(tokens)]
        wrong = [ends[n] - 2 for n, text in enumerate(texts.to_pylist()) if "Z" in text]
        return Encoded(np.where(np.isin(np.arange(len(tokens)), wrong), 5, tokens), starts)


def checked(texts: list[str], n: int, encoder: Any = None) -> Encoded:
    return CheckedEncoder(encoder or WrongEncoder(), tokenizer(), n).encode(
        pa.array(texts, pa.string())
    )


def test_what_is_right_passes_unchanged() -> None:
    honest = make_encoder(tokenizer())
    texts = [*CLEAN, *TEXTS]
    assert CheckedEncoder(honest, tokenizer(), 1).note == honest.note == "columnar encoder"
    got, want = checked(texts, 1000, honest), honest.encode(pa.array(texts, pa.string()))
    assert np.array_equal(got.tokens, want.tokens) and np.array_equal(got.starts, want.starts)


@pytest.mark.parametrize("place", range(4))
def test_the_first_difference_is_named(place: int) -> None:
    texts = list(CLEAN)
    texts.insert(place, "a dog Z")
    with pytest.raises(TokenizerError, match="'a dog Z'"):
        checked(texts, 4)
    if place == 3:
        checked(texts, 3)  # no more are compared than was asked for


def test_the_number_counts_over_batches() -> None:
    encoder = CheckedEncoder(WrongEncoder(), tokenizer(), 4)
    encoder.encode(pa.array(CLEAN, pa.string()))
    with pytest.raises(TokenizerError):
        encoder.encode(pa.array(["dog Z", "dog"], pa.string()))
    encoder = CheckedEncoder(WrongEncoder(), tokenizer(), 4)
    for batch in (CLEAN, ["dog", "dog Z"], ["dog Z"]):
        encoder.encode(pa.array(batch, pa.string()))  # the fifth is not compared any more


def test_of_a_long_text_the_beginning_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "CHECKED_CHARACTERS", 20)
    long = "a dog and a cat " * 5
    checked([long + "Z", *CLEAN], 4)  # what differs lies beyond
    with pytest.raises(TokenizerError, match="Z a dog"):
        checked([*CLEAN, "Z " + long], 4)


def test_a_short_text_next_to_a_long_one_is_compared_to_its_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(encode, "CHECKED_CHARACTERS", 20)
    with pytest.raises(TokenizerError, match="'dog Z'"):
        checked(["a dog and a cat " * 5, "dog Z"], 4)
    exactly = "a dog and one cat, Z"
    assert len(exactly) == 20
    with pytest.raises(TokenizerError, match=exactly):
        checked([exactly], 4)


def test_columns_serve_what_they_are_exact_on_and_sentencepiece_the_rest() -> None:
    fit = tokenizer()
    encoder = make_encoder(fit)
    assert isinstance(encoder, SlicedEncoder) and encoder.note == "columnar encoder"
    proto = type(fit.proto).FromString(fit.model)
    proto.normalizer_spec.add_dummy_prefix = False
    unfit = Tokenizer(proto.SerializeToString(), "unfit")
    plain = make_encoder(unfit)
    assert isinstance(plain, PlainEncoder)
    assert plain.note.startswith("plain sentencepiece, slowly: it treats spaces")


def test_no_text_is_an_empty_stream() -> None:
    for encoder in (PlainEncoder(tokenizer()), make_encoder(tokenizer())):
        stream = encoder.encode(pa.array([], pa.string()))
        assert len(stream.tokens) == len(stream.starts) == 0
        assert stream.tokens.dtype == np.uint16
