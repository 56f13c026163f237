"""Encoding on one core: ours and sentencepiece, Hugging Face's tokenizers and gigatoken.

    python tools/benchmarks/encode.py --repeats 2                  # the standard library's sources
    python tools/benchmarks/encode.py --corpus web='web/*.parquet:text' x='x.jsonl.zst:text'

All sides encode the same documents in the same process, in turns, `--repeats` times; a figure is MB
of UTF-8 a CPU second, the median of the turns with the lowest and highest. *Warm* is the same batch
again; *cold* is a fresh encoder's first 8 MB. Before anything is timed, every side's ids are
compared with sentencepiece's on every document: *other ids* is how many documents differ (ours has
to have none). Sides that are not installed are left out.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.json as pj
import pyarrow.parquet as pq

from measure import cpu_seconds, in_turns, machine, parse, ratios, spread
from pipeline.text.columnar import ColumnarEncoder
from pipeline.text.tokenizer import Tokenizer
from tools.models.tokenizers import tokenizer_json

COLD_BYTES = 8 << 20
Encode = Callable[[Sequence[str]], Any]


def main() -> None:
    """Print the machine, then one line a corpus and side."""
    options = parse(
        __doc__,
        corpus={"default": [], "metavar": "NAME=GLOB:COLUMN"},
        repeats=5,
        max_bytes={"default": 12 << 20, "help": "of each corpus"},
    )
    pa.set_cpu_count(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    print(machine("sentencepiece", "pyarrow", "tokenizers", "gigatoken"), end="\n\n")
    print("| corpus | side | other ids | warm MB/s | ours / side | cold MB/s | ours / side |")
    print("|---|---|---|---|---|---|---|")
    corpora = dict(text.split("=", 1) for text in options.corpus)
    for name, where in (corpora or {"python": ""}).items():
        for line in compare(read(where, options.max_bytes), options.repeats):
            print(f"| {name}, {line}", flush=True)


def read(where: str, max_bytes: int) -> list[str]:
    """Documents of `GLOB:COLUMN` up to so many bytes, or the standard library's top level."""
    if not where:
        texts = [
            p.read_text(errors="ignore") for p in sorted(Path(os.__file__).parent.glob("*.py"))
        ]
    else:
        pattern, column = where.rsplit(":", 1)
        texts = []
        for path in sorted(glob.glob(pattern)):  # noqa: PTH207  (the pattern is a text of the user's)
            if path.endswith(".parquet"):
                table = pq.read_table(path, columns=[column])
            else:
                block = pj.ReadOptions(block_size=64 << 20)
                table = pj.read_json(pa.input_stream(path), block)  # also compressed
            texts += table[column].drop_null().to_pylist()
    if not texts:
        raise SystemExit(f"no text in {where}")
    sizes = np.cumsum([len(text.encode()) for text in texts])
    return texts[: int(np.searchsorted(sizes, max_bytes)) + 1]


def sides(tokenizer: Tokenizer) -> dict[str, Callable[[], Encode]]:
    """Name -> what makes a fresh encoder."""
    found: dict[str, Callable[[], Encode]] = {
        "ours": lambda: ColumnarEncoder(tokenizer).encode,
        "sentencepiece": lambda: lambda texts: tokenizer.encode_all(list(texts)),
    }
    with contextlib.suppress(ImportError):
        import tokenizers

        described = json.dumps(tokenizer_json(tokenizer))
        found["tokenizers"] = lambda: partial(
            tokenizers.Tokenizer.from_str(described).encode_batch_fast, add_special_tokens=False
        )
    with contextlib.suppress(ImportError):
        import gigatoken  # type: ignore[import-not-found]

        found["gigatoken"] = lambda: partial(
            gigatoken.Tokenizer.from_sentencepiece(tokenizer.model).encode_batch, parallel=False
        )
    return found


def other_ids(encoded: dict[str, Any]) -> dict[str, int]:
    """Documents to which each side gives other ids than sentencepiece does."""
    stream = encoded["ours"]
    ours = [ids[1:-1].tolist() for ids in np.split(stream.tokens, stream.starts[1:])]
    ids = {"ours": ours, "sentencepiece": encoded["sentencepiece"]}
    if "tokenizers" in encoded:
        ids["tokenizers"] = [encoding.ids for encoding in encoded["tokenizers"]]
    if "gigatoken" in encoded:
        ids["gigatoken"] = encoded["gigatoken"].to_list()
    true = encoded["sentencepiece"]
    return {
        side: sum(theirs != right for theirs, right in zip(found, true, strict=True))
        for side, found in ids.items()
    }


def compare(texts: list[str], repeats: int) -> Iterator[str]:
    """A table line a side. Ours is given Arrow, which is what a parquet file gives it."""
    sizes = np.cumsum([len(text.encode()) for text in texts])
    n_cold = int(np.searchsorted(sizes, COLD_BYTES)) + 1
    n_bytes, cold_bytes = sizes[-1], sizes[:n_cold][-1]
    makers = sides(Tokenizer.default())
    given: dict[str, Any] = {**dict.fromkeys(makers, texts), "ours": pa.array(texts, pa.string())}
    encoders = {name: make() for name, make in makers.items()}
    others = other_ids({name: encode(given[name]) for name, encode in encoders.items()})
    if others["ours"]:
        raise SystemExit(f"ours has other ids than sentencepiece on {others['ours']} documents")

    def rates(name: str) -> tuple[float, float]:
        first = given[name][:n_cold]
        warm = n_bytes / cpu_seconds(lambda: encoders[name](given[name]))
        fresh = makers[name]()
        return warm / 1e6, cold_bytes / cpu_seconds(lambda: fresh(first)) / 1e6

    found = in_turns({name: partial(rates, name) for name in makers}, repeats)
    columns = {name: list(zip(*pairs, strict=True)) for name, pairs in found.items()}
    for name, pair in columns.items():
        line = f"{n_bytes / 1e6:.1f} MB | {name} | {others[name]:,} of {len(texts):,} |"
        for mine, its in zip(columns["ours"], pair, strict=True):
            line += f" {spread(its, '')} | {ratios(mine, its) if name != 'ours' else ''} |"
        yield line


if __name__ == "__main__":
    main()
