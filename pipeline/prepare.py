"""One source, from text to a finished folder of shards.

    request = Request(source=find("fineweb"), tokenizer=Tokenizer.default(), out=Path("shards"))
    manifest = prepare(request, Executor(workers=8), Watch())

 1. inputs.py, hub.py   The listing: local files, or the Hub's, its revision pinned to a commit.
 2. units.py            The plan: files cut into parts, parts filled into units. It is written to
                        `units.json` once; whoever comes later follows it.
 3. estimate.py         A sample is read and encoded. It shows a wrong column or a damaged file
                        before anything is done, and what the work will take; without room on the
                        disk nothing begins.
 4. work.py             Each unit, by any worker, in any order: read, make documents, encode, pack,
                        publish. The receipt is the commit: a unit without one is done again.
 5. write_manifest      With all receipts there, whoever notices writes the manifest: from now on
                        the source exists.

No other state is kept: the same command, started again after any end, does what is missing.
"""

from __future__ import annotations

import errno
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Final

from pipeline.errors import PrepareError
from pipeline.estimate import Estimate, estimate, refuse_without_room, take_sample
from pipeline.inputs.hub import HubInputs, hub_inputs
from pipeline.inputs.inputs import Inputs, embedded_inputs, local_inputs
from pipeline.inputs.sources import Source, refuse_unavailable
from pipeline.text.chat import Template
from pipeline.text.encode import encoder_note, make_encoder
from pipeline.text.tokenizer import Tokenizer
from pipeline.units.executors import Executor
from pipeline.units.recipe import Request, facts_of, recipe_of, refuse_contradictions, refuse_other
from pipeline.units.schedule import LimitedRun, amount_of, run_all
from pipeline.units.units import Plan, make_plan, read_plan
from pipeline.units.work import NO_LIMIT, Amount, Job, Limit, Step
from shards.errors import ShardError
from shards.files import (
    create_exclusively,
    fsync_folder,
    one_at_a_time,
    publish_bytes,
    remove_stale_temporaries,
)
from shards.format import (
    PLAN,
    TOKENIZER,
    Facts,
    Manifest,
    Receipt,
    summarise,
    token_dtype,
    unit_name,
)
from shards.reader import read_manifest, read_receipt
from shards.writer import write_manifest

NO_ROOM: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, None)
"""What a full disk is called; numpy tells of an array half written without any number."""


class Watch:
    """Hears of the plan before the work, and of each step of it; this one does nothing."""

    def waits(self, folder: Path) -> None:
        """Another run is at work in the folder, and this one begins when that has ended."""

    def planned(self, job: Job, ahead: Estimate, note: str) -> None:
        """The plan is made and there is room for it; `note` says how text is encoded."""

    def step(self, step: Step) -> None:
        """Some documents of a unit have become rows."""

    def unit_done(self, position: int) -> None:
        """A unit has its receipt."""


def prepare(request: Request, executor: Executor, watch: Watch) -> Manifest | None:
    """The finished source's manifest; None while other parts of an array are still at work."""
    refuse_contradictions(request)
    folder = (request.out / request.source.name).absolute()
    inputs, plan = _settle(request, folder)
    facts = facts_of(plan.recipe)
    job = Job(
        folder=folder,
        source=request.source,
        facts=facts,
        inputs=inputs,
        plan_sha256=plan.sha256,
        check_encoding=request.check_encoding,
    )
    with _alone(folder, request.limit, watch):
        remove_stale_temporaries(folder)
        if (manifest := _finished(folder, facts, plan, request.limit)) is not None:
            return manifest
        try:
            n_units = _run(request, executor, watch, job, plan)
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            told = error.strerror or "no space left on the device"
            raise PrepareError(
                f"{folder}: {told}: make room and start the same command again, it goes on where "
                "it stopped"
            ) from error
        finally:
            remove_stale_temporaries(folder)
        _refuse_nothing(folder, plan, n_units)
        return write_manifest(folder, facts, plan.parts, n_units)


def open_inputs(source: Source, data_files: tuple[str, ...] = ()) -> Inputs:
    """The listing of a source: of local files where they are named, else of its own place."""
    if data_files:
        return local_inputs(data_files)
    refuse_unavailable(source)
    return embedded_inputs(source) if source.embedded else hub_inputs(source)


def _alone(folder: Path, limit: Limit, watch: Watch) -> AbstractContextManager[None]:
    """Under a limit, one run at a time in a folder; the next goes on where it ends or is ended.

    It begins units ahead, uncut, and takes back what is behind the limit: two at once took away
    each other's files. Without one all runs write the same bytes, and need not know of each other.
    """
    if limit == NO_LIMIT:
        return nullcontext()
    return one_at_a_time(folder / PLAN, lambda: watch.waits(folder))


def receipts_of(folder: Path, plan: Plan) -> dict[int, Receipt]:
    """The receipts there are, by position of their unit; those of another plan do not count."""
    found, sha256 = {}, plan.sha256
    for position in range(len(plan.units)):
        path = folder / f"{unit_name(position)}.json"
        try:
            receipt = read_receipt(path)
        except (FileNotFoundError, ShardError):
            continue
        if receipt.plan_sha256 == sha256:
            found[position] = receipt
    return found


def _settle(request: Request, folder: Path) -> tuple[Inputs, Plan]:
    """The inputs and the plan in force: the folder's, if it has one, else a new one."""
    plan = read_plan(folder)
    if plan is not None:
        _refuse_other_tokenizer(plan, request.tokenizer, folder)
    inputs = _pinned(request, plan) or open_inputs(request.source, request.data_files)
    recipe = recipe_of(request, inputs)
    if plan is None:
        plan = make_plan(recipe, inputs, request.source, recipe["unit_bytes"])
        folder.mkdir(parents=True, exist_ok=True)
        fsync_folder(folder.parent)
        if not create_exclusively(folder / PLAN, plan.to_bytes()):
            return _settle(request, folder)  # somebody else was first: theirs is in force
    else:
        refuse_other(plan, recipe, inputs, folder)
    _keep_tokenizer(request.tokenizer, folder / TOKENIZER)
    return inputs, plan


def _refuse_other_tokenizer(plan: Plan, tokenizer: Tokenizer, folder: Path) -> None:
    if plan.recipe["tokenizer"]["sha256"] != tokenizer.info.sha256:
        raise PrepareError(
            f"{folder} was begun with another tokenizer than {tokenizer.name}: give that one "
            f"(--tokenizer {folder / TOKENIZER}), choose another --out, or delete the folder to "
            "begin anew"
        )


def _keep_tokenizer(tokenizer: Tokenizer, path: Path) -> None:
    """Put the model beside the shards; the plan names its digest: anything else is damage."""
    if not path.exists() or path.read_bytes() != tokenizer.model:
        publish_bytes(path, tokenizer.model)


def _pinned(request: Request, existing: Plan | None) -> HubInputs | None:
    """The Hub's files as an existing plan lists them: the same commit, no question asked."""
    source = request.source
    if existing is None or request.data_files or source.embedded or source.unavailable:
        return None
    recipe = existing.recipe
    if source.revision not in ("", recipe["revision"]) or source.dataset != recipe["dataset"]:
        return None
    return HubInputs(source.dataset, recipe["revision"], existing.files, recipe["licence"])


def _run(request: Request, executor: Executor, watch: Watch, job: Job, plan: Plan) -> int:
    """Do what is missing; the number of units that the source consists of."""
    receipts = receipts_of(job.folder, plan)
    number, of = request.part
    missing = [p for p in range(len(plan.units))[number - 1 :: of] if p not in receipts]
    if not missing:
        return len(plan.units)
    encoder = make_encoder(request.tokenizer)
    template = Template.of(request.tokenizer) if job.source.shape == "chat" else None
    sample = take_sample(job.inputs, job.source, plan, encoder, template)
    done = sum((amount_of(receipt.shards) for receipt in receipts.values()), Amount())
    ahead = estimate(
        plan,
        missing,
        sample,
        request.limit.after(done),
        token_dtype(request.tokenizer.vocab_size).itemsize,
        executor.workers,
    )
    refuse_without_room(job.folder, ahead.disk_bytes)
    with executor.running(
        job, len(missing), watch.step
    ) as submit:  # may fork: a screen has threads
        watch.planned(job, ahead, encoder_note(request.tokenizer))
        if request.limit == NO_LIMIT:
            run_all(missing, submit, executor.at_once, watch.unit_done)
            return len(plan.units)
        limited = LimitedRun(job.folder, plan.units, request.limit, submit, executor.at_once)
        return limited.run(receipts, watch.unit_done)


def _finished(folder: Path, facts: Facts, plan: Plan, limit: Limit) -> Manifest | None:
    """The manifest, if it is there and is what the receipts add up to."""
    try:
        manifest = read_manifest(folder)
    except ShardError:
        return None
    receipts = receipts_of(folder, plan)
    n_units = len(receipts)
    if set(receipts) != set(range(n_units)) or (limit == NO_LIMIT and n_units < len(plan.units)):
        return None
    shards = [shard for position in range(n_units) for shard in receipts[position].shards]
    complete = summarise(facts, plan.parts, shards, manifest.rejected)
    return manifest if manifest == complete else None


def _refuse_nothing(folder: Path, plan: Plan, n_units: int) -> None:
    """PrepareError if all is done and not one document came of it."""
    receipts = receipts_of(folder, plan)
    if len(receipts) < n_units or any(r.shards for r in receipts.values()):
        return
    reasons: dict[str, int] = {}
    for receipt in receipts.values():
        for reason, count in receipt.rejected.items():
            reasons[reason] = reasons.get(reason, 0) + count
    told = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))
    raise PrepareError(
        f"not one document came of the {len(plan.files)} files ({told or 'no records'}): see "
        f"{folder}/*.rejected.jsonl, then delete the folder and give other files or --text-column"
    )
