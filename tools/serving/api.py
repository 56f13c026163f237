"""OpenAI's API over a model: /v1/models, /v1/completions, /v1/chat/completions, and a page at `/`.

What cannot be computed here is rejected by name, never dropped: status 400 with `param`.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import re
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
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
from tools.generation.until import StoppedText
from tools.models.loading import LoadedModel
from tools.serving.engine import BusyError, Engine, Reply
from tools.serving.requests import Asked, BadRequestError, read_request

_PAGE: Final = Path(__file__).with_name("page.html")
_BODY_BYTES: Final = 1 << 20
_POLICY: Final = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
)


def make_app(
    engine: Engine, *, hosts: Sequence[str], token: str = "", chat: bool = True
) -> Starlette:
    """The server; only for these Host headers, and with a token only for who knows it.

    Without `chat` the page has the model write on: it has read no conversations.
    """

    async def models(request: Request) -> Response:
        _check_token(request, token)
        loaded = engine.loaded
        entry = {"id": model_id(loaded), "object": "model", "created": 0, "owned_by": "summerlm",
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


def model_id(loaded: LoadedModel) -> str:
    """`tiny-step-300`: the model's name as clients can type it, without where it lies."""
    return re.sub(r"[^A-Za-z0-9._]+", "-", Path(loaded.name).name)


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
            "model": model_id(loaded),
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
