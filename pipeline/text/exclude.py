"""Decontamination: documents that share 13 words in a row with an evaluation task are left out.

A list, made by `summer-eval contamination --write`, holds the hashes of every 13 words in a row of
the tasks' items (ngrams.py). Hashing every sequence of a text would take more than half of the time
of preparation, so a text is looked at in three steps, each of which can only find too much; they
take 14 % (web text and books against WikiText-2, ARC, MMLU, BoolQ and PIQA, one core):

    probes   of every tenth word and the three behind it, the first 8 bytes of each; 13 words in a
             row hold one such place
    spans    around the probes that the list has: 13 words, the first 8 bytes of each
    grams    of the documents that are left: the sequences themselves

The file: a line of JSON, then the hashes, little-endian, sorted.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import PrepareError
from pipeline.text.ngrams import (
    BASE,
    N_WORDS,
    Hashes,
    HashSet,
    Places,
    grams_of,
    normalised,
)
from shards.versions import EXCLUDE, FORMAT_KEY, check_format

_PROBE: Final = 4  # words
_STRIDE: Final = N_WORDS - _PROBE + 1
_PREFIX: Final = 8  # bytes of a word
_ONES: Final = np.uint64(0x0101010101010101)
_SPACES: Final = _ONES * np.uint64(ord(" "))
_HIGHEST: Final = _ONES << np.uint64(7)


@dataclass(frozen=True)
class Exclusion:
    """A list in memory. `data` is the file's content, `tasks` are named in the reasons."""

    data: bytes
    tasks: tuple[str, ...]
    grams: HashSet
    numbers: npt.NDArray[np.uint8]
    spans: HashSet
    probes: HashSet

    @property
    def described(self) -> dict[str, Any]:
        """What recipe and manifest say of it."""
        return {"sha256": hashlib.sha256(self.data).hexdigest(), "tasks": list(self.tasks)}

    @classmethod
    def of(cls, items: Mapping[str, Sequence[str]]) -> Exclusion:
        """The list of the items of each task."""
        every = [(n, item.encode()) for n, texts in enumerate(items.values()) for item in texts]
        found = [(number, grams_of(normalised(item)).hashes) for number, item in every]
        joined = np.concatenate([np.empty(0, np.uint64), *(hashes for _, hashes in found)])
        owners = np.repeat([n for n, _ in found], [len(hashes) for _, hashes in found])
        grams, first = np.unique(joined, return_index=True)
        numbers = owners[first].astype(np.uint8)  # of several tasks, the first
        placed = [_words(item) for _, item in every]
        words = [_signatures(text[begins]) for text, begins in placed]
        words = [each for each in words if len(each) >= N_WORDS]
        spans, probes = (
            np.unique(np.concatenate([np.empty(0, np.uint64), *(_joined(w, n) for w in words)]))
            for n in (N_WORDS, _PROBE)
        )
        arrays = [grams, spans, probes]
        body = b"".join(array.astype("<u8").tobytes() for array in arrays) + numbers.tobytes()
        described: dict[str, Any] = {
            FORMAT_KEY: EXCLUDE,
            "words": N_WORDS,
            "tasks": list(items),
            "sizes": [len(array) for array in arrays],
        }
        described["sha256"] = _digest(described, body)
        return cls.from_bytes(_spelled(described) + b"\n" + body, "the list")

    @classmethod
    def from_bytes(cls, data: bytes, name: str) -> Exclusion:
        """The list that a file's content spells; PrepareError if it spells none."""
        head, _, body = data.partition(b"\n")
        try:
            described = json.loads(head)
            if FORMAT_KEY not in described:
                raise ValueError("it begins with no format")
            check_format(described, EXCLUDE, name)
            tasks = tuple(described["tasks"])
            known = {key: value for key, value in described.items() if key != "sha256"}
            if described["sha256"] != _digest(known, body) or _spelled(described) != head:
                raise ValueError("its digest differs")
            ends = np.cumsum([0, *described["sizes"]]) * 8
            arrays = [np.frombuffer(body[a:b], "<u8") for a, b in itertools.pairwise(ends)]
            grams, spans, probes = map(HashSet, arrays)
            numbers = np.frombuffer(body[ends[-1] :], np.uint8)
            if len(numbers) != len(arrays[0]) or (numbers >= len(tasks)).any():
                raise ValueError("its sizes differ")
        except (
            ValueError,
            KeyError,
            TypeError,
            IndexError,
            AttributeError,
            RecursionError,
        ) as error:
            raise PrepareError(
                f"{name} is no list of `summer-eval contamination --write` ({error}): make one"
            ) from error
        return cls(data, tasks, grams, numbers, spans, probes)

    def screen(self, texts: pa.Array) -> dict[int, str]:
        """The texts that share 13 words in a row with a task, by place, each with the reason."""
        listed = pa.ListArray.from_arrays(
            pa.array([0, len(texts)], pa.int32()), texts.cast(pa.binary())
        )
        data = pc.binary_join(listed, b" ")[0].as_buffer()
        text, begins = _words(data)
        probed = np.arange(0, len(begins) - _PROBE + 1, _STRIDE)
        hashes = np.zeros(len(probed), np.uint64)
        for word in range(_PROBE):
            hashes = (hashes + _signatures(text[begins[word::_STRIDE][: len(probed)]])) * BASE
        probed = probed[self.probes.holds(hashes)]
        if not len(probed):
            return {}
        around = probed[:, None] + np.arange(1 - _STRIDE, N_WORDS)
        words = _signatures(text[begins[np.clip(around, 0, len(begins) - 1)]])
        spans = _joined(words, N_WORDS)
        probed = probed[self.spans.holds(spans.ravel()).reshape(spans.shape).any(axis=1)]
        ends = np.cumsum(np.asarray(pc.binary_length(texts)) + 1)
        # words in front of the probe, and behind it, may be another document's
        near = np.concatenate([begins[np.clip(probed + n, 0, len(begins) - 1)] for n in _AROUND])
        places = np.unique(np.searchsorted(ends, near, side="right")).tolist()
        reasons = {place: self._reason(texts[place].as_buffer()) for place in places}
        return {place: reason for place, reason in reasons.items() if reason}

    def _reason(self, text: Any) -> str:
        hashes = grams_of(normalised(bytes(text))).hashes
        shared = hashes[self.grams.holds(hashes)]
        if not len(shared):
            return ""
        number = int(self.numbers[np.searchsorted(self.grams.hashes, shared)].min())
        return f"shares {N_WORDS} words with {self.tasks[number]}"


def _spelled(described: object) -> bytes:
    return json.dumps(described).encode()


def _digest(described: object, body: bytes) -> str:
    return hashlib.sha256(_spelled(described) + body).hexdigest()


_AROUND: Final = (1 - _STRIDE, 0, N_WORDS - 1)


@functools.lru_cache(maxsize=1)
def read_exclusion(path: Path, sha256: str = "") -> Exclusion:
    """The list in a file; PrepareError if there is none, or one of another SHA-256."""
    try:
        found = Exclusion.from_bytes(path.read_bytes(), str(path))
    except OSError as error:
        raise PrepareError(f"{path}: {error.strerror}: name a list with --exclude") from error
    if sha256 and found.described["sha256"] != sha256:
        raise PrepareError(f"{path} is another list: start the same command again, to restore it")
    return found


def _words(joined: Any) -> tuple[Hashes, Places]:
    """The text, normalised, as overlapping numbers of 8 bytes, and where its words begin."""
    text = normalised(b"".join((b" ", joined, b" " * _PREFIX)))
    in_word = np.frombuffer(text, np.uint8) != ord(" ")
    begins = np.flatnonzero(in_word[1:] > in_word[:-1]) + 1
    return np.ndarray((len(text) - _PREFIX + 1,), "<u8", text, 0, (1,)), begins


def _signatures(eights: Hashes) -> Hashes:
    """The first 8 bytes of each word, given with what follows it; zeros behind its end. [n]"""
    spaces_zero = eights ^ _SPACES
    zeros = (spaces_zero - _ONES) & ~spaces_zero & _HIGHEST  # right up to the first zero byte
    within = ((zeros & (~zeros + np.uint64(1))) >> np.uint64(7)) - np.uint64(1)
    return np.asarray((eights | _SPACES) & within, np.uint64)


def _joined(words: Hashes, n: int) -> Hashes:
    """The hashes of each n words in a row along the last axis."""
    size = words.shape[-1] - n + 1
    hashes = np.zeros((*words.shape[:-1], max(0, size)), np.uint64)
    for word in range(n if size > 0 else 0):
        hashes = (hashes + words[..., word : word + size]) * BASE
    return hashes
