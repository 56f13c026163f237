"""A prompt's tokens -> the tokens that follow, drawn one by one, and their text as it is complete.

A token is drawn in float64 on the CPU with one uniform number, so a GPU and a laptop that compute
the same logits write the same text for a seed.
"""

import codecs
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from model.attention import KVCache
from tools.errors import ToolError
from tools.models.loading import DTYPES, LoadedModel, max_context
from tools.models.tokenizers import Vocabulary

_COLDEST = 1e-6
OnText = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is drawn. Temperature 0 is greedy; `top_k` 0 and `top_p` 1 leave all in.

    The order is that of Hugging Face's generation: temperature, then top-k, then top-p (nucleus
    sampling, Holtzman et al. 2020: the most probable tokens that add up to `top_p`).
    """

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ToolError(f"temperature {self.temperature}: choose 0 (greedy) or more")
        if 0 < self.temperature < _COLDEST:
            raise ToolError(f"temperature {self.temperature}: below {_COLDEST}, choose 0 (greedy)")
        if not 0 <= self.seed < 1 << 63:
            raise ToolError(f"seed {self.seed}: choose 0 or more, below 2^63")
        if self.top_k < 0:
            raise ToolError(f"top_k {self.top_k}: choose 0 (all tokens) or more")
        if not 0 < self.top_p <= 1:
            raise ToolError(f"top_p {self.top_p}: choose above 0, up to 1 (all tokens)")

    def generator(self) -> torch.Generator:
        """A new source of uniform numbers for one text."""
        return torch.Generator("cpu").manual_seed(self.seed)


@dataclass(frozen=True, kw_only=True)
class Generation:
    """How many tokens, drawn how. Without the cache every step computes on the full text."""

    max_tokens: int = 256
    sampling: Sampling = field(default_factory=Sampling)
    use_cache: bool = True

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ToolError(f"max_tokens {self.max_tokens}: choose 1 or more")


@torch.inference_mode()
def generate(
    loaded: LoadedModel,
    prompt: Sequence[int],
    options: Generation,
    on_token: Callable[[int], None] | None = None,
) -> list[int]:
    """The tokens that follow the prompt's, up to EOS (left out) or to the end of the context.

    `on_token` is called with each as it is drawn: tokens that stand for text, and EOS.
    """
    model, ids = loaded.model, list(prompt)
    room = room_for(loaded, len(ids), options.max_tokens)
    cache = None
    if options.use_cache:
        length, dtype = len(ids) + room, DTYPES[loaded.dtype]
        cache = KVCache(model.config, 1, length, loaded.device, dtype)
    drawable = loaded.vocabulary.may_be_drawn(model.config.vocab_size)
    never = ~torch.tensor(drawable, device=loaded.device)
    generator = options.sampling.generator()
    with loaded.autocast():
        while len(ids) < len(prompt) + room:
            unread = ids if cache is None else ids[cache.length :]
            hidden = model.hidden(torch.tensor([unread], device=loaded.device), cache=cache)
            logits = linear(hidden[0, -1:], model.head_weight).float()[0]
            drawn = draw(logits.masked_fill(never, -torch.inf), options.sampling, generator)
            if loaded.vocabulary.ends(drawn):
                break
            ids.append(drawn)
            if on_token is not None:
                on_token(drawn)
    return ids[len(prompt) :]


def room_for(loaded: LoadedModel, n_prompt: int, max_tokens: int) -> int:
    """Tokens that may follow a prompt; ToolError if it fills the context already."""
    limit = max_context(loaded.model.config)
    if limit is None:
        return max_tokens
    if n_prompt >= limit:
        raise ToolError(
            f"the prompt has {n_prompt:,} tokens and this model is exact up to {limit:,}: "
            "shorten it"
        )
    return min(max_tokens, limit - n_prompt)


class Written(NamedTuple):
    """What a model wrote: its tokens, without EOS, and their text."""

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
    """What follows the prompt; `opens_text` says that it begins a text, not goes on with one.

    `on_text` is called with each stretch of complete characters.
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
        raise ToolError("this tokenizer has no BOS to start from: give a --prompt")
    return write(loaded, ids, options, on_text, opens_text=not prompt).text


class Conversation:
    """Questions and answers in the chat template; each turn is computed from the very start."""

    def __init__(self, loaded: LoadedModel, options: Generation, system: str = "") -> None:
        if loaded.vocabulary.chat is None:
            raise ToolError(
                f"the tokenizer {loaded.vocabulary.name} has no chat template: leave --chat out, "
                "or use a model fine-tuned on conversations"
            )
        self._loaded, self._options, self._template = loaded, options, loaded.vocabulary.chat
        self._messages = [{"role": "system", "content": system}] if system else []

    def ask(self, question: str, on_text: OnText | None = None) -> str:
        """The model's answer, which is part of the conversation from now on."""
        self._messages.append({"role": "user", "content": question})
        prompt = self._template(self._messages)
        answer = write(self._loaded, prompt, self._options, on_text, opens_text=True)
        if answer.text.strip():
            self._messages.append({"role": "assistant", "content": answer.text})
        else:  # no turn: as if nothing had been asked
            self._messages.pop()
        return answer.text


class TextStream:
    """Tokens in, text out: complete characters only, however many tokens one of them takes.

    Bytes that can belong to no character come out as U+FFFD, as in the tokenizer's own decoding.
    """

    def __init__(self, vocabulary: Vocabulary, *, opens_text: bool) -> None:
        self._pieces = vocabulary.pieces
        self._drop_space = opens_text and vocabulary.space_first
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, drawn: int) -> str:
        """The characters that this token completes."""
        piece = self._pieces[drawn]
        if self._drop_space and piece:
            piece = piece.removeprefix(b" ")
            self._drop_space = False
        return self._decoder.decode(piece)

    def finish(self) -> str:
        """What is left of an incomplete character."""
        return self._decoder.decode(b"", final=True)


def draw(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """The next token, given the logits [V] of all."""
    logits = logits.detach().cpu().double()
    if logits.isnan().any():
        raise ToolError("the model gives NaN logits: its weights are damaged")
    if sampling.temperature == 0:
        return int(logits.argmax())
    ranked, ids = (logits / sampling.temperature).sort(descending=True, stable=True)
    if sampling.top_k:
        ranked = ranked[: sampling.top_k]
    cumulative = ranked.softmax(dim=0).cumsum(dim=0)
    kept = 1 + int((cumulative < sampling.top_p).sum())  # up to the first that reaches top_p
    cumulative = cumulative[:kept]
    uniform = torch.rand((), dtype=torch.float64, generator=generator) * cumulative[-1]
    place = torch.searchsorted(cumulative, uniform, right=True)
    return int(ids[place.clamp_max(len(cumulative) - 1)])
