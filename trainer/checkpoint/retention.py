"""Which checkpoints stand: the newest that is whole, those set aside, purged, or copied elsewhere.

A folder step-<n> is a checkpoint while it holds COMMIT.json. That mark is taken away before
anything else of it, so that a kill at any moment leaves a checkpoint or none, never half of one.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
from pathlib import Path
from typing import Final

from shards.files import fsync_folder, publish_bytes, sha256_file
from shards.format import TOKENIZER
from trainer.checkpoint.runs import (
    CHECKPOINTS,
    CONFIG,
    RECORD,
    checkpoint_path,
    checkpoints,
    step_of,
)
from trainer.checkpoint.storage import (
    CheckpointConfig,
    Record,
    make_room,
    prove,
    read_record,
    remove,
)
from trainer.distributed.world import World
from trainer.errors import CheckpointError

_DAMAGED: Final = "COMMIT.damaged.json"
_ABANDONED: Final = "COMMIT.abandoned.json"


def mirror_of(run: Path, config: CheckpointConfig) -> Path | None:
    """Where copies of a run's checkpoints go, itself laid out as a run; None without a mirror."""
    return Path(config.mirror) / run.resolve().name if config.mirror else None


def newest_proven(
    run: Path, world: World, mirror: Path | None = None
) -> tuple[Path, Record, list[str]] | None:
    """The newest checkpoint that is whole, its record, and what was wrong with newer ones.

    A run's own comes before the mirror's of the same step. None if there is none at all. A damaged
    one loses its COMMIT.json's name, so that it is neither loaded by anyone else nor counted among
    those that are kept.
    """
    own, copies = world.on_main(lambda: (checkpoints(run), checkpoints(mirror) if mirror else []))
    complaints: list[str] = []
    if copies and not own:
        complaints.append(f"{run} has no checkpoint of its own left; its mirror {mirror} has")
    for checkpoint in sorted([*own, *copies], key=step_of, reverse=True):
        try:
            return checkpoint, prove(checkpoint, world), complaints
        except CheckpointError as error:
            complaints.append(str(error))
            world.on_main(functools.partial(_mark_damaged, checkpoint))
    if complaints:
        raise CheckpointError(
            f"no checkpoint of {run} is whole ({complaints[-1]}); restore a copy, "
            "or start anew with --out"
        )
    return None


def abandon_after(run: Path, step: int, mirror: Path | None = None) -> list[str]:
    """The names of checkpoints after `step`, which lose their mark: the run goes on from before
    them.

    Left as they are they would be what the next resume finds newest, on another path.
    """
    newer = [checkpoint for checkpoint in checkpoints(run) if step_of(checkpoint) > step]
    for checkpoint in newer:
        _rename_mark(checkpoint, _ABANDONED)
    if mirror is not None:
        with contextlib.suppress(OSError):  # away, or it can only be read: the run goes on
            abandon_after(mirror, step)
    return [checkpoint.name for checkpoint in newer]


def purge(run: Path, config: CheckpointConfig) -> None:
    """Remove checkpoints beyond those to keep, and what a kill has left of others."""
    found = checkpoints(run)
    for folder in found[: -config.keep_last]:
        if not config.keep_every or step_of(folder) % config.keep_every:
            remove(folder)
    for folder in (run / CHECKPOINTS).glob("step-*"):
        if step_of(folder) >= 0 and not any(folder.glob("COMMIT*.json")):
            remove(folder)


def copy_checkpoint(checkpoint: Path, mirror: Path) -> Path:
    """The copy of a checkpoint in its mirror: every file proven there, and then the mark."""
    record = read_record(checkpoint)
    folder = checkpoint_path(mirror, int(record["step"]))
    make_room(folder, sum(entry["bytes"] for entry in record["files"].values()))
    for name, entry in record["files"].items():
        copy = folder / name
        shutil.copyfile(checkpoint / name, copy)
        _flush(copy)
        if sha256_file(copy) != entry["sha256"]:
            raise CheckpointError(f"{copy} is not what was copied (its digest differs)")
    for name in (CONFIG, TOKENIZER):  # a mirror explains itself, as a run does
        if (source := checkpoint.parents[1] / name).exists():
            publish_bytes(mirror / name, source.read_bytes())
    fsync_folder(folder)
    publish_bytes(folder / RECORD, (checkpoint / RECORD).read_bytes())
    fsync_folder(folder.parent)
    return folder


def _flush(path: Path) -> None:
    """Put a file on the disk, and out of memory where that can be asked for, to be read back."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _mark_damaged(checkpoint: Path) -> None:
    with contextlib.suppress(OSError):  # where it can only be read it is found again, and refused
        _rename_mark(checkpoint, _DAMAGED)


def _rename_mark(checkpoint: Path, name: str) -> None:
    (checkpoint / RECORD).replace(checkpoint / name)
    fsync_folder(checkpoint)
