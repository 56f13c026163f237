"""The vocabulary: text and ids, what is never emitted, extension, training."""

import io

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import TokenizerError
from pipeline.text.columnar import unfit_reason
from pipeline.text.tokenizer import EXTENSION, Tokenizer, base_model, extend, processor, train
from pipeline_samples import TEXTS, tokenizer

DEFAULT = Tokenizer.default()
KINDS = DEFAULT.proto.SentencePiece
CONTROL = {
    n for n, e in enumerate(DEFAULT.proto.pieces) if e.type in (KINDS.CONTROL, KINDS.UNKNOWN)
}
SPELLINGS = [e.piece for e in DEFAULT.proto.pieces if e.type == KINDS.CONTROL] + ["<unk>", "<0x0A>"]


def test_the_default_is_the_extended_base() -> None:
    info = DEFAULT.info
    assert (info.vocab_size, info.bos_id, info.eos_id, info.pad_id) == (32768, 1, 2, 0)
    assert info.name == "mistral-v3-extended"
    assert unfit_reason(DEFAULT) is None
    for piece in ("[INST]", "[/INST]", "[PREFIX]", "[REFERENCE_DOC_0]", *EXTENSION):
        assert DEFAULT.id_of(piece) in CONTROL


def test_the_extension_changes_no_id_of_any_text() -> None:
    base = processor(base_model())
    for text in [*TEXTS[:20], "  def f(x):\n\treturn x\n", "déjà vu 東京 \U0001f600", "", " "]:
        assert DEFAULT.encode(text) == base.encode(text)


@settings(deadline=None)
@given(st.text() | st.lists(st.sampled_from([*SPELLINGS, " ", "a"])).map("".join))
def test_text_comes_back_and_never_becomes_a_control_piece(text: str) -> None:
    ids = DEFAULT.encode(text)
    assert not CONTROL & set(ids)
    assert DEFAULT.decode(ids) == text.replace("\u2581", " ")
    assert b"".join(DEFAULT.token_bytes[i] for i in ids)[1:] == (
        text.replace("\u2581", " ").encode() if text else b""
    )


def test_token_bytes_count_what_each_id_adds_to_a_text() -> None:
    """In a text and at its beginning, with and without a space put in front."""
    table = np.load(io.BytesIO(DEFAULT.token_bytes_file()))
    assert (table.shape, table.dtype) == ((32768, 2), np.dtype("<u2"))
    for text in [*TEXTS[:9], "  two", "déjà vu 東京 \U0001f600", "\n"]:
        ids = np.array([DEFAULT.bos_id, *DEFAULT.encode(text), DEFAULT.eos_id])
        before, ids = ids[:-1], ids[1:]
        added = table[ids, (table[before, 0] == 0) * 1]
        assert added.sum() == len(text.encode())
        assert added[-1] == 0  # EOS
    proto = DEFAULT.proto.__class__()
    proto.CopyFrom(DEFAULT.proto)
    proto.normalizer_spec.add_dummy_prefix = False
    plain = np.load(io.BytesIO(Tokenizer(proto.SerializeToString(), "plain").token_bytes_file()))
    assert np.array_equal(plain[:, 1], table[:, 0]) and table[:, 1].sum() < table[:, 0].sum()


def test_extension_fills_spare_slots_and_then_appends() -> None:
    added = Tokenizer(extend(base_model(), [f"[X{n}]" for n in range(740)]), "x")
    spare = [e.piece for e in added.proto.pieces if e.piece.startswith("[control_")]
    assert spare == [] and added.vocab_size == 32768 + 740 - 737
    assert added.id_of("[X0]") == DEFAULT.id_of(EXTENSION[0])
    assert added.id_of("[X739]") == added.vocab_size - 1
    assert added.encode("see [X0] and [X739]") == DEFAULT.encode("see [X0] and [X739]")
    with pytest.raises(TokenizerError, match="already has the piece '\\[INST\\]'"):
        extend(base_model(), ["[INST]"])


def test_training_gives_the_same_bytes_and_fits_the_fast_encoder() -> None:
    again = Tokenizer(train(TEXTS, 400), "small")
    assert again.model == tokenizer().model
    assert (again.vocab_size, again.bos_id, again.eos_id, again.pad_id) == (400, 1, 2, 0)
    assert (again.id_of("[INST]"), again.id_of("[/INST]")) == (3, 4)
    assert unfit_reason(again) is None
    for text in ("  two  spaces ", "never seen: ß 漢字\t\x00", "42"):
        assert again.decode(again.encode(text)) == text
    with pytest.raises(TokenizerError, match="--vocab-size"):
        train(["only a line"], 50_000)


def test_a_model_that_does_not_fit_is_rejected() -> None:
    with pytest.raises(TokenizerError, match=r"readme is no SentencePiece model"):
        Tokenizer(b"# A page about something else\n", "readme")
    with pytest.raises(TokenizerError, match="user-defined"):
        Tokenizer(base_model(), "base")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=model, vocab_size=200, model_type="bpe",
        minloglevel=2,
    )  # fmt: skip
    with pytest.raises(TokenizerError, match="no byte fallback"):
        Tokenizer(model.getvalue(), "plain")
    with pytest.raises(TokenizerError, match="id 400 is outside the 400 entries of small"):
        tokenizer().decode([5, 400])
    with pytest.raises(TokenizerError, match="has no control piece \\[THINK\\]"):
        tokenizer().id_of("[THINK]")
