"""Encoding on one core: ours beside sentencepiece and, where it is installed, gigatoken.

    python tools/benchmarks/encode.py                             # the standard library's sources
    python tools/benchmarks/encode.py --corpus web='web/*.parquet:text'

All sides encode the same documents in the same process, in turns, `--repeats` times; a figure is MB
of UTF-8 a CPU second, the median of the turns with the lowest and highest. *Warm* is the same batch
again; *cold* is a fresh encoder's first 8 MB. Before anything is timed, our ids are compared with
sentencepiece's on every document.
"""

from __future__ import annotations

import argparse
import glob
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from measure import machine, spread
from pipeline.columnar import ColumnarEncoder
from pipeline.tokenizer import Tokenizer

COLD_BYTES = 8 << 20
Side = Callable[[Sequence[str]], object]


def main() -> None:
    """Print the machine, then one line a corpus and side."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--corpus", action="append", default=[], metavar="NAME=GLOB:COLUMN")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--max-bytes", type=int, default=24 << 20)
    options = parser.parse_args()
    pa.set_cpu_count(1)
    print(machine("sentencepiece", "pyarrow"), end="\n\n")
    print("| corpus | side | warm MB/s | ratio | cold MB/s | ratio |\n|---|---|---|---|---|---|")
    corpora = dict(text.split("=", 1) for text in options.corpus)
    for name, where in (corpora or {"python": ""}).items():
        texts = read(where, options.max_bytes)
        check(texts)
        for line in compare(texts, options.repeats):
            print(f"| {name} {line}", flush=True)


def read(where: str, max_bytes: int) -> list[str]:
    """Documents of parquet files `GLOB:COLUMN`, or the standard library's top-level sources."""
    if not where:
        files = sorted(Path(os.__file__).parent.glob("*.py"))
        return [path.read_text(errors="ignore") for path in files]
    pattern, column = where.rsplit(":", 1)
    texts: list[str] = []
    for path in sorted(glob.glob(pattern)):  # noqa: PTH207  (the pattern is a text of the user's)
        texts += pq.read_table(path, columns=[column])[column].drop_null().to_pylist()
    sizes = np.cumsum([len(text.encode()) for text in texts])
    return texts[: int(np.searchsorted(sizes, max_bytes)) + 1]


def check(texts: Sequence[str]) -> None:
    """Stop if one id differs from sentencepiece's."""
    tokenizer = Tokenizer.default()
    stream = ColumnarEncoder(tokenizer).encode(pa.array(texts, pa.string()))
    for text, ids in zip(texts, np.split(stream.tokens, stream.starts[1:]), strict=True):
        if ids[1:-1].tolist() != tokenizer.encode(text):
            raise SystemExit(f"other ids than sentencepiece's on {text[:80]!r}")


def sides() -> dict[str, Callable[[], Side]]:
    """Name -> what makes a fresh encoder."""
    tokenizer = Tokenizer.default()

    def ours() -> Side:
        encoder = ColumnarEncoder(tokenizer)
        return lambda texts: encoder.encode(texts)

    found: dict[str, Callable[[], Side]] = {"ours": ours}
    found["sentencepiece"] = lambda: lambda texts: tokenizer.encode_all(list(texts))
    try:
        import gigatoken  # type: ignore[import-not-found]
    except ImportError:
        return found

    def gigatoken_side() -> Side:
        encoder = gigatoken.Tokenizer.from_sentencepiece(tokenizer.model)
        return lambda texts: encoder.encode_batch(texts, parallel=False)

    found["gigatoken"] = gigatoken_side
    return found


def compare(texts: Sequence[str], repeats: int) -> list[str]:
    """A table line a side. Ours is given Arrow, which is what a parquet file gives it."""
    given = {"ours": pa.array(texts, pa.string())}
    n_bytes = sum(len(text.encode()) for text in texts)
    n_cold = int(np.searchsorted(np.cumsum([len(text.encode()) for text in texts]), COLD_BYTES)) + 1
    cold_bytes = sum(len(text.encode()) for text in texts[:n_cold])
    makers = sides()
    warm: dict[str, list[float]] = {name: [] for name in makers}
    cold: dict[str, list[float]] = {name: [] for name in makers}
    encoders = {name: make() for name, make in makers.items()}
    for name, encode in encoders.items():
        encode(given.get(name, texts))
    for _ in range(repeats):
        for name, make in makers.items():
            batch = given.get(name, texts)
            warm[name].append(n_bytes / 1e6 / cpu_seconds(encoders[name], batch))
            cold[name].append(cold_bytes / 1e6 / cpu_seconds(make(), batch[:n_cold]))
    ours_warm, ours_cold = np.median(warm["ours"]), np.median(cold["ours"])
    return [
        f"({n_bytes / 1e6:.1f} MB) | {name} | {spread(warm[name], '')} "
        f"| {ours_warm / np.median(warm[name]):.2f}x "
        f"| {spread(cold[name], '')} | {ours_cold / np.median(cold[name]):.2f}x |"
        for name in makers
    ]


def cpu_seconds(encode: Side, texts: Sequence[str]) -> float:
    """CPU seconds of one call."""
    start = time.process_time()
    encode(texts)
    return time.process_time() - start


if __name__ == "__main__":
    main()
