"""Long texts are encoded a slice at a time, so that memory does not grow with a document.

A slice may end where text may be cut, but the next one is encoded as a text of its own, with a
dummy prefix that the whole text does not have there. Two kinds of places allow for it:

    in front of a space      the space is left out: the dummy prefix takes its place
    in front of a character  that no piece joins to a space: the prefix is a token by itself, and
                             that token is left out

A text without any such place for megabytes is encoded in one slice, however long. A word, which
has no place to cut at all, is encoded up to 4 MiB; a document with a longer one is rejected.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.text.chat import Encoded
from pipeline.text.columnar import SPACE, WINDOW, Bytes, ColumnarEncoder, matched_pieces
from pipeline.text.tokenizer import Tokenizer

SLICE_BYTES: Final = 8 << 20
LONG_WORD: Final = "a word above 4 MiB"
LONGEST_WORD: Final = 4 << 20  # encoding one takes 70 to 130 times its size
_BLANK: Final = 0x20


class SlicedEncoder:
    """The columnar encoder, given at most about 8 MiB at a time."""

    note = "columnar encoder"

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._encoder = ColumnarEncoder(tokenizer)
        self._cuts = self._encoder.table.reshape(256, 256).T  # [prev, next]
        self._prefixed, self._closing = tokenizer.space_first, tokenizer.closing
        self._has_space = self._prefixed and SPACE in matched_pieces(tokenizer)

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
        for here in range(1, len(text), WINDOW):
            window = text[here - 1 : here + WINDOW]
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
        for here in range(at, len(text) - 1, WINDOW):
            window = text[here - 1 : here + WINDOW]
            before, behind = window[:-1], window[1:]
            joined = (behind == _BLANK) | (not self._prefixed)
            if self._has_space:
                joined |= self._cuts[_BLANK, behind]
            places = np.flatnonzero(self._cuts[before, behind] & joined)
            if len(places):
                return here + int(places[0])
        return None
