"""Which checkpoints stay: the newest that is intact, those set aside, purged, or mirrored.

A folder step-<n> is a checkpoint while it holds checkpoint.json. That record is removed before
anything else of it, so that a kill at any moment leaves a checkpoint or none, never half of one.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from shards.files import fsync_folder, publish_bytes, sha256_file
from shards.format import TOKENIZER_FILES
from trainer.checkpoint import storage
from trainer.checkpoint.runs import CHECKPOINTS, CONFIG, checkpoints, record_path, step_of
from trainer.checkpoint.storage import Record, remove
from trainer.config.sections import CheckpointConfig
from trainer.distributed.world import World
from trainer.errors import CheckpointError

_DAMAGED: Final = "damaged.json"
_INVALIDATED: Final = "invalidated.json"


def mirror_of(run: Path, config: CheckpointConfig) -> Path | None:
    """Where copies of a run's checkpoints go, itself laid out as a run; None without a mirror."""
    return Path(config.mirror) / run.resolve().name if config.mirror else None


def resumable(run: Path, mirror: Path | None = None) -> tuple[list[Path], list[str]]:
    """Checkpoints to go on from, newest first, own before mirrored; a line if only those exist."""
    own, copies = checkpoints(run), checkpoints(mirror) if mirror else []
    note = f"{run} has no checkpoint of its own left; its mirror {mirror} has"
    found = sorted([*own, *copies], key=step_of, reverse=True)
    return found, [note] if copies and not own else []


def newest_intact(
    candidates: Sequence[Path], notes: Sequence[str], world: World
) -> tuple[Path, Record, list[str]] | None:
    """The first of the checkpoints that is intact, its record, and what was wrong with others.

    None if there are none. A damaged one's record is renamed, so that it no longer counts.
    """
    damage = list(notes)
    for checkpoint in candidates:
        try:
            return checkpoint, storage.verify(checkpoint, world), damage
        except CheckpointError as error:
            damage.append(str(error))
            with contextlib.suppress(OSError):  # where it can only be read it is found again
                world.on_main(functools.partial(_rename_record, checkpoint, _DAMAGED))
    if candidates:
        raise CheckpointError(
            f"no checkpoint of {candidates[0].parents[1]} is intact ({damage[-1]}); restore a "
            "copy, or start a new run with --out"
        )
    return None


def invalidate_after(run: Path, step: int, mirror: Path | None = None) -> list[str]:
    """The names of checkpoints after `step`, their records now renamed: no resume finds them."""
    newer = [checkpoint for checkpoint in checkpoints(run) if step_of(checkpoint) > step]
    for checkpoint in newer:
        _rename_record(checkpoint, _INVALIDATED)
    if mirror is not None:
        with contextlib.suppress(OSError):  # away, or it can only be read: the run goes on
            invalidate_after(mirror, step)
    return [checkpoint.name for checkpoint in newer]


def purge(run: Path, config: CheckpointConfig) -> None:
    """Remove checkpoints beyond those to keep, and what a kill has left of others."""
    found = checkpoints(run)
    for folder in found[: -config.keep_last]:
        if not config.keep_every or step_of(folder) % config.keep_every:
            remove(folder)
    for folder in (run / CHECKPOINTS).glob("step-*"):
        if step_of(folder) >= 0 and not any(folder.glob("*.json")):
            remove(folder)


def is_copied(checkpoint: Path, mirror: Path) -> bool:
    """Whether the mirror has a copy: the same record, which is written last."""
    ours, theirs = record_path(checkpoint), record_path(mirror / CHECKPOINTS / checkpoint.name)
    return theirs.exists() and theirs.read_bytes() == ours.read_bytes()


def copy_checkpoint(checkpoint: Path, mirror: Path) -> Path:
    """The copy of a checkpoint in its mirror: every file verified there, the record last."""
    record = storage.read_record(checkpoint)
    folder = mirror / CHECKPOINTS / checkpoint.name
    storage.make_room(folder, sum(entry["bytes"] for entry in record["files"].values()))
    for name, entry in record["files"].items():
        copy = folder / name
        shutil.copyfile(checkpoint / name, copy)
        with copy.open("rb") as file:  # onto the disk, and out of memory, to be read back
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if sha256_file(copy) != entry["sha256"]:
            raise CheckpointError(f"{copy} is not what was copied (its digest differs)")
    for name in (CONFIG, *TOKENIZER_FILES):  # a mirror explains itself, as a run does
        if (source := checkpoint.parents[1] / name).exists():
            publish_bytes(mirror / name, source.read_bytes())
    fsync_folder(folder)
    publish_bytes(folder / record_path(checkpoint).name, record_path(checkpoint).read_bytes())
    fsync_folder(folder.parent)
    return folder


def _rename_record(checkpoint: Path, name: str) -> None:
    record_path(checkpoint).replace(checkpoint / name)
    fsync_folder(checkpoint)
