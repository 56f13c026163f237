"""The disk that checkpoints go to, and the shards that are read."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from typing import Final

import numpy as np

from shards.errors import ShardError
from shards.files import publish
from shards.format import Split
from shards.reader import ShardReader, find_sources
from tools.diagnosis.machine import CheckResult, Context, Verdict
from trainer.config.memory import checkpoint_bytes

LEAST_WRITE_RATE: Final = 100e6
PROBE_BYTES: Final = 256 << 20
_MOST_FILES: Final = 100
_READ_S: Final = 0.5
_LEAST_HEADROOM: Final = 2.0  # sequences are read twice as fast as they are trained on


def disk(context: Context) -> Iterator[CheckResult]:
    """Room for the checkpoints that are kept, and the rate at which they are written."""
    config, one = context.config, checkpoint_bytes(context.config.model)
    needed = (config.checkpoint.keep_last + 1) * one
    free = shutil.disk_usage(context.folder).free
    verdict: Verdict = "ok" if free >= needed else "fail" if free < one else "warn"
    text = (
        f"{free / 1e9:,.1f} GB free; checkpoints of {config.preset} need {needed / 1e9:,.1f} GB "
        f"({config.checkpoint.keep_last} kept, one being written)"
    )
    yield CheckResult(verdict, "disk", text, figures={"free_bytes": free, "needed_bytes": needed})
    if free < 2 * PROBE_BYTES:
        return
    block, path, start = os.urandom(1 << 20), context.folder / ".doctor", time.perf_counter()
    try:
        with publish(path) as file:  # really on the disk
            for _ in range(PROBE_BYTES >> 20):
                file.write(block)
        rate = PROBE_BYTES / (time.perf_counter() - start)
    finally:
        path.unlink(missing_ok=True)
    text = f"{rate / 1e6:,.0f} MB/s, a checkpoint takes {one / rate:,.2g} s to write"
    fast, figures = rate >= LEAST_WRITE_RATE, {"bytes_per_s": rate}
    yield CheckResult("ok" if fast else "warn", "write rate", text, figures=figures)


def shards(context: Context) -> Iterator[CheckResult]:
    """For each source: sequences of each file verified, others read for a while.

    It is a sample: `summer-prep verify` reads every byte.
    """
    if context.shards is None:
        yield CheckResult("note", "shards", "not checked", "give --shards FOLDER")
        return
    for name, manifest in find_sources(context.shards).items():
        split: Split = "train" if manifest.n_rows > manifest.n_val_rows else "val"
        reader = ShardReader(context.shards / name, split, manifest)
        try:
            checked = _check_files(reader)
            rate = _read_rate(reader)
        except (ShardError, OSError) as error:
            yield CheckResult("fail", "shards", str(error))
            continue
        text = f"{name}: {checked} verified, {rate / 1e6:,.1f} M tokens/s a process"
        wanted = context.measured.get("tokens_per_s", 0.0)
        readers = context.nproc * max(1, context.config.loader.num_workers)
        fast, fix = rate * readers >= _LEAST_HEADROOM * wanted, ""
        if not fast:
            text = f"{text}; {readers} of them may be too slow for {wanted:,.0f} tokens/s"
            fix = "a faster disk, or loader.num_workers"
        n_bytes = rate * np.dtype(manifest.facts.dtype).itemsize
        figures = {"tokens_per_s": rate, "bytes_per_s": n_bytes}
        yield CheckResult("ok" if fast else "warn", "shards", text, fix, figures=figures)


def _check_files(reader: ShardReader) -> str:
    """How many files of the split had their first and last sequence verified."""
    sizes = np.array([info.n_rows for info in reader.manifest.split(reader.split)])
    ends = sizes.cumsum()[sizes > 0]
    chosen = slice(None, None, max(1, -(-len(ends) // _MOST_FILES)))
    last, sizes = ends[chosen] - 1, sizes[sizes > 0][chosen]
    reader.rows(np.concatenate([last, last + 1 - sizes]))
    return f"{len(last)} of {len(ends)} files"


def _read_rate(reader: ShardReader) -> float:
    """Tokens a second of random sequences, each verified; ShardError where one is damaged."""
    generator, n_rows, start = np.random.default_rng(0), 0, time.perf_counter()
    while time.perf_counter() - start < _READ_S:
        reader.rows(generator.integers(0, reader.n_rows, 64))
        n_rows += 64
    return n_rows * reader.seq_len / (time.perf_counter() - start)
