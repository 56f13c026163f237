"""SIGTERM and Ctrl-C as a wish: the step under way is finished, saved, and then it ends."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def listen_for_stop() -> Iterator[Callable[[], bool]]:
    """A function that says whether this process has been asked to stop."""
    asked = threading.Event()

    def ask(number: int, frame: Any) -> None:
        asked.set()

    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set  # handlers belong to the main thread; here nobody can ask
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
