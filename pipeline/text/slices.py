"""Long texts encoded a slice at a time, so that memory does not grow with a document.

A slice may end where text may be cut (columnar.py), but the next one is encoded as a text of its
own, with a dummy prefix that the whole text does not have there. Two kinds of places allow for it:

    in front of a space      the space is left out: the dummy prefix takes its place
    in front of a character  that no piece joins to a space: the prefix is a token by itself, and
                             that token is left out

A text without any such place for megabytes is encoded in one slice, however long.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.text.columnar import SPACE, ColumnarEncoder, Flags, Stream, cut_table
from pipeline.text.tokenizer import Tokenizer

SLICE_BYTES: Final = 8 << 20
_WINDOW: Final = 1 << 16  # bytes looked at for a place, at a time
_BLANK: Final = 0x20

Bytes = npt.NDArray[np.uint8]


class SlicedEncoder:
    """The columnar encoder, given at most about 8 MiB at a time."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, self._encoder = tokenizer, ColumnarEncoder(tokenizer)
        self._has_space = any(entry.piece == SPACE for entry in tokenizer.proto.pieces)

    @functools.cached_property
    def _cuts(self) -> Flags:
        """[prev, next]: whether text may be cut between two bytes."""
        return cut_table(self._tokenizer).reshape(256, 256).T

    def encode(self, texts: pa.Array) -> Stream:
        """`BOS doc EOS BOS doc EOS ...` of the texts, and where each BOS stands."""
        if texts.nbytes <= 2 * SLICE_BYTES:
            return self._encoder.encode(texts)
        streams = list(self._streams(texts))
        lengths = np.cumsum([0, *(len(stream.tokens) for stream in streams)])
        starts = [stream.starts + length for stream, length in zip(streams, lengths, strict=False)]
        return Stream(np.concatenate([s.tokens for s in streams]), np.concatenate(starts))

    def _streams(self, texts: pa.Array) -> Iterator[Stream]:
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

    def _long(self, text: pa.Scalar) -> Stream:
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
            tokens.append(found[1 + left_out : -1])
        tokens.append(found[-1:])  # EOS
        return Stream(np.concatenate(tokens), np.zeros(1, np.int64))

    def _slices(self, text: Bytes) -> Iterator[tuple[int, int, int]]:
        """(first byte, end, tokens to leave out) of each slice."""
        first = left_out = 0
        while len(text) - first > 2 * SLICE_BYTES:
            end = self._place(text, first + SLICE_BYTES)
            if end is None:
                break
            yield first, end, left_out
            first, left_out = (end + 1, 0) if text[end] == _BLANK else (end, 1)
        yield first, len(text), left_out

    def _place(self, text: Bytes, at: int) -> int | None:
        """The first place from `at` on where a slice may end."""
        for here in range(at, len(text) - 1, _WINDOW):
            window = text[here - 1 : here + _WINDOW]
            before, behind = window[:-1], window[1:]
            joined = behind == _BLANK
            if self._has_space:
                joined |= self._cuts[_BLANK, behind]
            places = np.flatnonzero(self._cuts[before, behind] & joined)
            if len(places):
                return here + int(places[0])
        return None
