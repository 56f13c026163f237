"""The data order and the loader against their bars, as a markdown table.

    python tools/benchmarks/data.py                   # 20,000 rows of 8 KiB
    python tools/benchmarks/data.py --rows 1600

Times of the order are CPU time, the loader's are elapsed time. Files are written under a temporary
folder and read once before, so all is warm.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from measure import cpu_seconds, machine, parse, spread
from shards import writer
from shards.reader import ShardReader
from tools.diagnosis.trial import write_shards
from trainer.config.sections import LoaderConfig
from trainer.config.shares import REFERENCE_SHARES
from trainer.data.batches import MicroBatches, StepRange
from trainer.data.loader import Loader
from trainer.data.mixture import BatchShape, DataOrder, Phase

SEQ_LEN = 4096
TIMES = 7
ROWS = {"fineweb": 10**9, "the-stack": 3 * 10**8, "books3": 10**8, "arxiv": 5 * 10**7,
        "slimorca": 6 * 10**5}  # fmt: skip


def reference_order(scale: int = 1) -> DataOrder:
    """The data order of the reference mixture; each source has `scale` times its rows."""
    weights = {name: int(share) // 5 for name, share in REFERENCE_SHARES.items()}
    rows = {name: scale * n for name, n in ROWS.items()}
    return DataOrder(seed=0, rows=rows, phases=[Phase(0, weights)])


def order_s(call: Callable[[], object], unit: float) -> str:
    """The spread of a call's CPU time in a unit of so many seconds, after one not counted."""
    call()
    return spread([cpu_seconds(call) / unit for _ in range(TIMES)], "")


def batches_of(folder: Path, n_rows: int, shape: BatchShape) -> MicroBatches:
    """The micro-batches of all rows of one source."""
    order = DataOrder(seed=0, rows={folder.name: n_rows}, phases=[Phase(0, {folder.name: 1})])
    n_steps = n_rows // shape.global_batch_size
    stretch = StepRange(first_index=0, n_steps=n_steps, shape=shape, rank=0)
    return MicroBatches(order, {folder.name: ShardReader(folder)}, stretch)


def loader_rates(folder: Path, n_rows: int) -> list[float]:
    """GB/s of rows read, verified, stacked in this one process."""
    rates = []
    for _ in range(TIMES + 1):
        batches = batches_of(folder, n_rows, BatchShape(64, 8, 1))
        start = time.perf_counter()
        n_bytes = 0
        for batch in batches:
            n_bytes += batch.tokens.nbytes  # type: ignore[union-attr]
        rates.append(n_bytes / 1e9 / (time.perf_counter() - start))
    return rates[1:]


def waits(folder: Path, n_rows: int, step_s: float) -> float:
    """Share of the time that steps of this length wait for a loader of two workers."""
    batches = batches_of(folder, n_rows, BatchShape(8, 8, 1))
    loader = Loader(batches, LoaderConfig(), torch.device("cpu"), 0, print)
    loader.next()  # the first comes with the workers
    loader.waited_s = 0.0
    start = time.perf_counter()
    for _ in range(n_rows // 8 - 1):
        loader.next()
        time.sleep(step_s)
    share = loader.waited_s / (time.perf_counter() - start)
    loader.close()
    return share


def ratios_of_many_shards(folder: Path, tokens: np.ndarray) -> list[float]:
    """Time of random rows over 2,500 shards by that over 100, interleaved; the rows are equal."""
    readers = []
    for n_shards in (2500, 100):
        rows = -(-len(tokens) // n_shards)
        writer.SHARD_BYTES = rows * tokens[0].nbytes  # type: ignore[misc]
        write_shards(folder / f"{n_shards}", tokens, 32_768)
        readers.append(ShardReader(folder / f"{n_shards}"))
        readers[-1].rows(np.arange(len(tokens)))  # the first row of a shard verifies its sidecar
    found = []
    for turn in range(TIMES):
        indices = np.random.default_rng(turn).permutation(len(tokens))[:4096]
        many, few = (cpu_seconds(partial(reader.rows, indices)) for reader in readers)
        found.append(many / few)
    return found


def main() -> None:
    """Measure the data order and the loader."""
    n_rows = parse(__doc__, rows=20_000).rows
    order = reference_order()
    lines = [
        ("an index, 65,536 at once, us of CPU", "< 0.5",
         order_s(lambda: order.locate(np.arange(65_536) + 10**6), 65_536e-6)),
        ("seek(10^12), ms of CPU", "< 1", order_s(lambda: order.locate(np.array([10**12])), 1e-3)),
    ]  # fmt: skip
    for scale, name in ((1, "1.45 G"), (1000, "1.45 T")):
        took = order_s(lambda n=scale: reference_order(n).locate(np.arange(64)), 1e-3)  # type: ignore[misc]
        lines.append((f"start-up, {name} rows, ms of CPU", "the same", took))
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "rows"
        tokens = np.random.default_rng(0).integers(3, 32_768, (n_rows, SEQ_LEN), np.uint16)
        write_shards(source, tokens, 32_768)
        rates = loader_rates(source, n_rows)
        waited = waits(source, min(n_rows, 1600), 0.05)
        ratios = ratios_of_many_shards(Path(folder), tokens)
    lines += [
        ("rows read, verified, stacked, GB/s a process", ">= 1.5", spread(rates, "")),
        ("a random row of 2,500 shards, by one of 100", "<= 1.5", spread(ratios, "")),
        ("steps of 50 ms and 8 rows wait", "< 1 %", f"{waited:.2%} of the time"),
    ]
    print(f"{machine('numpy', 'torch')}\n")
    print("| what | bar | measured: median (least .. most) |\n|---|---|---|")
    print("\n".join(f"| {' | '.join(line)} |" for line in lines))


if __name__ == "__main__":
    main()
