"""The data order and the loader against their bars, as a markdown table.

    python tools/benchmarks/data.py [--rows 20000]

Times of the order are CPU time; the loader's are elapsed time and CPU time. Files are written under
a temporary folder and read once before, so all is warm.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import torch

from measure import machine, spread, write_shards
from shards.reader import ShardReader
from trainer.config.shares import REFERENCE_SHARES
from trainer.data.batches import MicroBatches, StepRange
from trainer.data.loader import Loader, LoaderConfig
from trainer.data.mixture import BatchShape, DataOrder, Phase

_SEQ_LEN = 4096
_TIMES = 7
_ROWS = {"fineweb": 10**9, "the-stack": 3 * 10**8, "books3": 10**8, "arxiv": 5 * 10**7,
         "slimorca": 6 * 10**5}  # fmt: skip


def reference_order(scale: int = 1) -> DataOrder:
    """The data order of the reference mixture; each source has `scale` times its rows."""
    weights = {name: int(share) // 5 for name, share in REFERENCE_SHARES.items()}
    rows = {name: scale * n for name, n in _ROWS.items()}
    return DataOrder(seed=0, rows=rows, phases=[Phase(0, weights)])


def cpu_s(act: Callable[[], object], times: int = _TIMES) -> list[float]:
    """CPU seconds of each of several calls, after one that is not counted."""
    act()
    taken = []
    for _ in range(times):
        start = time.process_time()
        act()
        taken.append(time.process_time() - start)
    return taken


def loader_rates(folder: Path, n_rows: int) -> tuple[list[float], list[float]]:
    """GB/s of rows read, verified, stacked: by elapsed and by CPU time of this one process."""
    order = DataOrder(seed=0, rows={folder.name: n_rows}, phases=[Phase(0, {folder.name: 1})])
    shape = BatchShape(64, 8, 1)
    elapsed, cpu = [], []
    for _ in range(_TIMES + 1):
        stretch = StepRange(first_index=0, n_steps=n_rows // 64, shape=shape, rank=0)
        batches = MicroBatches(order, {folder.name: ShardReader(folder)}, stretch)
        wall, start, size = time.perf_counter(), time.process_time(), 0
        for batch in batches:
            size += batch.tokens.nbytes  # type: ignore[union-attr]
        cpu.append(size / 1e9 / (time.process_time() - start))
        elapsed.append(size / 1e9 / (time.perf_counter() - wall))
    return elapsed[1:], cpu[1:]


def waits(folder: Path, n_rows: int, step_s: float, steps: int) -> float:
    """Share of the time that steps of this length wait for a loader of two workers."""
    order = DataOrder(seed=0, rows={folder.name: n_rows}, phases=[Phase(0, {folder.name: 1})])
    stretch = StepRange(first_index=0, n_steps=steps, shape=BatchShape(8, 8, 1), rank=0)
    batches = MicroBatches(order, {folder.name: ShardReader(folder)}, stretch)
    loader = Loader(batches, LoaderConfig(), torch.device("cpu"), 0, print)
    loader.next()  # the first comes with the workers
    loader.waited_s = 0.0
    start = time.perf_counter()
    for _ in range(steps - 1):
        loader.next()
        time.sleep(step_s)
    share = loader.waited_s / (time.perf_counter() - start)
    loader.close()
    return share


@click.command()
@click.option("--rows", default=20_000, show_default=True, help="Rows of 8 KiB that are read.")
def main(rows: int) -> None:
    """Measure the data order and the loader.

    Example: python tools/benchmarks/data.py
    """
    order = reference_order()
    index_us = [s * 1e6 / 65_536 for s in cpu_s(lambda: order.locate(np.arange(65_536) + 10**6))]
    seek_ms = [s * 1e3 for s in cpu_s(lambda: order.locate(np.array([10**12])))]
    start_ms = [[s * 1e3 for s in cpu_s(lambda n=n: reference_order(n).locate(np.arange(64)))]  # type: ignore[misc]
                for n in (1, 1000)]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "rows"
        tokens = np.random.default_rng(0).integers(3, 32_768, (rows, _SEQ_LEN), np.uint16)
        write_shards(source, tokens, 32_768)
        elapsed, cpu = loader_rates(source, rows)
        waited = waits(source, rows, 0.05, 200)
    click.echo(f"{machine('numpy', 'torch')}\n")
    click.echo("| what | bar | measured: median (least .. most) |\n|---|---|---|")
    for line in (
        ("an index, 65,536 at once", "< 0.5 us", spread(index_us, "us CPU")),
        ("seek(10^12)", "< 1 ms", spread(seek_ms, "ms CPU")),
        ("start-up, 1.45 G rows", "the same", spread(start_ms[0], "ms CPU")),
        ("start-up, 1.45 T rows", "the same", spread(start_ms[1], "ms CPU")),
        ("rows read, verified, stacked", ">= 1 GB/s a process", spread(elapsed, "GB/s elapsed")),
        ("the same", "", spread(cpu, "GB/s of CPU time")),
        ("steps of 50 ms and 8 rows wait", "< 1 %", f"{waited:.2%} of the time"),
    ):
        click.echo(f"| {' | '.join(line)} |")


if __name__ == "__main__":
    main()
