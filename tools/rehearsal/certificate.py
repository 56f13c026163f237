"""The faults of a rehearsal, what is promised of each, and what was found, as text and as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from jinja2 import Environment, FileSystemLoader

from shards.files import publish_bytes, publish_json
from shards.versions import CERTIFICATE, stamp
from trainer.metrics.metrics import RunEvent


@dataclass(frozen=True)
class FaultCase:
    """One fault. `interval` is the number of the interval between checkpoints in which it happens.

    `order` is `kind:rank` for SUMMER_FAULT, empty where the rehearsal itself does the damage;
    `event` is the one with which the run has to report it, under its name or the older one.
    """

    name: str
    interval: int
    order: str
    event: str
    promise: str


FAULTED: Final = (
    FaultCase("worker dies", 0, "worker:0", RunEvent.LOADER,
              "a process that reads data is killed: another continues from the same sequence"),
    FaultCase("rank killed", 1, "sigkill:1", RunEvent.RESUME,
              "SIGKILL of one rank: all ranks restart from the last checkpoint"),
    FaultCase("SIGTERM", 2, "sigterm:1", RunEvent.STOPPED,
              "one rank is asked to stop: all save a checkpoint, exit code 75"),
    FaultCase("mixture changed", 2, "", RunEvent.MIXTURE,
              "the same command with other weights continues from the counts of the old ones"),
    FaultCase("full disk", 3, "full-disk:0", RunEvent.CHECKPOINT_FAILED,
              "a checkpoint that does not fit fails with a message; training goes on"),
    FaultCase("rank stopped", 4, "sigstop:1", RunEvent.HUNG,
              "SIGSTOP: the others name the rank, write their stacks, and all restart"),
    FaultCase("SIGINT", 5, "sigint:0", RunEvent.STOPPED, "as SIGTERM"),
    FaultCase("sequence damaged", 6, "bit-flip:1", RunEvent.DAMAGED,
              "a flipped bit in a shard: training stops at a checkpoint; summer-prep repair fixes "
              "the shard"),
    FaultCase("checkpoint damaged", 6, "", RunEvent.FALLBACK,
              "a flipped bit in the newest checkpoint: resumed from the one before"),
    FaultCase("terminal closed", 7, "sighup:1", RunEvent.STOPPED, "SIGHUP: as SIGTERM"),
    FaultCase("logs torn", 7, "", RunEvent.RESUME,
              "a cut last line, and zeros behind it, in both logs: closed before the next line, "
              "and left out"),
    FaultCase("job suspended", 8, "", RunEvent.RESUME,
              "SIGSTOP of the whole job for longer than the hang timeout, then SIGCONT: it goes "
              "on, and no rank is blamed"),
)  # fmt: skip
GUARDED: Final = (
    FaultCase("gradient NaN", 0, "nan:1", RunEvent.SKIPPED,
              "the device skips the update; a replay of the run skips it too"),
    FaultCase("gradient spike", 3, "spike:0", RunEvent.SKIPPED,
              "as NaN: a gradient norm far above the recent ones"),
    FaultCase("bad steps persist", 5, "nan:0", RunEvent.ROLLBACK,
              "back to the last good checkpoint, leaving out the samples since then"),
)  # fmt: skip
FAULTS: Final = {case.name: case for case in (*FAULTED, *GUARDED)}


@dataclass(frozen=True, kw_only=True)
class FaultResult:
    """One fault: the step it hit, and whether it was noticed, overcome and without consequence."""

    fault: str
    step: int
    detected: bool
    recovered: bool
    steps_lost: int  # steps that had to be repeated
    identical: bool  # the next checkpoint that both runs have holds the same bytes in both

    @property
    def kept(self) -> bool:
        """Whether everything was as promised."""
        return self.detected and self.recovered and self.identical


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """The results, and what they hold for."""

    command: str
    steps: int
    seconds: float
    versions: dict[str, Any]
    data: dict[str, str]  # each source's dataset hash
    bit_exact: bool | None  # whether passes repeat bit for bit, as the run's checkpoints say
    digests: dict[str, tuple[str | None, str | None]]  # last checkpoint: faulted, uninterrupted
    scores: dict[str, float]  # held-out bits per byte of both
    rows: tuple[FaultResult, ...]

    @property
    def kept(self) -> bool:
        """Whether every promise was kept."""
        return (
            {row.fault for row in self.rows} == set(FAULTS)
            and all(row.kept for row in self.rows)
            and bool(self.digests)
            and all(one == other for one, other in self.digests.values())
            and len(set(self.scores.values())) == 1
        )


def table(certificate: Certificate) -> list[str]:
    """One line a fault, as text and as Markdown."""
    heads = ("step", "detected", "recovered", "steps lost", "bit-identical")
    lines = [
        f"| {'fault':<18} | {' | '.join(heads)} |",
        f"|{'-' * 20}|{'|'.join('-' * (len(head) + 1) + ':' for head in heads)}|",
    ]
    for row in certificate.rows:
        found = (row.step, row.detected, row.recovered, row.steps_lost, row.identical)
        cells = (_cell(value).rjust(len(head)) for value, head in zip(found, heads, strict=True))
        lines.append(f"| {row.fault:<18} | {' | '.join(cells)} |")
    exact = "not recorded" if certificate.bit_exact is None else _cell(certificate.bit_exact)
    said = f"passes repeat bit for bit, as the run itself says: {exact}"
    return [*lines, "", said, f"every promise kept: {_cell(certificate.kept)}"]


def publish(certificate: Certificate, out: Path) -> None:
    """Write certificate.json and certificate.md, which certificate.jinja becomes."""
    facts = {**stamp(CERTIFICATE), "kept": certificate.kept, **asdict(certificate)}
    publish_json(out / "certificate.json", facts)
    templates = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=False)
    values = {"certificate": certificate, "table": table(certificate), "faults": FAULTS}
    page = templates.get_template("certificate.jinja").render(values)
    publish_bytes(out / "certificate.md", f"{page}\n".encode())


def _cell(value: int) -> str:
    """A count, or what is said of a truth value."""
    return ("yes" if value else "NO") if isinstance(value, bool) else str(value)
