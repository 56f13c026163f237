"""One unit, from text to receipt: the same function whoever runs it, on whatever machine."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from pipeline.errors import PrepareError
from pipeline.inputs.inputs import Inputs
from pipeline.inputs.reading import PartReader
from pipeline.inputs.sources import Source
from pipeline.text.chat import Template
from pipeline.text.documents import DocumentMaker, Documents, in_batches
from pipeline.text.encode import CheckedEncoder, Encoded, encode_documents, make_encoder
from pipeline.text.pack import Packer
from pipeline.text.tokenizer import Tokenizer
from pipeline.units.units import Plan, read_plan
from shards.format import TOKENIZER, Facts, Receipt, TokenizerInfo, unit_name
from shards.writer import ShardWriter


@dataclass(frozen=True, kw_only=True)
class Job:
    """All that a worker needs to know; small, and the same for every unit."""

    folder: Path
    source: Source
    facts: Facts
    inputs: Inputs
    plan_sha256: str
    check_encoding: int


@dataclass(frozen=True)
class Amount:
    """Documents and tokens: how much was made, or may be made."""

    documents: int = 0
    tokens: int = 0

    def __add__(self, other: Amount) -> Amount:
        return Amount(self.documents + other.documents, self.tokens + other.tokens)


@dataclass(frozen=True)
class Limit:
    """Where to stop: at so many documents, or behind the document that reaches so many tokens.

    None: no bound.
    """

    documents: int | None = None
    tokens: int | None = None

    def after(self, done: Amount) -> Limit:
        """What is left of it."""
        return Limit(
            None if self.documents is None else max(0, self.documents - done.documents),
            None if self.tokens is None else max(0, self.tokens - done.tokens),
        )

    def is_met_by(self, done: Amount) -> bool:
        """Whether no further document may come."""
        enough_documents = self.documents is not None and done.documents >= self.documents
        return enough_documents or (self.tokens is not None and done.tokens >= self.tokens)


@dataclass(frozen=True)
class Step:
    """How far a unit is; a later one replaces it, and one of nothing begins the unit again."""

    unit: int
    text_bytes: int = 0
    amount: Amount = Amount()


BATCH_BYTES: Final = 8 << 20
"""Text encoded in one go: the columnar encoder's cost of a call is that of some 100 kB."""

Report = Callable[[Step], None]
NO_LIMIT = Limit()
Submit = Callable[[int, Limit], "Future[Receipt]"]


def run_unit(job: Job, position: int, limit: Limit, report: Report) -> Receipt:
    """The unit's receipt, after its shards have been published.

    What an earlier try left is written over with the same bytes.
    """
    plan = _plan(job.folder, job.plan_sha256)
    writer = ShardWriter(job.folder, unit_name(position), job.facts)
    packers = {split: Packer(writer, split, job.facts) for split in ("train", "val")}
    maker = DocumentMaker(job.source, job.facts.val_fraction)
    tokenizer = _tokenizer(job.folder / TOKENIZER, job.facts.tokenizer)
    encoder = CheckedEncoder(make_encoder(tokenizer), tokenizer, job.check_encoding)
    template = Template.of(tokenizer) if job.source.shape == "chat" else None
    text_bytes, done = 0, Amount()
    report(Step(position))
    for documents in in_batches(_documents(job, plan, position, maker), BATCH_BYTES):
        chosen = documents.first(len(documents) if limit.documents is None
                                 else limit.documents - done.documents)  # fmt: skip
        encoded = encode_documents(encoder, chosen, template)
        encoded, chosen = _cut(encoded, chosen, limit.after(done))
        for split, here in (("train", ~chosen.held), ("val", chosen.held)):
            packers[split].add(encoded.choose(here), chosen.parts[here], chosen.records[here])
        text_bytes += chosen.texts.nbytes
        done += Amount(len(chosen), len(encoded.tokens))
        report(Step(position, text_bytes, done))
        if limit.is_met_by(done):
            break
    for packer in packers.values():
        packer.finish()
    return writer.finish(maker.rejected, job.plan_sha256)


def _documents(job: Job, plan: Plan, position: int, maker: DocumentMaker) -> Iterator[Documents]:
    """The documents of a unit, in order."""
    unit = plan.units[position]
    reader = PartReader(job.inputs, job.source)
    try:
        for number in range(unit.first, unit.last):
            part = plan.parts[number]
            yield from maker.documents(number, part, reader.read(part))
    finally:
        reader.close()


def _cut(encoded: Encoded, documents: Documents, limit: Limit) -> tuple[Encoded, Documents]:
    """The documents up to the one that reaches the token limit."""
    if limit.tokens is None or len(encoded.tokens) < limit.tokens:
        return encoded, documents
    n = int(np.searchsorted(np.cumsum(encoded.lengths), limit.tokens)) + 1
    return encoded.choose(np.arange(len(documents)) < n), documents.first(n)


@functools.lru_cache(maxsize=1)
def _tokenizer(path: Path, info: TokenizerInfo) -> Tokenizer:
    tokenizer = Tokenizer.load(path, info.name)
    if tokenizer.info != info:
        raise PrepareError(
            f"{path} is not {info.name} any more (its digest differs): start the same command "
            "again, which puts it back"
        )
    return tokenizer


@functools.lru_cache(maxsize=1)
def _plan(folder: Path, sha256: str) -> Plan:
    plan = read_plan(folder)
    if plan is None or plan.sha256 != sha256:
        raise PrepareError(
            f"{folder}: the plan changed while it was worked on: start the same command again"
        )
    return plan
