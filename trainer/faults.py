"""A lost worker or a lost rank, told in one line where torch would show a traceback."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

from trainer.distributed import World
from trainer.errors import TrainingError


@contextlib.contextmanager
def named_faults(world: World) -> Iterator[None]:
    """Turn torch's errors for processes that are gone into TrainingError with a mend.

    torch raises for a dead loader worker out of a signal handler, in whatever line is running; and
    for a dead rank out of the reduction that misses it.
    """
    try:
        yield
    except RuntimeError as error:
        first = re.sub(r"^\[[^]]*\]\s*", "", str(error)).partition("\n")[0].partition(". ")[0]
        again = "the last commit stands: run the same command again"
        if "DataLoader worker" in first:
            raise TrainingError(
                f"a loader worker died ({first}); {again}, with a smaller loader.num_workers if "
                "memory was short"
            ) from error
        if world.world_size > 1 and any(word in str(error) for word in _TRANSPORTS):
            raise TrainingError(
                f"rank {world.rank} lost another rank ({first}); {again}"
            ) from error
        raise


_TRANSPORTS = ("gloo", "NCCL", "Connection", "ProcessGroup")
