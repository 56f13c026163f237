"""What the work will take, before it starts: files, bytes to read, tokens, disk, time.

Tokens and time come from a first sample of the input, read and encoded as all of it will be. That
also shows a wrong column or a damaged file before anything is written.
"""

from __future__ import annotations

import itertools
import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow.compute as pc

from pipeline.errors import PrepareError, SourceError
from pipeline.inputs.inputs import Inputs
from pipeline.inputs.records import MISSING
from pipeline.text.chat import ChatTemplate
from pipeline.text.documents import DocumentMaker, Documents, in_batches
from pipeline.text.encode import Encoder, encode_documents
from pipeline.units.job import Limit, PrepareJob, UnitProgress
from pipeline.units.units import PreparePlan

SAMPLE_BYTES: Final = 1 << 20
SAMPLE_BATCHES: Final = 4
MOST_READ: Final = 64
"""Parts, and batches of records of them, that are read at most: small files give one each."""
LEAST_SAMPLE_S: Final = 1.0
HELD_OUT_DOCUMENTS: Final = 20
_TOKEN_BYTES: Final = 4
ROOM_FACTOR: Final = 1.05
"""For sidecars, padding, and text that is unlike the sample."""


@dataclass(frozen=True)
class TextSample:
    """What a first sample showed."""

    documents: int
    text_bytes: int
    tokens: int
    token_bytes: int
    seconds_per_byte: float
    text_share: float
    """Bytes of text in one that was planned: records have other fields, compression is guessed."""
    seconds: float


@dataclass(frozen=True)
class Estimate:
    """The work ahead, and the seconds it takes."""

    units: Mapping[int, int]
    """The planned bytes of text of every unit that is still to be done, by position."""
    limit: Limit
    """What is left of it: it may be met before all units are done."""
    read_bytes: int
    tokens: int
    disk_bytes: int
    seconds: float
    sample_s: float = LEAST_SAMPLE_S
    """What the sample took; below LEAST_SAMPLE_S nothing is known of the speed."""


class PrepareListener:
    """Is called with the plan before the work, and with each step of it; this one does nothing."""

    def waits(self, folder: Path) -> None:
        """Another run is at work in the folder, and this one begins when that has ended."""

    def planned(self, job: PrepareJob, ahead: Estimate, note: str) -> None:
        """The plan is made and there is room for it; `note` says how text is encoded."""

    def progressed(self, step: UnitProgress) -> None:
        """Some documents of a unit have become rows."""

    def unit_done(self, position: int) -> None:
        """A unit has its record."""


def take_sample(job: PrepareJob, encoder: Encoder, template: ChatTemplate | None) -> TextSample:
    """Some of the text, read and encoded; SourceError if it is not where it should be."""
    maker = DocumentMaker(job.plan.source, val_fraction=0.0)
    n = tokens = token_bytes = 0
    read: list[tuple[int, float]] = []  # bytes and seconds of each batch
    encoded: list[tuple[int, float]] = []
    began = time.perf_counter()
    for documents in _first_documents(job.plan, job.inputs, maker):
        found = time.perf_counter()
        beginning = _beginning(documents)
        ids = encode_documents(encoder, beginning, template).tokens
        n, tokens, token_bytes = n + len(beginning), tokens + len(ids), ids.itemsize
        read.append((documents.texts.nbytes, found - began))
        began = time.perf_counter()
        encoded.append((beginning.texts.nbytes, began - found))
        if sum(size for size, _ in encoded) >= SAMPLE_BYTES * SAMPLE_BATCHES:
            break
    if not n and {entry["reason"] for entry in maker.rejected} == {MISSING}:
        raise SourceError(
            f"{maker.rejected[0]['file']}: its records have no field "
            f"{job.plan.source.text_column!r}: name the one that holds the text with --text-column"
        )
    # the first batch is slow: the encoder has not seen the common words yet
    seconds = _seconds_per_byte(read) + _seconds_per_byte(encoded[1:] or encoded)
    planned = sum(s * _planned_bytes(job.plan, number) for number, s in maker.shares.items())
    share = sum(size for size, _ in read) / planned if planned else 1.0
    took = sum(seconds for _, seconds in (*read, *encoded))
    text_bytes = sum(size for size, _ in encoded)
    return TextSample(n, text_bytes, tokens, token_bytes, seconds, share, took)


def _planned_bytes(plan: PreparePlan, number: int) -> float:
    """The bytes of text that a part was planned with: its share of its unit's."""
    unit = next(unit for unit in plan.units if unit.first <= number < unit.last)
    sizes = [max(1, part.last - part.first) for part in plan.parts[unit.first : unit.last]]
    return unit.text_bytes * sizes[number - unit.first] / sum(sizes)


def default_val_fraction(plan: PreparePlan, inputs: Inputs, limit: Limit) -> float:
    """What is held out unless it is said: a thousandth, or some 20 documents, never above a tenth.

    The number of documents is that of the plan's text by the mean length in a first sample.
    """
    maker = DocumentMaker(plan.source, val_fraction=0.0)
    expected, documents, text_bytes = 0.0, 0, 0
    for some in _first_documents(plan, inputs, maker):
        documents, text_bytes = documents + len(some), text_bytes + some.texts.nbytes
        if text_bytes >= SAMPLE_BYTES * SAMPLE_BATCHES:
            planned = sum(unit.text_bytes for unit in plan.units)
            expected = documents * planned / text_bytes
            break
    else:  # all of a small source has been read
        share = MOST_READ / max(MOST_READ, len(plan.parts))
        expected = documents / share
    if limit.documents is not None:
        expected = min(expected, limit.documents)
    if limit.tokens is not None:
        expected = min(expected, limit.tokens * _TOKEN_BYTES * documents / max(1, text_bytes))
    thousandths = math.ceil(1000 * HELD_OUT_DOCUMENTS / max(1.0, expected))
    return float(max(1, min(100, thousandths))) / 1000


def estimate(
    plan: PreparePlan, positions: Sequence[int], sample: TextSample, limit: Limit, workers: int
) -> Estimate:
    """What the units at these positions of a plan will take, going by the sample."""
    units = {position: plan.units[position].text_bytes for position in positions}
    text_bytes = sum(units.values()) * sample.text_share
    workers = max(1, min(workers, len(units)))
    tokens = text_bytes * sample.tokens / max(1, sample.text_bytes)
    wanted = tokens if limit.tokens is None else min(tokens, limit.tokens)
    if limit.documents is not None:
        wanted = min(wanted, limit.documents * sample.tokens / max(1, sample.documents))
    share = wanted / tokens if tokens else 0.0
    return Estimate(
        units=units,
        limit=limit,
        read_bytes=round(share * sum(plan.units[position].read_bytes for position in positions)),
        tokens=round(wanted),
        disk_bytes=round(wanted * sample.token_bytes * ROOM_FACTOR),
        seconds=share * text_bytes * sample.seconds_per_byte / workers,
        sample_s=sample.seconds,
    )


def check_disk_space(folder: Path, needed_bytes: int) -> None:
    """PrepareError if the folder's disk has less room than that."""
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise PrepareError(
            f"{folder}: about {needed_bytes / 1e6:,.0f} MB are needed and {free / 1e6:,.0f} MB are "
            "free: choose a larger disk with --out, or take a part with --max-tokens"
        )


def _seconds_per_byte(batches: list[tuple[int, float]]) -> float:
    return sum(seconds for _, seconds in batches) / max(1, sum(size for size, _ in batches))


def _first_documents(
    plan: PreparePlan, inputs: Inputs, maker: DocumentMaker
) -> Iterator[Documents]:
    """Documents from the beginning of the plan, about SAMPLE_BYTES at a time or more.

    Where there are none, as in a file of nothing but zeros, the search ends after a while.
    """
    parts = itertools.chain.from_iterable(map(plan.parts_of, range(len(plan.units))))
    found = maker.read(inputs, itertools.islice(parts, MOST_READ))
    yield from in_batches(itertools.islice(found, MOST_READ), SAMPLE_BYTES)


def _beginning(documents: Documents) -> Documents:
    """The first of them, and of those the first characters: about SAMPLE_BYTES of text."""
    ends = np.cumsum(np.asarray(pc.binary_length(documents.texts)))
    texts = int(np.searchsorted(ends, SAMPLE_BYTES)) + 1
    if documents.turns is not None:
        texts = int(np.searchsorted(np.cumsum(documents.turns), texts)) + 1
    documents = documents.first(texts)
    beginnings = pc.utf8_slice_codeunits(documents.texts, 0, SAMPLE_BYTES)
    return replace(documents, texts=beginnings)
