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

Long texts are encoded a slice at a time, so that memory does not grow with a document. A slice may
end where text may be cut, but the next one is encoded as a text of its own, with a dummy prefix
that the whole text does not have there. Two kinds of places allow for it:

    in front of a space      the space is left out: the dummy prefix takes its place
    in front of a character  that no piece joins to a space: the prefix is a token by itself, and
                             that token is left out

A text without any such place for megabytes is encoded in one slice, however long. A word, which
has no place to cut at all, is encoded up to 4 MiB; a document with a longer one is rejected.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.text.chat import Encoded
from pipeline.text.json_tokenizer import JsonTokenizer
from pipeline.text.tokenizer import Tokenizer, processor
from shards.format import Flags, Tokens, token_dtype

SLICE_BYTES: Final = 8 << 20
SPACE: Final = "\u2581"  # what a space is inside a model
_BLANK: Final = 0x20
_MARKER: Final = b"\xff"
LONG_WORD: Final = "a word above 4 MiB"
_NO_DUMMY_PREFIX: Final = b"\x1a\x02\x18\x00"  # normalizer_spec { add_dummy_prefix: false }
LONGEST_WORD: Final = 4 << 20  # encoding one takes 70 to 130 times its size
_CACHED_WORD_BYTES: Final = 64  # longer ones rarely come twice
_CACHED_WORDS: Final = 1 << 17  # are kept; more only if few batches have so many of their own, as
_MOST_WORDS: Final = 1 << 20  # in text of many languages, for all are hashed again in every batch
_BATCHES: Final = 4
_COUNTED: Final = 8  # of so many words one is counted: which are common shows all the same
_WINDOW: Final = 1 << 16  # bytes cut at a time: what is made of them stays in the cache

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
    if any(SPACE in piece.lstrip(SPACE) for piece in _matched_pieces(tokenizer)):
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
    pieces = _MARKER.join(piece.encode() for piece in _matched_pieces(tokenizer))
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


def _matched_pieces(tokenizer: Tokenizer) -> list[str]:
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
        self._table = cut_table(tokenizer)
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
        flags = np.empty(_WINDOW, np.bool_)  # flags[i]: between bytes i and i+1 of the window
        for first in range(0, len(text) - 1, _WINDOW):
            window = text[first : first + _WINDOW + 1]
            for parity in (0, 1):
                pairs = window[parity : len(window) - (len(window) - parity) % 2].view("<u2")
                flags[parity : parity + 2 * len(pairs) : 2] = self._table.take(pairs, mode="clip")
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


class SlicedEncoder:
    """The columnar encoder, given at most about 8 MiB at a time."""

    note = "columnar encoder"

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._encoder = ColumnarEncoder(tokenizer)
        self._cuts = self._encoder._table.reshape(256, 256).T  # [prev, next]
        self._prefixed, self._closing = tokenizer.space_first, tokenizer.closing
        self._has_space = self._prefixed and SPACE in _matched_pieces(tokenizer)

    def encode(self, texts: pa.Array) -> Encoded:
        """`BOS doc EOS BOS doc EOS ...` of the texts, and where each BOS stands."""
        if texts.nbytes <= 2 * SLICE_BYTES:
            return self._encoder.encode(texts)
        streams = list(self._streams(texts))
        lengths = np.cumsum([0, *(len(stream.tokens) for stream in streams)])
        starts = [stream.starts + length for stream, length in zip(streams, lengths, strict=False)]
        return Encoded(np.concatenate([s.tokens for s in streams]), np.concatenate(starts))

    def unfit(self, texts: pa.Array) -> dict[int, str]:
        """The texts that would take too much memory: those with a word above 4 MiB."""
        long = np.flatnonzero(np.asarray(pc.binary_length(texts)) > LONGEST_WORD).tolist()
        words = {n: self._longest(np.frombuffer(texts[n].as_buffer(), np.uint8)) for n in long}
        return {n: LONG_WORD for n, size in words.items() if size > LONGEST_WORD}

    def _longest(self, text: Bytes) -> int:
        """Bytes of the longest word."""
        longest = last = 0
        for here in range(1, len(text), _WINDOW):
            window = text[here - 1 : here + _WINDOW]
            places = here + np.flatnonzero(self._cuts[window[:-1], window[1:]])
            if len(places):
                longest = max(longest, int(np.diff(places, prepend=last).max()))
                last = int(places[-1])
        return max(longest, len(text) - last)

    def _streams(self, texts: pa.Array) -> Iterator[Encoded]:
        """The streams of neighbouring texts, short ones together."""
        ends = np.cumsum(np.asarray(pc.binary_length(texts)), dtype=np.int64)
        first = 0
        while first < len(texts):
            done = ends[first - 1] if first else 0
            last = max(first + 1, int(np.searchsorted(ends, done + SLICE_BYTES, side="right")))
            if ends[last - 1] - done <= 2 * SLICE_BYTES:
                yield self._encoder.encode(texts[first:last])
            else:
                yield self._long(texts[first])
            first = last

    def _long(self, text: pa.Scalar) -> Encoded:
        data = text.as_buffer()
        tokens: list[Any] = []
        for first, last, left_out in self._slices(np.frombuffer(data, np.uint8)):
            piece = pa.Array.from_buffers(
                pa.large_binary(),
                1,
                [None, pa.py_buffer(np.array([first, last], np.int64)), data],
            )
            found = self._encoder.encode(piece).tokens
            if not tokens:
                tokens.append(found[:1])  # BOS
            tokens.append(found[1 + left_out : len(found) - self._closing])
        tokens.append(found[len(found) - self._closing :])  # EOS
        return Encoded(np.concatenate(tokens), np.zeros(1, np.int64))

    def _slices(self, text: Bytes) -> Iterator[tuple[int, int, int]]:
        """(first byte, end, tokens to leave out) of each slice."""
        first = left_out = 0
        while len(text) - first > 2 * SLICE_BYTES:
            end = self._place(text, first + SLICE_BYTES)
            if end is None:
                break
            yield first, end, left_out
            if not self._prefixed:
                first = end
            else:
                first, left_out = (end + 1, 0) if text[end] == _BLANK else (end, 1)
        yield first, len(text), left_out

    def _place(self, text: Bytes, at: int) -> int | None:
        """The first place from `at` on where a slice may end."""
        for here in range(at, len(text) - 1, _WINDOW):
            window = text[here - 1 : here + _WINDOW]
            before, behind = window[:-1], window[1:]
            joined = (behind == _BLANK) | (not self._prefixed)
            if self._has_space:
                joined |= self._cuts[_BLANK, behind]
            places = np.flatnonzero(self._cuts[before, behind] & joined)
            if len(places):
                return here + int(places[0])
        return None


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
