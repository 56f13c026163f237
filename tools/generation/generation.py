"""A prompt's ids -> the ids that follow, one by one, and their text as soon as it is certain."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from model.kv_cache import KVCache
from tools.errors import GenerationError
from tools.generation.sampling import Sampling, draw
from tools.models.loading import DTYPES, LoadedModel, max_context
from tools.models.vocabulary import Vocabulary

OnText = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Generation:
    """How far and how to go on. Without the cache every step reads the whole text again."""

    max_tokens: int = 256
    sampling: Sampling = field(default_factory=Sampling)
    use_cache: bool = True

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise GenerationError(f"max_tokens {self.max_tokens}: choose 1 or more")


@torch.inference_mode()
def generate(
    loaded: LoadedModel,
    prompt: Sequence[int],
    options: Generation,
    on_id: Callable[[int], None] | None = None,
) -> list[int]:
    """The ids that follow the prompt's, up to EOS (left out) or to the end of the context.

    `on_id` is called with each as it is drawn. Only ids that stand for text can be drawn, and EOS.
    """
    ids = list(prompt)
    room = _room(loaded, len(ids), options.max_tokens)
    cache = _new_cache(loaded, len(ids) + room) if options.use_cache else None
    never = _never_drawn(loaded)
    generator = options.sampling.generator()
    unread = ids
    with loaded.autocast():
        while len(ids) < len(prompt) + room:
            logits = _next_logits(loaded, ids if cache is None else unread, cache)
            drawn = draw(logits.masked_fill(never, -torch.inf), options.sampling, generator)
            if drawn == loaded.vocabulary.eos_id:
                break
            ids.append(drawn)
            unread = [drawn]
            if on_id is not None:
                on_id(drawn)
    return ids[len(prompt) :]


class Written(NamedTuple):
    """What a model wrote: its ids, without EOS, and their text."""

    ids: list[int]
    text: str


def write(
    loaded: LoadedModel,
    prompt: Sequence[int],
    options: Generation,
    on_text: OnText | None = None,
    *,
    opens_text: bool,
) -> Written:
    """What follows the prompt's ids; `opens_text` says that it begins a text, not goes on with one.

    `on_text` is called with each stretch of whole characters.
    """
    stream = TextStream(loaded.vocabulary, opens_text=opens_text)
    parts: list[str] = []

    def emit(text: str) -> None:
        parts.append(text)
        if text and on_text is not None:
            on_text(text)

    ids = generate(loaded, prompt, options, lambda drawn: emit(stream.feed(drawn)))
    emit(stream.finish())
    return Written(ids, "".join(parts))


def complete(
    loaded: LoadedModel, prompt: str, options: Generation, on_text: OnText | None = None
) -> str:
    """The text that the model writes after the prompt (after nothing, if it is empty)."""
    vocabulary = loaded.vocabulary
    start = [] if vocabulary.bos_id is None else [vocabulary.bos_id]
    ids = start + list(vocabulary.encode(prompt) if prompt else [])
    if not ids:
        raise GenerationError("this tokenizer has no BOS to start from: give a --prompt")
    return write(loaded, ids, options, on_text, opens_text=not prompt).text


class Conversation:
    """Questions and answers in the chat template, the whole exchange read again at each turn."""

    def __init__(self, loaded: LoadedModel, options: Generation, system: str = "") -> None:
        if loaded.vocabulary.chat is None:
            raise GenerationError(
                f"the tokenizer {loaded.vocabulary.name} has no chat markers: leave --chat out, "
                "or use a model fine-tuned on conversations"
            )
        self._loaded, self._options, self._template = loaded, options, loaded.vocabulary.chat
        self._ids = [self._template.bos_id]
        self._before = f"{system}\n\n" if system else ""

    def ask(self, question: str, on_text: OnText | None = None) -> str:
        """The model's answer, which is part of the conversation from now on."""
        template, vocabulary = self._template, self._loaded.vocabulary
        turn = [template.inst_id, *vocabulary.encode(self._before + question), template.end_inst_id]
        prompt = self._ids + turn
        answer = write(self._loaded, prompt, self._options, on_text, opens_text=True)
        self._ids, self._before = [*prompt, *answer.ids, template.eos_id], ""
        return answer.text


class TextStream:
    """Ids in, text out: whole characters only, however many ids one of them takes.

    Bytes that can belong to no character come out as U+FFFD, as in the tokenizer's own decoding.
    """

    def __init__(self, vocabulary: Vocabulary, *, opens_text: bool) -> None:
        self._pieces = vocabulary.pieces
        self._drop_space = opens_text and vocabulary.space_first
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, drawn: int) -> str:
        """The characters that this id completes."""
        piece = self._pieces[drawn]
        if self._drop_space and piece:
            piece = piece.removeprefix(b" ")
            self._drop_space = False
        return self._decoder.decode(piece)

    def finish(self) -> str:
        """What is left of a character that never came to its end."""
        return self._decoder.decode(b"", final=True)


def _room(loaded: LoadedModel, n_prompt: int, max_tokens: int) -> int:
    """Ids that may follow a prompt; GenerationError if it fills the context already."""
    limit = max_context(loaded.model.config)
    if limit is None:
        return max_tokens
    if n_prompt >= limit:
        raise GenerationError(
            f"the prompt has {n_prompt:,} tokens and this model is exact up to {limit:,}: "
            "shorten it"
        )
    return min(max_tokens, limit - n_prompt)


def _new_cache(loaded: LoadedModel, length: int) -> KVCache:
    return KVCache(loaded.model.config, 1, length, loaded.device, DTYPES[loaded.dtype])


def _never_drawn(loaded: LoadedModel) -> Tensor:
    """True for ids that are neither text nor EOS. [V]"""
    vocabulary = loaded.vocabulary
    allowed = torch.zeros(loaded.model.config.vocab_size, dtype=torch.bool)
    allowed[: len(vocabulary)] = torch.tensor([bool(piece) for piece in vocabulary.pieces])
    if vocabulary.eos_id is not None:
        allowed[vocabulary.eos_id] = True
    return ~allowed.to(loaded.device)


def _next_logits(loaded: LoadedModel, ids: Sequence[int], cache: KVCache | None) -> Tensor:
    """Logits [V] of the id after `ids`, which follow those that the cache holds."""
    tokens = torch.tensor([list(ids)], device=loaded.device)
    last = loaded.model.hidden(tokens, cache=cache)[:, -1]
    return linear(last, loaded.model.head_weight).float()[0]
