"""Damaged units done again, from the same input, to the same bytes.

The new files are made beside the old ones and take their places only if the unit came out as the
manifest says: if the input has changed, nothing is touched and the unit is named.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from pipeline.checks.damage import Damage
from pipeline.checks.verify import STRANGE, State, damages, unit_of
from pipeline.errors import PrepareError
from pipeline.inputs.hub import HubInputs
from pipeline.inputs.inputs import LOCAL, Inputs, embedded_inputs, local_inputs
from pipeline.text.tokenizer import default_model
from pipeline.units.executors import Executor
from pipeline.units.recipe import CHECKED_DOCUMENTS, source_of
from pipeline.units.schedule import amount_of
from pipeline.units.units import Plan
from pipeline.units.work import Job, Limit
from shards.files import fsync_folder, publish_bytes, remove_stale_temporaries, sha256_file
from shards.format import PLAN, TOKENIZER
from shards.writer import write_manifest

SCRATCH: Final = ".repair-"


def repair(folder: Path, data_files: tuple[str, ...], executor: Executor) -> list[Damage]:
    """The damages found and mended; PrepareError names the first that cannot be.

    `data_files` are needed if the source was prepared from local files.
    """
    if not folder.is_dir():
        raise PrepareError(f"{folder}: no such folder: name that of a source, as shards/fineweb")
    for left_over in folder.glob(f"{SCRATCH}*"):
        shutil.rmtree(left_over)
    remove_stale_temporaries(folder)
    found = _damages(folder)
    if not found:
        return []
    state = State(folder)
    plan = state.plan
    if plan is None:
        raise PrepareError(
            f"{folder / PLAN} is missing or damaged: delete it and run the same `summer-prep "
            "tokenize` again, which makes it anew and finds the units done; then repair"
        )
    _restore_tokenizer(folder, state)
    n_units = len(state.units)
    if units := sorted({unit for damage in found if (unit := unit_of(damage)) is not None}):
        inputs = _inputs(plan, units, data_files)
        with tempfile.TemporaryDirectory(prefix=SCRATCH, dir=folder) as scratch:
            for name in (PLAN, TOKENIZER):
                shutil.copy(folder / name, scratch)
            _redo(Path(scratch), state, plan, inputs, units, executor)
            for unit in units:
                _replace(Path(scratch), folder, unit)
    write_manifest(folder, state.facts, plan.parts, n_units)
    for damage in _damages(folder):
        raise PrepareError(f"{folder}: still damaged, {damage}: prepare the source anew")
    return found


def _damages(folder: Path) -> list[Damage]:
    """The damages, but for files that are none of ours and hurt nobody."""
    return [d for d in damages(folder) if d.what != STRANGE or unit_of(d) is not None]


def _restore_tokenizer(folder: Path, state: State) -> None:
    path, wanted = folder / TOKENIZER, state.facts.tokenizer
    if path.is_file() and sha256_file(path) == wanted.sha256:
        return
    if hashlib.sha256(default_model()).hexdigest() != wanted.sha256:
        raise PrepareError(
            f"{path} is missing or damaged: copy the file of {wanted.name} there again "
            f"(SHA-256 {wanted.sha256}), then repair"
        )
    publish_bytes(path, default_model())


def _inputs(plan: Plan, units: Sequence[str], data_files: tuple[str, ...]) -> Inputs:
    """What the units are read from; PrepareError if it is gone or not what it was."""
    source = source_of(plan.recipe)
    inputs: Inputs
    if source.embedded:
        inputs = embedded_inputs(source)
    elif source.dataset != LOCAL:
        return HubInputs(source.dataset, source.revision, plan.files, source.licence)
    elif data_files:
        inputs = local_inputs(data_files)
    else:
        raise PrepareError(
            f"{source.name} was prepared from local files: name the same ones with --data-files"
        )
    now = {file.path: file.bytes for file in inputs.files}
    before = {file.path: file.bytes for file in plan.files}
    for unit in units:
        for part in plan.parts[plan.units[int(unit)].first : plan.units[int(unit)].last]:
            if now.get(part.file) != before[part.file]:
                raise PrepareError(
                    f"unit {unit} was made from {part.file} of {before[part.file]:,} bytes, which "
                    "is not among the files now: give the same ones, or prepare the source anew"
                )
    return inputs


def _redo(
    scratch: Path,
    state: State,
    plan: Plan,
    inputs: Inputs,
    units: Sequence[str],
    executor: Executor,
) -> None:
    """Make the units in the scratch folder; PrepareError if one is not what it was."""
    job = Job(
        folder=scratch,
        source=source_of(plan.recipe),
        facts=state.facts,
        inputs=inputs,
        plan_sha256=plan.sha256,
        check_encoding=CHECKED_DOCUMENTS,
    )
    with executor.running(job, len(units), lambda step: None) as submit:
        futures = {unit: submit(int(unit), _limit_of(unit, state, plan)) for unit in units}
        receipts = {unit: future.result() for unit, future in futures.items()}
    for unit, receipt in receipts.items():
        if state.knows(unit) and receipt.shards != state.shards_of(unit):
            raise PrepareError(
                f"unit {unit} comes out otherwise than the manifest says: its input has changed; "
                "nothing was replaced; prepare the source anew"
            )


def _limit_of(unit: str, state: State, plan: Plan) -> Limit:
    """What the units before left of the plan's limit."""
    limit = Limit(plan.recipe["max_documents"], plan.recipe["max_tokens"])
    before = [shard for name in state.units if name < unit for shard in state.shards_of(name)]
    return limit.after(amount_of(before))


def _replace(scratch: Path, folder: Path, unit: str) -> None:
    """Put a unit's new files in the place of the old ones: the receipt goes first, comes last."""
    receipt = f"{unit}.json"
    (folder / receipt).unlink(missing_ok=True)
    made = [path for path in scratch.glob(f"{unit}[-.]*") if path.name != receipt]
    for path in folder.glob(f"{unit}[-.]*"):
        if not (scratch / path.name).exists():
            path.unlink()
    for path in [*made, scratch / receipt]:
        path.replace(folder / path.name)
    fsync_folder(folder)
