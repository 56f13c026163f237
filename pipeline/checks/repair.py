"""Damaged units done again, from the same input, to the same bytes.

The new files are made next to the old ones and take their places only if the unit came out as the
manifest says: if the input has changed, nothing is touched and the unit is named.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Final

from pipeline.checks.verify import Damage, Metadata, digest_of, find_damage
from pipeline.errors import PrepareError
from pipeline.inputs.hub import HubInputs
from pipeline.inputs.inputs import INTERPRETER, LOCAL, Inputs
from pipeline.inputs.listing import embedded_inputs, local_inputs
from pipeline.inputs.urls import UrlInputs
from pipeline.text.json_tokenizer import load_tokenizer
from pipeline.text.tokenizer import default_model
from pipeline.units.dispatch import amount_of
from pipeline.units.executors import Executor
from pipeline.units.job import Limit, PrepareJob
from pipeline.units.units import PreparePlan
from shards.files import fsync_folder, one_at_a_time, publish_bytes, remove_abandoned
from shards.format import (
    EXCLUDED,
    MANIFEST,
    PLAN,
    TOKEN_BYTES,
    TOKENIZER_CONFIG,
    TOKENIZER_FILES,
    tokenizer_path,
)
from shards.writer import write_manifest

SCRATCH: Final = ".repair-"
SAME_COMMAND: Final = "run the same `summer-prep tokenize` again"


def repair(folder: Path, data_files: tuple[str, ...], executor: Executor) -> list[Damage]:
    """The damages found and repaired, with the same local files; PrepareError if one cannot be."""
    alone = one_at_a_time(folder, lambda: None) if folder.is_dir() else nullcontext()
    with alone:
        return _repair(folder, data_files, executor)


def _repair(folder: Path, data_files: tuple[str, ...], executor: Executor) -> list[Damage]:
    metadata, found = Metadata(folder), _damages(folder)
    for earlier in folder.glob(f"{SCRATCH}*"):
        shutil.rmtree(earlier)
    remove_abandoned(folder)
    if not found:
        return []
    if (plan := metadata.plan) is None:
        raise PrepareError(
            f"{folder / PLAN} is missing or damaged: delete it and {SAME_COMMAND}; then repair"
        )
    if metadata.manifest is None and len(metadata.records) < len(metadata.units):
        raise PrepareError(
            f"{folder}: {MANIFEST} and a unit's record are missing or damaged: {SAME_COMMAND}"
        )
    _restore_tokenizer(folder, metadata)
    if any(damage.file == EXCLUDED for damage in found):
        raise PrepareError(
            f"{folder / EXCLUDED} is missing or damaged: {SAME_COMMAND}, which restores it"
        )
    if units := sorted({damage.unit for damage in found if damage.unit is not None}):
        inputs = _inputs(plan, units, data_files)
        with tempfile.TemporaryDirectory(prefix=SCRATCH, dir=folder) as scratch:
            for name in filter(lambda name: (folder / name).exists(), (*TOKENIZER_FILES, EXCLUDED)):
                shutil.copy(folder / name, scratch)
            _redo(PrepareJob(Path(scratch), plan, inputs), metadata, units, executor)
            for unit in units:
                _replace(Path(scratch), folder, unit)
    write_manifest(folder, metadata.facts, plan.parts, len(metadata.units))
    for damage in _damages(folder):
        raise PrepareError(f"{folder}: still damaged, {damage}: delete it and {SAME_COMMAND}")
    return found


def _damages(folder: Path) -> list[Damage]:
    """The damages, without files that belong to nothing and harm nothing."""
    return [damage for damage in find_damage(folder) if not damage.is_stranger]


def _restore_tokenizer(folder: Path, metadata: Metadata) -> None:
    path, wanted = tokenizer_path(folder), metadata.facts.tokenizer
    if digest_of(path) != wanted.sha256:
        if hashlib.sha256(default_model()).hexdigest() != wanted.sha256:
            raise PrepareError(
                f"{path} is missing or damaged: copy the one of SHA-256 {wanted.sha256} there"
            )
        publish_bytes(path, default_model())
    tokenizer = load_tokenizer(path, wanted.name)
    if tokenizer.info != wanted:
        raise PrepareError(
            f"{folder / TOKENIZER_CONFIG} is missing or damaged: {SAME_COMMAND}, which restores it"
        )
    if (folder / TOKEN_BYTES).exists():
        publish_bytes(folder / TOKEN_BYTES, tokenizer.token_bytes_file())


def _inputs(plan: PreparePlan, units: Sequence[str], data_files: tuple[str, ...]) -> Inputs:
    """What the units are read from; PrepareError if it is gone or not what it was."""
    source = plan.source
    if source.dataset == LOCAL and not data_files:
        raise PrepareError(
            f"{source.name} was prepared from local files: name the same ones with --data-files"
        )
    if "://" in source.dataset:
        return UrlInputs(source.dataset, "", plan.files)
    if source.dataset not in (LOCAL, INTERPRETER):
        return HubInputs(source.dataset, source.revision, plan.files, source.licence)
    if source.embedded:
        inputs = embedded_inputs(source)
    else:  # whether the content is the same, the shards' digests tell, not the files' times
        inputs = local_inputs(data_files, earlier=[file.path for file in plan.files])
    now = {file.path: file.bytes for file in inputs.files}
    before = {file.path: file.bytes for file in plan.files}
    for unit in units:
        for _, part in plan.parts_of(int(unit)):
            if now.get(part.file) != before[part.file]:
                raise PrepareError(
                    f"unit {unit} was made from {part.file} of {before[part.file]:,} bytes, which "
                    "is not among the files now: give the same ones, or prepare the source again"
                )
    return inputs


def _redo(job: PrepareJob, metadata: Metadata, units: Sequence[str], executor: Executor) -> None:
    """Make the units in the job's folder; PrepareError if one is not what it was."""
    limit = Limit(job.plan.recipe["max_documents"], job.plan.recipe["max_tokens"])
    futures = {}
    with executor.running(job, len(units), lambda step: None) as submit:
        for unit in units:
            before = [s for name in metadata.units if name < unit for s in metadata.shards_of(name)]
            futures[unit] = submit(int(unit), limit.after(amount_of(before)))
        records = {unit: future.result() for unit, future in futures.items()}
    for unit, record in records.items():
        if record.shards != metadata.shards_of(unit):
            raise PrepareError(
                f"unit {unit} comes out otherwise: its input has changed; nothing was replaced"
            )


def _replace(scratch: Path, folder: Path, unit: str) -> None:
    """Put a unit's new files in the place of the old ones: its record goes first, comes last."""
    record = f"{unit}.json"
    (folder / record).unlink(missing_ok=True)
    for path in folder.glob(f"{unit}[-.]*"):
        if not (scratch / path.name).exists():
            path.unlink()
    for path in sorted(scratch.glob(f"{unit}[-.]*"), key=lambda path: path.name == record):
        path.replace(folder / path.name)
    fsync_folder(folder)
