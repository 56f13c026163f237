"""One thread writes for everybody: replies wait in a bounded queue, several are written at once."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import AsyncIterator, Sequence
from typing import Any

from tools.generation.batch import Batch, Text
from tools.generation.generation import Generation, room_for
from tools.models.loading import LoadedModel

_IDLE_S = 0.2


class BusyError(Exception):
    """As many requests wait as may."""


class Reply:
    """The tokens of one request, as they are drawn; `close` ends their drawing."""

    def __init__(self, prompt: Sequence[int], options: Generation, top: int | None) -> None:
        self.text = Text(prompt, options, self._on_token, top=top)
        self.closed = False
        self._loop, self._events = asyncio.get_running_loop(), asyncio.Queue[Any]()

    async def tokens(self) -> AsyncIterator[int]:
        """Each token; raises what has gone wrong with the model."""
        while (event := await self._events.get()) is not None:
            if isinstance(event, Exception):
                raise event
            yield event

    def close(self) -> None:
        """Have no more drawn: nobody listens."""
        self.closed = True

    def put(self, event: int | Exception | None) -> None:
        """Hand an event over from the engine's thread: a token, an error, or None for the end."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: the server ends
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    def _on_token(self, drawn: int) -> bool:
        self.put(drawn)
        return self.closed


class Engine:
    """Writes up to `size` replies at once; `waiting` more may wait."""

    def __init__(self, loaded: LoadedModel, size: int, waiting: int) -> None:
        self.loaded, self._size = loaded, size
        self._waiting: queue.Queue[Reply] = queue.Queue(waiting)
        self._writing: list[Reply] = []
        self._batch = Batch(loaded, size)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, prompt: Sequence[int], options: Generation, top: int | None) -> Reply:
        """Queue a request. ToolError for a prompt that fills the context; BusyError."""
        room_for(self.loaded, len(prompt), options.max_tokens)
        reply = Reply(prompt, options, top)
        try:
            self._waiting.put_nowait(reply)
        except queue.Full:
            raise BusyError from None
        return reply

    def end(self) -> None:
        """End every answer, and the thread, after the token that it is at."""
        self._ended.set()

    def stop(self) -> None:
        """End, and wait for that."""
        self.end()
        self._thread.join()

    def _run(self) -> None:
        self._write_all()
        with contextlib.suppress(queue.Empty):
            while True:
                self._writing.append(self._waiting.get_nowait())
        for reply in self._writing:
            reply.put(None)

    def _write_all(self) -> None:
        while not self._ended.is_set():
            try:
                self._admit()
                if self._batch.texts:
                    self._batch.step()
            except Exception as error:  # the next requests are not to suffer for it
                self._batch = Batch(self.loaded, self._size)
                self._finish(error)
            else:
                self._finish(None)

    def _admit(self) -> None:
        """Read the prompts of waiting replies while there is place; wait if nothing is written."""
        while len(self._batch.texts) < self._size:
            try:
                reply = self._waiting.get(block=not self._batch.texts, timeout=_IDLE_S)
            except queue.Empty:
                return
            if reply.closed:
                continue
            try:
                self._batch.add(reply.text)
            except Exception as error:  # of memory, say: this prompt's own
                reply.put(error)
            else:
                self._writing.append(reply)

    def _finish(self, end: Exception | None) -> None:
        """Tell those whose text is complete."""
        for reply in [each for each in self._writing if each.text not in self._batch.texts]:
            self._writing.remove(reply)
            reply.put(end)
