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
a text that spells one would forge it, so it is rejected."""


def tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """The vocabulary as a tokenizer.json."""
    from tokenizers import AddedToken, decoders, models, normalizers, processors  # with [hf] alone
    from tokenizers import Tokenizer as FastTokenizer

    pieces = tokenizer.proto.pieces
    bos, unk = pieces[tokenizer.bos_id].piece, pieces[tokenizer.pad_id].piece
    vocab = {entry.piece: number for number, entry in enumerate(pieces)}
    model = models.BPE(vocab, _merges(tokenizer), unk_token=unk, fuse_unk=True, byte_fallback=True)
    normalize: list[Any] = [normalizers.Replace(" ", SPACE)]
    decode: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if tokenizer.proto.normalizer_spec.add_dummy_prefix:
        normalize = [normalizers.Prepend(SPACE), *normalize]
        decode = [*decode, decoders.Strip(" ", 1, 0)]
    fast = FastTokenizer(model)
    fast.add_special_tokens(
        [AddedToken(piece, normalized=False, special=True) for piece in _markers(tokenizer)]
    )
    fast.normalizer = normalizers.Sequence(normalize)
    fast.decoder = decoders.Sequence(decode)
    fast.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A",
        pair=f"{bos} $A {bos} $B",
        special_tokens=[(bos, tokenizer.bos_id)],
    )
    described: dict[str, Any] = json.loads(fast.to_str())
    return described


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


def _merges(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    """Every pair of pieces that joins into a piece, the best score first."""
    kinds = tokenizer.proto.SentencePiece
    scores = {e.piece: e.score for e in tokenizer.proto.pieces if e.type == kinds.NORMAL}
    merges: list[tuple[str, str]] = []
    for piece in sorted(scores, key=lambda piece: -scores[piece]):
        cuts = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        merges += [(left, right) for left, right in cuts if left in scores and right in scores]
    return merges


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
