"""What one rank alone notices: told, written down, and made an error that says what to do."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainer.distributed.world import World
from trainer.errors import LostRankError
from trainer.metrics.metrics import append_event


def alarm(run: Path, text: str, event: str, **facts: Any) -> None:
    """Tell on stderr and in events.jsonl what the main rank cannot know or may not live to say."""
    with contextlib.suppress(OSError):
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()
    append_event(run, event, text=text, **facts)


@contextlib.contextmanager
def named_faults(world: World) -> Iterator[None]:
    """Turn torch's error in the reduction that misses a rank into LostRankError."""
    try:
        yield
    except RuntimeError as error:
        if world.world_size > 1 and any(word in str(error) for word in _TRANSPORTS):
            first = re.sub(r"^\[[^]]*\]\s*", "", str(error)).partition("\n")[0].partition(". ")[0]
            raise LostRankError(
                f"rank {world.rank} lost another rank ({first}); the last checkpoint stands: "
                "torchrun starts all ranks again, as often as --max-restarts says"
            ) from error
        raise


_TRANSPORTS = ("gloo", "NCCL", "Connection", "ProcessGroup")
