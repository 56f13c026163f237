"""The vocabulary: Mistral's, extended; loading one, training one; ids <-> text.

Text never becomes a control piece: `</s>` in a document is four ordinary characters, so that a web
page cannot forge the end of a document. Control pieces are put in by id alone.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Final

import numpy as np

from pipeline.errors import TokenizerError
from shards.format import TOKENIZER, Flags, ManifestTokenizer

BASE_PACKAGE: Final = "mistral_common"
BASE_FILE: Final = "data/mistral_instruct_tokenizer_240323.model.v3"
DEFAULT_NAME: Final = "mistral-v3-extended"

EXTENSION: Final = ("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[THINK]", "[/THINK]")
"""What later chat models of the base's family added: a model can be fine-tuned on system turns and
on reasoning without a change of vocabulary."""

CHAT_PIECES: Final = ("[INST]", "[/INST]")
SPARE: Final = re.compile(r"\[control_\d+\]")


class Tokenizer:
    """A SentencePiece model and its facts. `encode` adds no BOS, no EOS.

    `vocab_size` counts control and byte pieces, too. `pad_id` is that of `<unk>`, which byte
    fallback never emits. With `space_first` a text's first piece begins with a space that is not in
    the text (the dummy prefix). A tokenizer.json is a JsonTokenizer (json_tokenizer.py).
    """

    file: ClassVar[str] = TOKENIZER
    space_first: bool

    def __init__(self, model: bytes, name: str) -> None:
        self.model, self.name = model, name
        self.proto = _parse(model, name)
        self._processor = processor(model)
        self.vocab_size = len(self.proto.pieces)
        self.bos_id, self.eos_id = int(self._processor.bos_id()), int(self._processor.eos_id())
        self.pad_id = int(self._processor.unk_id())
        self.info = ManifestTokenizer(
            name=name,
            sha256=hashlib.sha256(model).hexdigest(),
            vocab_size=self.vocab_size,
            bos_id=self.bos_id,
            eos_id=self.eos_id,
            pad_id=self.pad_id,
        )
        _check_usable(self.proto, self.info)
        self.space_first = bool(self.proto.normalizer_spec.add_dummy_prefix)

    @classmethod
    def load(cls, path: Path, name: str | None = None) -> Tokenizer:
        """The tokenizer in a `.model` file; TokenizerError if there is none."""
        try:
            model = path.read_bytes()
        except OSError as error:
            raise TokenizerError(
                f"{path}: {error.strerror}; name a SentencePiece .model, or leave --tokenizer out"
            ) from error
        return cls(model, name or path.name.removesuffix(".model"))

    @classmethod
    def default(cls) -> Tokenizer:
        """The extended base vocabulary, `mistral-v3-extended`."""
        return cls(default_model(), DEFAULT_NAME)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tokenizer) and self.info == other.info

    def __hash__(self) -> int:
        return hash(self.info)

    def encode(self, text: str) -> list[int]:
        """The text's ids, as sentencepiece gives them, without BOS and EOS."""
        return list(self._processor.encode(text))

    def encode_all(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text, on one core."""
        return list(self._processor.encode(texts, num_threads=1))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids; control pieces have none. Inverse of `encode`."""
        return str(self._processor.decode([self._checked(int(i)) for i in ids]))

    def _checked(self, number: int) -> int:
        if not 0 <= number < self.vocab_size:
            raise TokenizerError(
                f"id {number} is outside the {self.vocab_size} entries of {self.name}"
            )
        return number

    @property
    def closing(self) -> int:
        """Tokens behind a document: EOS, or none where it is the BOS of the next."""
        return int(self.eos_id != self.bos_id)

    def files(self) -> dict[str, bytes]:
        """What is kept beside shards and weights, by name."""
        return {TOKENIZER: self.model}

    @functools.cached_property
    def token_bytes(self) -> tuple[bytes, ...]:
        """The UTF-8 bytes that each id adds to a text: none for control pieces and `<unk>`.

        The text of some ids is these bytes joined, without the first space (the dummy prefix).
        """
        kinds = self.proto.SentencePiece
        special = {kinds.CONTROL, kinds.UNKNOWN}
        return tuple(
            bytes([int(entry.piece[3:-1], 16)]) if entry.type == kinds.BYTE
            else b"" if entry.type in special
            else entry.piece.replace("\u2581", " ").encode()
            for entry in self.proto.pieces
        )  # fmt: skip

    def token_bytes_file(self) -> bytes:
        """The content of token_bytes.npy; shards/format.py says what its two columns mean."""
        kinds = self.proto.SentencePiece
        prefixed = [
            entry.piece.startswith("\u2581") and entry.type not in (kinds.CONTROL, kinds.UNKNOWN)
            for entry in self.proto.pieces
        ]
        return self._lengths_file(np.array(prefixed) & self.space_first)

    def _lengths_file(self, shorter_first: Flags) -> bytes:
        """Of each id its bytes, and its bytes at the beginning of a text: one less if so marked."""
        lengths = np.array([len(spelled) for spelled in self.token_bytes])
        first = lengths - shorter_first
        out = io.BytesIO()
        dtype = "<u2" if lengths.max() < 1 << 16 else "<u4"
        np.save(out, np.stack([lengths, first], axis=1).astype(dtype), allow_pickle=False)
        return out.getvalue()

    @property
    def control_pieces(self) -> list[str]:
        """The pieces that are put in by id alone, in order of id, without `<unk>`."""
        kinds = self.proto.SentencePiece
        return [entry.piece for entry in self.proto.pieces if entry.type == kinds.CONTROL]

    def piece(self, number: int) -> str:
        """How the vocabulary spells an id."""
        return str(self._processor.id_to_piece(number))

    def id_of(self, piece: str) -> int:
        """The id of a control piece; TokenizerError if the vocabulary has none of that name."""
        number = int(self._processor.piece_to_id(piece))
        if not self._processor.is_control(number):
            raise TokenizerError(
                f"{self.name} has no control piece {piece}: use the default tokenizer, or add it "
                f"with `summer-prep tokenizer --extend FILE --piece {piece} --out FILE`"
            )
        return number


def processor(model: bytes) -> Any:
    """A SentencePieceProcessor of the model's bytes."""
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_proto=model)


@functools.cache
def default_model() -> bytes:
    """The base vocabulary with our control pieces, the bytes of a .model file."""
    return extend(base_model(), EXTENSION)


def base_model() -> bytes:
    """Mistral-7B-Instruct's v3 vocabulary as the package mistral-common ships it, untouched."""
    spec = importlib.util.find_spec(BASE_PACKAGE)
    path = Path(spec.origin).parent / BASE_FILE if spec and spec.origin else None
    if path is None or not path.is_file():
        raise TokenizerError(
            "the base vocabulary comes with the package mistral-common, which is not installed or "
            "too old: `pip install 'mistral-common>=1.8'`, or name a file with --tokenizer"
        )
    return path.read_bytes()


def extend(model: bytes, pieces: Sequence[str], name: str = "the model to extend") -> bytes:
    """The model with each of `pieces` as a control piece, and no user-defined symbols left.

    Spare slots (`[control_7]`) are renamed first, which leaves every id and the size of the
    vocabulary alone; what does not fit is appended. User-defined symbols match in text, so they
    become control pieces: otherwise a document could spell one and be given a special id.
    """
    proto = _parse(model, name)
    kinds = proto.SentencePiece
    names = {entry.piece for entry in proto.pieces}
    spare = [e for e in proto.pieces if e.type == kinds.CONTROL and SPARE.fullmatch(e.piece)]
    for entry in proto.pieces:
        if entry.type == kinds.USER_DEFINED:
            entry.type = kinds.CONTROL
    for piece in pieces:
        if not piece or piece in names:
            raise TokenizerError(
                f"the vocabulary already has the piece {piece!r}: choose another spelling"
            )
        names.add(piece)
        if spare:
            spare.pop(0).piece = piece
        else:
            proto.pieces.add(piece=piece, score=0.0, type=kinds.CONTROL)
    proto.trainer_spec.vocab_size = len(proto.pieces)
    return bytes(proto.SerializeToString(deterministic=True))


def train(lines: Iterable[str], vocab_size: int) -> bytes:
    """A SentencePiece BPE of `vocab_size` entries learnt from the lines; equal bytes each time.

    Byte fallback, no normalisation, spaces kept, digits apart: any text comes back from its ids
    unchanged, and the fast encoder is exact on it. `<unk>` is 0, BOS 1, EOS 2, and [INST] and
    [/INST] follow.
    """
    import sentencepiece

    out = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=out,
            vocab_size=vocab_size,
            model_type="bpe",
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=True,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            character_coverage=0.9995,
            control_symbols=list(CHAT_PIECES),
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            shuffle_input_sentence=False,
            max_sentence_length=1 << 24,
            num_threads=1,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise TokenizerError(
            f"no vocabulary of {vocab_size} in this text ({error}): more text or other --vocab-size"
        ) from error
    return out.getvalue()


def _parse(model: bytes, name: str) -> Any:
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    schema: Any = sentencepiece_model_pb2  # generated code: its classes exist at run time only
    proto = schema.ModelProto()
    try:
        proto.ParseFromString(model)
    except DecodeError:
        proto.Clear()
    if not proto.pieces:
        raise TokenizerError(
            f"{name} is no SentencePiece model: name a .model file or a tokenizer.json"
        )
    return proto


def _check_usable(proto: Any, info: ManifestTokenizer) -> None:
    """TokenizerError unless the ids differ from those of BOS, EOS and padding."""
    kinds = proto.SentencePiece
    if min(info.bos_id, info.eos_id) < 0:
        raise TokenizerError(
            f"{info.name} has no BOS or no EOS: train it with bos_id and eos_id of 0 or more"
        )
    if sum(entry.type == kinds.BYTE for entry in proto.pieces) < 256:
        raise TokenizerError(
            f"{info.name} has no byte fallback, some text would become <unk>: train it with one"
        )
    if symbols := [e.piece for e in proto.pieces if e.type == kinds.USER_DEFINED]:
        raise TokenizerError(
            f"{info.name} gives text the special id of {symbols[0]!r}, a user-defined symbol: "
            "`summer-prep tokenizer --extend FILE --out FILE` makes it a control piece"
        )
