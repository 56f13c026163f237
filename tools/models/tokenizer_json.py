"""A SentencePiece vocabulary <-> Hugging Face's tokenizer.json.

transformers can turn a `.model` file into its own form, but with other ids for some texts (a first
space, rare pairs of merges), so the file is written here: the normaliser puts SentencePiece's
dummy prefix in front, and the merges are ordered by the scores that SentencePiece goes by.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from pipeline.text.tokenizer import CHAT_PIECES, Tokenizer

SPACE: Final = "▁"

_CHAT: Final = r"""
{%- if messages and messages[0]['role'] == 'system' -%}
  {%- set system, turns = messages[0]['content'], messages[1:] -%}
{%- else -%}
  {%- set system, turns = '', messages -%}
{%- endif -%}
{%- if turns and turns[-1]['role'] == 'user' and not add_generation_prompt -%}
  {%- set turns = turns[:-1] -%}
{%- endif -%}
{%- if not turns -%}
  {{- raise_exception('no answer: for a question alone, give add_generation_prompt=True') -}}
{%- endif -%}
{{- bos_token -}}
{%- for turn in turns -%}
  {%- set asks = loop.index0 % 2 == 0 -%}
  {%- if turn['role'] != ('user' if asks else 'assistant') -%}
    {{- raise_exception('turns out of order: user and assistant take turns, user first') -}}
  {%- endif -%}
  {%- set text = turn['content'] if asks else turn['content'].rstrip(' ') -%}
  {%- if not text -%}{{- raise_exception('empty turn') -}}{%- endif -%}
  {%- if system and loop.first -%}{%- set text = system ~ '\n\n' ~ text -%}{%- endif -%}
  {%- for marker in MARKERS -%}
    {%- if marker in text -%}
      {{- raise_exception('a turn spells ' ~ marker ~ ', which would become that marker') -}}
    {%- endif -%}
  {%- endfor -%}
  {{- '[INST]' ~ text ~ '[/INST]' if asks else text ~ eos_token -}}
{%- endfor -%}
"""
"""pipeline/text/chat.py for transformers. There markers are put in by id and texts stay text; here
a text that spells one would forge it, so it is refused."""


def tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """The vocabulary as a tokenizer.json."""
    proto = tokenizer.proto
    ids = {entry.piece: number for number, entry in enumerate(proto.pieces)}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added(ids[piece], piece) for piece in _markers(tokenizer)],
        "normalizer": {"type": "Sequence", "normalizers": _normalizers(tokenizer)},
        "pre_tokenizer": None,
        "post_processor": _bos_in_front(proto.pieces[tokenizer.bos_id].piece, tokenizer.bos_id),
        "decoder": {"type": "Sequence", "decoders": _decoders(tokenizer)},
        "model": {
            "type": "BPE",
            "unk_token": proto.pieces[tokenizer.pad_id].piece,
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": ids,
            "merges": _merges(tokenizer),
        },
    }


def tokenizer_config(tokenizer: Tokenizer, context: int) -> dict[str, Any]:
    """The tokenizer_config.json that goes with it."""
    pieces, markers = tokenizer.proto.pieces, _markers(tokenizer)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": pieces[tokenizer.bos_id].piece,
        "eos_token": pieces[tokenizer.eos_id].piece,
        "unk_token": pieces[tokenizer.pad_id].piece,
        "pad_token": pieces[tokenizer.pad_id].piece,
        "padding_side": "left",
        "model_max_length": context,
        "model_input_names": ["input_ids", "attention_mask"],  # transformers 4 would add a third
        "clean_up_tokenization_spaces": False,
    }
    if not set(CHAT_PIECES) <= set(markers):
        return config
    return {**config, "chat_template": _CHAT.strip().replace("MARKERS", json.dumps(markers))}


def _markers(tokenizer: Tokenizer) -> list[str]:
    """The pieces that stand for something else than their spelling."""
    kinds = tokenizer.proto.SentencePiece
    special = (kinds.CONTROL, kinds.UNKNOWN)
    return [entry.piece for entry in tokenizer.proto.pieces if entry.type in special]


def piece_bytes(description: Mapping[str, Any]) -> dict[int, bytes]:
    """What each id of a tokenizer.json stands for in a text, in UTF-8; special ids for nothing."""
    byte_level = '"ByteLevel"' in str(description.get("decoder")).replace("'", '"')
    spell = _byte_level_spelling if byte_level else _sentencepiece_spelling
    pieces = {number: spell(piece) for piece, number in description["model"]["vocab"].items()}
    for added in description.get("added_tokens", ()):
        pieces[added["id"]] = b"" if added["special"] else added["content"].encode()
    return pieces


def _merges(tokenizer: Tokenizer) -> list[list[str]]:
    """Every pair of pieces that joins into a piece, the best score first."""
    kinds = tokenizer.proto.SentencePiece
    scores = {e.piece: e.score for e in tokenizer.proto.pieces if e.type == kinds.NORMAL}
    merges = []
    for piece in sorted(scores, key=lambda piece: -scores[piece]):
        cuts = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        merges += [[left, right] for left, right in cuts if left in scores and right in scores]
    return merges


def _normalizers(tokenizer: Tokenizer) -> list[dict[str, Any]]:
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    if not tokenizer.proto.normalizer_spec.add_dummy_prefix:
        return [replace]
    return [{"type": "Prepend", "prepend": SPACE}, replace]


def _decoders(tokenizer: Tokenizer) -> list[dict[str, Any]]:
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if tokenizer.proto.normalizer_spec.add_dummy_prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return decoders


def _added(number: int, piece: str) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": piece, **flags, "special": True}


def _bos_in_front(piece: str, number: int) -> dict[str, Any]:
    bos = {"SpecialToken": {"id": piece, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    return {
        "type": "TemplateProcessing",
        "single": [bos, first],
        "pair": [bos, first, bos, second],
        "special_tokens": {piece: {"id": piece, "ids": [number], "tokens": [piece]}},
    }


def _sentencepiece_spelling(piece: str) -> bytes:
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return bytes([int(piece[3:-1], 16)])
    return piece.replace(SPACE, " ").encode()


def _byte_level_spelling(piece: str) -> bytes:
    return bytes(_BYTE_OF[character] for character in piece)


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's (Radford et al. 2019): a printable byte is itself, the others follow from U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(0x100 + place): byte for place, byte in enumerate(others)}


_BYTE_OF: Final = _byte_alphabet()
