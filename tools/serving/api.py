"""OpenAI's API over a model: /v1/models, /v1/completions, /v1/chat/completions, and a page at `/`.

What cannot be computed here is rejected by name, never dropped: status 400 with `param`.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import math
import secrets
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from tools.errors import ToolError
from tools.generation.generation import Generation, Sampling
from tools.generation.until import StoppedText
from tools.models.loading import LoadedModel
from tools.serving.engine import BusyError, Engine, Reply

_PAGE: Final = Path(__file__).with_name("page.html")
_BODY_BYTES: Final = 1 << 20
_STOPS, _STOP_CHARACTERS, _MOST_TOP = 16, 200, 20
_LENGTHS: Final = ("max_completion_tokens", "max_tokens")
_READ: Final = {
    "temperature", "top_p", "top_k", "seed", *_LENGTHS, "prompt", "messages", "model", "stream",
    "stream_options", "stop", "logprobs", "top_logprobs", "user", "metadata", "store",
}  # fmt: skip
_NEUTRAL: Final = {"n": 1, "best_of": 1, "repetition_penalty": 1, "tool_choice": "none"}
"""What is computed as if it were not there, if it has this value."""
_POLICY: Final = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
)


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


def make_app(
    engine: Engine, *, hosts: Sequence[str], token: str = "", chat: bool = True
) -> Starlette:
    """The server; only for these Host headers, and with a token only for who knows it.

    Without `chat` the page has the model write on: it has read no conversations.
    """

    async def models(request: Request) -> Response:
        _check_token(request, token)
        loaded = engine.loaded
        entry = {"id": loaded.name, "object": "model", "created": 0, "owned_by": "summerlm",
                 "max_model_len": loaded.trained_context,
                 "chat": chat and loaded.vocabulary.chat is not None}  # fmt: skip
        return JSONResponse({"object": "list", "data": [entry]})

    async def answer(request: Request) -> Response:
        _check_token(request, token)
        in_turns = request.url.path.startswith("/v1/chat")
        asked = read_request(await _body_of(request), engine.loaded, chat=in_turns)
        reply = engine.submit(asked.prompt, asked.options, asked.top)
        answer = ApiAnswer(engine.loaded, asked, reply)
        if asked.stream:
            return StreamingResponse(answer.events(), media_type="text/event-stream")
        return JSONResponse(await answer.whole(request))

    async def page(request: Request) -> Response:
        text = _PAGE.read_text("utf-8")
        return HTMLResponse(text, headers={"Content-Security-Policy": _POLICY})

    return Starlette(
        routes=[
            Route("/", page),
            Route("/v1/models", models),
            Route("/v1/completions", answer, methods=["POST"]),
            Route("/v1/chat/completions", answer, methods=["POST"]),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))],
        exception_handlers={
            BadRequestError: _as_error, ToolError: _as_error, BusyError: _as_error,
            HTTPException: _as_error,
        },
    )  # fmt: skip


async def _as_error(request: Request, error: Exception) -> Response:
    """An error in OpenAI's shape."""
    status, kind, message = 400, "invalid_request_error", str(error)
    if isinstance(error, BusyError):
        status, kind, message = 429, "rate_limit_error", "too many requests wait: try again later"
    elif isinstance(error, HTTPException):
        status, message = error.status_code, error.detail
    found = {"message": message, "type": kind, "param": getattr(error, "param", None), "code": None}
    return JSONResponse({"error": found}, status)


def _check_token(request: Request, token: str) -> None:
    given = request.headers.get("authorization", "").removeprefix("Bearer ")
    if token and not hmac.compare_digest(given.encode(), token.encode()):
        raise HTTPException(401, "give the server's token: Authorization: Bearer TOKEN")


async def _body_of(request: Request) -> dict[str, Any]:
    """The JSON object that was sent. A page of another site cannot send this type unasked."""
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise HTTPException(415, "send Content-Type: application/json")
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > _BODY_BYTES:
            raise HTTPException(413, f"a request may have {_BODY_BYTES:,} bytes")
    try:
        body = json.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise BadRequestError(f"the body is no JSON: {error}") from error
    if not isinstance(body, dict):
        raise BadRequestError("the body is no JSON object")
    return body


def read_request(body: Mapping[str, Any], loaded: LoadedModel, *, chat: bool) -> Asked:
    """What is asked for; BadRequestError names the key that cannot be."""
    given = {key: value for key, value in body.items() if value is not None}
    for key, value in given.items():
        if key not in _READ and value and value != _NEUTRAL.get(key):
            raise BadRequestError(f"{key} is not computed here: leave it out", key)
    if chat:
        prompt, opens_text = _messages(given.get("messages"), loaded), True
    else:
        prompt, opens_text = _prompt(given.get("prompt", ""), loaded)
    length = next((key for key in _LENGTHS if key in given), "max_tokens")
    most = int(_number(given, length, loaded.trained_context if chat else 16))
    sampling = Sampling(
        temperature=_number(given, "temperature", 1.0),
        top_p=_number(given, "top_p", 1.0),
        top_k=int(_number(given, "top_k", 0)),
        seed=int(_number(given, "seed", secrets.randbits(31))),
    )
    stream_options = given.get("stream_options", {})
    return Asked(
        chat=chat,
        prompt=prompt,
        options=Generation(max_tokens=most, sampling=sampling),
        stops=_stops(given.get("stop", ())),
        top=_top(given, chat=chat),
        stream=given.get("stream") is True,
        with_usage=isinstance(stream_options, dict) and bool(stream_options.get("include_usage")),
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
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise BadRequestError(f"prompt is no UTF-8: {error}", "prompt") from error
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
        wanted, key = (given.get("top_logprobs", 0), "top_logprobs") if wanted else (None, key)
    if wanted is None or wanted is False:
        return None
    if isinstance(wanted, bool) or not isinstance(wanted, int) or not 0 <= wanted <= _MOST_TOP:
        raise BadRequestError(f"{key} must be a number from 0 to {_MOST_TOP}", key)
    return wanted


class ApiAnswer:
    """A reply on its way out, in OpenAI's shape: as one object, or as events."""

    def __init__(self, loaded: LoadedModel, asked: Asked, reply: Reply) -> None:
        self._loaded, self._asked, self._reply = loaded, asked, reply
        self._text = StoppedText(loaded, asked.stops, opens_text=asked.opens_text)
        kind = "chat.completion" if asked.chat else "text_completion"
        self._head: dict[str, Any] = {
            "id": f"{'chatcmpl' if asked.chat else 'cmpl'}-{secrets.token_hex(12)}",
            "object": kind + (".chunk" if asked.chat and asked.stream else ""),
            "created": int(time.time()),
            "model": loaded.name,
        }

    async def whole(self, request: Request) -> dict[str, Any]:
        """All of it; given up where the one who asked has gone."""
        parts: list[str] = []
        async with contextlib.aclosing(self._parts()) as written:
            async for text, _ in written:
                parts.append(text)
                if await request.is_disconnected():
                    break
        content = "".join(parts)
        choice = {"index": 0, "logprobs": self._logprobs(0), "finish_reason": self._reason()}
        choice |= (
            {"message": {"role": "assistant", "content": content}}
            if self._asked.chat
            else {"text": content}
        )
        return {**self._head, "choices": [choice], "usage": self._usage()}

    async def events(self) -> AsyncGenerator[str]:
        """Server-sent events, one a stretch of text, the last says why it ended."""
        chat = self._asked.chat
        if chat:
            yield self._event({"role": "assistant", "content": ""}, None, 0)
        shown = 0
        async with contextlib.aclosing(self._parts()) as written:
            try:
                async for text, n_tokens in written:
                    if text:
                        yield self._event({"content": text} if chat else text, None, shown)
                        shown = n_tokens
            except Exception as error:
                found = {"message": str(error), "type": "server_error", "param": None}
                yield f"data: {json.dumps({'error': found})}\n\n"
                return
        yield self._event({} if chat else "", self._reason(), shown)
        if self._asked.with_usage:
            closing = {**self._head, "choices": [], "usage": self._usage()}
            yield f"data: {json.dumps(closing)}\n\n"
        yield "data: [DONE]\n\n"

    async def _parts(self) -> AsyncGenerator[tuple[str, int]]:
        """Stretches of text, each with how many tokens were drawn so far."""
        n_tokens = 0
        try:
            async for drawn in self._reply.tokens():
                n_tokens += 1
                yield self._text.feed(drawn), n_tokens
                if self._text.stopped:
                    break
            yield self._text.finish(), n_tokens
        finally:
            self._reply.close()
            self._n_tokens = n_tokens

    def _event(self, delta: Any, reason: str | None, first: int) -> str:
        choice: dict[str, Any] = {"index": 0, "finish_reason": reason}
        choice |= {"delta" if self._asked.chat else "text": delta}
        choice["logprobs"] = (
            self._logprobs(first) if delta and delta != {"role": "assistant"} else None
        )
        return f"data: {json.dumps({**self._head, 'choices': [choice]})}\n\n"

    def _reason(self) -> str:
        ended = self._text.stopped or self._reply.text.left
        return "stop" if ended else "length"

    def _usage(self) -> dict[str, int]:
        counts = len(self._asked.prompt), self._n_tokens
        names = ("prompt_tokens", "completion_tokens", "total_tokens")
        return dict(zip(names, (*counts, sum(counts)), strict=True))

    def _logprobs(self, first: int) -> dict[str, Any] | None:
        """Those of the tokens from `first` on."""
        text = self._reply.text
        if self._asked.top is None:
            return None
        rows = list(zip(text.ids, text.logprobs, strict=False))[first:]
        if self._asked.chat:
            return {
                "content": [
                    {
                        **self._token(drawn, nats),
                        "top_logprobs": [self._token(*each) for each in best.items()],
                    }
                    for drawn, (nats, best) in rows
                ]
            }
        return {
            "tokens": [self._spelled(drawn) for drawn, _ in rows],
            "token_logprobs": [nats for _, (nats, _) in rows],
            "top_logprobs": [
                {self._spelled(each): value for each, value in best.items()}
                for _, (_, best) in rows
            ],
        }

    def _token(self, drawn: int, nats: float) -> dict[str, Any]:
        piece = self._loaded.vocabulary.pieces[drawn]
        return {"token": self._spelled(drawn), "logprob": nats, "bytes": list(piece)}

    def _spelled(self, drawn: int) -> str:
        """A token's text; as OpenAI spells it where it is a part of a character alone."""
        piece = self._loaded.vocabulary.pieces[drawn]
        try:
            return piece.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)
