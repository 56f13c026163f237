"""Sequences of 13 words as 64-bit hashes, in numpy: finds a text in gigabytes of others.

A word is a run of ASCII letters and digits, lower-cased, and of bytes beyond ASCII as they are:
punctuation and spacing, which tokenizers and data sets treat differently, do not count. The hash
of a word is a polynomial in its bytes modulo 2^64, taken from one running sum over the text
(Karp & Rabin 1987); that of a sequence is a polynomial in its words' hashes, in the same way.
Measured on one core: about 200 MB of English a second, 40 MB with reading and decoding shards.
"""

import functools
from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

Hashes = npt.NDArray[np.uint64]
Places = npt.NDArray[np.int64]

N_WORDS: Final = 13
"""The length that GPT-3's authors took (Brown et al. 2020, appendix C)."""

BARRIER: Final = b" \xff "
"""Separates documents: a byte that no UTF-8 holds is a word that no text has."""

BASE: Final = np.uint64(0x9E3779B97F4A7C15)  # odd: its powers have inverses modulo 2^64
_INVERSE: Final = pow(int(BASE), -1, 1 << 64)
_FILTER_BITS: Final = 24
TABLE: Final = bytes(
    byte if byte >= 0x80 or chr(byte).isalnum() else 0x20 for byte in bytes(range(256)).lower()
)


def normalised(text: bytes) -> bytes:
    """The text's words and spaces, byte for byte."""
    return text.translate(TABLE)


class Grams(NamedTuple):
    """The sequences of a normalised text: hashes [n], and the byte where each begins and ends."""

    hashes: Hashes
    begins: Places
    ends: Places


def grams_of(text: bytes) -> Grams:
    """Every sequence of 13 words in a normalised text, in order."""
    characters = np.frombuffer(text, np.uint8)
    in_word = np.pad(characters != ord(" "), 1)
    edges = np.flatnonzero(in_word[1:] != in_word[:-1])
    begins, ends = edges[::2], edges[1::2]
    if len(begins) < N_WORDS:
        return Grams(np.empty(0, np.uint64), begins[:0], ends[:0])
    words = mixed(_differences(characters, begins, ends))
    first = np.arange(len(words) - N_WORDS + 1)
    hashes = _differences(words, first, first + N_WORDS)
    return Grams(hashes, begins[: len(first)], ends[N_WORDS - 1 :])


def _differences(values: npt.NDArray[np.unsignedinteger], begins: Places, ends: Places) -> Hashes:
    """The polynomial hash of values[begin:end] for each pair, whatever stands before."""
    n = 1 << len(values).bit_length()
    running = np.zeros(len(values) + 1, np.uint64)
    np.cumsum(values * _powers(int(BASE), n)[: len(values)], out=running[1:])
    hashes = (running[ends] - running[begins]) * _powers(_INVERSE, n)[begins]
    return np.asarray(hashes, np.uint64)


def mixed(words: Hashes) -> Hashes:
    """The finaliser of splitmix64 (Steele, Lea & Flood 2014): close words, far hashes."""
    words = words + BASE
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(words ^ (words >> np.uint64(31)), np.uint64)


@functools.lru_cache(maxsize=64)
def _powers(base: int, n: int) -> Hashes:
    """base^i modulo 2^64, for i below n."""
    factors = np.full(n, base, np.uint64)
    factors[0] = 1
    return np.cumprod(factors)


class HashSet:
    """Sorted hashes, to be found among many others."""

    def __init__(self, hashes: Hashes) -> None:
        self.hashes = hashes
        filled = np.zeros(1 << _FILTER_BITS, np.bool_)
        filled[_filter_place(hashes)] = True
        self._filter = np.packbits(filled, bitorder="little")  # 2 MB stay in the cache

    def holds(self, hashes: Hashes) -> npt.NDArray[np.bool_]:
        """Which of some hashes are in the set. [n]"""
        place = _filter_place(hashes)
        bits = self._filter[place >> np.uint64(3)] >> (place & np.uint64(7)).astype(np.uint8)
        found: npt.NDArray[np.bool_] = (bits & 1).astype(np.bool_)
        maybe = np.flatnonzero(found)
        if len(maybe):
            maybe = maybe[np.argsort(hashes[maybe])]  # in order: half of the cache misses
            place = np.minimum(np.searchsorted(self.hashes, hashes[maybe]), len(self.hashes) - 1)
            found[maybe] = self.hashes[place] == hashes[maybe]
        return found


class Wanted:
    """The sequences of some items, to be found in other texts."""

    def __init__(self, items: Sequence[str]) -> None:
        found = [grams_of(normalised(item.encode())).hashes for item in items]
        self._sizes = np.array([len(hashes) for hashes in found], np.int64)
        self._items = np.repeat(np.arange(len(items)), self._sizes)
        joined = np.concatenate([np.empty(0, np.uint64), *found])
        self.hashes, self._number = np.unique(joined, return_inverse=True)
        self._set = HashSet(self.hashes)

    @property
    def measurable(self) -> npt.NDArray[np.bool_]:
        """Which items have 13 words at all. [n_items]"""
        return self._sizes > 0

    def find(self, hashes: Hashes) -> tuple[Places, Places]:
        """Places in `hashes` that are wanted, and the number of each among all wanted."""
        places = np.flatnonzero(self._set.holds(hashes))
        return places, np.searchsorted(self.hashes, hashes[places])

    def per_item(self, found: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
        """The share of each item's sequences that were found, given which were. [n_items]"""
        hits = np.bincount(self._items, found[self._number], minlength=len(self._sizes))
        return np.asarray(hits / np.maximum(1, self._sizes))

    def items_of(self, number: int) -> Places:
        """The items that hold a wanted sequence."""
        return np.unique(self._items[self._number == number])


def _filter_place(hashes: Hashes) -> Hashes:
    return np.asarray(hashes >> np.uint64(64 - _FILTER_BITS))
