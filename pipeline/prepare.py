"""One source, from text to a finished folder of shards.

1. inputs.py, hub.py  The listing: local files, or the Hub's, its revision pinned to a commit.
2. units.py           The plan: files cut into parts, parts filled into units. It is written to
                      `units.json` once; whoever comes later follows it.
3. estimate.py        A sample is read and encoded: what the work will take. Without room on the
                      disk nothing begins.
4. work.py            Each unit, by any worker, in any order: read, make documents, encode, pack,
                      publish. A unit whose record is missing is done again.
5. write_manifest     With all unit records there, whoever notices writes the manifest: from now
                      on the source exists.

No other state is kept: the same command, started again after any end, does what is missing.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from pipeline.errors import PrepareError
from pipeline.estimate import (
    PrepareListener,
    check_disk_space,
    default_val_fraction,
    estimate,
    take_sample,
)
from pipeline.inputs.hub import HubInputs
from pipeline.inputs.inputs import Inputs
from pipeline.inputs.urls import open_inputs
from pipeline.text.chat import ChatTemplate
from pipeline.text.encode import make_encoder
from pipeline.units.dispatch import LimitedRun, amount_of, run_all
from pipeline.units.executors import Executor
from pipeline.units.job import NO_LIMIT, Amount, Limit, PrepareJob
from pipeline.units.recipe import PrepareRequest, check_request, check_same_recipe, recipe_of
from pipeline.units.units import PreparePlan, make_plan, read_plan
from shards.errors import ShardError, SummerError
from shards.files import (
    create_once,
    fsync_folder,
    in_use,
    is_in_use,
    one_at_a_time,
    publish_bytes,
    remove_abandoned,
)
from shards.format import (
    EXCLUDED,
    MANIFEST,
    PLAN,
    TOKEN_BYTES,
    TOKENIZER,
    TOKENIZER_JSON,
    Manifest,
    UnitRecord,
    combine,
    tokenizer_path,
    unit_name,
)
from shards.reader import check_files, read_manifest, read_unit_record
from shards.writer import write_manifest

NO_ROOM: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, None)
"""What a full disk is called; numpy reports an array half written without any number."""


class _FailedStartError(Exception):
    """Nothing was begun, for this error."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error


def prepare(
    request: PrepareRequest, executor: Executor, listener: PrepareListener
) -> Manifest | None:
    """The finished source's manifest; None while other parts of an array are still at work."""
    check_request(request)
    folder = (request.out / request.source.name).absolute()
    inputs, plan = load_or_create_plan(request, folder)
    job = PrepareJob(folder, plan, inputs, request.check_encoding)
    try:
        with in_use(folder / TOKEN_BYTES):
            return _prepare(request, executor, listener, job)
    except _FailedStartError as failed:
        _forget_failed_start(folder)
        raise failed.error from None


def _prepare(
    request: PrepareRequest, executor: Executor, listener: PrepareListener, job: PrepareJob
) -> Manifest | None:
    """What is missing of a plan in force, done; `prepare`'s result."""
    folder, plan = job.folder, job.plan
    # A limited run begins units ahead, uncut, and removes what is behind the limit: two at once
    # would remove each other's files. Without a limit all runs write the same bytes.
    alone = one_at_a_time(folder / PLAN, lambda: listener.waits(folder))
    with nullcontext() if request.limit == NO_LIMIT else alone:
        remove_abandoned(folder)
        done = unit_records_of(folder, plan)
        if (manifest := _finished(job, done, request.limit)) is not None:
            return manifest
        try:
            n_units = _run(request, executor, listener, job, done)
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            reason = error.strerror or "no space left on the device"
            raise PrepareError(
                f"{error.filename or folder}: {reason}: make room and start the same command "
                "again, it goes on"
            ) from error
        finally:
            remove_abandoned(folder)
        _check_not_empty(folder, plan, n_units)
        return write_manifest(folder, plan.facts, plan.parts, n_units)


def unit_records_of(folder: Path, plan: PreparePlan) -> dict[int, UnitRecord]:
    """The unit records there are, by position of their unit; those of another plan do not count."""
    found, sha256 = {}, plan.sha256
    for position in range(len(plan.units)):
        with contextlib.suppress(FileNotFoundError, ShardError):
            record = read_unit_record(folder / f"{unit_name(position)}.json")
            if record.plan_sha256 == sha256:
                found[position] = record
    return found


def load_or_create_plan(request: PrepareRequest, folder: Path) -> tuple[Inputs, PreparePlan]:
    """The inputs and the plan in force: the folder's, if it has one, else a new one.

    A plan of which nothing was made is no obstacle to another one.
    """
    plan = read_plan(folder)
    try:
        inputs, recipe = _asked_for(request, plan, folder)
    except SummerError:
        if plan is None or not _forget_failed_start(folder):
            raise
        return load_or_create_plan(request, folder)
    if plan is None:
        plan = make_plan(recipe, inputs, request.source, recipe["unit_bytes"])
        if request.val_fraction is None and request.source.val_fraction < 1:
            chosen = default_val_fraction(plan, inputs, request.limit)
            plan = replace(plan, recipe={**recipe, "val_fraction": chosen})
        folder.mkdir(parents=True, exist_ok=True)
        fsync_folder(folder.parent)
        if not create_once(folder / PLAN, plan.to_bytes()):
            return load_or_create_plan(request, folder)  # another run was first: its plan counts
    _keep_files(request, folder)
    return inputs, plan


def _asked_for(
    request: PrepareRequest, plan: PreparePlan | None, folder: Path
) -> tuple[Inputs, dict[str, Any]]:
    """The inputs and the recipe of a request; PrepareError if the folder's plan has others."""
    tokenizer = request.tokenizer
    if plan is not None and plan.recipe["tokenizer"]["sha256"] != tokenizer.info.sha256:
        raise PrepareError(
            f"{folder} was begun with another tokenizer than {tokenizer.name}: give that one "
            f"(--tokenizer {tokenizer_path(folder)}), or choose another --out"
        )
    earlier = [] if plan is None else [file.path for file in plan.files]
    inputs = inputs_from_plan(request, plan) or open_inputs(
        request.source, request.data_files, earlier
    )
    recipe = recipe_of(request, inputs)
    if plan is not None:
        if request.val_fraction is None:
            recipe["val_fraction"] = plan.recipe["val_fraction"]
        check_same_recipe(plan, recipe, inputs, folder)
    return inputs, recipe


def _forget_failed_start(folder: Path) -> bool:
    """Whether a plan of which no document came, and nobody is at work on, is gone now."""
    if not (folder / PLAN).exists() or is_in_use(folder / TOKEN_BYTES):
        return False
    try:
        records = [read_unit_record(path) for path in folder.glob("[0-9]*[0-9].json")]
    except ShardError:
        return False
    if (folder / MANIFEST).exists() or any(record.shards for record in records):
        return False
    ours = (PLAN, TOKENIZER, TOKENIZER_JSON, TOKEN_BYTES, EXCLUDED)
    for path in [*folder.glob("[0-9]*"), *(folder / name for name in ours)]:
        path.unlink(missing_ok=True)
    for empty in (folder, folder.parent):
        with contextlib.suppress(OSError):
            empty.rmdir()
    return True


def _keep_files(request: PrepareRequest, folder: Path) -> None:
    """Put what workers need besides the plan with the shards; what differs from it is damage."""
    files = request.tokenizer.files() | {TOKEN_BYTES: request.tokenizer.token_bytes_file()}
    files |= {EXCLUDED: request.exclude.data} if request.exclude else {}
    for name, data in files.items():
        path = folder / name
        if not path.exists() or path.read_bytes() != data:
            publish_bytes(path, data)


def inputs_from_plan(request: PrepareRequest, plan: PreparePlan | None) -> HubInputs | None:
    """The Hub's files as an existing plan lists them: the same commit, without asking the Hub."""
    source = request.source
    if plan is None or request.data_files or source.dataset != plan.source.dataset:
        return None
    if source.revision not in ("", plan.source.revision):
        return None
    return HubInputs(source.dataset, plan.source.revision, plan.files, plan.source.licence)


def _run(
    request: PrepareRequest,
    executor: Executor,
    listener: PrepareListener,
    job: PrepareJob,
    done: Mapping[int, UnitRecord],
) -> int:
    """Do what is missing; the number of units that the source consists of."""
    plan, (number, of) = job.plan, request.part
    missing = [p for p in range(len(plan.units))[number - 1 :: of] if p not in done]
    if not missing:
        return len(plan.units)
    encoder = make_encoder(request.tokenizer)
    template = ChatTemplate.of(request.tokenizer) if plan.source.shape == "chat" else None
    try:
        sample = take_sample(job, encoder, template)
        made = sum((amount_of(record.shards) for record in done.values()), Amount())
        ahead = estimate(plan, missing, sample, request.limit.after(made), executor.workers)
        check_disk_space(job.folder, ahead.disk_bytes)
    except (SummerError, OSError) as error:
        raise _FailedStartError(error) from error
    # the pool may fork, so it begins before the display, which has threads
    with executor.running(job, len(missing), listener.progressed) as submit:
        listener.planned(job, ahead, encoder.note)
        if request.limit == NO_LIMIT:
            run_all(missing, submit, executor.at_once, listener.unit_done)
            return len(plan.units)
        limited = LimitedRun(job, request.limit, submit, executor.at_once)
        return limited.run(done, listener.unit_done)


def _finished(job: PrepareJob, done: Mapping[int, UnitRecord], limit: Limit) -> Manifest | None:
    """The manifest, if it is there and is what the unit records add up to."""
    try:
        manifest = read_manifest(job.folder)
    except ShardError:
        return None
    plan = job.plan
    if list(done) != list(range(len(done))) or (limit == NO_LIMIT and len(done) < len(plan.units)):
        return None
    if manifest != combine(plan.facts, plan.parts, done.values()):
        return None
    check_files(job.folder, manifest)
    return manifest


def _check_not_empty(folder: Path, plan: PreparePlan, n_units: int) -> None:
    """PrepareError if all is done and not one document came of it."""
    records = unit_records_of(folder, plan).values()
    made = combine(plan.facts, plan.parts, records)
    if len(records) == n_units and not made.shards:
        reasons = ", ".join(f"{count} {reason}" for reason, count in made.rejected.items())
        raise PrepareError(
            f"not one document came of the {len(plan.files)} files ({reasons or 'no records'}): "
            f"see {folder}/*.rejected.jsonl, delete the folder, name other files or --text-column"
        )
