"""What a folder of shards holds: counts, rejected records, padding, and sequences as text."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from pipeline.errors import PrepareError
from pipeline.text.json_tokenizer import load_tokenizer
from shards.files import json_bytes
from shards.format import Manifest, Split
from shards.reader import ShardReader, read_manifest

ROWS_AT_ONCE: Final = 1024
TOP_TOKENS: Final = 20


def report(folder: Path) -> dict[str, Any]:
    """Facts about a prepared source, for a script; every row is read and checked on the way.

    Besides the manifest's: `padding` (places that hold no token), `cut_documents` (those that run
    on into another row), `histogram` ({0: ids that never occur, 1: those that occur 1 to 9 times,
    10: 10 to 99 times, ...}) and `top_tokens` ({piece: how often it occurs}).
    """
    manifest = read_manifest(folder)
    info = manifest.facts.tokenizer
    tokenizer = load_tokenizer(folder, info.name)
    counts, cut = _counted(folder, manifest)
    padding = int(counts[info.pad_id])
    counts[info.pad_id] = 0
    digits = [len(str(count)) if count else 0 for count in counts.tolist()]
    top = np.argsort(-counts, kind="stable")[:TOP_TOKENS].tolist()
    return {
        **_manifest_facts(manifest),
        "n_files": len({part.file for part in manifest.parts}),
        "n_shards": len(manifest.shards),
        "padding": padding,
        "cut_documents": cut,
        "cut_share": cut / max(1, manifest.n_documents),
        "ids_used": int(np.count_nonzero(counts)),
        "histogram": {10 ** (n - 1) if n else 0: found
                      for n, found in enumerate(np.bincount(digits).tolist())},
        "top_tokens": {tokenizer.piece(i): int(counts[i]) for i in top},
    }  # fmt: skip


def _manifest_facts(manifest: Manifest) -> dict[str, Any]:
    return {k: v for k, v in manifest.to_json().items() if k not in ("parts", "shards")}


def _counted(folder: Path, manifest: Manifest) -> tuple[npt.NDArray[np.int64], int]:
    """How often each id occurs [vocab_size], and the documents that run on into another row."""
    tokenizer = manifest.facts.tokenizer
    counts, cut = np.zeros(tokenizer.vocab_size, np.int64), 0
    for split in ("train", "val"):
        open_document = False  # whether the row before ended inside a document that began in it
        reader = ShardReader(folder, split, manifest)
        for first in range(0, reader.n_rows, ROWS_AT_ONCE):
            rows, _ = reader.rows(np.arange(first, min(first + ROWS_AT_ONCE, reader.n_rows)))
            counts += np.bincount(rows.reshape(-1), minlength=tokenizer.vocab_size)
            begins = rows == tokenizer.bos_id
            runs_on = ~begins[:, 0] & (rows[:, 0] != tokenizer.pad_id)
            cut += int(np.count_nonzero(runs_on[1:] & begins[:-1].any(axis=1)))
            cut += int(open_document and runs_on[0])
            open_document = bool(begins[-1].any())
    return counts, cut


def escaped(text: str) -> str:
    """Text as a terminal may show it: control characters are spelled, but line ends and tabs."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


def show_row(folder: Path, split: Split, index: int) -> str:
    """A row for a person, documents apart; PrepareError if there are not so many."""
    reader = ShardReader(folder, split)
    if not 0 <= index < reader.n_rows:
        raise PrepareError(
            f"{folder} has {reader.n_rows:,} {split} sequences: there is no sequence {index}"
        )
    tokens = reader.rows(np.array([index]))[0][0]
    facts = reader.manifest.facts.tokenizer
    tokenizer = load_tokenizer(folder, facts.name)
    file, part, record = reader.origin(index)
    lines = [f"=== sequence {index}: {file}, part {part}, record {record}"]
    text, done = tokens[tokens != facts.pad_id], 0
    for piece in filter(len, np.split(text, np.flatnonzero(text == facts.bos_id))):
        # a next document or padding shows the end where EOS is the BOS of the next
        done += len(piece)
        begins, ends = piece[0] == facts.bos_id, piece[-1] == facts.eos_id
        ends = done < len(tokens) if not tokenizer.closing else ends
        lines += ["--- document begins" if begins else "--- continued from the sequence before"]
        lines += [escaped(tokenizer.decode(piece))]
        lines += ["--- document ends" if ends else "--- runs on into the next sequence"]
    padding = len(tokens) - len(text)
    return "\n".join(lines + [f"--- {padding} places of padding"] * (padding > 0))


def summary(folder: Path, manifest: Manifest, as_json: bool) -> str:
    """What a preparation made, for a person or as JSON."""
    if as_json:
        return json_bytes(_manifest_facts(manifest)).decode().rstrip()
    n_train = manifest.n_rows - manifest.n_val_rows
    lines = [
        f"{folder}: {manifest.n_documents:,} documents, {manifest.n_tokens:,} tokens in "
        f"{n_train:,} sequences of {manifest.facts.seq_len} for training and "
        f"{manifest.n_val_rows:,} held out"
    ]
    if not manifest.n_val_rows and manifest.facts.val_fraction:
        lines += ["  no document is held out: the source is small; --val-fraction 0.01 takes more"]
    for reason, count in manifest.rejected.items():
        lines += [f"  rejected: {count:,} records, {reason} (see *.rejected.jsonl)"]
    return "\n".join([*lines, f"  dataset hash {manifest.root}"])


def report_lines(facts: dict[str, Any]) -> str:
    """The report for a person."""
    tokenizer, n_tokens = facts["tokenizer"], facts["n_tokens"]
    places = max(1, facts["n_rows"] * facts["seq_len"])
    rejected = "".join(f"; {count:,} {reason}" for reason, count in facts["rejected"].items())
    top = (f"{piece} {count / n_tokens:.1%}" for piece, count in facts["top_tokens"].items())
    often = (f"{least}-{10 * least - 1} times {ids:,}" if least else f"never {ids:,}"
             for least, ids in facts["histogram"].items())  # fmt: skip
    shown = {
        "source": f"{facts['source']}, from {facts['dataset']} {facts['revision']}".rstrip(),
        "licence": facts["licence"],
        "tokenizer": f"{tokenizer['name']}, {tokenizer['vocab_size']:,} entries, "
        f"{facts['ids_used']:,} of them used",
        "documents": f"{facts['n_documents']:,}, of which {facts['cut_documents']:,} "
        f"({facts['cut_share']:.1%}) run on into another sequence",
        "tokens": f"{n_tokens:,}, and {facts['padding']:,} places of padding "
        f"({facts['padding'] / places:.2%})",
        "sequences": f"{facts['n_rows'] - facts['n_val_rows']:,} for training, "
        f"{facts['n_val_rows']:,} held out, of {facts['seq_len']} {facts['dtype']} "
        f"({facts['packing']})",
        "files": f"{facts['n_files']:,} read, {facts['n_shards']:,} shards written",
        "rejected": f"{sum(facts['rejected'].values()):,} records{rejected}",
        "frequent": ", ".join(top),
        "occur": ", ".join(often),
        "hash": facts["root"],
    }
    return "\n".join(f"{name:<10} {text}" for name, text in shown.items())
