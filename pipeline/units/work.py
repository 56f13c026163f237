"""One unit, from text to its record: the same function whoever runs it, on whatever machine."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Final

import numpy as np

from pipeline.errors import PrepareError
from pipeline.text.chat import ChatTemplate, Encoded
from pipeline.text.documents import DocumentMaker, Documents, Screen, in_batches
from pipeline.text.encode import CheckedEncoder, encode_documents, make_encoder
from pipeline.text.exclude import read_exclusion
from pipeline.text.json_tokenizer import load_tokenizer
from pipeline.text.pack import Packer
from pipeline.text.tokenizer import Tokenizer
from pipeline.units.job import Amount, Limit, PrepareJob, ReportProgress, UnitProgress
from shards.format import EXCLUDED, ManifestTokenizer, UnitRecord, unit_name
from shards.writer import ShardWriter

BATCH_BYTES: Final = 8 << 20
"""Text encoded in one go: the columnar encoder's cost of a call is that of some 100 kB."""


def run_unit(job: PrepareJob, position: int, limit: Limit, report: ReportProgress) -> UnitRecord:
    """The unit's record, after its shards have been published (over those of an earlier try)."""
    source, facts = job.plan.source, job.plan.facts
    writer = ShardWriter(job.folder, unit_name(position), facts)
    packers = {split: Packer(writer, split, facts) for split in ("train", "val")}
    tokenizer = _tokenizer(job.folder, facts.tokenizer)
    encoder = CheckedEncoder(make_encoder(tokenizer), tokenizer, job.check_encoding)
    maker = DocumentMaker(source, facts.val_fraction, (encoder.unfit, *_exclusion(job)))
    template = ChatTemplate.of(tokenizer) if source.shape == "chat" else None
    text_bytes, done = 0, Amount()
    report(UnitProgress(position))
    read = maker.read(job.inputs, job.plan.parts_of(position))
    for documents in in_batches(read, BATCH_BYTES):
        chosen = documents.first(len(documents) if limit.documents is None
                                 else limit.documents - done.documents)  # fmt: skip
        encoded = encode_documents(encoder, chosen, template)
        encoded, chosen = _cut(encoded, chosen, limit.after(done))
        for split, here in (("train", ~chosen.held), ("val", chosen.held)):
            packers[split].add(encoded.choose(here), chosen.parts[here], chosen.records[here])
        text_bytes += chosen.texts.nbytes
        done += Amount(len(chosen), len(encoded.tokens))
        report(UnitProgress(position, text_bytes, done))
        if limit.is_met_by(done):
            break
    for packer in packers.values():
        packer.finish()
    return writer.finish(maker.rejected, job.plan.sha256)


def _exclusion(job: PrepareJob) -> list[Screen]:
    """What leaves out documents of evaluation tasks, if that was asked for."""
    excluded = job.plan.facts.exclude
    if excluded is None:
        return []
    return [read_exclusion(job.folder / EXCLUDED, excluded["sha256"]).screen]


def _cut(encoded: Encoded, documents: Documents, limit: Limit) -> tuple[Encoded, Documents]:
    """The documents up to the one that reaches the token limit."""
    if limit.tokens is None or len(encoded.tokens) < limit.tokens:
        return encoded, documents
    n = int(np.searchsorted(np.cumsum(encoded.lengths), limit.tokens)) + 1
    return encoded.choose(np.arange(len(documents)) < n), documents.first(n)


@functools.lru_cache(maxsize=1)
def _tokenizer(folder: Path, info: ManifestTokenizer) -> Tokenizer:
    tokenizer = load_tokenizer(folder, info.name)
    if tokenizer.info != info:
        raise PrepareError(
            f"{folder / tokenizer.file} is not {info.name} any more: start the same command again, "
            "which restores it"
        )
    return tokenizer
