"""What the work will take, before it starts: files, bytes to read, tokens, disk, time.

Tokens and time come from a first sample of the real input, read and encoded with the real code;
that also shows a wrong column or a damaged file before anything is written.
"""

from __future__ import annotations

import itertools
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow.compute as pc

from pipeline.chat import Template
from pipeline.documents import DocumentMaker, Documents, in_batches
from pipeline.encode import Encoder, encode_documents
from pipeline.errors import PrepareError, SourceError
from pipeline.inputs import Inputs
from pipeline.reading import MISSING, PartReader
from pipeline.sources import Source
from pipeline.units import Plan, Unit
from pipeline.work import Limit

SAMPLE_BYTES: Final = 1 << 20
SAMPLE_BATCHES: Final = 64
ROOM_FACTOR: Final = 1.05
"""For sidecars, padding, and text that is unlike the sample."""


@dataclass(frozen=True)
class Sample:
    """What a first look at the text showed."""

    documents: int
    text_bytes: int
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Estimate:
    """The work ahead: `n_units` are still to be done of the plan's."""

    n_files: int
    n_units: int
    read_bytes: int
    tokens: int
    disk_bytes: int
    hours: float


def take_sample(
    inputs: Inputs, source: Source, plan: Plan, encoder: Encoder, template: Template | None
) -> Sample:
    """About 1 MiB of the text, read and encoded; SourceError if it is not where it should be."""
    reader, maker = PartReader(inputs, source), DocumentMaker(source, val_fraction=0.0)
    n = text_bytes = tokens = 0
    began = time.perf_counter()
    try:
        for documents in in_batches(_first_documents(plan, reader, maker), SAMPLE_BYTES):
            encoded = encode_documents(encoder, documents, template)
            n += len(documents)
            text_bytes += documents.texts.nbytes
            tokens += len(encoded.tokens)
            if text_bytes >= SAMPLE_BYTES:
                break
    finally:
        reader.close()
    if not n and {entry["reason"] for entry in maker.rejected} == {MISSING}:
        raise SourceError(
            f"{maker.rejected[0]['file']}: its records have no field {source.text_column!r}: "
            "name the one that holds the text with --text-column"
        )
    return Sample(n, text_bytes, tokens, time.perf_counter() - began)


def estimate(
    plan: Plan, units: Sequence[Unit], sample: Sample, limit: Limit, token_bytes: int, workers: int
) -> Estimate:
    """What the given units of a plan will take, going by the sample."""
    text_bytes = sum(unit.text_bytes for unit in units)
    per_byte = 1 / max(1, sample.text_bytes)
    tokens = text_bytes * sample.tokens * per_byte
    wanted = tokens
    if limit.tokens is not None:
        wanted = min(wanted, limit.tokens)
    if limit.documents is not None:
        wanted = min(wanted, limit.documents * sample.tokens / max(1, sample.documents))
    share = wanted / tokens if tokens else 0.0
    hours = share * text_bytes * sample.seconds * per_byte / max(1, min(workers, len(units))) / 3600
    return Estimate(
        n_files=len(plan.files),
        n_units=len(units),
        read_bytes=round(share * sum(unit.read_bytes for unit in units)),
        tokens=round(wanted),
        disk_bytes=round(wanted * token_bytes * ROOM_FACTOR),
        hours=hours,
    )


def refuse_without_room(folder: Path, needed_bytes: int) -> None:
    """PrepareError if the folder's disk has less room than that."""
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise PrepareError(
            f"{folder}: about {needed_bytes / 1e9:,.1f} GB are needed and {free / 1e9:,.1f} GB are "
            "free: choose a larger disk with --out, or take a part with --max-tokens"
        )


def _first_documents(plan: Plan, reader: PartReader, maker: DocumentMaker) -> Iterator[Documents]:
    """Documents from the beginnings of the first units, at most SAMPLE_BYTES at a time.

    Where there are none, as in a file of nothing but zeros, the search ends after some batches.
    """
    numbers = itertools.chain.from_iterable(range(u.first, u.last) for u in plan.units)
    batches = (
        documents
        for number in numbers
        for documents in maker.documents(
            number, plan.parts[number], reader.read(plan.parts[number])
        )
    )
    for documents in itertools.islice(batches, SAMPLE_BATCHES):
        if len(documents):
            yield documents.first(_within(documents, SAMPLE_BYTES))


def _within(documents: Documents, size: int) -> int:
    """How many of the documents it takes to reach that many bytes; all if they do not."""
    ends = np.cumsum(np.asarray(pc.binary_length(documents.texts)))
    texts = int(np.searchsorted(ends, size)) + 1
    if documents.turns is None:
        return texts
    return int(np.searchsorted(np.cumsum(documents.turns), texts)) + 1
