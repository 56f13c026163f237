"""Jobs in a thread of their own, while training goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import TypeVar

T = TypeVar("T")


class BackgroundThread:
    """A thread that does one job after the other, and keeps no process from ending.

    Python waits for the threads of an executor when it exits, for ever if one never ends. A new
    thread for each job takes 0.3 ms.
    """

    def __init__(self, name: str) -> None:
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=_work, args=(self._jobs,), name=name, daemon=True)
        self._thread.start()

    def submit(self, job: Callable[[], T]) -> Future[T]:
        """What the job returns or raises, when its turn has come."""
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(job())
            except BaseException as error:
                future.set_exception(error)

        self._jobs.put(run)
        return future

    def end(self, limit_s: float) -> None:
        """Let it end after the jobs that it has, and wait for that, but not longer than that."""
        self._jobs.put(None)
        self._thread.join(limit_s)


def run_in_background(name: str, job: Callable[[], T]) -> Future[T]:
    """What one job returns or raises, done in a thread of its own."""
    thread = BackgroundThread(name)
    future = thread.submit(job)
    thread.end(0)
    return future


def _work(jobs: SimpleQueue[Callable[[], None] | None]) -> None:
    while job := jobs.get():
        job()
        del job  # and what it holds, until the next comes
