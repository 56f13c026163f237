"""What a check is given, and what it finds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from trainer.config.config import RunConfig

Verdict = Literal["ok", "note", "warn", "fail"]


@dataclass(frozen=True)
class CheckResult:
    """One thing that was checked: ok, worth knowing, suspicious or preventing the run.

    `fix` is what to do about it, `source` who says so, `figures` the numbers in SI units.
    """

    verdict: Verdict
    topic: str
    detail: str
    fix: str = ""
    source: str = ""
    figures: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Context:
    """The run that is planned, the kind of device, and where it would write.

    `measured` is filled by the checks that measure, for those that come after them.
    """

    config: RunConfig
    device: str
    folder: Path
    nproc: int = 1
    shards: Path | None = None
    measured: dict[str, float] = field(default_factory=dict)
