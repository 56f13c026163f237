"""Tokenizers: a SentencePiece model or a tokenizer.json as evaluation and generation see it.

transformers can turn a `.model` file into a tokenizer.json, but with other ids for some texts (a
first space, rare pairs of merges), so the file is written here: the normaliser puts SentencePiece's
dummy prefix in front, and the merges are ordered by the scores that SentencePiece goes by.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, Self

from pipeline.errors import TokenizerError
from pipeline.text.chat import BadConversationError, ChatTemplate, render
from pipeline.text.json_tokenizer import JsonTokenizer, piece_bytes
from pipeline.text.tokenizer import CHAT_PIECES, Tokenizer
from shards.files import json_bytes
from shards.format import TOKENIZER_CONFIG, TOKENIZER_JSON
from tools.errors import ConversionError, ToolError

SPACE: Final = "▁"
_MOST_FILLED_UP: Final = 1024
"""Weights are padded to a round number of entries, never by more; else they are another's."""

Message = Mapping[str, Any]
"""A turn of a conversation: `role` and `content`."""

_CHAT: Final = Path(__file__).with_name("chat.jinja")
"""pipeline/text/chat.py for transformers. There markers are put in by id and texts stay text; here
a text that spells one would forge it, so it is rejected."""


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Ids <-> text. `encode` adds no BOS and no EOS.

    `pieces` holds the UTF-8 bytes that each id stands for in a text; ids that are not text (BOS,
    EOS, other control pieces, `<unk>`) stand for none. With `space_first` a text's first piece
    begins with a space that is not in the text (SentencePiece's dummy prefix). `chat` gives the
    ids of a conversation up to where the next answer begins, None where there is no template.
    `end_ids` are further ids that end a text, besides `eos_id`.
    """

    name: str
    encode: Callable[[str], Sequence[int]]
    decode: Callable[[Iterable[int]], str]
    pieces: tuple[bytes, ...]
    bos_id: int | None
    eos_id: int | None
    sha256: str
    space_first: bool
    chat: Callable[[Sequence[Message]], list[int]] | None
    end_ids: frozenset[int] = frozenset()

    def __len__(self) -> int:
        return len(self.pieces)

    def may_be_drawn(self, n_ids: int) -> list[bool]:
        """Whether each of `n_ids` ids may be generated: it stands for text, or ends it."""
        is_text = [*map(bool, self.pieces), *[False] * n_ids][:n_ids]
        return [text or self.ends(number) for number, text in enumerate(is_text)]

    def ends(self, number: int) -> bool:
        """Whether a text ends with that id."""
        return number == self.eos_id or number in self.end_ids

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Self:
        """The vocabulary of a tokenizer of shards."""
        chat = None
        with contextlib.suppress(TokenizerError):
            chat = partial(_chat_ids, ChatTemplate.of(tokenizer), tokenizer.encode)
        return cls(
            name=tokenizer.name,
            encode=tokenizer.encode,
            decode=tokenizer.decode,
            pieces=tokenizer.token_bytes,
            bos_id=tokenizer.bos_id,
            eos_id=tokenizer.eos_id,
            sha256=tokenizer.info.sha256,
            space_first=tokenizer.space_first,
            chat=chat,
        )

    @classmethod
    def of_tokenizer_json(cls, folder: Path) -> Self:
        """One that transformers encodes with; special tokens in a text stay text."""
        try:
            from transformers import AutoTokenizer
        except ImportError as error:
            raise ConversionError(
                f"{folder}: reading {TOKENIZER_JSON} needs transformers: pip install 'summerlm[hf]'"
            ) from error
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        raw = (folder / TOKENIZER_JSON).read_bytes()
        spelled = piece_bytes(json.loads(raw))
        pieces = tuple(spelled.get(number, b"") for number in range(max(spelled) + 1))
        how = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}

        def encode(text: str) -> list[int]:
            return list(tokenizer(text, **how).input_ids)

        return cls(
            name=folder.name,
            encode=encode,
            decode=lambda ids: str(tokenizer.decode(list(ids), skip_special_tokens=True)),
            pieces=pieces,
            bos_id=tokenizer.bos_token_id,
            eos_id=tokenizer.eos_token_id,
            sha256=hashlib.sha256(raw).hexdigest(),
            space_first=pieces[encode("a")[0]].startswith(b" "),
            chat=partial(_folders_chat_ids, tokenizer) if tokenizer.chat_template else None,
        )


def _chat_ids(
    template: ChatTemplate, encode: Callable[[str], Sequence[int]], messages: Sequence[Message]
) -> list[int]:
    """The ids of a conversation that ends with a question, markers put in by id, as in training."""
    try:
        *texts, _ = render([*messages, {"role": "assistant", "content": "."}])
    except BadConversationError as error:
        raise ToolError(f"the conversation has no place in the template: {error}") from error
    ids = [template.bos_id]
    for place, text in enumerate(texts):
        turn = encode(text)
        asks = place % 2 == 0
        ids += [template.inst_id, *turn, template.end_inst_id] if asks else [*turn, template.eos_id]
    return ids


def _folders_chat_ids(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """The same by the template that comes with a folder; a text that spells a marker is an error.

    transformers looks for markers in the text that the template gives, and would take it for one.
    """
    markers = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    for text in (str(message.get("content")) for message in messages):
        if spelled := next((marker for marker in markers if marker in text), None):
            raise ToolError(f"a turn spells {spelled}, which would become that marker")
    try:
        ids = tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, return_dict=False
        )
    except Exception as error:  # the template may raise what it likes
        raise ToolError(f"the folder's chat template rejects the conversation: {error}") from error
    return [int(each) for each in ids]


def filled_up(vocabulary: Vocabulary, n_ids: int) -> Vocabulary:
    """With ids that stand for nothing where the model has a few more, to have a round number."""
    missing = n_ids - len(vocabulary)
    if 0 < missing < _MOST_FILLED_UP:
        return replace(vocabulary, pieces=vocabulary.pieces + missing * (b"",))
    return vocabulary  # which fits, or is rejected


def tokenizer_files(tokenizer: Tokenizer, context: int, *, chat: bool = True) -> dict[str, bytes]:
    """What a Hugging Face folder holds of a tokenizer, by name; `context` is that of the model."""
    files = tokenizer.files()
    files[TOKENIZER_CONFIG] = json_bytes(tokenizer_config(tokenizer, context, chat=chat))
    if TOKENIZER_JSON not in files:
        files[TOKENIZER_JSON] = json_bytes(tokenizer_json(tokenizer))
    return files


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


def tokenizer_config(tokenizer: Tokenizer, context: int, *, chat: bool) -> dict[str, Any]:
    """The tokenizer_config.json that goes with it, with the template of conversations if `chat`."""
    has_unk = not isinstance(tokenizer, JsonTokenizer)
    markers = _markers(tokenizer) if has_unk else []
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokenizer.piece(tokenizer.bos_id),
        "eos_token": tokenizer.piece(tokenizer.eos_id),
        **({"unk_token": tokenizer.piece(tokenizer.pad_id)} if has_unk else {}),
        "pad_token": tokenizer.piece(tokenizer.pad_id),
        "padding_side": "left",
        "model_max_length": context,
        "model_input_names": ["input_ids", "attention_mask"],  # transformers 4 would add a third
        "clean_up_tokenization_spaces": False,
    }
    if not (chat and set(CHAT_PIECES) <= set(markers)):
        return config
    return {
        **config,
        "chat_template": _CHAT.read_text("utf-8").strip().replace("MARKERS", json.dumps(markers)),
    }


def _markers(tokenizer: Tokenizer) -> list[str]:
    """The pieces that stand for something else than their spelling."""
    kinds = tokenizer.proto.SentencePiece
    special = (kinds.CONTROL, kinds.UNKNOWN)
    return [entry.piece for entry in tokenizer.proto.pieces if entry.type in special]


def _merges(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    """Every pair of pieces that joins into a piece, the best score first."""
    kinds = tokenizer.proto.SentencePiece
    scores = {e.piece: e.score for e in tokenizer.proto.pieces if e.type == kinds.NORMAL}
    merges: list[tuple[str, str]] = []
    for piece in sorted(scores, key=lambda piece: -scores[piece]):
        cuts = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        merges += [(left, right) for left, right in cuts if left in scores and right in scores]
    return merges
