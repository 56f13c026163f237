"""What workers are given and what they report: job, limit, step."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pipeline.inputs.inputs import Inputs
from pipeline.units.units import PreparePlan
from shards.format import UnitRecord

CHECKED_DOCUMENTS: Final = 8
"""Documents of each unit that are compared with sentencepiece by default."""


@dataclass(frozen=True)
class PrepareJob:
    """All that a worker needs to know, the same for every unit."""

    folder: Path
    plan: PreparePlan
    inputs: Inputs
    check_encoding: int = CHECKED_DOCUMENTS


@dataclass(frozen=True)
class Amount:
    """Documents and tokens: how much was made, or may be made."""

    documents: int = 0
    tokens: int = 0

    def __add__(self, other: Amount) -> Amount:
        return Amount(self.documents + other.documents, self.tokens + other.tokens)


@dataclass(frozen=True)
class Limit:
    """Where to stop: at so many documents, or behind the one that reaches so many tokens."""

    documents: int | None = None
    tokens: int | None = None

    def after(self, done: Amount) -> Limit:
        """What is left of it."""
        return Limit(
            None if self.documents is None else max(0, self.documents - done.documents),
            None if self.tokens is None else max(0, self.tokens - done.tokens),
        )

    def is_met_by(self, done: Amount) -> bool:
        """Whether no further document may come."""
        enough_documents = self.documents is not None and done.documents >= self.documents
        return enough_documents or (self.tokens is not None and done.tokens >= self.tokens)


@dataclass(frozen=True)
class UnitProgress:
    """How far a unit is; a later one replaces it, and one of nothing begins the unit again."""

    unit: int
    text_bytes: int = 0
    amount: Amount = Amount()


NO_LIMIT = Limit()
ReportProgress = Callable[[UnitProgress], None]
Submit = Callable[[int, Limit], "Future[UnitRecord]"]
RunUnit = Callable[[PrepareJob, int, Limit, ReportProgress], UnitRecord]
