"""What a rehearsal found, as a table, as JSON and as a page."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from shards.files import publish_bytes, publish_json
from shards.versions import CERTIFICATE, stamp

MEANINGS: Final = {
    "worker dies": "a process that reads rows is killed: another reads on from the same row",
    "rank killed": "SIGKILL of one rank: all ranks start again from the last checkpoint",
    "SIGTERM": "one rank is asked to stop: all checkpoint, exit code 75",
    "mixture changed": "the same command with other weights goes on from the counts of the old",
    "full disk": "a checkpoint that does not fit fails, loudly; training goes on with the old one",
    "rank stopped": "SIGSTOP: the others name it, keep their stacks, and all start again",
    "SIGINT": "as SIGTERM",
    "row rots": "a flipped bit in a shard: refused, saved before it; summer-prep repair mends",
    "checkpoint damaged": "a flipped bit in the newest checkpoint: resumed from the one before",
    "gradient NaN": "the update is refused on the device; the replay refuses it too",
    "gradient spike": "as NaN: a norm far outside the recent ones",
    "bad steps persist": "back to the last good checkpoint, without the samples from there to here",
}
"""Every fault, and what is promised of it."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One fault: the step it hit, whether it was noticed, overcome, and left no trace."""

    fault: str
    step: int
    detected: bool
    recovered: bool
    steps_lost: int  # steps that had to be made again
    identical: bool  # the next common checkpoint has the same bytes as the twin's

    @property
    def kept(self) -> bool:
        """Whether all was as promised."""
        return self.detected and self.recovered and self.identical


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """The rows, and what they hold for."""

    command: str
    steps: int
    seconds: float
    versions: dict[str, Any]
    data: dict[str, str]  # each source's root
    digests: dict[str, tuple[str | None, str | None]]  # of the last checkpoint: hurt, undisturbed
    scores: dict[str, float]  # held-out bits per byte of both
    rows: tuple[Row, ...]

    @property
    def kept(self) -> bool:
        """Whether every promise was kept."""
        return (
            {row.fault for row in self.rows} == set(MEANINGS)
            and all(row.kept for row in self.rows)
            and bool(self.digests)
            and all(here == there for here, there in self.digests.values())
            and len(set(self.scores.values())) == 1
        )


def table(certificate: Certificate) -> list[str]:
    """One line a fault, for a terminal."""
    lines = [f"{'fault':<18} {'step':>4}  detected  recovered  steps lost  bit-identical"]
    lines += [
        f"{row.fault:<18} {row.step:>4}  {_yes(row.detected):<8}  {_yes(row.recovered):<9}  "
        f"{row.steps_lost:>10}  {_yes(row.identical)}"
        for row in certificate.rows
    ]
    return [*lines, f"every promise kept: {_yes(certificate.kept)}"]


def publish(certificate: Certificate, out: Path) -> None:
    """Write certificate.json and certificate.md."""
    facts = {**stamp(CERTIFICATE), "kept": certificate.kept, **asdict(certificate)}
    publish_json(out / "certificate.json", facts)
    publish_bytes(out / "certificate.md", ("\n".join(_page(certificate)) + "\n").encode())


def _page(certificate: Certificate) -> Iterator[str]:
    yield f"# Rehearsal: {'every promise kept' if certificate.kept else 'PROMISES BROKEN'}\n"
    yield f"`{certificate.command}`\n"
    yield f"{certificate.steps} steps, {certificate.seconds:.0f} s in all.\n"
    yield "| fault | what is promised | step | detected | recovered | steps lost | bit-identical |"
    yield "|---|---|---|---|---|---|---|"
    for row in certificate.rows:
        yield (
            f"| {row.fault} | {MEANINGS[row.fault]} | {row.step} | {_yes(row.detected)} | "
            f"{_yes(row.recovered)} | {row.steps_lost} | {_yes(row.identical)} |"
        )
    yield (
        "\n*Bit-identical*: the next checkpoint that both have, weights and optimizer moments, has "
        "the "
        "same SHA-256 in every file as that of a run that nothing happened to (for refused updates "
        "and rollbacks: as that of a replay from its events alone).\n"
    )
    yield "| file of the last checkpoint | hurt | undisturbed |\n|---|---|---|"
    for name, (here, there) in certificate.digests.items():
        yield f"| {name} | `{here}` | `{there}` |"
    yield "\n| held-out score | bits per byte |\n|---|---|"
    for name, score in certificate.scores.items():
        yield f"| {name} | {score:.6f} |"
    yield "\n| what it holds for | |\n|---|---|"
    for name, fact in {**certificate.versions, **certificate.data}.items():
        yield f"| {name} | `{fact}` |"


def _yes(value: bool) -> str:
    return "yes" if value else "NO"
