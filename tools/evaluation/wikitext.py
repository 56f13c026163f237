r"""WikiText's raw text: what its rows are, and what each protocol makes of them.

`wiki.test.raw` is lines that end in "\n", of which those between paragraphs hold a single space.
The data set on the Hub is the same lines as rows: each keeps its "\n", and a blank line has become
an empty string. Four texts are made of them:

    disjoint, stride   the rows joined by "\n\n": a paragraph is followed by three or more newlines
                       and a blank line's space is gone; 1,296,370 bytes for the test split
    llama.cpp          the file itself, without its last end of line
    lm-eval            62 pages, each from a title to the next, detokenized

Perplexity per word and per byte is always divided by the words and bytes of the **raw** text
(241,211 and 1,290,590 for the test split), whatever was scored: it is the corpus that is being
described, and joins and tokenizers then cancel out. Words are what white space separates; only
`lm-eval` counts them as its harness does, which finds an empty one at each end of a page.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from pipeline.inputs.inputs import layout_of
from tools.errors import EvaluationError
from tools.evaluation.datasets import EvaluationSet, read_records
from tools.evaluation.tasks import CORPORA

OFFICIAL_SHA256: Final = "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08"
"""Of wiki.test.raw, which WikiText-2 and WikiText-103 share: 1,290,590 bytes."""

JOIN: Final = "\n\n"
_BLANK_LINE: Final = " \n"

_DETOKENIZED: Final = (
    ("s '", "s'"),
    ("/' [0-9]/", "/'[0-9]/"),
    *((f" @{re.escape(mark)}@ ", mark) for mark in "-,."),
    *((f" {re.escape(mark)} ", f"{mark} ") for mark in ":;.!?,"),
    (r"\(\s*([^)]*?)\s*\)", r"(\1)"),
    (r"\[\s*([^\]]*?)\s*\]", r"[\1]"),
    (r"{\s*([^}]*?)\s*}", r"{\1}"),
    (r'"\s*([^"]*?)\s*"', r'"\1"'),
    (r"'\s*([^']*?)\s*'", r"'\1'"),
    ("= = = =", "===="),
    ("= = =", "==="),
    ("= =", "=="),
    (" ° ", "°"),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" N ", " 1 "),
    (" 's", "'s"),
)
"""What lm-evaluation-harness does to a page, one after the other (it has the list from Megatron).

Its second rule, meant for apostrophes before digits, looks for slashes: it is kept as it is there.
"""


class Piece(NamedTuple):
    """A text scored by itself, and the words and bytes that its perplexity is counted in."""

    text: str
    n_words: int
    n_bytes: int


@dataclass(frozen=True)
class EvaluationText:
    """A text to be scored: `raw` as it is counted and named, `joined` as most protocols read it."""

    raw: str
    joined: str

    @property
    def n_bytes(self) -> int:
        """UTF-8 bytes of the raw text."""
        return len(self.raw.encode())

    @property
    def n_words(self) -> int:
        """Words of the raw text, split on white space."""
        return len(self.raw.split())

    @property
    def sha256(self) -> str:
        """SHA-256 of the raw text's UTF-8 bytes: a local file's own digest."""
        return hashlib.sha256(self.raw.encode()).hexdigest()

    def pieces(self, protocol: str) -> list[Piece]:
        """What a protocol scores, in order."""
        if protocol == "lm-eval":
            return [
                Piece(detokenized(page), len(re.split(r"\s+", page)), len(page.encode()))
                for page in pages_of(self.raw)
            ]
        text = self.raw.removesuffix("\n") if protocol == "llama.cpp" else self.joined
        return [Piece(text, self.n_words, self.n_bytes)]


READ_AS: Final = {
    "disjoint": f"rows joined by {JOIN!r}",
    "stride": f"rows joined by {JOIN!r}",
    "lm-eval": "pages, detokenized",
    "llama.cpp": "the raw file",
}
"""How each protocol's text comes from the raw one."""


def pages_of(raw: str) -> list[str]:
    """The pages of a raw text, each from its title line to the next, as the harness cuts them.

    A title is ` = Name = `; one more pair of equals signs makes it a section's.
    """
    pages: list[list[str]] = [[]]
    for line in raw.split("\n"):
        shortened = line.replace("= = =", "===").replace("= =", "==").strip()
        if shortened.startswith("= ") and shortened.endswith(" ="):
            pages.append([])
        pages[-1].append(line)
    return [page for page in map("\n".join, pages) if page.strip()]


def detokenized(page: str) -> str:
    """A page as it would be written: spaces before punctuation and inside brackets taken out."""
    for pattern, replacement in _DETOKENIZED:
        page = re.sub(pattern, replacement, page)
    return page


def from_raw(raw: str) -> EvaluationText:
    """The evaluation text of a raw file's contents."""
    rows = re.findall(r"[^\n]*\n|[^\n]+", raw)
    return EvaluationText(raw, JOIN.join(row if row.strip() else "" for row in rows))


def from_rows(rows: Sequence[str]) -> EvaluationText:
    """The evaluation text of a data set's rows; the raw file is rebuilt from them, byte for byte.

    (Rows of another corpus, that do not end their line, get an end of line each in `raw`.)
    """
    lines = [row if row.endswith("\n") else row + "\n" for row in rows]
    raw = "".join(_BLANK_LINE if line == "\n" else line for line in lines)
    return EvaluationText(raw, JOIN.join(rows))


def read_text(data: Path | None = None, corpus: str = "wikitext2") -> EvaluationText:
    """WikiText's test split (of `wikitext2` or `wikitext103`) from a local file, or from the Hub.

    A parquet or jsonl file holds rows (column `text`); any other is taken as raw text.
    """
    layout = None if data is None else layout_of(data.name)
    if data is None or (layout is not None and layout.kind != "text" and not data.is_dir()):
        return from_rows(_texts(read_records(data, CORPORA[corpus])))
    if data.is_dir():
        raise EvaluationError(f"{data} is a folder: name the file in it that holds the test split")
    try:
        return from_raw(data.read_bytes().decode())
    except UnicodeDecodeError as error:
        raise EvaluationError(
            f"{data}: no UTF-8 at byte {error.start}; name the raw text, a .parquet or a .jsonl"
        ) from error


def _texts(records: EvaluationSet) -> list[str]:
    """Every row's text, in order; EvaluationError at one that has none."""
    for number, row in enumerate(records.rows):
        try:
            row["text"].encode()  # a lone surrogate is no text either
        except (KeyError, AttributeError, UnicodeEncodeError) as error:
            raise EvaluationError(
                f"{records.where}: row {number} has no text: fetch the file again"
            ) from error
    return [row["text"] for row in records.rows]
