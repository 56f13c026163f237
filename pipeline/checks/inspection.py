"""What a folder of shards holds: counts, rejected records, padding, and sequences as text.

report(folder)                 numbers about a source
show_row(folder, split, 17)    one row as text, cut where documents begin and end
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from pipeline.errors import PrepareError
from pipeline.text.tokenizer import Tokenizer
from shards.format import TOKENIZER, Manifest, Split, Tokens
from shards.reader import ShardReader, read_manifest

ROWS_AT_ONCE: Final = 1024
TOP_TOKENS: Final = 20


@dataclass(frozen=True)
class SourceReport:
    """Numbers about a prepared source."""

    manifest: Manifest
    padding: int
    """Places of rows that hold no token."""
    cut_documents: int
    """Documents that run on into another row."""
    counts: npt.NDArray[np.int64]
    """How often each id occurs. [vocab_size]"""

    @property
    def cut_share(self) -> float:
        """The share of documents that run on into another row."""
        return self.cut_documents / max(1, self.manifest.n_documents)

    def histogram(self) -> dict[int, int]:
        """{0: ids that never occur, 1: those that occur 1 to 9 times, 10: 10 to 99 times, ...}."""
        digits = np.array([len(str(count)) if count else 0 for count in self.counts.tolist()])
        return {10 ** (n - 1) if n else 0: int(found)
                for n, found in enumerate(np.bincount(digits))}  # fmt: skip

    def to_json(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """The report for a script."""
        facts = self.manifest.to_json()
        del facts["parts"], facts["shards"]
        top = np.argsort(-self.counts, kind="stable")[:TOP_TOKENS]
        return {
            **facts,
            "n_files": len({part.file for part in self.manifest.parts}),
            "n_shards": len(self.manifest.shards),
            "padding": self.padding,
            "cut_documents": self.cut_documents,
            "cut_share": self.cut_share,
            "ids_used": int(np.count_nonzero(self.counts)),
            "histogram": self.histogram(),
            "top_tokens": {tokenizer.piece(int(i)): int(self.counts[i]) for i in top},
        }


def report(folder: Path) -> SourceReport:
    """The numbers; every row is read and checked on the way."""
    manifest = read_manifest(folder)
    tokenizer = manifest.facts.tokenizer
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    cut = 0
    for split in ("train", "val"):
        open_document = False  # whether the row before ended inside a document that began in it
        for rows in _row_batches(ShardReader(folder, split, manifest)):
            counts += np.bincount(rows.reshape(-1), minlength=tokenizer.vocab_size)
            begins = rows == tokenizer.bos_id
            runs_on = ~begins[:, 0] & (rows[:, 0] != tokenizer.pad_id)
            cut += int(np.count_nonzero(runs_on[1:] & begins[:-1].any(axis=1)))
            cut += int(open_document and runs_on[0])
            open_document = bool(begins[-1].any())
    padding = int(counts[tokenizer.pad_id])
    counts[tokenizer.pad_id] = 0
    return SourceReport(manifest, padding, cut, counts)


def show_row(folder: Path, split: Split, index: int) -> str:
    """A row for a person, documents apart; PrepareError if there are not so many."""
    reader = ShardReader(folder, split)
    if not 0 <= index < reader.n_rows:
        raise PrepareError(
            f"{folder} has {reader.n_rows:,} {split} sequences: there is no sequence {index}"
        )
    tokens = reader.rows(np.array([index]))[0][0]
    facts = reader.manifest.facts.tokenizer
    tokenizer = Tokenizer.load(folder / TOKENIZER, facts.name)
    file, part, record = reader.origin(index)
    lines = [f"=== sequence {index}: {file}, part {part}, record {record}"]
    text = tokens[tokens != facts.pad_id]
    for piece in filter(len, np.split(text, np.flatnonzero(text == facts.bos_id))):
        begins, ends = piece[0] == facts.bos_id, piece[-1] == facts.eos_id
        lines += ["--- document begins" if begins else "--- continued from the sequence before"]
        lines += [tokenizer.decode(piece)]
        lines += ["--- document ends" if ends else "--- runs on into the next sequence"]
    padding = len(tokens) - len(text)
    return "\n".join(lines + [f"--- {padding} places of padding"] * (padding > 0))


def _row_batches(reader: ShardReader) -> Iterator[Tokens]:
    for first in range(0, reader.n_rows, ROWS_AT_ONCE):
        yield reader.rows(np.arange(first, min(first + ROWS_AT_ONCE, reader.n_rows)))[0]


def summary_lines(folder: Path, manifest: Manifest) -> str:
    """What a preparation made, for a person."""
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


def report_lines(folder: Path, found: SourceReport, tokenizer: Tokenizer) -> str:
    """The report for a person."""
    manifest = found.manifest
    facts = manifest.facts
    places = manifest.n_rows * facts.seq_len
    lines = [
        f"{folder}: {facts.source}, from {facts.dataset} {facts.revision}".rstrip(),
        f"  licence    {facts.licence}",
        f"  tokenizer  {facts.tokenizer.name}, {facts.tokenizer.vocab_size:,} entries, "
        f"{np.count_nonzero(found.counts):,} of them used",
        f"  documents  {manifest.n_documents:,}, of which {found.cut_documents:,} "
        f"({found.cut_share:.1%}) run on into another sequence",
        f"  tokens     {manifest.n_tokens:,}, and {found.padding:,} places of padding "
        f"({found.padding / max(1, places):.2%})",
        f"  sequences  {manifest.n_rows - manifest.n_val_rows:,} for training, "
        f"{manifest.n_val_rows:,} held out, of {facts.seq_len} {facts.dtype} ({facts.packing})",
        f"  files      {len({part.file for part in manifest.parts}):,} read, "
        f"{len(manifest.shards):,} shards written",
        f"  rejected   {sum(manifest.rejected.values()):,} records",
    ]
    lines += [f"             {count:,} {reason}" for reason, count in manifest.rejected.items()]
    top = np.argsort(-found.counts, kind="stable")[:TOP_TOKENS]
    spelled = (f"{tokenizer.piece(int(i))} {found.counts[i] / manifest.n_tokens:.1%}" for i in top)
    lines += [f"  frequent   {', '.join(spelled)}"]
    often = (f"{least}-{10 * least - 1} times {ids:,}" if least else f"never {ids:,}"
             for least, ids in found.histogram().items())  # fmt: skip
    lines += [f"  ids occur  {', '.join(often)}", f"  hash       {manifest.root}"]
    return "\n".join(lines)
