"""Small corpora, a small vocabulary, and a walk over shards that uses numpy alone."""

import functools
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.estimate import PrepareListener
from pipeline.inputs.listing import local_inputs
from pipeline.inputs.sources import Source, SourceOverrides, find
from pipeline.prepare import prepare
from pipeline.text.documents import DocumentMaker
from pipeline.text.tokenizer import Tokenizer, train
from pipeline.units.executors import Executor
from pipeline.units.recipe import PrepareRequest
from pipeline.units.units import cut_into_parts
from shards.format import Manifest

WORDS = "the cat sat on a mat and then it rained all day long in London while 42 dogs barked"
TEXT = Source(name="mine", about="", licence="")
TEXTS = [f"{WORDS[n % 40 :]}, number {n}.\n{WORDS * (n % 7)}" for n in range(300)]


@functools.cache
def tokenizer() -> Tokenizer:
    """A vocabulary of 400 entries, learnt in a tenth of a second."""
    return Tokenizer(train(TEXTS, 400), "small")


def write_parquet(path: Path, rows: list[Any], column: str = "text", group: int = 1000) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"id": list(range(len(rows))), column: rows})
    pq.write_table(table, path, row_group_size=group)
    return path


def write_jsonl(path: Path, rows: list[Any], column: str = "text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"id": n, column: row}) + "\n"
                            for n, row in enumerate(rows)))  # fmt: skip
    return path


def corpus(folder: Path, n_files: int = 6, per_file: int = 80) -> Any:
    """Files of several kinds with documents that are message apart by their numbers."""
    rng = random.Random(0)
    texts = []
    for number in range(n_files):
        rows = [f"{number}/{n} {rng.choice(TEXTS) * rng.randrange(4)}" for n in range(per_file)]
        texts += rows
        if number % 2:
            write_parquet(folder / f"{number}.parquet", rows, group=30)
        else:
            write_jsonl(folder / f"{number}.jsonl", rows)
    return texts


def request(out: Path, files: str, name: str = "mine", **changes: Any) -> PrepareRequest:
    """A small request: rows of 64 tokens, units of 16 kB."""
    settings = {"seq_len": 64, "val_fraction": 0.1, "unit_bytes": 1 << 14, "check_encoding": 1}
    return PrepareRequest(
        source=find(name, SourceOverrides(data_files=(files,))),
        tokenizer=changes.pop("tokenizer", None) or tokenizer(),
        out=out,
        data_files=(files,),
        **{**settings, **changes},
    )


def prepared(wanted: PrepareRequest, workers: int = 1) -> Manifest:
    manifest = prepare(wanted, Executor(workers=workers), PrepareListener())
    assert manifest is not None
    return manifest


def documents(folder: Path) -> list[list[int]]:
    """The ids of every document, BOS and EOS included, train and held out."""
    manifest = json.loads((folder / "manifest.json").read_text())
    facts, found = manifest["tokenizer"], []
    for split in ("train", "val"):
        streams: dict[str, list[Any]] = {}
        for shard in manifest["shards"]:
            if shard["split"] == split:
                unit = shard["file"].split("-")[0]
                streams.setdefault(unit, []).append(np.load(folder / shard["file"]))
        for rows in streams.values():
            stream = np.concatenate(rows).reshape(-1)
            stream = stream[: np.flatnonzero(stream != facts["pad_id"])[-1] + 1]
            assert stream[0] == facts["bos_id"]
            starts = np.flatnonzero(stream == facts["bos_id"])
            found += [piece.tolist() for piece in np.split(stream, starts[1:])]
    return found


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def read(pattern: Any, source: Source = TEXT) -> Any:
    """(texts, [(file, record, reason)]) of everything that the pattern matches."""
    inputs = local_inputs((str(pattern),))
    maker = DocumentMaker(source, 0.0)
    parts = enumerate(weighed.part for weighed in cut_into_parts(inputs, source))
    texts = [
        text for documents in maker.read(inputs, parts) for text in documents.texts.to_pylist()
    ]
    return texts, [(entry["file"], entry["record"], entry["reason"]) for entry in maker.rejected]


def is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    return True
