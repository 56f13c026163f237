"""What a client of OpenAI's API asks for, read; what cannot be computed is rejected by name."""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from tools.errors import ToolError
from tools.generation.generation import Generation, Sampling
from tools.models.loading import LoadedModel, max_context

_STOPS, _STOP_CHARACTERS, _MOST_TOP = 16, 200, 20
_LENGTHS: Final = ("max_completion_tokens", "max_tokens")
_READ: Final = {
    "temperature", "top_p", "top_k", "seed", *_LENGTHS, "prompt", "messages", "model", "stream",
    "stream_options", "stop", "logprobs", "top_logprobs", "user", "metadata", "store",
}  # fmt: skip
_NEUTRAL: Final = {"n": 1, "best_of": 1, "repetition_penalty": 1, "tool_choice": "none"}
"""What is computed as if it were not there, if it has this value."""


class BadRequestError(Exception):
    """A request that cannot be answered, and which of its keys is to blame."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


@dataclass(frozen=True)
class Asked:
    """A request, read: everything that the answer depends on."""

    chat: bool
    prompt: Sequence[int]
    options: Generation
    stops: tuple[str, ...]
    top: int | None
    stream: bool
    with_usage: bool
    opens_text: bool


def read_request(body: Mapping[str, Any], loaded: LoadedModel, *, chat: bool) -> Asked:
    """What is asked for; BadRequestError names the key that cannot be."""
    given = {key: value for key, value in body.items() if value is not None}
    try:
        json.dumps(given, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise BadRequestError(f"the body holds half a character: {error}") from error
    for key, value in given.items():
        if key not in _READ and value and value != _NEUTRAL.get(key):
            raise BadRequestError(f"{key} is not computed here: leave it out", key)
    if chat:
        prompt, opens_text = _messages(given.get("messages"), loaded), True
    else:
        prompt, opens_text = _prompt(given.get("prompt", ""), loaded)
    length = next((key for key in _LENGTHS if key in given), "max_tokens")
    most = int(_number(given, length, loaded.trained_context if chat else 16))
    limit = max_context(loaded.model.config) or loaded.trained_context
    if len(prompt) >= limit:
        raise BadRequestError(f"the prompt has {len(prompt):,} tokens, of {limit:,} at most")
    sampling = Sampling(
        temperature=_number(given, "temperature", 1.0),
        top_p=_number(given, "top_p", 1.0),
        top_k=int(_number(given, "top_k", 0)),
        seed=int(_number(given, "seed", secrets.randbits(31))),
    )
    stream, stream_options = given.get("stream", False), given.get("stream_options", {})
    if not isinstance(stream, bool) or not isinstance(stream_options, dict):
        raise BadRequestError("stream must be true or false, stream_options an object", "stream")
    return Asked(
        chat=chat,
        prompt=prompt,
        options=Generation(max_tokens=min(most, limit - len(prompt)), sampling=sampling),
        stops=_stops(given.get("stop", ())),
        top=_top(given, chat=chat),
        stream=stream,
        with_usage=bool(stream_options.get("include_usage")),
        opens_text=opens_text,
    )


def _messages(messages: Any, loaded: LoadedModel) -> list[int]:
    if loaded.vocabulary.chat is None:
        raise BadRequestError("this model has no chat template: use /v1/completions", "messages")
    if not isinstance(messages, list) or not messages:
        raise BadRequestError("messages must be a list of turns", "messages")
    try:
        return loaded.vocabulary.chat(messages)
    except ToolError as error:
        raise BadRequestError(str(error), "messages") from error


def _prompt(prompt: Any, loaded: LoadedModel) -> tuple[list[int], bool]:
    """The ids of a text (or of ids), and whether the answer begins a text."""
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        (prompt,) = prompt
    vocabulary, n_ids = loaded.vocabulary, loaded.model.config.vocab_size
    if isinstance(prompt, list) and prompt:
        if not all(type(each) is int and 0 <= each < n_ids for each in prompt):
            raise BadRequestError(f"prompt must hold ids from 0 to {n_ids - 1}", "prompt")
        return prompt, False
    if not isinstance(prompt, str):
        raise BadRequestError("prompt must be one text, or a list of ids", "prompt")
    start = [] if vocabulary.bos_id is None else [vocabulary.bos_id]
    ids = start + list(vocabulary.encode(prompt) if prompt else [])
    if not ids:
        raise BadRequestError("this tokenizer has no BOS to start from: give a prompt", "prompt")
    return ids, not prompt


def _number(given: Mapping[str, Any], key: str, default: float) -> float:
    value = given.get(key, default)
    whole = key not in ("temperature", "top_p")
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
        raise BadRequestError(f"{key} must be a {'whole ' if whole else ''}number", key)
    if not abs(value) < 1 << 63 or not math.isfinite(value):
        raise BadRequestError(f"{key} is too large", key)
    return value


def _stops(stop: Any) -> tuple[str, ...]:
    stops = [stop] if isinstance(stop, str) else stop
    fits = isinstance(stops, list | tuple) and len(stops) <= _STOPS
    if not fits or not all(isinstance(s, str) and len(s) <= _STOP_CHARACTERS for s in stops):
        raise BadRequestError(
            f"stop must be up to {_STOPS} texts of at most {_STOP_CHARACTERS} characters", "stop"
        )
    return tuple(filter(None, stops))


def _top(given: Mapping[str, Any], *, chat: bool) -> int | None:
    """How many of the likeliest tokens are shown in each place; None: no probabilities at all."""
    wanted, key = given.get("logprobs"), "logprobs"
    if chat:
        if not isinstance(wanted, bool | None) or (not wanted and "top_logprobs" in given):
            raise BadRequestError("logprobs must be true where top_logprobs is given", "logprobs")
        wanted, key = (given.get("top_logprobs", 0), "top_logprobs") if wanted else (None, key)
    if wanted is None or wanted is False:
        return None
    if isinstance(wanted, bool) or not isinstance(wanted, int) or not 0 <= wanted <= _MOST_TOP:
        raise BadRequestError(f"{key} must be a number from 0 to {_MOST_TOP}", key)
    return wanted
