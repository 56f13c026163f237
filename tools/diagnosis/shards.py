"""Whether prepared sources can be read, and fast enough for the run that is planned."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from typing import Final

import numpy as np

from shards.errors import ShardError
from shards.format import Split
from shards.reader import ShardReader, find_sources
from tools.diagnosis.findings import Finding, Subject
from tools.diagnosis.rates import read_rate

_LOOK_S: Final = 2.0
_LEAST_HEADROOM: Final = 2.0  # rows are read twice as fast as they are trained on


def shards(subject: Subject) -> Iterator[Finding]:
    """For each source: its files opened, rows of each proven, random rows read for a while.

    It is a look, not a proof: `summer-prep verify` reads every byte.
    """
    if subject.shards is None:
        yield Finding("note", "shards", "not looked at", "give --shards FOLDER")
        return
    try:
        sources = find_sources(subject.shards)
    except ShardError as error:
        yield Finding("fail", "shards", str(error))
        return
    for name, manifest in sources.items():
        split: Split = "train" if manifest.n_rows > manifest.n_val_rows else "val"
        reader = ShardReader(subject.shards / name, split, manifest)
        try:
            n_files, n_looked = _look_over(reader)
            rate = read_rate(reader)
        except (ShardError, OSError) as error:
            yield Finding("fail", "shards", str(error))
            continue
        yield _judge(subject, name, reader, rate, f"{n_looked} of {n_files} files")


def _look_over(reader: ShardReader) -> tuple[int, int]:
    """Files of the split, and how many were opened and had their first and last row proven."""
    sizes = [info.n_rows for info in reader.manifest.split(reader.split)]
    ends = np.array(list(itertools.accumulate(sizes)), np.int64)
    n_looked, deadline = 0, time.perf_counter() + _LOOK_S
    for size, end in zip(sizes, ends, strict=True):
        if time.perf_counter() > deadline:
            break
        if size:
            reader.rows(np.array([end - size, end - 1]))
        n_looked += 1
    return len(sizes), n_looked


def _judge(subject: Subject, name: str, reader: ShardReader, rate: float, seen: str) -> Finding:
    """What one process reads, and whether all of them feed the run."""
    n_bytes = np.dtype(reader.manifest.facts.dtype).itemsize * rate
    text = (
        f"{name}: {rate / 1e6:,.1f} M tokens/s ({n_bytes / 1e6:,.0f} MB/s) a process; {seen}, sane"
    )
    figures = {"tokens_per_s": rate, "bytes_per_s": n_bytes}
    wanted = subject.measured.get("tokens_per_s", 0.0)
    readers = subject.nproc * max(1, subject.config.loader.num_workers)
    if rate * readers >= _LEAST_HEADROOM * wanted:
        return Finding("ok", "shards", text, figures=figures)
    text = f"{text}; {readers} of them may be too slow for {wanted:,.0f} tokens/s"
    return Finding("warn", "shards", text, "a faster disk, or loader.num_workers", figures=figures)
