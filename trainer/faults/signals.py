"""What reaches a rank from outside: a request to stop, and the loss of another rank."""

from __future__ import annotations

import contextlib
import re
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any, Final

from trainer.distributed.world import World
from trainer.errors import LostRankError

_TRANSPORTS: Final = ("gloo", "NCCL", "Connection", "ProcessGroup")


@contextlib.contextmanager
def listen_for_stop() -> Iterator[Callable[[], bool]]:
    """A function that says whether SIGTERM or Ctrl-C has asked this process to stop.

    The step under way is then finished and saved, and the run ends.
    """
    asked = threading.Event()

    def ask(number: int, frame: Any) -> None:
        asked.set()

    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set  # handlers belong to the main thread; here there are none
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def translate_comm_errors(world: World) -> Iterator[None]:
    """Turn torch's error in a reduction that misses a rank into LostRankError."""
    try:
        yield
    except RuntimeError as error:
        if world.world_size > 1 and any(word in str(error) for word in _TRANSPORTS):
            first = re.sub(r"^\[[^]]*\]\s*", "", str(error)).partition("\n")[0].partition(". ")[0]
            raise LostRankError(
                f"rank {world.rank} lost another rank ({first}); the last checkpoint is intact: "
                "torchrun restarts all ranks, as often as --max-restarts says"
            ) from error
        raise
