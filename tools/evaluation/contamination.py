"""Contamination: which evaluation items share 13 words in a row with what a model was trained on.

Two figures for each task: over all training rows of the shards, and over the rows that a run has
drawn up to its newest checkpoint, which its data order tells. The first follows documents from row
to row; in the second a row stands alone, as it did in training. An item below 13 words cannot be
judged and is left out of both.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from pipeline.text.tokenizer import Tokenizer
from shards.format import TOKENIZER, Manifest
from shards.reader import ShardReader, find_sources
from tools.evaluation.datasets import read_records
from tools.evaluation.multiple_choice import Setting
from tools.evaluation.ngrams import BARRIER, N_WORDS, Wanted, grams_of, normalised
from tools.evaluation.scoring import Progress
from tools.evaluation.tasks import find_task, read_questions
from tools.evaluation.wikitext import CONFIGS, pages_of, read_text
from tools.tracing.provenance import document_name
from tools.tracing.run_trace import RunTrace
from trainer.checkpoint.storage import read_record

_ROWS_AT_ONCE: Final = 64
_EXAMPLES: Final = 3
_SAMPLES_AT_ONCE: Final = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Example:
    """An item that was found: the words, and the document that the row with them begins in."""

    item: int
    words: str
    source: str
    row: int
    document: str


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """Of the items that can be judged: how many, and what share, have a sequence in the text.

    `gram_share` is the mean share of an item's sequences; `text_bytes` is what was searched.
    """

    items: int
    share: float
    gram_share: float
    text_bytes: int
    examples: tuple[Example, ...]
    time_s: float


@dataclass(frozen=True, kw_only=True)
class Contamination:
    """The overlap of a task with shards, and with what a run has seen of them (None: no run)."""

    task: str
    items: int
    too_short: int
    shards: str
    roots: dict[str, str]
    in_shards: Overlap
    checkpoint: str | None = None
    next_index: int | None = None
    seen: Overlap | None = None

    def to_json(self) -> dict[str, object]:
        """All figures under their names."""
        return {"task": "contamination", "of": self.task, **asdict(self)}

    @property
    def in_a_line(self) -> str:
        """The figures for a card."""
        line = f"{self.in_shards.share:.2%} of items share {N_WORDS} words with {self.shards}"
        seen = (
            ""
            if self.seen is None
            else f", {self.seen.share:.2%} with what {self.checkpoint} had seen"
        )
        return line + seen


def contamination(
    task: str,
    shards: Path,
    *,
    data: Path | None = None,
    checkpoint: Path | None = None,
    limit: int | None = None,
    progress: Progress | None = None,
) -> Contamination:
    """The share of a task's items (the first `limit`) that the training rows overlap with.

    With a checkpoint, also with what its run had drawn by then, from the shards that it names
    itself.
    """
    items = items_of(task, data)[:limit]
    wanted = Wanted(items)
    manifests = find_sources(shards)
    readers = {name: ShardReader(shards / name, "train", m) for name, m in manifests.items()}
    whole = {name: np.arange(reader.n_rows) for name, reader in readers.items()}
    seen, next_index = None, None
    if checkpoint is not None:
        drawn_from, rows, next_index = _seen_rows(checkpoint)
        seen = _search(wanted, drawn_from, rows, apart=True)
    return Contamination(
        task=task,
        items=len(items),
        too_short=int((~wanted.measurable).sum()),
        shards=str(shards),
        roots={name: manifest.root for name, manifest in manifests.items()},
        in_shards=_search(wanted, readers, whole, apart=False, progress=progress),
        checkpoint=None if checkpoint is None else str(checkpoint),
        next_index=next_index,
        seen=seen,
    )


def items_of(task: str, data: Path | None = None) -> list[str]:
    """The text of each item: a question with its right answer, or a page."""
    if task in CONFIGS:
        return pages_of(read_text(data, task).raw)
    found = find_task(task)
    questions = read_questions(found, read_records(Setting(data=data).data, found.table))
    return [question.solved() for question in questions]


def _seen_rows(
    checkpoint: Path,
) -> tuple[Mapping[str, ShardReader], dict[str, npt.NDArray[np.int64]], int]:
    """The rows of each source that a run had drawn by a checkpoint, and how many samples that were.

    Samples that a rollback jumped over are counted as seen.
    """
    next_index = int(read_record(checkpoint)["next_index"])
    trace = RunTrace(checkpoint.resolve().parents[1])
    drawn = {
        name: np.zeros(n_rows, np.bool_)
        for name, n_rows in zip(trace.order.sources, trace.order.rows, strict=True)
    }
    for begin in range(0, next_index, _SAMPLES_AT_ONCE):
        located = trace.order.locate(np.arange(begin, min(begin + _SAMPLES_AT_ONCE, next_index)))
        for number, name in enumerate(trace.order.sources):
            drawn[name][located.row[located.source == number]] = True
    rows = {name: np.flatnonzero(mask) for name, mask in drawn.items() if name in trace.readers}
    return trace.readers, rows, next_index


def _search(
    wanted: Wanted,
    readers: Mapping[str, ShardReader],
    rows: Mapping[str, npt.NDArray[np.int64]],
    *,
    apart: bool,
    progress: Progress | None = None,
) -> Overlap:
    """What is found of the wanted sequences in rows of some sources."""
    started = time.monotonic()
    found = np.zeros(len(wanted.hashes), np.bool_)
    examples: list[Example] = []
    n_bytes, done = 0, 0
    total = sum(map(len, rows.values()))
    spellers: dict[str, _Speller] = {}
    for name, indices in rows.items():
        manifest = readers[name].manifest
        sha256 = manifest.facts.tokenizer.sha256
        if sha256 not in spellers:
            spellers[sha256] = _Speller(readers[name].folder, manifest)
        for block in _blocks(readers[name], spellers[sha256], indices, apart):
            n_bytes += len(block.text) - block.carried
            grams = grams_of(block.text)
            places, numbers = wanted.find(grams.hashes[:-1])  # the last may end in half a word
            for place, number in zip(places.tolist(), numbers.tolist(), strict=True):
                if len(examples) < _EXAMPLES and not found[number]:
                    words = block.text[grams.begins[place] : grams.ends[place]]
                    row = block.row_at(int(grams.ends[place]) - 1)
                    item = int(wanted.items_of(number)[0])
                    if item not in {example.item for example in examples}:
                        examples.append(_example(readers[name], name, row, item, words))
                found[number] = True
            done += block.n_rows
            if progress is not None:
                progress(done, total)
    shares = wanted.per_item(found)[wanted.measurable]
    return Overlap(
        items=int((shares > 0).sum()),
        share=float((shares > 0).mean()) if len(shares) else 0.0,
        gram_share=float(shares.mean()) if len(shares) else 0.0,
        text_bytes=n_bytes,
        examples=tuple(examples),
        time_s=time.monotonic() - started,
    )


@dataclass(frozen=True)
class _Block:
    """The normalised text of some rows, behind what was carried over from the rows before."""

    text: bytes
    carried: int
    rows: npt.NDArray[np.int64]
    row_ends: npt.NDArray[np.int64]

    @property
    def n_rows(self) -> int:
        return len(self.rows)

    def row_at(self, byte: int) -> int:
        """The row that a byte of the text is in."""
        place = int(np.searchsorted(self.row_ends, byte - self.carried, side="right"))
        return int(self.rows[min(place, len(self.rows) - 1)])


def _blocks(
    reader: ShardReader, speller: _Speller, indices: npt.NDArray[np.int64], apart: bool
) -> Iterator[_Block]:
    """The rows' text a megabyte at a time; without `apart`, sequences run on between them."""
    carried = b""
    for begin in range(0, len(indices), _ROWS_AT_ONCE):
        chosen = indices[begin : begin + _ROWS_AT_ONCE]
        ids = reader.rows(chosen)[0]
        if apart:
            ids = np.pad(ids, ((0, 0), (0, 1)), constant_values=speller.barrier_id)
        ends = np.cumsum(speller.sizes[ids].sum(axis=1))
        is_last = begin + _ROWS_AT_ONCE >= len(indices)
        text = carried + speller.spell(ids.ravel()) + (BARRIER if is_last else b"")
        yield _Block(text, len(carried), chosen, ends)
        carried = b"" if apart else _tail(text)


def _tail(text: bytes) -> bytes:
    """The last 13 words, of which the last may be half a word."""
    words = text.rsplit(None, N_WORDS)
    return text if len(words) <= N_WORDS else text[len(words[0]) :]


class _Speller:
    """Ids -> normalised text, by one gather of bytes (joining pieces takes three times as long)."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        pieces = [normalised(p) for p in Tokenizer.load(folder / TOKENIZER).token_bytes]
        self.barrier_id = manifest.facts.tokenizer.bos_id
        pieces[self.barrier_id] = BARRIER
        self.sizes = np.array([len(piece) for piece in pieces], np.int32)
        self._starts = np.cumsum(self.sizes, dtype=np.int32) - self.sizes
        self._bytes = np.frombuffer(b"".join(pieces), np.uint8)

    def spell(self, ids: npt.NDArray[np.unsignedinteger]) -> bytes:
        """The text of ids in a row."""
        sizes = self.sizes[ids]
        ends = np.cumsum(sizes, dtype=np.int32)
        places = np.repeat(self._starts[ids] - (ends - sizes), sizes)
        places += np.arange(len(places), dtype=np.int32)
        spelled: bytes = self._bytes[places].tobytes()
        return spelled


def _example(reader: ShardReader, source: str, row: int, item: int, words: bytes) -> Example:
    _, part, record = reader.origin(row)
    spoken = b" ".join(words.split()).decode(errors="replace")
    document = document_name(reader.manifest, part, record)
    return Example(item=item, words=spoken, source=source, row=row, document=document)
