"""Byte-level BPE from a tokenizer.json (Llama 3, Qwen, SmolLM, GPT-2), through `tokenizers`.

Ids are those of `tokenizers` with special tokens in a text taken as text. Which special tokens are
BOS and EOS is said by --bos and --eos, by the tokenizer_config.json next to the file, or by their
customary names. A vocabulary without a BOS of its own has one token between documents: BOS and EOS
are the same then, and stand in front of a document, not behind it.

The words of the columnar encoder are here the text from one space to the next. That is exact where
the model's own splitter never has a space behind anything but white space inside a word, and looks
at nothing in front of a word: SPLITTERS lists those known. Web text, a vocabulary of 8,000, one
core: `tokenizers` alone reads 1 MB/s, the columns 2 in the first megabytes and 35 with the words
known. (Calling the model's own splitter for words takes as long as all of `tokenizers`.)
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from pipeline.errors import TokenizerError
from pipeline.text.tokenizer import Tokenizer
from shards.errors import one_line
from shards.files import json_bytes
from shards.format import (
    TOKENIZER_CONFIG,
    TOKENIZER_JSON,
    Flags,
    ManifestTokenizer,
    tokenizer_path,
)

CUSTOMARY: Final = {
    "bos": ("<|begin_of_text|>", "<s>", "<bos>", "<|startoftext|>"),
    "eos": ("<|end_of_text|>", "</s>", "<eos>", "<|endoftext|>"),
}
"""What BOS and EOS are called where nothing else says so, the likeliest first."""

_AT_ONCE: Final = 1 << 20
"""Characters encoded in one call: for each byte of text `tokenizers` takes 110 to 130 of memory."""

_GPT2: Final = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CL100K: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITTERS: Final = frozenset({_GPT2, _CL100K % r"\p{N}{1,3}", _CL100K % r"\p{N}"})
"""GPT-2's and SmolLM's; Llama 3's; Qwen's."""


_MOST_UNUSED: Final = 1 << 17
"""Ids that no token has: a table has a row for each, so there must be an end to them."""


class JsonTokenizer(Tokenizer):
    """A tokenizer.json and its facts. `model` holds the file's bytes.

    `pad_id` is a special token that no text becomes, or one more id where there is none to spare.
    """

    file = TOKENIZER_JSON
    space_first = False

    def __init__(
        self, model: bytes, name: str, ends: Mapping[str, str | None] | None = None
    ) -> None:
        from tokenizers import Tokenizer as FastTokenizer

        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are our own
        self.model, self.name = model, name
        try:
            self._fast = FastTokenizer.from_str(model.decode())
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # all that it says of its type, and a panic is no Exception
            raise TokenizerError(
                f"{name} is no tokenizer.json ({one_line(error)}): fetch it again"
            ) from error
        self._fast.no_truncation()
        self._fast.no_padding()
        self._fast.encode_special_tokens = True
        pieces = self._fast.get_vocab()
        n_ids = 1 + max(pieces.values(), default=0)
        if n_ids > len(pieces) + _MOST_UNUSED:
            raise TokenizerError(
                f"{name} has {len(pieces):,} tokens and ids up to {n_ids - 1:,}: fetch it again"
            )
        self._described: dict[str, Any] = json.loads(self._fast.to_str())
        self._check_byte_level()
        added = self._described["added_tokens"]
        self._special = {each["content"]: each["id"] for each in added if each["special"]}
        named = {"bos": None, "eos": None, "pad": None, **(ends or {})}
        self.eos_id = self._end_id("eos", named["eos"])
        self.bos_id = self._end_id("bos", named["bos"], self.eos_id)
        self.pad_id = self._padding(named["pad"], n_ids)
        self.vocab_size = max(n_ids, self.pad_id + 1)
        self.info = ManifestTokenizer(
            name=name,
            sha256=hashlib.sha256(model).hexdigest(),
            vocab_size=self.vocab_size,
            bos_id=self.bos_id,
            eos_id=self.eos_id,
            pad_id=self.pad_id,
        )

    def _check_byte_level(self) -> None:
        described = self._described
        model = described["model"]
        if model["type"] != "BPE" or "ByteLevel" not in str(described["pre_tokenizer"]):
            raise TokenizerError(
                f"{self.name} is no byte-level BPE, and shards are made with one or with a "
                "SentencePiece model: name its tokenizer.model, if there is one"
            )
        if absent := [byte for char, byte in BYTES.items() if char not in model["vocab"]]:
            raise TokenizerError(f"{self.name} has no token for the byte {absent[0]:#04x}")
        if model["dropout"]:
            raise TokenizerError(f"{self.name} has a dropout of {model['dropout']}: set it to null")

    def _end_id(self, which: str, named: str | None, default: int | None = None) -> int:
        """The id of BOS or EOS; TokenizerError if there is none of that name."""
        if named is not None:
            if named not in self._special:
                raise TokenizerError(
                    f"{self.name} has no special token {named!r} for --{which}: it has "
                    f"{', '.join(list(self._special)[:8]) or 'none'}"
                )
            return int(self._special[named])
        found = [self._special[each] for each in CUSTOMARY[which] if each in self._special]
        if not found and default is None:
            raise TokenizerError(
                f"{self.name} does not say what ends a document: name one of its special tokens "
                f"with --eos: {', '.join(list(self._special)[:8]) or 'it has none'}"
            )
        return int(found[0] if found else default)  # type: ignore[arg-type]

    def _padding(self, named: str | None, n_ids: int) -> int:
        spare = {k: v for k, v in self._special.items() if v not in (self.bos_id, self.eos_id)}
        likely = [*([named] if named else []), *(key for key in spare if "pad" in key), *spare]
        return int(next((spare[key] for key in likely if key in spare), n_ids))

    def encode(self, text: str) -> list[int]:
        """The text's ids, as `tokenizers` gives them, without BOS and EOS."""
        return list(self._fast.encode(text, add_special_tokens=False).ids)

    def encode_all(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text, on one core."""
        ids: list[list[int]] = []
        begun = n_characters = 0
        for end, text in enumerate(texts, start=1):
            n_characters += len(text)
            if n_characters >= _AT_ONCE or end == len(texts):
                some = self._fast.encode_batch_fast(texts[begun:end], add_special_tokens=False)
                ids += [each.ids for each in some]
                begun, n_characters = end, 0
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids; special ones have none, bytes that are no UTF-8 become U+FFFD."""
        pieces = self.token_bytes
        return b"".join(pieces[self._checked(int(i))] for i in ids).decode(errors="replace")

    @functools.cached_property
    def token_bytes(self) -> tuple[bytes, ...]:
        """The UTF-8 bytes that each id adds to a text: none for special tokens."""
        spelled = piece_bytes(self._described)
        return tuple(spelled.get(number, b"") for number in range(self.vocab_size))

    def token_bytes_file(self) -> bytes:
        """The content of token_bytes.npy; shards/format.py says what its two columns mean."""
        return self._lengths_file(np.zeros(self.vocab_size, np.bool_))

    @property
    def control_pieces(self) -> list[str]:
        """The special tokens, which are put in by id alone."""
        return list(self._special)

    def piece(self, number: int) -> str:
        """How the vocabulary spells an id."""
        return str(self._fast.id_to_token(number) or "<padding>")

    def id_of(self, piece: str) -> int:
        """The id of a special token; TokenizerError if the vocabulary has none of that name."""
        if piece not in self._special:
            raise TokenizerError(
                f"{self.name} has no special token {piece}, which the chat template needs: leave "
                "--tokenizer out for conversations, or name a SentencePiece model with it"
            )
        return int(self._special[piece])

    def files(self) -> dict[str, bytes]:
        """What is kept next to shards and weights, by name."""
        ends = {
            f"{which}_token": self._fast.id_to_token(number)
            for which, number in {
                "bos": self.bos_id,
                "eos": self.eos_id,
                "pad": self.pad_id,
            }.items()
        }
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **ends}
        return {TOKENIZER_JSON: self.model, TOKENIZER_CONFIG: json_bytes(config)}

    def unfit_reason(self) -> str | None:
        """Why texts cannot be cut at spaces; None if that is exact."""
        splitter, known = self._described["pre_tokenizer"], False
        for step in splitter.get("pretokenizers", [splitter]):
            if step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
                known |= step["pattern"].get("Regex") in SPLITTERS
            elif step["type"] == "ByteLevel" and not step["add_prefix_space"]:
                known |= step["use_regex"]
            elif step["type"] != "Digits":
                return "its splitter is not known"
        if not known:
            return "its splitter is not known"
        if (self._described["normalizer"] or {"type": "NFC"})["type"] != "NFC":
            return "it normalizes text"
        matched = [each for each in self._described["added_tokens"] if not each["special"]]
        if any(each["rstrip"] or each["single_word"] or " " in each["content"] for each in matched):
            return "it has added tokens with spaces"
        return None

    def cut_table(self) -> Flags:
        """[prev, next]: whether text may be cut between two bytes: between a visible ASCII one and
        a space."""
        table = np.zeros((256, 256), np.bool_)
        table[0x21:0x7F, 0x20] = True
        return table


def load_tokenizer(path: Path, name: str | None = None, **ends: str) -> Tokenizer:
    """The tokenizer in a file or folder; TokenizerError if there is none that can be used.

    `ends` name the special tokens `bos` and `eos` of a tokenizer.json.
    """
    path = tokenizer_path(path) if path.is_dir() else path
    if path.suffix != ".json":
        if ends:
            raise TokenizerError(
                f"--{next(iter(ends))} is for a tokenizer.json, and {path.name} knows its own: "
                "leave it out"
            )
        return Tokenizer.load(path, name)
    try:
        model = path.read_bytes()
    except OSError as error:
        raise TokenizerError(f"{path}: {error.strerror}; name a tokenizer.json") from error
    own = path.absolute().parent.name if path.name == TOKENIZER_JSON else path.stem
    return JsonTokenizer(model, name or own, {**_configured(path), **ends})


def _configured(path: Path) -> dict[str, str | None]:
    """The special tokens that the tokenizer_config.json next to a tokenizer.json names."""
    path = path.with_name(TOKENIZER_CONFIG)
    try:
        config = json.loads(path.read_bytes())
        named = {which: config.get(f"{which}_token") for which in ("bos", "eos", "pad")}
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError, AttributeError) as error:
        raise TokenizerError(f"{path} is damaged ({one_line(error)}): fetch it again") from error
    spelled = {k: v.get("content") if isinstance(v, dict) else v for k, v in named.items()}
    return {k: v if isinstance(v, str) else None for k, v in spelled.items()}


def piece_bytes(described: Mapping[str, Any]) -> dict[int, bytes]:
    """What each id of a tokenizer.json stands for in a text, in UTF-8; special ids for nothing."""
    byte_level = "ByteLevel" in str(described.get("decoder"))
    pieces = {
        number: bytes(map(BYTES.__getitem__, piece)) if byte_level else _spelling(piece)
        for piece, number in described["model"]["vocab"].items()
        if not byte_level or BYTES.keys() >= set(piece)
    }
    for added in described.get("added_tokens", ()):
        pieces[added["id"]] = b"" if added["special"] else added["content"].encode()
    return pieces


def _spelling(piece: str) -> bytes:
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return bytes([int(piece[3:-1], 16)])
    return piece.replace("\u2581", " ").encode()


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's (Radford et al. 2019): a printable byte is itself, the others follow from U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(0x100 + place): byte for place, byte in enumerate(others)}


BYTES: Final = _byte_alphabet()
