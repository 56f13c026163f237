"""A tokenizer as evaluation and generation see it, whichever kind it is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.errors import TokenizerError
from pipeline.text.chat import ChatTemplate
from pipeline.text.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Ids <-> text. `encode` adds no BOS and no EOS.

    `pieces` holds the UTF-8 bytes that each id stands for in a text; ids that are not text (BOS,
    EOS, other control pieces, `<unk>`) stand for none. With `space_first` a text's first piece
    begins with a space that is not in the text (SentencePiece's dummy prefix). `chat` holds the
    ids of the chat template's markers, None where the vocabulary has none.
    """

    name: str
    encode: Callable[[str], Sequence[int]]
    decode: Callable[[Iterable[int]], str]
    pieces: tuple[bytes, ...]
    bos_id: int | None
    eos_id: int | None
    sha256: str
    space_first: bool
    chat: ChatTemplate | None

    @classmethod
    def of_sentencepiece(cls, tokenizer: Tokenizer) -> Vocabulary:
        """The vocabulary of a SentencePiece model."""
        return cls(
            name=tokenizer.name,
            encode=tokenizer.encode,
            decode=tokenizer.decode,
            pieces=tokenizer.token_bytes,
            bos_id=tokenizer.bos_id,
            eos_id=tokenizer.eos_id,
            sha256=tokenizer.info.sha256,
            space_first=bool(tokenizer.proto.normalizer_spec.add_dummy_prefix),
            chat=_chat_template(tokenizer),
        )

    def __len__(self) -> int:
        return len(self.pieces)

    def n_bytes(self) -> npt.NDArray[np.int64]:
        """Bytes of text that each id stands for. [V]"""
        return np.array([len(piece) for piece in self.pieces], np.int64)


def _chat_template(tokenizer: Tokenizer) -> ChatTemplate | None:
    try:
        return ChatTemplate.of(tokenizer)
    except TokenizerError:
        return None
