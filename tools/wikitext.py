r"""WikiText's raw text: what its rows are, and how they are joined for scoring.

`wiki.test.raw` is lines that end in "\n", of which those between paragraphs hold a single space.
The data set on the Hub is the same lines as rows: each keeps its "\n", and a blank line has become
an empty string. The field's usual evaluation text is those rows joined by "\n\n"; so a paragraph
is followed by three or more newlines and a blank line's space is gone. That text, 1,296,370 bytes
for the test split, is what the `disjoint` and `stride` protocols cut into windows.

Perplexity per word and per byte is always divided by the words and bytes of the **raw** text
(241,211 and 1,290,590 for the test split), whatever was scored: it is the corpus that is being
described, and joins and tokenizers then cancel out. Words are what white space separates.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pipeline.documents import valid_texts
from pipeline.errors import SourceError
from pipeline.hub import hub_inputs
from pipeline.inputs import Inputs, layout_of, local_inputs
from pipeline.reading import PartReader
from pipeline.sources import Source, find
from pipeline.units import cut_into_parts
from tools.errors import EvaluationError

JOIN: Final = "\n\n"
_BLANK_LINE: Final = " \n"


@dataclass(frozen=True)
class EvaluationText:
    """A text to be scored: `raw` as it is counted and named, `joined` as the model reads it."""

    raw: str
    joined: str
    join: str = JOIN

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


def from_raw(raw: str) -> EvaluationText:
    """The evaluation text of a raw file's contents."""
    lines = raw.split("\n")
    rows = [line + "\n" for line in lines[:-1]] + ([lines[-1]] if lines[-1] else [])
    return EvaluationText(raw, JOIN.join(row if row.strip() else "" for row in rows))


def from_rows(rows: Sequence[str]) -> EvaluationText:
    """The evaluation text of a data set's rows; the raw file is rebuilt from them, byte for byte.

    (Rows of another corpus, that do not end their line, get an end of line each in `raw`.)
    """
    lines = [row if row.endswith("\n") else row + "\n" for row in rows]
    raw = "".join(_BLANK_LINE if line == "\n" else line for line in lines)
    return EvaluationText(raw, JOIN.join(rows))


def read_text(data: Path | None = None) -> EvaluationText:
    """WikiText-2's test split from a local file, or from the Hub where none is named.

    A parquet or jsonl file holds rows (column `text`); any other is taken as raw text.
    """
    source = find("wikitext2")
    if data is None:
        return from_rows(list(_rows(_from_hub(source), source)))
    if data.is_dir():
        raise EvaluationError(f"{data} is a folder: name the file in it that holds the test split")
    layout = layout_of(data.name)
    if layout is not None and layout.kind != "text":
        return from_rows(list(_rows(local_inputs((str(data),)), source)))
    try:
        return from_raw(data.read_bytes().decode())
    except UnicodeDecodeError as error:
        raise EvaluationError(
            f"{data}: no UTF-8 at byte {error.start}; name the raw text, a .parquet or a .jsonl"
        ) from error


def _from_hub(source: Source) -> Inputs:
    try:
        return hub_inputs(source)
    except SourceError as error:  # its mend names the option of another command
        raise EvaluationError(str(error).replace("--data-files", "--data FILE")) from error


def _rows(inputs: Inputs, source: Source) -> Iterator[str]:
    """Every row of a listing's text column, in order; EvaluationError at one that is no text."""
    with closing(PartReader(inputs, source)) as reader:
        for weighed in cut_into_parts(inputs, source):
            for records in reader.read(weighed.part):
                texts, reasons = valid_texts(records)
                for place, text in enumerate(texts.to_pylist()):
                    if text is None:
                        raise EvaluationError(
                            f"{weighed.part.file}: row {records.first + place} has no text "
                            f"({reasons[place]}): fetch the file again"
                        )
                    yield text
