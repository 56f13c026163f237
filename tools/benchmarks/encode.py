"""Encoding on one core: ours and sentencepiece, Hugging Face's tokenizers and gigatoken.

    python tools/benchmarks/encode.py                              # the standard library's sources
    python tools/benchmarks/encode.py --corpus web='web/*.parquet:text' --corpus x='x.jsonl:text'

All sides encode the same documents in the same process, in turns, `--repeats` times; a figure is MB
of UTF-8 a CPU second, the median of the turns with the lowest and highest. *Warm* is the same batch
again; *cold* is a fresh encoder's first 8 MB. Before anything is timed, every side's ids are
compared with sentencepiece's on every document: *other ids* is how many documents differ (ours has
to have none). Sides that are not installed are left out.
"""

from __future__ import annotations

import argparse
import contextlib
import glob
import io
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from measure import machine, spread
from pipeline.text.columnar import ColumnarEncoder
from pipeline.text.tokenizer import Tokenizer
from tools.models.tokenizer_json import tokenizer_json

COLD_BYTES = 8 << 20
Side = Callable[[Sequence[str]], Any]


def main() -> None:
    """Print the machine, then one line a corpus and side."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--corpus", action="append", default=[], metavar="NAME=GLOB:COLUMN")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--max-bytes", type=int, default=12 << 20)
    options = parser.parse_args()
    pa.set_cpu_count(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    print(machine("sentencepiece", "pyarrow", "tokenizers", "gigatoken"), end="\n\n")
    print("| corpus | side | other ids | warm MB/s | ours / side | cold MB/s | ours / side |")
    print("|---|---|---|---|---|---|---|")
    corpora = dict(text.split("=", 1) for text in options.corpus)
    for name, where in (corpora or {"python": ""}).items():
        texts = read(where, options.max_bytes)
        for line in compare(texts, options.repeats):
            print(f"| {name}, {line}", flush=True)


def read(where: str, max_bytes: int) -> list[str]:
    """Documents of `GLOB:COLUMN` up to so many bytes, or the standard library's top level."""
    if not where:
        files = sorted(Path(os.__file__).parent.glob("*.py"))
        return [path.read_text(errors="ignore") for path in files]
    pattern, column = where.rsplit(":", 1)
    texts: list[str] = []
    for path in sorted(glob.glob(pattern)):  # noqa: PTH207  (the pattern is a text of the user's)
        texts += read_file(Path(path), column)
        sizes = np.cumsum([len(text.encode()) for text in texts])
        if sizes[-1] >= max_bytes:
            return texts[: int(np.searchsorted(sizes, max_bytes)) + 1]
    if not texts:
        raise SystemExit(f"no file matches {pattern}")
    return texts


def read_file(path: Path, column: str) -> list[str]:
    """The documents of a parquet, jsonl or jsonl.zst file."""
    if path.suffix == ".parquet":
        return list(pq.read_table(path, columns=[column])[column].drop_null().to_pylist())
    with path.open("rb") as file:
        raw = zstandard.ZstdDecompressor().stream_reader(file) if path.suffix == ".zst" else file
        lines = io.TextIOWrapper(raw, encoding="utf-8", newline="\n")
        return [json.loads(line)[column] for line in lines]


def sides(tokenizer: Tokenizer) -> dict[str, Callable[[], Side]]:
    """Name -> what makes a fresh encoder."""

    def ours() -> Side:
        encoder = ColumnarEncoder(tokenizer)
        return lambda texts: encoder.encode(texts)

    found: dict[str, Callable[[], Side]] = {"ours": ours}
    found["sentencepiece"] = lambda: lambda texts: tokenizer.encode_all(list(texts))
    with contextlib.suppress(ImportError):
        found["tokenizers"] = hugging_face(tokenizer)
    with contextlib.suppress(ImportError):
        found["gigatoken"] = gigatoken(tokenizer)
    return found


def hugging_face(tokenizer: Tokenizer) -> Callable[[], Side]:
    """What makes a fresh encoder of Hugging Face's tokenizers."""
    import tokenizers

    description = json.dumps(tokenizer_json(tokenizer))

    def make() -> Side:
        encoder = tokenizers.Tokenizer.from_str(description)
        return lambda texts: encoder.encode_batch_fast(list(texts), add_special_tokens=False)

    return make


def gigatoken(tokenizer: Tokenizer) -> Callable[[], Side]:
    """What makes a fresh encoder of gigatoken."""
    import gigatoken  # type: ignore[import-not-found]

    def make() -> Side:
        encoder = gigatoken.Tokenizer.from_sentencepiece(tokenizer.model)
        return lambda texts: encoder.encode_batch(list(texts), parallel=False)

    return make


def other_ids(
    tokenizer: Tokenizer, texts: Sequence[str], encoded: dict[str, Any]
) -> dict[str, int]:
    """Documents to which each side gives other ids than sentencepiece does."""
    true = tokenizer.encode_all(list(texts))
    stream = encoded["ours"]
    ours = [ids[1:-1].tolist() for ids in np.split(stream.tokens, stream.starts[1:])]
    ids = {"ours": ours, "sentencepiece": encoded["sentencepiece"]}
    if "tokenizers" in encoded:
        ids["tokenizers"] = [encoding.ids for encoding in encoded["tokenizers"]]
    if "gigatoken" in encoded:
        ids["gigatoken"] = encoded["gigatoken"].to_list()
    return {
        side: sum(theirs != right for theirs, right in zip(found, true, strict=True))
        for side, found in ids.items()
    }


def compare(texts: Sequence[str], repeats: int) -> list[str]:
    """A table line a side. Ours is given Arrow, which is what a parquet file gives it."""
    tokenizer = Tokenizer.default()
    given = {"ours": pa.array(texts, pa.string())}
    sizes = np.cumsum([len(text.encode()) for text in texts])
    n_cold = int(np.searchsorted(sizes, COLD_BYTES)) + 1
    n_bytes, cold_bytes = sizes[-1], sizes[:n_cold][-1]
    makers = sides(tokenizer)
    encoders = {name: make() for name, make in makers.items()}
    first = {name: encode(given.get(name, texts)) for name, encode in encoders.items()}
    others = other_ids(tokenizer, texts, first)
    if others["ours"]:
        raise SystemExit(f"ours has other ids than sentencepiece on {others['ours']} documents")
    warm: dict[str, list[float]] = {name: [] for name in makers}
    cold: dict[str, list[float]] = {name: [] for name in makers}
    for _ in range(repeats):
        for name, make in makers.items():
            batch = given.get(name, texts)
            warm[name].append(n_bytes / 1e6 / cpu_seconds(encoders[name], batch))
            cold[name].append(cold_bytes / 1e6 / cpu_seconds(make(), batch[:n_cold]))
    return [
        f"{n_bytes / 1e6:.1f} MB | {name} | {others[name]:,} of {len(texts):,} "
        f"| {spread(warm[name], '')} | {ratio(warm, name)} "
        f"| {spread(cold[name], '')} | {ratio(cold, name)} |"
        for name in makers
    ]


def ratio(rates: dict[str, list[float]], name: str) -> str:
    """Ours over another side, turn by turn."""
    if name == "ours":
        return ""
    return spread([ours / its for ours, its in zip(rates["ours"], rates[name], strict=True)], "x")


def cpu_seconds(encode: Side, texts: Sequence[str]) -> float:
    """CPU seconds of one call."""
    start = time.process_time()
    encode(texts)
    return time.process_time() - start


if __name__ == "__main__":
    main()
