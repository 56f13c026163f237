"""What a person sees of a preparation: the plan before it starts, then a line that moves."""

from __future__ import annotations

import threading
import time
from bisect import bisect
from datetime import timedelta
from operator import itemgetter
from pathlib import Path
from typing import Final, TextIO

from rich.console import Console
from rich.filesize import decimal
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pipeline.estimate import LEAST_SAMPLE_S, Estimate, PrepareListener
from pipeline.inputs.inputs import listing_summary
from pipeline.units.job import NO_LIMIT, Amount, PrepareJob, UnitProgress

PLAIN_INTERVAL_S: Final = 30.0
"""How often a line is written where nothing can move: files, pipes, CI."""


class ProgressEstimator:
    """How far the work is, how fast it goes and what is left of it. The caller gives the time.

    The work is the planned bytes of text. What a planned byte yields is known of the units that
    are done (records have other fields, compressed files are guessed), and taken to hold for those
    at work. The rate is that of the later half, of the time or of the work, whichever is shorter:
    workers that start and encoders that are new to the words are slow at first, and a cluster
    grows and shrinks.
    """

    def __init__(self, ahead: Estimate) -> None:
        self._ahead = ahead
        self._steps: dict[int, UnitProgress] = {}
        self._at_work: dict[int, tuple[float, float]] = {}  # when begun, when last heard of
        self.ended: set[int] = set()
        # when so much text was done; the first text is the slowest: rates are of what comes later
        self._samples: list[tuple[float, int]] = []
        self._now = 0.0
        self.text_bytes = 0

    def progressed(self, step: UnitProgress, now: float) -> None:
        """A unit has come further, or is begun (again)."""
        before = self._steps.get(step.unit, UnitProgress(step.unit)).text_bytes
        self._steps[step.unit], self._now = step, now
        self.text_bytes += step.text_bytes - before
        if step.unit not in self.ended:
            begun, _ = self._at_work.get(step.unit, (now, now))
            self._at_work[step.unit] = begun if step.text_bytes else now, now
        if step.text_bytes < before:  # a unit was lost: no rate of that
            self._samples = []
        elif step.text_bytes > before and (not self._samples or now > self._samples[-1][0]):
            self._samples.append((now, self.text_bytes))

    def unit_done(self, position: int) -> None:
        """A unit is done; its last step may be reported later."""
        self.ended.add(position)
        self._at_work.pop(position, None)

    @property
    def done(self) -> Amount:
        """Documents and tokens so far."""
        return sum((step.amount for step in self._steps.values()), Amount())

    @property
    def share(self) -> float:
        """How much is done, 0 to 1."""
        limit, done = self._ahead.limit, self.done
        shares = [sum(self._planned_done().values()) / max(1, sum(self._ahead.units.values()))]
        shares += [done.documents / limit.documents] if limit.documents else []
        shares += [done.tokens / limit.tokens] if limit.tokens else []
        return min(1.0, max(shares))

    def bytes_per_second(self) -> float:
        """Text of late, a second; 0 if it is not known yet."""
        samples = self._samples
        if not samples:
            return 0.0
        half_time = bisect(samples, (samples[0][0] + self._now) / 2, key=itemgetter(0)) - 1
        half_text = bisect(samples, self.text_bytes / 2, key=itemgetter(1)) - 1
        began, text = samples[max(0, min(max(half_time, half_text), len(samples) - 2))]
        seconds = self._now - began
        return (self.text_bytes - text) / seconds if seconds > 0 else 0.0

    def seconds_left(self, now: float) -> float | None:
        """Seconds until all is done, or None if it is not known yet."""
        rate, share = self.bytes_per_second(), self.share
        if not rate or not share:
            return None
        left = [0.0, self.text_bytes * (1 - share) / share / rate - (now - self._now)]
        if self._ahead.limit == NO_LIMIT:  # with few units left, the longest of them decides
            for unit, done in self._planned_done().items():
                if done and unit in self._at_work:
                    begun, heard = self._at_work[unit]
                    to_do = self._ahead.units.get(unit, 0) - done
                    left.append(to_do * (heard - begun) / done - (now - heard))
        return max(left)

    def _planned_done(self) -> dict[int, float]:
        """The planned bytes that each unit has behind it."""
        planned = self._ahead.units
        done = {unit: float(planned.get(unit, 0)) for unit in self.ended}
        text = sum(self._steps[unit].text_bytes for unit in self.ended & self._steps.keys())
        per_byte = sum(done.values()) / text if text else 0.0
        for unit in self._at_work:
            planned_bytes = self._steps[unit].text_bytes * (per_byte or 1.0)
            done[unit] = min(planned_bytes, planned.get(unit, 0))
        return done


class PrepareDisplay(PrepareListener):
    """Writes to a stream; on a terminal a bar is kept up to date."""

    def __init__(self, stream: TextIO) -> None:
        self._console = Console(
            file=stream, highlight=False, soft_wrap=True, force_terminal=stream.isatty()
        )
        self._lock = threading.Lock()  # steps come from a thread that listens to the workers
        self._estimator: ProgressEstimator | None = None
        self._ahead: Estimate
        self._began = self._printed = 0.0
        self._live = Live(console=self._console, get_renderable=self._bar, transient=True)

    def waits(self, folder: Path) -> None:
        """Say for whom it waits."""
        self._console.print(f"{folder}: another limited run is at work here; this one waits for it")

    def planned(self, job: PrepareJob, ahead: Estimate, note: str) -> None:
        """Show what the work will take."""
        facts = job.plan.facts
        for line in (
            f"{facts.source}: {facts.dataset}"
            + (f" at {facts.revision[:12]}" if facts.revision else ""),
            f"  files      {listing_summary(job.inputs)}",
            f"  licence    {facts.licence}",
            f"  to read    {decimal(ahead.read_bytes)} in {len(ahead.units):,} units of work"
            + ("" if ahead.limit == NO_LIMIT else ", as far as the limit reaches"),
            f"  to write   about {_rounded(ahead.tokens)} tokens, {decimal(ahead.disk_bytes)} "
            f"into {job.folder}",
            f"  held out   {facts.val_fraction:.1%} of the documents",
            f"  tokenizer  {facts.tokenizer.name}, {facts.tokenizer.vocab_size:,} entries, {note}",
            f"  time       about {duration(ahead.seconds)}, at the rate of a first sample"
            if ahead.sample_s >= LEAST_SAMPLE_S
            else "  time       estimating: the first sample took less than a second",
        ):
            self._console.print(line, markup=False)
        self._estimator, self._ahead = ProgressEstimator(ahead), ahead
        self._began = self._printed = time.monotonic()
        if self._console.is_terminal:
            self._live.start()

    def progressed(self, step: UnitProgress) -> None:
        """Count a step; where no line moves, print one now and then."""
        if (estimator := self._estimator) is None:
            return
        now = time.monotonic()
        with self._lock:
            estimator.progressed(step, now)
        if not self._console.is_terminal and now - self._printed > PLAIN_INTERVAL_S:
            self._printed = now
            self._console.print(self._line(estimator)[1], markup=False)

    def unit_done(self, position: int) -> None:
        """Count a unit."""
        if self._estimator is not None:
            with self._lock:
                self._estimator.unit_done(position)

    def close(self) -> None:
        """Stop the bar and write a last line, about all of the work."""
        self._live.stop()
        if (estimator := self._estimator) is not None:
            rate = estimator.text_bytes / max(time.monotonic() - self._began, 1e-9)
            self._console.print(self._counts(estimator, rate), markup=False)
        self._estimator = None

    def _bar(self) -> Table:
        grid = Table.grid(padding=(0, 1))
        if self._estimator is not None:
            share, line = self._line(self._estimator)
            bar = ProgressBar(total=1.0, completed=share, width=20)
            grid.add_row(bar, Text(line, no_wrap=True, overflow="ellipsis"))
        return grid

    def _line(self, estimator: ProgressEstimator) -> tuple[float, str]:
        """How much is done, and the line that says so."""
        with self._lock:
            share, left = estimator.share, estimator.seconds_left(time.monotonic())
            counts = self._counts(estimator, estimator.bytes_per_second())
        eta = "" if left is None else f"{duration(left)} left, "
        return share, f"{share:.0%}, {eta}{counts}"

    def _counts(self, estimator: ProgressEstimator, rate: float) -> str:
        of = f"/{len(self._ahead.units):,}" if self._ahead.limit == NO_LIMIT else ""
        done = estimator.done
        return (
            f"{len(estimator.ended):,}{of} units, {done.documents:,} documents, "
            f"{_rounded(done.tokens)} tokens, {rate / 1e6:,.1f} MB/s"
        )


def _rounded(number: int) -> str:
    return f"{number / 1e6:,.1f} M" if number >= 1e6 else f"{number:,}"


def duration(seconds: float) -> timedelta:
    """A time to print: H:MM:SS, with days in front."""
    return timedelta(seconds=round(seconds))
