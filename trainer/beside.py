"""Work beside training."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def beside(name: str, job: Callable[[], T]) -> Future[T]:
    """What a job returns or raises, done in a thread that keeps no process from ending.

    Python waits for the threads of an executor when it exits, for ever if one never ends.
    """
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(job())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, name=name, daemon=True).start()
    return future
