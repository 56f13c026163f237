"""The corpora, in one table: where each is read from, under which licence, whether it is open.

A new source is one more row of SOURCES. The five with a share are the reference run's mixture.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

from pipeline.errors import SourceError

Shape = Literal["documents", "lines", "chat"]
"""A record is a document; a line of a page; or a conversation."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """One corpus. `data_files` are patterns inside the Hub repository, `{config}` filled in."""

    name: str
    about: str
    licence: str
    share: float = 0.0
    """Percent of the reference run's mixture."""
    dataset: str = ""
    config: str = ""
    revision: str = ""
    split: str = "train"
    data_files: tuple[str, ...] = ()
    text_column: str = "text"
    shape: Shape = "documents"
    separator: str = ""
    """What ends a document in a text file; empty: the file is one."""
    val_fraction: float = 0.001
    gated: bool = False
    embedded: bool = False
    """Whether it comes with the Python interpreter."""
    unavailable: str = ""
    """Why it cannot be had, where it cannot."""
    substitute: str = ""
    """The source that fills this one's share in its absence."""

    @property
    def patterns(self) -> tuple[str, ...]:
        """The file patterns inside the repository; none: whatever the config names."""
        if any("{config}" in pattern for pattern in self.data_files):
            names = [name.strip() for name in self.config.split(",")]
            return tuple(p.format(config=name) for p in self.data_files for name in names)
        return self.data_files

    @property
    def state(self) -> str:
        """Whether anyone can have it."""
        if self.unavailable or self.embedded:
            return "local copy only" if self.unavailable else "comes with Python"
        return "gated" if self.gated else "open"


CODE_LANGUAGES: Final = (
    "c", "c++", "c-sharp", "css", "dockerfile", "go", "haskell", "html", "java", "javascript",
    "julia", "kotlin", "lua", "makefile", "markdown", "perl", "php", "python", "r", "ruby",
    "rust", "scala", "shell", "sql", "tex", "typescript",
)  # fmt: skip

SOURCES: Final = (
    Source(
        name="fineweb",
        about="English web pages, filtered; configs sample-10BT, sample-100BT, sample-350BT, ...",
        licence="ODC-By 1.0; Common Crawl's terms of use",
        share=60,
        dataset="HuggingFaceFW/fineweb",
        config="sample-100BT",
    ),
    Source(
        name="the-stack",
        about="permissively licensed source code; --config python,go,... chooses languages",
        licence="each file's own permissive licence; The Stack's terms of use",
        share=20,
        dataset="bigcode/the-stack-dedup",
        config=",".join(CODE_LANGUAGES),
        data_files=("data/{config}/*.parquet",),
        text_column="content",
        gated=True,
    ),
    Source(
        name="books3",
        about="books; columns title, text",
        licence="none: copyright of each book's author",
        share=10,
        unavailable="it was withdrawn over copyright and no public copy exists",
        substitute="pg19",
    ),
    Source(
        name="arxiv",
        about="LaTeX sources of papers (RedPajama's selection, as kept by proof-pile-2)",
        licence="each paper's own licence",
        share=5,
        dataset="EleutherAI/proof-pile-2",
        data_files=("arxiv/train/*.jsonl.zst",),
        substitute="arxiv-papers",
    ),
    Source(
        name="slimorca",
        about="conversations: questions answered by GPT-4, rendered with the chat template",
        licence="MIT; output of OpenAI's models",
        share=5,
        dataset="Open-Orca/SlimOrca",
        text_column="conversations",
        shape="chat",
    ),
    Source(
        name="pg19",
        about="books before 1919 from Project Gutenberg; stands in for books3",
        licence="Apache-2.0; the books are in the public domain in the USA",
        dataset="emozilla/pg19",
    ),
    Source(
        name="arxiv-papers",
        about="openly licensed papers as plain text; stands in for arxiv",
        licence="each paper's own open licence (CC BY, CC BY-SA or CC0)",
        dataset="common-pile/arxiv_papers",
    ),
    Source(
        name="python-code",
        about="the top-level standard library files of this interpreter; needs no network",
        licence="PSF-2.0",
        embedded=True,
    ),
    Source(
        name="python-docs",
        about="the language reference's topics that pydoc carries; needs no network",
        licence="PSF-2.0",
        embedded=True,
    ),
    Source(
        name="wikitext2",
        about="WikiText-2's test pages, raw: evaluation text, so all of it is held out",
        licence="CC BY-SA 3.0 and GFDL",
        dataset="Salesforce/wikitext",
        config="wikitext-2-raw-v1",
        split="test",
        shape="lines",
        val_fraction=1.0,
    ),
)

BY_NAME: Final = {source.name: source for source in SOURCES}


@dataclass(frozen=True, kw_only=True)
class SourceOverrides:
    """What a user may change about a source; empty: as in the table."""

    dataset: str = ""
    config: str = ""
    revision: str = ""
    text_column: str = ""
    split: str = ""
    shape: str = ""
    separator: str = ""
    data_files: tuple[str, ...] = ()
    """Local files; or patterns inside the repository where `dataset` is given too."""


def find(name: str, choice: SourceOverrides | None = None) -> Source:
    """The table's source of that name with the user's changes, or a new one if it has data."""
    choice = choice or SourceOverrides()
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise SourceError(
            f"source {name!r}: a name is letters, digits, `.`, `_`, `-`: it becomes a folder's name"
        )
    known = BY_NAME.get(name)
    if known is None:
        if not (choice.dataset or choice.data_files):
            near = difflib.get_close_matches(name, BY_NAME, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(BY_NAME)}."
            raise SourceError(
                f"unknown source {name!r}: {hint} For a corpus of your own add "
                "--dataset ORG/NAME or --data-files 'FOLDER/*.parquet'"
            )
        known = Source(name=name, about="a corpus of your own", licence="unknown")
    _check_of_use(known, choice)
    changes: dict[str, Any] = {name: value for name, value in vars(choice).items() if value}
    if choice.shape == "chat" and known.shape != "chat":
        changes.setdefault("text_column", "messages")
    if choice.shape == "lines":  # not those of pages, which are in the table alone
        changes |= {"shape": "documents", "separator": "\n"}
    if choice.separator and choice.shape not in ("", "documents"):
        raise SourceError(
            f"--separator {choice.separator!r} cuts text files into documents: leave --shape "
            f"{choice.shape} out"
        )
    if choice.dataset:
        changes |= {"unavailable": "", "embedded": False, "gated": False}
    else:
        changes.pop("data_files", None)
    return replace(known, **changes)


def _check_of_use(source: Source, choice: SourceOverrides) -> None:
    """SourceError for an option that would do nothing where the data comes from."""
    if choice.dataset:
        return
    if choice.data_files:
        place, without = "--data-files names local files", "config revision"
    elif source.embedded:
        place, without = f"{source.name} comes with Python", "config revision split text_column"
    else:
        return
    for name in without.split():
        if getattr(choice, name):
            option = f"--{name.replace('_', '-')}"
            raise SourceError(f"{option} does nothing here: {place}; leave it out")


def check_available(source: Source) -> None:
    """SourceError, with what to use instead, for a source that cannot be fetched."""
    if source.unavailable:
        raise SourceError(
            f"{source.name} cannot be fetched: {source.unavailable}: give a copy with "
            f"--data-files, or prepare its substitute: `summer-prep tokenize --source "
            f"{source.substitute}`"
        )
