"""Documents -> ids: the seam between what is read and how it is encoded.

make_encoder(tokenizer)         the columnar encoder, or plain sentencepiece where it must be
encoder.encode(texts)           an Arrow array of strings -> BOS doc EOS BOS doc EOS ...
encode_documents(encoder, ...)  the same for documents, conversations among them
CheckedEncoder(encoder, ...)    the same, its first texts compared with sentencepiece's ids
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import TokenizerError
from pipeline.text.chat import Template
from pipeline.text.columnar import Stream, unfit_reason
from pipeline.text.documents import Documents
from pipeline.text.slices import SlicedEncoder
from pipeline.text.tokenizer import Tokenizer
from shards.format import Tokens, token_dtype

CHECKED_CHARACTERS: Final = 1 << 15

Flags = npt.NDArray[np.bool_]


class Encoder(Protocol):
    """Gives ids exactly as sentencepiece does."""

    def encode(self, texts: pa.Array) -> Stream:
        """`BOS doc EOS BOS doc EOS ...` of the texts, and where each BOS stands."""


class PlainEncoder:
    """sentencepiece itself, for vocabularies that the columnar encoder is not exact on."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._dtype = token_dtype(tokenizer.vocab_size)

    def encode(self, texts: pa.Array) -> Stream:
        """`BOS doc EOS BOS doc EOS ...` of the texts, and where each BOS stands."""
        bos, eos = self._tokenizer.bos_id, self._tokenizer.eos_id
        documents = [
            np.array([bos, *ids, eos], self._dtype)
            for ids in self._tokenizer.encode_all(texts.to_pylist())
        ]
        ends = np.cumsum([len(ids) for ids in documents], dtype=np.int64)
        tokens = np.concatenate(documents) if documents else np.empty(0, self._dtype)
        return Stream(tokens, np.concatenate([[0], ends[:-1]]).astype(np.int64)[: len(documents)])


@functools.lru_cache(maxsize=1)
def make_encoder(tokenizer: Tokenizer) -> Encoder:
    """The fastest encoder that is exact for this vocabulary; the same one again if it is asked for.

    The words that it has seen serve the next unit.
    """
    if unfit_reason(tokenizer) is None:
        return SlicedEncoder(tokenizer)
    return PlainEncoder(tokenizer)


def encoder_note(tokenizer: Tokenizer) -> str:
    """Which encoder `make_encoder` chooses, and why, in words."""
    reason = unfit_reason(tokenizer)
    return f"plain sentencepiece, slowly: {reason}" if reason else "in columns"


@dataclass(frozen=True)
class Encoded:
    """Documents as ids: the stream, where each document begins, and the targets, if they matter."""

    tokens: Tokens
    starts: npt.NDArray[np.int64]
    targets: Flags | None = None

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Ids of each document, BOS and EOS included."""
        return np.diff(self.starts, append=len(self.tokens))

    def choose(self, chosen: Flags) -> Encoded:
        """The documents for which chosen [n] is true."""
        if chosen.all():
            return self
        lengths = self.lengths
        kept = np.repeat(chosen, lengths)
        starts = np.cumsum(lengths[chosen]) - lengths[chosen]
        targets = None if self.targets is None else self.targets[kept]
        return Encoded(self.tokens[kept], starts, targets)


def encode_documents(
    encoder: Encoder, documents: Documents, template: Template | None = None
) -> Encoded:
    """The documents' ids; of conversations, in the chat template."""
    stream = encoder.encode(documents.texts)
    if documents.turns is None or template is None:
        return Encoded(stream.tokens, stream.starts)
    return Encoded(*template.join(stream.tokens, stream.starts, documents.turns))


class CheckedEncoder:
    """An encoder whose first `n` texts are compared with what sentencepiece makes of them.

    TokenizerError names the first that differs. Of a long text only the beginning is compared, by
    itself: sentencepiece takes seconds for a book.
    """

    def __init__(self, encoder: Encoder, tokenizer: Tokenizer, n: int) -> None:
        self._encoder, self._tokenizer, self._left = encoder, tokenizer, n

    def encode(self, texts: pa.Array) -> Stream:
        """`BOS doc EOS BOS doc EOS ...` of the texts, and where each BOS stands."""
        stream = self._encoder.encode(texts)
        if self._left:
            sample = texts[: self._left]
            self._left -= len(sample)
            long = np.asarray(pc.greater(pc.utf8_length(sample), CHECKED_CHARACTERS))
            self._compare(sample, stream, ~long)
            if long.any():
                beginnings = pc.utf8_slice_codeunits(sample, 0, CHECKED_CHARACTERS)
                self._compare(beginnings, self._encoder.encode(beginnings), long)
        return stream

    def _compare(self, texts: pa.Array, stream: Stream, chosen: Flags) -> None:
        ends = [*stream.starts[1:].tolist(), len(stream.tokens)]
        for place in np.flatnonzero(chosen).tolist():
            text = texts[place].as_py()
            ids = stream.tokens[stream.starts[place] + 1 : ends[place] - 1]
            if ids.tolist() != self._tokenizer.encode(text):
                raise TokenizerError(
                    f"the fast encoder and sentencepiece differ on {text[:60]!r}...: please report "
                    "it together with the tokenizer; nothing of this unit was written"
                )
