"""SentencePiece BPE at columnar speed, id for id what sentencepiece itself gives.

A merge across the characters a|b makes a piece that contains "ab". So where no piece of the
vocabulary contains that pair, no merge can ever span it, whatever the scores: the text may be cut
there and both sides encoded alone. In a trained vocabulary such places are everywhere (before a
run of spaces, at digits, newlines, most punctuation), and the words between them repeat so often
that nearly all are looked up, not encoded:

    text   = documents joined by 0xFF, which no UTF-8 text contains
    cuts   = where a table of byte pairs says so
    words  = Arrow binary array over (cuts, text), no copy
    index  = Arrow's index_in(words, words seen so far)      # unknown ones: ask sentencepiece
    stream = ids of the words seen, take(index)              # Arrow's gather makes the row stream

The marker 0xFF is a word too, with the ids EOS BOS: documents come out separated.

The table comes from the model, on bytes: conservative where characters share bytes, never wrong.
Nothing here makes a Python string of a document.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.text.chat import Encoded
from pipeline.text.json_tokenizer import JsonTokenizer
from pipeline.text.tokenizer import Tokenizer, processor
from shards.format import Flags, Tokens, token_dtype

SPACE: Final = "\u2581"  # what a space is inside a model
_MARKER: Final = b"\xff"
_NO_DUMMY_PREFIX: Final = b"\x1a\x02\x18\x00"  # normalizer_spec { add_dummy_prefix: false }
_CACHED_WORD_BYTES: Final = 64  # longer ones rarely come twice
_CACHED_WORDS: Final = 1 << 17  # are kept; more only if few batches have so many of their own, as
_MOST_WORDS: Final = 1 << 20  # in text of many languages, for all are hashed again in every batch
_BATCHES: Final = 4
_COUNTED: Final = 8  # of so many words one is counted: which are common shows all the same
WINDOW: Final = 1 << 16  # bytes cut at a time: what is made of them stays in the cache

Bytes = npt.NDArray[np.uint8]


@functools.lru_cache(maxsize=8)
def unfit_reason(tokenizer: Tokenizer) -> str | None:
    """Why this vocabulary needs its plain encoder; None if cutting is exact for it."""
    if isinstance(tokenizer, JsonTokenizer):
        return tokenizer.unfit_reason()
    proto = tokenizer.proto
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    if trainer.model_type != trainer.BPE:
        return "it is no BPE"
    if not trainer.byte_fallback:
        return "it has no byte fallback"
    if normalizer.name != "identity" or normalizer.precompiled_charsmap:
        return f"it normalizes text ({normalizer.name or 'rules of its own'})"
    if normalizer.remove_extra_whitespaces or not normalizer.add_dummy_prefix:
        return "it treats spaces in another way"
    if trainer.treat_whitespace_as_suffix or not normalizer.escape_whitespaces:
        return "it treats spaces in another way"
    if any(piece.type == piece.USER_DEFINED for piece in proto.pieces):
        return "it has user-defined symbols"
    if any(SPACE in piece.lstrip(SPACE) for piece in matched_pieces(tokenizer)):
        return "a space stands inside a piece"
    return None


def cut_table(tokenizer: Tokenizer) -> Flags:
    """[256 * 256], indexed prev + 256 * next: whether text may be cut between two bytes."""
    table = _pair_table(tokenizer)
    table[0xFF, :] = table[:, 0xFF] = True
    return np.ascontiguousarray(table.T).reshape(-1)


def _pair_table(tokenizer: Tokenizer) -> Flags:
    """[prev, next]: whether text may be cut between two bytes."""
    if isinstance(tokenizer, JsonTokenizer):
        return tokenizer.cut_table()
    table = np.ones((256, 256), np.bool_)
    table[:, 0x80:0xC0] = False  # inside a character
    pieces = _MARKER.join(piece.encode() for piece in matched_pieces(tokenizer))
    for spelling in (pieces, pieces.replace(SPACE.encode(), b" ")):
        data = np.frombuffer(spelling, np.uint8)
        table[data[:-1], data[1:]] = False
    # a space and a literal U+2581 (E2 96 81) are one symbol, so runs of both hold together
    table[0x81, 0x20] = table[0x20, 0xE2] = False
    return table


def _word_encoder(tokenizer: Tokenizer) -> Callable[[list[str]], list[list[int]]]:
    """What gives the ids of texts without a space in front of each."""
    if isinstance(tokenizer, JsonTokenizer):
        return tokenizer.encode_all
    encode: Callable[[list[str]], list[list[int]]] = processor(
        tokenizer.model + _NO_DUMMY_PREFIX
    ).encode
    return encode


def matched_pieces(tokenizer: Tokenizer) -> list[str]:
    """The pieces that text can become: not control, byte or unknown ones."""
    kinds = tokenizer.proto.SentencePiece
    special = (kinds.CONTROL, kinds.BYTE, kinds.UNKNOWN)
    return [entry.piece for entry in tokenizer.proto.pieces if entry.type not in special]


class ColumnarEncoder:
    """Encodes Arrow arrays of text. It keeps the words that it has seen, for the next batch.

    Raises ValueError for a vocabulary that `unfit_reason` gives a reason for.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        if reason := unfit_reason(tokenizer):
            raise ValueError(f"{tokenizer.name} cannot be encoded in columns: {reason}")
        self.dtype = token_dtype(tokenizer.vocab_size)
        self._encode = _word_encoder(tokenizer)
        self.table = cut_table(tokenizer)
        self._head = _MARKER + b" " * tokenizer.space_first
        self._closing, self._eos = tokenizer.closing, tokenizer.eos_id
        self._words = pa.array([_MARKER], pa.binary())
        marker = np.array([self._eos, tokenizer.bos_id][-1 - self._closing :], self.dtype)
        self._ids = pa.array([marker.tobytes()], pa.binary())
        self._uses = np.zeros(1, np.int64)

    def encode(self, texts: pa.Array) -> Encoded:
        """The stream of an array of strings, valid UTF-8 without nulls, 2 GiB at most."""
        words = self._cut(_joined(texts, self._head))
        index, known, ids = self._look_up(words)
        stream = ids.take(index)
        places = np.asarray(index)
        starts = _offsets(stream)[np.flatnonzero(places == 0)].astype(np.int64)
        self._remember(known, ids, places)
        return Encoded(self._finished(stream), starts // self.dtype.itemsize)

    def _look_up(self, words: Any) -> tuple[Any, Any, Any]:
        """Each word's place among the words known now, these words, and the ids of each."""
        index = pc.index_in(words, value_set=self._words)
        if not index.null_count:
            return index, self._words, self._ids
        # only the unknown are hashed again: looking all up a second time cost a third of a batch
        unknown = pc.is_null(index)
        new = words.filter(unknown).dictionary_encode()
        places = pc.add(new.indices, pa.scalar(len(self._words), pa.int32()))
        return (
            pc.replace_with_mask(index, unknown, places),
            pa.concat_arrays([self._words, new.dictionary]),
            pa.concat_arrays([self._ids, self._encode_words(new.dictionary)]),
        )

    def _finished(self, stream: Any) -> Tokens:
        """The tokens: every marker began with the EOS of the document before; shift by one.

        Where nothing closes a document there is nothing to shift.
        """
        offsets = _offsets(stream)
        data = np.frombuffer(stream.buffers()[2], np.uint8)[offsets[0] : offsets[-1]]
        tokens = np.empty(len(data) // self.dtype.itemsize, self.dtype)
        tokens[: len(tokens) - self._closing] = data.view(self.dtype)[self._closing :]
        tokens[len(tokens) - self._closing :] = self._eos
        return tokens

    def _cut(self, text: Bytes) -> Any:
        """The words of the text, an Arrow binary array over its bytes."""
        offsets = np.empty(len(text) + 2, np.int32)  # pages that are never written cost nothing
        offsets[0], n = 0, 1
        flags = np.empty(WINDOW, np.bool_)  # flags[i]: between bytes i and i+1 of the window
        for first in range(0, len(text) - 1, WINDOW):
            window = text[first : first + WINDOW + 1]
            for parity in (0, 1):
                pairs = window[parity : len(window) - (len(window) - parity) % 2].view("<u2")
                flags[parity : parity + 2 * len(pairs) : 2] = self.table.take(pairs, mode="clip")
            cuts = np.flatnonzero(flags[: len(window) - 1])
            np.add(cuts, first + 1, out=offsets[n : n + len(cuts)], casting="unsafe")
            n += len(cuts)
        offsets[n] = len(text)
        buffers = [None, pa.py_buffer(offsets[: n + 1]), pa.py_buffer(text)]
        return pa.Array.from_buffers(pa.binary(), n, buffers)

    def _encode_words(self, words: Any) -> Any:
        """The packed ids of each word, from the plain encoder."""
        encoded = self._encode([word.decode() for word in words.to_pylist()])
        sizes = np.fromiter(map(len, encoded), np.int64, len(encoded)) * self.dtype.itemsize
        offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
        ids = np.fromiter(itertools.chain.from_iterable(encoded), self.dtype)
        buffers = [None, pa.py_buffer(offsets), pa.py_buffer(ids)]
        return pa.Array.from_buffers(pa.binary(), len(encoded), buffers)

    def _remember(self, words: Any, ids: Any, places: npt.NDArray[np.int32]) -> None:
        """Keep the words worth keeping; when there are too many, the half that was used most."""
        uses = np.bincount(places[::_COUNTED], minlength=len(words))
        uses[: len(self._uses)] += self._uses
        if len(words) == len(self._words):
            self._uses = uses
            return
        known = len(self._words)
        short = pc.less_equal(pc.binary_length(words[known:]), _CACHED_WORD_BYTES)
        words = pa.concat_arrays([self._words, words[known:].filter(short)])
        ids = pa.concat_arrays([self._ids, ids[known:].filter(short)])
        uses = np.concatenate([uses[:known], uses[known:][np.asarray(short)]])
        if len(words) > _CACHED_WORDS and len(words) > (room := _room(places)):
            uses[0] = np.iinfo(np.int64).max // 2  # the marker stays, and stays first
            keep = np.sort(np.argsort(-uses, kind="stable")[: room // 2])
            words, ids = words.take(pa.array(keep)), ids.take(pa.array(keep))
            uses = uses[keep] // 2  # what was common long ago makes room in time
        self._words, self._ids, self._uses = words, ids, uses


def _room(places: npt.NDArray[np.int32]) -> int:
    """How many words may be kept after a batch of these."""
    distinct = int(np.count_nonzero(np.bincount(places)))
    return max(_CACHED_WORDS, min(_MOST_WORDS, _BATCHES * distinct))


def _joined(texts: Any, head: bytes) -> Bytes:
    """Each document behind its head: 0xFF, and a space, if the vocabulary has it (the dummy
    prefix), which an empty document does not get."""
    texts = texts.cast(pa.binary())
    listed = pa.ListArray.from_arrays(pa.array([0, len(texts)], pa.int32()), texts)
    joined = pc.binary_join(listed, head)
    body = np.frombuffer(joined.buffers()[2], np.uint8)[: _offsets(joined)[-1]]
    text = np.empty(len(body) + len(head), np.uint8)
    text[: len(head)], text[len(head) :] = list(head), body
    if not len(texts):
        return text[:0]
    lengths = np.asarray(pc.binary_length(texts))
    if len(head) > 1 and not lengths.all():
        starts = np.concatenate([[0], np.cumsum(lengths + 2)[:-1]])
        text = np.delete(text, starts[lengths == 0] + 1)
    return text


def _offsets(array: Any) -> npt.NDArray[np.int32]:
    """[n + 1]: where each value of a binary array begins in its data buffer."""
    return np.frombuffer(array.buffers()[1], np.int32)[array.offset : array.offset + len(array) + 1]
