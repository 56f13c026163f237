"""How many bytes of text ids stand for, read off the SentencePiece model beside the shards.

The trainer sees no text; what it needs to say bits per byte are the lengths of the vocabulary's
pieces. They stand in a protobuf message (sentencepiece_model.proto, Apache-2.0): field 1, repeated,
is a piece with its spelling (1) and kind (3); field 3, the normaliser, says in its field 3 whether
a space is put before each text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

_UNKNOWN, _CONTROL, _BYTE = 2, 3, 6  # kinds of pieces; 1, the default, is text
_SPACE: Final = "\u2581".encode()

Ids = npt.NDArray[np.int64]
Value = int | bytes


class TextBytes:
    """The bytes that targets add to a text, each one known from its id and the id before it."""

    def __init__(self, model: bytes) -> None:
        pieces = [_piece(data) for field, data in _fields(model) if field == 1]
        spec = [dict(_fields(bytes(data))) for field, data in _fields(model) if field == 3]
        self._length = np.array([_length(text, kind) for text, kind in pieces], np.int64)
        self._control = np.array([kind == _CONTROL for _, kind in pieces])
        self._prefixed = np.array(
            [text.startswith(_SPACE) and kind not in (_UNKNOWN, _CONTROL) for text, kind in pieces]
        ) & bool(spec[0].get(3, 1) if spec else 1)

    def count(self, ids: Ids, before: Ids) -> Ids:
        """Bytes of each of `ids`, which follow `before`. [...] -> [...]

        A text begins after a control piece; the space put before it is not its own.
        """
        return np.asarray(self._length[ids] - (self._control[before] & self._prefixed[ids]))


def read_text_bytes(path: Path, sha256: str) -> TextBytes | None:
    """The lengths in a tokenizer's file; None unless it is there and has this digest."""
    data = path.read_bytes() if path.exists() else b""
    return TextBytes(data) if hashlib.sha256(data).hexdigest() == sha256 else None


def _piece(data: Value) -> tuple[bytes, int]:
    fields = dict(_fields(bytes(data)))
    return bytes(fields[1]), int(fields.get(3, 1))


def _length(text: bytes, kind: int) -> int:
    if kind in (_UNKNOWN, _CONTROL):
        return 0
    return 1 if kind == _BYTE else len(text.replace(_SPACE, b" "))


def _fields(message: bytes) -> Iterator[tuple[int, Value]]:
    """Number and value of each field of a protobuf message (protobuf.dev, Encoding)."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        field, wire = tag >> 3, tag & 7
        if wire == 0:
            value, at = _varint(message, at)
            yield field, value
            continue
        if wire == 2:
            size, at = _varint(message, at)
        else:
            size = {1: 8, 5: 4}[wire]
        yield field, message[at : at + size]
        at += size


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
        if byte < 128:
            return value, at
