"""Records -> documents: texts as they are, pages joined from lines, or conversations.

What is rejected is listed, {reason, file, record} each. Its text alone decides what is held out.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from pipeline.inputs.inputs import Inputs
from pipeline.inputs.reading import PartReader
from pipeline.inputs.records import BAD_UTF8, LARGE, MAX_RECORD_BYTES, MISSING, Records
from pipeline.inputs.sources import Source
from pipeline.text.chat import BadConversationError, render, spell
from shards.format import Flags, Ordinals, Part

EMPTY: Final = "empty"
PAGE_TITLE: Final = re.compile(r" = [^=].*[^=] = \n?")
PAGES_AT_ONCE: Final = 256

Rejected = dict[str, str | int]
Screen = Callable[[pa.Array], dict[int, str]]
"""Of texts, those that are not to become documents, by place, each with the reason."""


@dataclass(frozen=True)
class Documents:
    """Some documents. `parts`, `records` (where each is from) and `held` have one entry for each.

    `texts` has one text a document; of conversations one a turn, `turns` saying how many each.
    """

    texts: pa.Array
    parts: Ordinals
    records: Ordinals
    held: Flags
    turns: npt.NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.records)

    def first(self, n: int) -> Documents:
        """The first n of them."""
        texts = n if self.turns is None else int(self.turns[:n].sum())
        turns = None if self.turns is None else self.turns[:n]
        parts, records, held = self.parts[:n], self.records[:n], self.held[:n]
        return Documents(self.texts[:texts], parts, records, held, turns)

    def choose(self, chosen: Flags) -> Documents:
        """Those for which chosen [n] is true."""
        texts = chosen if self.turns is None else np.repeat(chosen, self.turns)
        turns = None if self.turns is None else self.turns[chosen]
        return Documents(
            self.texts.filter(pa.array(texts)),
            self.parts[chosen],
            self.records[chosen],
            self.held[chosen],
            turns,
        )

    @classmethod
    def concat(cls, several: list[Documents]) -> Documents:
        """All of them as one."""
        if len(several) == 1:
            return several[0]
        turns = [documents.turns for documents in several if documents.turns is not None]
        return cls(
            pa.concat_arrays([documents.texts for documents in several]),
            np.concatenate([documents.parts for documents in several]),
            np.concatenate([documents.records for documents in several]),
            np.concatenate([documents.held for documents in several]),
            np.concatenate(turns) if turns else None,
        )


def in_batches(stream: Iterable[Documents], batch_bytes: int) -> Iterator[Documents]:
    """The same documents in batches of at least that size: small files cost no more than large."""
    waiting: list[Documents] = []
    waiting_bytes = 0
    for documents in filter(len, stream):
        waiting.append(documents)
        waiting_bytes += documents.texts.nbytes
        if waiting_bytes >= batch_bytes:
            yield Documents.concat(waiting)
            waiting, waiting_bytes = [], 0
    if waiting:
        yield Documents.concat(waiting)


class DocumentMaker:
    """Turns the records of one source into documents and keeps the list of what it rejected."""

    def __init__(
        self, source: Source, val_fraction: float, screens: tuple[Screen, ...] = ()
    ) -> None:
        self._source, self._screens = source, screens
        self._held_below = round(val_fraction * (1 << 16))
        self.rejected: list[Rejected] = []
        self.shares: dict[int, float] = {}
        """Of each part that was begun, by its number, how much of it has been read."""

    def read(self, inputs: Inputs, parts: Iterable[tuple[int, Part]]) -> Iterator[Documents]:
        """The documents of parts, given with their numbers in the plan, in order."""
        with contextlib.closing(PartReader(inputs, self._source)) as reader:
            for number, part in parts:
                for documents in self.documents(number, part, reader.read(part)):
                    self.shares[number] = min(1.0, reader.share)
                    yield self._screened(part, documents)

    def documents(self, number: int, part: Part, batches: Iterable[Records]) -> Iterator[Documents]:
        """The documents of the plan's part of that number, in order."""
        if self._source.shape == "lines":
            pages = self._pages(part, batches)
            while batch := list(itertools.islice(pages, PAGES_AT_ONCE)):
                texts = pa.array([text for _, text in batch], pa.large_string())
                yield self._of(number, texts, [first for first, _ in batch])
            return
        make = self._conversations if self._source.shape == "chat" else self._texts
        for records in batches:
            yield make(number, part, records)

    def _screened(self, part: Part, documents: Documents) -> Documents:
        """Without those that a screen names; of a conversation one turn is enough."""
        reasons: dict[int, str] = {}
        for place, reason in itertools.chain.from_iterable(
            screen(documents.texts).items() for screen in self._screens
        ):
            if documents.turns is not None:
                place = int(np.searchsorted(np.cumsum(documents.turns), place, side="right"))
            reasons.setdefault(place, reason)
        if not reasons:
            return documents
        kept = np.ones(len(documents), np.bool_)
        for place in sorted(reasons):
            kept[place] = False
            self._reject(part, int(documents.records[place]), reasons[place])
        return documents.choose(kept)

    def _of(self, number: int, texts: pa.Array, records: Any) -> Documents:
        held = held_out(texts, self._held_below)
        parts = np.full(len(texts), number, np.uint32)
        return Documents(texts, parts, np.asarray(records, np.uint32), held)

    def _reject(self, part: Part, record: int, reason: str) -> None:
        self.rejected.append({"reason": reason, "file": part.file, "record": record})

    def _texts(self, number: int, part: Part, records: Records) -> Documents:
        texts, reasons = valid_texts(records)
        good = np.ones(len(texts), np.bool_)
        for place, reason in sorted(reasons.items()):
            good[place] = False
            self._reject(part, records.first + place, reason)
        if reasons:
            texts = texts.filter(pa.array(good))
        return self._of(number, texts, records.first + np.flatnonzero(good))

    def _pages(self, part: Part, batches: Iterable[Records]) -> Iterator[tuple[int, str]]:
        """Lines joined into pages, each with the number of its first line.

        A page begins at its title, ` = Title = `. The parquet files of such a data set keep an
        empty text for a blank line, which reads ` \n` in the raw file: it is put back, so that
        both give the same pages.
        """
        lines: list[str] = []
        begun, titled = 0, False
        for record, line in self._lines(part, batches):
            if PAGE_TITLE.fullmatch(line):
                if titled:
                    yield begun, "".join(lines)
                    lines, begun = [], record
                titled = True
            lines.append(line or " \n")
        if lines:
            yield begun, "".join(lines)

    def _lines(self, part: Part, batches: Iterable[Records]) -> Iterator[tuple[int, str]]:
        for records in batches:
            texts, reasons = valid_texts(records)
            for place, line in enumerate(texts.to_pylist()):
                reason = reasons.get(place, EMPTY)
                if reason == EMPTY:
                    yield records.first + place, line
                else:
                    self._reject(part, records.first + place, reason)

    def _conversations(self, number: int, part: Part, records: Records) -> Documents:
        conversations: list[list[str]] = []
        ordinals: list[int] = []
        for place, value in enumerate(_as_list(records.values)):
            reason = records.reasons.get(place, MISSING if value is None else "")
            try:
                if not reason:
                    conversations.append(_rendered(value))
                    ordinals.append(records.first + place)
            except BadConversationError as error:
                reason = str(error)
            if reason:
                self._reject(part, records.first + place, reason)
        joined = self._of(number, pa.array(map(spell, conversations), pa.large_string()), ordinals)
        texts = pa.array(itertools.chain.from_iterable(conversations), pa.large_string())
        counts = np.array([len(turns) for turns in conversations], np.int64)
        return Documents(texts, joined.parts, joined.records, joined.held, counts)


def valid_texts(records: Records) -> tuple[pa.Array, dict[int, str]]:
    """The records as strings, and the reason of each that is no text.

    A rejected record is null, or, if its reason is EMPTY, an empty string.
    """
    data = records.values
    if isinstance(data, pa.ChunkedArray):
        data = data.combine_chunks()
    if pa.types.is_dictionary(data.type):
        data = data.dictionary_decode()
    data = data.cast(pa.large_binary())
    reasons = dict(records.reasons)
    for place in np.flatnonzero(np.asarray(data.is_null())).tolist():
        reasons.setdefault(place, MISSING)
    lengths = np.asarray(pc.fill_null(pc.binary_length(data), 1))
    reasons |= dict.fromkeys(np.flatnonzero(lengths == 0).tolist(), EMPTY)
    reasons |= dict.fromkeys(np.flatnonzero(lengths > MAX_RECORD_BYTES).tolist(), LARGE)
    try:
        return data.cast(pa.large_string()), reasons
    except pa.ArrowInvalid:  # string columns of parquet files can hold any bytes
        values = data.to_pylist()
        for place, value in enumerate(values):
            if value is not None and not _is_utf8(value):
                values[place], reasons[place] = None, BAD_UTF8
        return pa.array(values, pa.large_binary()).cast(pa.large_string()), reasons


def held_out(texts: pa.Array, below: int) -> Flags:
    """[n]: whether each text's XXH3-64, modulo 2^16, is less than `below`."""
    if below in (0, 1 << 16) or not len(texts):
        return np.full(len(texts), below > 0)
    offsets = np.frombuffer(texts.buffers()[1], np.int64)[texts.offset :][: len(texts) + 1].tolist()
    data = memoryview(texts.buffers()[2] or b"")
    digest = xxhash.xxh3_64_intdigest
    hashes = [digest(data[first:last]) for first, last in itertools.pairwise(offsets)]
    return np.array(hashes, np.uint64) % np.uint64(1 << 16) < below


def _as_list(values: Any) -> list[Any]:
    """Python values of an Arrow array, or its scalars where a string in it is not UTF-8."""
    if isinstance(values, list):
        return values
    try:
        return list(values.to_pylist())
    except UnicodeDecodeError:
        return [value if value.is_valid else None for value in values]


def _rendered(value: Any) -> list[str]:
    """A conversation's turns; BadConversationError has the reason if it is none."""
    try:
        turns = render(value.as_py() if isinstance(value, pa.Scalar) else value)
        size = sum(len(text.encode()) for text in turns)
    except UnicodeError:
        raise BadConversationError(BAD_UTF8) from None
    if size > MAX_RECORD_BYTES:
        raise BadConversationError(LARGE)
    return turns


def _is_utf8(value: bytes) -> bool:
    try:
        value.decode()
        return True
    except UnicodeDecodeError:
        return False
