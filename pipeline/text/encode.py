"""Documents -> ids: chooses the encoder, renders conversations, compares with sentencepiece."""

from __future__ import annotations

import functools
from typing import Final, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import TokenizerError
from pipeline.text.chat import ChatTemplate, Encoded
from pipeline.text.columnar import unfit_reason
from pipeline.text.documents import Documents
from pipeline.text.json_tokenizer import JsonTokenizer
from pipeline.text.slices import LONGEST_WORD, SlicedEncoder
from pipeline.text.tokenizer import Tokenizer
from shards.format import Flags, token_dtype

CHECKED_CHARACTERS: Final = 1 << 15
LONG_TEXT: Final = "above 4 MiB, for a vocabulary that is encoded slowly"


class Encoder(Protocol):
    """Gives ids exactly as sentencepiece does; `note` says in words how."""

    note: str

    def encode(self, texts: pa.Array) -> Encoded:
        """`BOS doc EOS BOS doc EOS ...` of the texts, and where each BOS stands."""

    def unfit(self, texts: pa.Array) -> dict[int, str]:
        """The texts that it cannot encode within the memory of a worker, each with the reason."""


class PlainEncoder:
    """sentencepiece itself, for vocabularies that the columnar encoder is not exact on."""

    def __init__(self, tokenizer: Tokenizer, reason: str = "as asked for") -> None:
        library = "tokenizers" if isinstance(tokenizer, JsonTokenizer) else "sentencepiece"
        self.note = f"plain {library}, slowly: {reason}"
        self._tokenizer = tokenizer
        self._dtype = token_dtype(tokenizer.vocab_size)

    def unfit(self, texts: pa.Array) -> dict[int, str]:
        """The texts above 4 MiB: encoding takes 50 to 130 times their size."""
        long = np.asarray(pc.binary_length(texts)) > LONGEST_WORD
        return dict.fromkeys(np.flatnonzero(long).tolist(), LONG_TEXT)

    def encode(self, texts: pa.Array) -> Encoded:
        """`BOS doc EOS BOS doc EOS ...` of the texts, and where each BOS stands."""
        bos, end = self._tokenizer.bos_id, [self._tokenizer.eos_id] * self._tokenizer.closing
        documents = [
            np.array([bos, *ids, *end], self._dtype)
            for ids in self._tokenizer.encode_all(texts.to_pylist())
        ]
        ends = np.cumsum([len(ids) for ids in documents], dtype=np.int64)
        tokens = np.concatenate(documents) if documents else np.empty(0, self._dtype)
        return Encoded(tokens, np.concatenate([[0], ends[:-1]]).astype(np.int64)[: len(documents)])


@functools.lru_cache(maxsize=1)
def make_encoder(tokenizer: Tokenizer) -> Encoder:
    """The fastest encoder that is exact for this vocabulary; it is kept with the words it knows."""
    reason = unfit_reason(tokenizer)
    return PlainEncoder(tokenizer, reason) if reason else SlicedEncoder(tokenizer)


def encode_documents(
    encoder: Encoder, documents: Documents, template: ChatTemplate | None = None
) -> Encoded:
    """The documents' ids; of conversations, in the chat template."""
    stream = encoder.encode(documents.texts)
    if documents.turns is None or template is None:
        return stream
    return template.join(stream.tokens, stream.starts, documents.turns)


class CheckedEncoder:
    """An encoder whose first `n` texts are compared with what sentencepiece makes of them.

    TokenizerError names the first that differs. Of a long text only the beginning is compared, by
    itself: sentencepiece takes seconds for a book.
    """

    def __init__(self, encoder: Encoder, tokenizer: Tokenizer, n: int) -> None:
        self.note = encoder.note
        self._encoder, self._tokenizer, self._left = encoder, tokenizer, n
        self.unfit = encoder.unfit

    def encode(self, texts: pa.Array) -> Encoded:
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

    def _compare(self, texts: pa.Array, stream: Encoded, chosen: Flags) -> None:
        ends = [*stream.starts[1:].tolist(), len(stream.tokens)]
        for place in np.flatnonzero(chosen).tolist():
            text = texts[place].as_py()
            ids = stream.tokens[stream.starts[place] + 1 : ends[place] - self._tokenizer.closing]
            if ids.tolist() != self._tokenizer.encode(text):
                raise TokenizerError(
                    f"the fast encoder and the plain one differ on {text[:60]!r}: please report it"
                )
