"""What is asked for, and the recipe: all options that the output's bytes depend on.

`units.json` holds the recipe. A second call with another one is rejected; `repair` follows it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from pipeline.errors import PrepareError
from pipeline.inputs.hub import HubInputs
from pipeline.inputs.inputs import Inputs, spelled
from pipeline.inputs.sources import Source
from pipeline.text.chat import ChatTemplate
from pipeline.text.exclude import Exclusion
from pipeline.text.tokenizer import Tokenizer
from pipeline.units.job import CHECKED_DOCUMENTS, NO_LIMIT, Limit
from pipeline.units.units import LEAST_UNIT_BYTES, UNIT_BYTES, UNITS_WANTED, PreparePlan
from shards.format import MAX_SEQ_LEN, token_dtype

TYPICAL_DOCUMENT_BYTES: Final = 2500
TYPICAL_TOKEN_BYTES: Final = 4
"""Longer than any model's context; a mistyped number would take all memory."""
OPTIONAL: Final = ("separator", "exclude")
"""Keys that a recipe has only if they are given."""


@dataclass(frozen=True, kw_only=True)
class PrepareRequest:
    """What to prepare. Without `data_files`, which are local, the source's own place is read."""

    source: Source
    tokenizer: Tokenizer
    out: Path
    data_files: tuple[str, ...] = ()
    seq_len: int = 4096
    val_fraction: float | None = None
    loss_mask: bool = False
    limit: Limit = NO_LIMIT
    check_encoding: int = CHECKED_DOCUMENTS
    exclude: Exclusion | None = None
    part: tuple[int, int] = (1, 1)
    unit_bytes: int | None = None
    """Text in a unit at most; by default 256 MiB, less if a limit is to take from many places."""


def check_request(request: PrepareRequest) -> None:
    """PrepareError if options exclude one another or the source."""
    number, of = request.part
    if not 1 <= number <= of:
        raise PrepareError(
            f"--part {number}/{of}: parts are numbered 1/{of} to {of}/{of}, not from 0"
        )
    if not 2 <= request.seq_len <= MAX_SEQ_LEN:
        raise PrepareError(f"--seq-len {request.seq_len}: a sequence has 2 to {MAX_SEQ_LEN} tokens")
    if of > 1 and request.limit != NO_LIMIT:
        raise PrepareError(
            "--part does not go with --max-tokens or --max-documents: a limit counts over all units"
        )
    if request.loss_mask and request.source.shape != "chat":
        raise PrepareError(
            f"--loss-mask is for conversations, and {request.source.name} has none: leave it out"
        )
    if request.loss_mask and request.seq_len % 8:
        raise PrepareError(f"--seq-len {request.seq_len}: with --loss-mask a multiple of 8")
    if request.source.shape == "chat":
        ChatTemplate.of(request.tokenizer)  # says so if the vocabulary has no chat markers


def recipe_of(request: PrepareRequest, inputs: Inputs) -> dict[str, Any]:
    """All that the output's bytes depend on besides the listing; the first keys are the Facts."""
    source, info = request.source, request.tokenizer.info
    licence = source.licence
    if isinstance(inputs, HubInputs) and licence == "unknown":
        licence = inputs.licence or licence
    val_fraction = source.val_fraction if request.val_fraction is None else request.val_fraction
    return {
        "source": source.name,
        "dataset": inputs.dataset,
        "revision": inputs.revision,
        "licence": licence,
        "seq_len": request.seq_len,
        "dtype": token_dtype(info.vocab_size).name,
        "packing": "concat+mask" if request.loss_mask else "concat",
        "val_fraction": val_fraction,
        "tokenizer": asdict(info),
        "config": "" if request.data_files else source.config,
        "split": "" if request.data_files else source.split,
        "text_column": source.text_column,
        "shape": source.shape,
        "max_documents": request.limit.documents,
        "max_tokens": request.limit.tokens,
        "unit_bytes": _unit_bytes(request),
        # only where it is given: folders begun by earlier versions go on
        **({"exclude": request.exclude.described} if request.exclude else {}),
        **({"separator": source.separator} if source.separator else {}),
    }


def _unit_bytes(request: PrepareRequest) -> int:
    """256 MiB; under a limit about a 64th of it, so that a small sample is not of one place."""
    if request.unit_bytes is not None:
        return request.unit_bytes
    documents, tokens = request.limit.documents, request.limit.tokens
    expected = [UNIT_BYTES * UNITS_WANTED]
    expected += [] if documents is None else [documents * TYPICAL_DOCUMENT_BYTES]
    expected += [] if tokens is None else [tokens * TYPICAL_TOKEN_BYTES]
    return max(LEAST_UNIT_BYTES, min(expected) // UNITS_WANTED)


def check_same_recipe(
    existing: PreparePlan, recipe: Mapping[str, Any], inputs: Inputs, folder: Path
) -> None:
    """PrepareError if the folder was begun with another recipe or other files."""
    fix = "choose another --out, or delete the folder to start over"
    for key, value in {**dict.fromkeys(OPTIONAL), **recipe}.items():
        if (was := existing.recipe.get(key)) != value:
            raise PrepareError(f"{folder} was begun with {key} {was!r}, not {value!r}: {fix}")
    before = {file.path: file for file in existing.files}
    now = {file.path: file for file in inputs.files}
    for path in sorted(before.keys() | now.keys()):
        was, found = before.get(path), now.get(path)
        if was is None:
            raise PrepareError(
                f"{folder} was begun without {path}: prepare new files as a source of another name "
                "(--source NAME-2) and give that a weight (--set mixture.NAME-2=1)"
            )
        if found is not None and not was.version:
            found = replace(found, version="")  # begun by 0.2.0 or before
        if was != found:
            there = "absent" if found is None else spelled(found)
            raise PrepareError(
                f"{folder} was begun with other files: {path} was {spelled(was)}, is {there}: {fix}"
            )
