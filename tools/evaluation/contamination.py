"""Contamination: which evaluation items share 13 words in a row with what a model was trained on.

Two figures for each task: over all training rows of the shards, and over the rows that a run has
drawn up to a checkpoint, which follow from its data order. The first follows documents from row to
row; in the second a row stands alone, as it did in training. An item below 13 words has no sequence
to look for and is left out of both.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.text.exclude import Exclusion
from pipeline.text.json_tokenizer import load_tokenizer
from pipeline.text.ngrams import BARRIER, N_WORDS, Wanted, grams_of, normalised
from shards.files import publish_bytes
from shards.reader import ShardReader, find_sources
from tools.errors import EvaluationError
from tools.evaluation.cards import Result
from tools.evaluation.datasets import read_questions, read_records
from tools.evaluation.scoring import Progress
from tools.evaluation.tasks import CORPORA, TASKS, TaskOptions
from tools.evaluation.wikitext import pages_of, read_text
from tools.tracing.run_trace import RunTrace, document_name
from trainer.checkpoint.storage import read_record

_ROWS_AT_ONCE: Final = 64
_EXAMPLES: Final = 3
_SAMPLES_AT_ONCE: Final = 1 << 20


def contamination(task: str, options: TaskOptions, progress: Progress | None = None) -> Result:
    """The share of a task's items (the first `limit`) that the training rows overlap with.

    With a checkpoint (`seen_by`), also with what its run had drawn by then, from the shards that
    the run names itself. `in_shards` and `seen` are what `_search` returns.
    """
    items, checkpoint = items_of(task, options.data)[: options.limit], options.seen_by
    wanted = Wanted(items)
    manifests = find_sources(options.shards)
    readers = {
        name: ShardReader(options.shards / name, "train", m) for name, m in manifests.items()
    }
    every = {name: np.arange(reader.n_rows) for name, reader in readers.items()}
    seen, next_index = None, None
    if checkpoint is not None:
        drawn_from, rows, next_index = _seen_rows(checkpoint)
        seen = _search(wanted, drawn_from, rows, apart=True)
    n_long = int(wanted.measurable.sum())
    settings = {
        "of": task,
        "items": len(items),
        "too_short": len(items) - n_long,
        "shards": str(options.shards),
        "roots": {name: manifest.root for name, manifest in manifests.items()},
        "in_shards": _search(wanted, readers, every, apart=False, progress=progress),
        "checkpoint": None if checkpoint is None else str(checkpoint),
        "next_index": next_index,
        "seen": seen,
    }
    return Result(
        task=task,
        metrics={},
        settings=settings,
        model={},
        about=f"contamination, items that share {N_WORDS} words in a row, of {n_long:,} "
        f"({len(items) - n_long:,} more are shorter)",
        notes=_notes(settings),
    )


def write_exclusion(tasks: Sequence[str], options: TaskOptions, path: Path) -> str:
    """Write the list for `summer-prep tokenize --exclude` of some tasks' items; says what it is.

    EvaluationError where no item has 13 words.
    """
    items = {task: items_of(task, options.data)[: options.limit] for task in tasks}
    made = Exclusion.of(items)
    if not len(made.grams.hashes):
        raise EvaluationError(f"no item of {', '.join(tasks)} has {N_WORDS} words: nothing to list")
    publish_bytes(path, made.data)
    return (
        f"{path}: {len(made.grams.hashes):,} sequences of {N_WORDS} words of "
        f"{sum(map(len, items.values())):,} items of {', '.join(tasks)}, "
        f"SHA-256 {made.described['sha256']}"
    )


def with_contamination(results: Sequence[Result], overlap: Result) -> list[Result]:
    """A task's results with the overlap of its items beside them."""
    line = f"{overlap['in_shards']['share']:.2%} of items share {N_WORDS} words with "
    line += overlap["shards"]
    if overlap["seen"] is not None:
        line += f", {overlap['seen']['share']:.2%} with what {overlap['checkpoint']} had seen"
    note, carried = f"overlap   {line}", {"contamination": overlap.to_json()}
    return [
        replace(each, settings={**each.settings, **carried}, notes=[*each.notes, note])
        for each in results
    ]


def items_of(task: str, data: Path | None = None) -> list[str]:
    """The text of each item: a question with its right answer, or a page."""
    if task in CORPORA:
        return pages_of(read_text(data, task).raw)
    if task not in TASKS:
        raise EvaluationError(f"contamination of {task}: it has no items; choose another --task")
    questions = read_questions(TASKS[task], read_records(data, TASKS[task].table))
    return [question.with_answer() for question in questions]


def _seen_rows(
    checkpoint: Path,
) -> tuple[Mapping[str, ShardReader], dict[str, npt.NDArray[np.int64]], int]:
    """The rows of each source that a run had drawn by a checkpoint, and how many samples that were.

    Samples that a rollback jumped over are counted as seen.
    """
    next_index = int(read_record(checkpoint)["next_index"])
    trace = RunTrace(checkpoint.resolve().parents[1])
    order = trace.order
    drawn = [np.zeros(n_rows, np.bool_) for n_rows in order.rows]
    for begin in range(0, next_index, _SAMPLES_AT_ONCE):
        located = order.locate(np.arange(begin, min(begin + _SAMPLES_AT_ONCE, next_index)))
        for number, mask in enumerate(drawn):
            mask[located.row[located.source == number]] = True
    masks = dict(zip(order.sources, drawn, strict=True))
    rows = {name: np.flatnonzero(masks[name]) for name in order.sources if name in trace.readers}
    return trace.readers, rows, next_index


def _search(
    wanted: Wanted,
    readers: Mapping[str, ShardReader],
    rows: Mapping[str, npt.NDArray[np.int64]],
    *,
    apart: bool,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """What is found of the wanted sequences in rows of some sources.

    Of the items that have 13 words: how many, and what share, have a sequence in the text. Then
    the mean share of an item's sequences (`gram_share`), the bytes searched, and examples.
    """
    started = time.monotonic()
    found = np.zeros(len(wanted.hashes), np.bool_)
    examples: dict[int, dict[str, Any]] = {}
    n_bytes, done, total = 0, 0, sum(map(len, rows.values()))
    for name, indices in rows.items():
        for block in _blocks(readers[name], indices, apart):
            n_bytes += len(block.text) - block.carried
            grams = grams_of(block.text)
            places, numbers = wanted.find(grams.hashes[:-1])  # the last may end in half a word
            for place, number in zip(places.tolist(), numbers.tolist(), strict=True):
                if len(examples) == _EXAMPLES:
                    break
                item = int(wanted.items_of(number)[0])
                if not found[number] and item not in examples:
                    span = int(grams.begins[place]), int(grams.ends[place])
                    examples[item] = _example(readers[name], block, span, item)
            found[numbers] = True
            done += len(block.rows)
            if progress is not None:
                progress(done, total)
    shares = wanted.per_item(found)[wanted.measurable]
    return {
        "items": int((shares > 0).sum()),
        "share": float((shares > 0).mean()) if len(shares) else 0.0,
        "gram_share": float(shares.mean()) if len(shares) else 0.0,
        "text_bytes": n_bytes,
        "examples": list(examples.values()),
        "time_s": time.monotonic() - started,
    }


class _Block(NamedTuple):
    """The normalised text of some rows, behind what was carried over from the rows before."""

    text: bytes
    carried: int
    rows: npt.NDArray[np.int64]
    row_ends: npt.NDArray[np.int64]


def _blocks(reader: ShardReader, indices: npt.NDArray[np.int64], apart: bool) -> Iterator[_Block]:
    """The rows' text a megabyte at a time; without `apart`, sequences run on between them."""
    decoder = _Decoder(reader)
    carried = b""
    for begin in range(0, len(indices), _ROWS_AT_ONCE):
        chosen = indices[begin : begin + _ROWS_AT_ONCE]
        ids = reader.rows(chosen)[0]
        if apart:
            ids = np.pad(ids, ((0, 0), (0, 1)), constant_values=decoder.barrier_id)
        ends = np.cumsum(decoder.sizes[ids].sum(axis=1))
        is_last = begin + _ROWS_AT_ONCE >= len(indices)
        text = carried + decoder.decode(ids.ravel()) + (BARRIER if is_last else b"")
        yield _Block(text, len(carried), chosen, ends)
        if not apart:  # the last 13 words, of which the last may be half a word
            words = text.rsplit(None, N_WORDS)
            carried = text[len(words[0]) :] if len(words) > N_WORDS else text


class _Decoder:
    """Ids -> normalised text, by one gather of bytes (joining pieces takes three times as long)."""

    def __init__(self, reader: ShardReader) -> None:
        tokenizer = load_tokenizer(reader.folder)
        pieces = [normalised(piece) for piece in tokenizer.token_bytes]
        self.barrier_id = tokenizer.bos_id
        pieces[self.barrier_id] = BARRIER
        self.sizes = np.array([len(piece) for piece in pieces], np.int32)
        self._starts = np.cumsum(self.sizes, dtype=np.int32) - self.sizes
        self._bytes = np.frombuffer(b"".join(pieces), np.uint8)

    def decode(self, ids: npt.NDArray[np.unsignedinteger]) -> bytes:
        """The text of ids in a row."""
        sizes = self.sizes[ids]
        ends = np.cumsum(sizes, dtype=np.int32)
        places = np.repeat(self._starts[ids] - (ends - sizes), sizes)
        places += np.arange(len(places), dtype=np.int32)
        decoded: bytes = self._bytes[places].tobytes()
        return decoded


def _example(
    reader: ShardReader, block: _Block, span: tuple[int, int], item: int
) -> dict[str, Any]:
    """An item that was found: the words, and the document that the row with them begins in."""
    words = block.text[slice(*span)].split()
    place = int(np.searchsorted(block.row_ends, span[1] - 1 - block.carried, side="right"))
    row = int(block.rows[min(place, len(block.rows) - 1)])
    _, part, record = reader.origin(row)
    return {
        "item": item,
        "words": b" ".join(words).decode(errors="replace"),
        "source": reader.manifest.facts.source,
        "row": row,
        "document": document_name(reader.manifest, part, record),
    }


def _notes(found: Mapping[str, Any]) -> list[str]:
    parts = [(f"in {found['shards']}", found["in_shards"])]
    if found["seen"] is not None:
        samples = f"{found['next_index']:,} samples"
        parts.append((f"seen by {found['checkpoint']}, {samples}", found["seen"]))
    return [
        *(
            f"  {part['items']:>6,} ({part['share']:.2%}; {part['gram_share']:.2%} of sequences) "
            f"{where}; {part['text_bytes'] / 1e6:,.1f} MB in {part['time_s']:.1f} s"
            for where, part in parts
        ),
        *(
            f"  e.g. item {each['item']} in {each['source']}, row {each['row']} (which begins in "
            f"{each['document']}): {each['words']}"
            for each in found["in_shards"]["examples"]
        ),
        *(f"shards    {name}: dataset hash {root}" for name, root in found["roots"].items()),
    ]
