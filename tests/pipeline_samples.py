"""Small corpora, a small vocabulary, and a walk over shards that uses numpy alone."""

import functools
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

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


LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@functools.cache
def byte_level(style: str, special: tuple[str, ...] = ("<|endoftext|>", "<|pad|>")) -> bytes:
    """A tokenizer.json of 500 entries in the style of gpt2, smollm, llama3, qwen, or `other`."""
    fast = tokenizers.Tokenizer(models.BPE(ignore_merges=style == "llama3"))
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False)
    cut = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pattern = LLAMA3.replace("{1,3}", "" if style == "qwen" else "{1,3}")
    if style == "other":
        pattern = r"\w+ ?|\W+"  # a space ends a word
    fast.pre_tokenizer = {
        "gpt2": whole,
        "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), whole]),
    }.get(style, pre_tokenizers.Sequence(
        [pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"), cut]
    ))  # fmt: skip
    fast.decoder = decoders.ByteLevel()
    if style == "qwen":
        fast.normalizer = normalizers.NFC()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    fast.train_from_iterator(TEXTS, trainers.BpeTrainer(
        vocab_size=500, special_tokens=list(special), initial_alphabet=alphabet,
        show_progress=False,
    ))  # fmt: skip
    if style == "qwen":
        fast.add_tokens(["<tool_call>"])  # not special: matched in text
    return fast.to_str().encode()


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
