"""What a person sees of a preparation: the plan before it starts, then a line that moves."""

from __future__ import annotations

import threading
import time
from bisect import bisect
from pathlib import Path
from typing import Final, TextIO

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

from pipeline.estimate import Estimate, PrepareListener
from pipeline.units.job import NO_LIMIT, PrepareJob, Step

PLAIN_INTERVAL_S: Final = 30.0
"""How often a line is written where nothing can move: files, pipes, CI."""
LEAST_SAMPLES: Final = 3
"""Steps of each worker, at least, that the rate is taken from."""
GROWTH: Final = 1.001
"""Of a long run only those steps are kept after which so many times the text was done."""


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
        self._planned_bytes = max(1, sum(ahead.units.values()))
        self._steps: dict[int, Step] = {}
        self._at_work: dict[int, tuple[float, float]] = {}  # when begun, when last heard of
        self._ended: set[int] = set()
        self._ended_planned = self._ended_text = 0
        self.documents = self.tokens = self.text_bytes = 0
        # when so much text was done; the first text is the slowest: rates are of what comes later
        self._times: list[float] = []
        self._texts: list[int] = []
        self._now = 0.0

    def step(self, step: Step, now: float) -> None:
        """A unit has come further, or is begun (again)."""
        old = self._steps.get(step.unit, Step(step.unit))
        self._steps[step.unit] = step
        self.documents += step.amount.documents - old.amount.documents
        self.tokens += step.amount.tokens - old.amount.tokens
        self.text_bytes += step.text_bytes - old.text_bytes
        if step.unit in self._ended:
            self._ended_text += step.text_bytes - old.text_bytes
        else:
            begun, _ = self._at_work.get(step.unit, (now, now))
            self._at_work[step.unit] = begun if step.text_bytes else now, now
        self._now = now
        if self._texts and self.text_bytes < self._texts[-1]:  # a unit was lost: no rate of that
            self._times, self._texts = [], []
        last_at, last = (self._times[-1], self._texts[-1]) if self._times else (-1.0, 0)
        if now > last_at and self.text_bytes > last * GROWTH:
            self._times.append(now)
            self._texts.append(self.text_bytes)

    def unit_done(self, position: int) -> None:
        """A unit is done; its last step may be reported later."""
        if position in self._ended:
            return
        self._ended.add(position)
        self._at_work.pop(position, None)
        self._ended_planned += self._ahead.units.get(position, 0)
        self._ended_text += self._steps.get(position, Step(position)).text_bytes

    @property
    def n_ended(self) -> int:
        """Units done."""
        return len(self._ended)

    @property
    def share(self) -> float:
        """How much is done, 0 to 1."""
        limit = self._ahead.limit
        done = self._ended_planned + sum(self._planned_of(unit) for unit in self._at_work)
        shares = [done / self._planned_bytes]
        shares += [self.documents / limit.documents] if limit.documents else []
        shares += [self.tokens / limit.tokens] if limit.tokens else []
        return min(1.0, max(shares))

    def bytes_per_second(self) -> float:
        """Text of late, a second; 0 if it is not known yet."""
        if not self._times:
            return 0.0
        half_time = bisect(self._times, (self._times[0] + self._now) / 2) - 1
        half_text = bisect(self._texts, self.text_bytes / 2) - 1
        least = LEAST_SAMPLES * max(1, len(self._at_work))
        first = max(0, min(max(half_time, half_text), len(self._times) - least))
        done, seconds = self.text_bytes - self._texts[first], self._now - self._times[first]
        return done / seconds if done > 0 and seconds > 0 else 0.0

    def seconds_left(self, now: float) -> float | None:
        """Seconds until all is done, or None if it is not known yet."""
        rate, share = self.bytes_per_second(), self.share
        if not rate or not share:
            return None
        left = self.text_bytes * (1 - share) / share / rate - (now - self._now)
        if self._ahead.limit == NO_LIMIT:  # with few units left, the longest of them decides
            left = max([left, *(self._seconds_of(unit, now) for unit in self._at_work)])
        return max(0.0, left)

    def _planned_of(self, unit: int) -> float:
        """The planned bytes that a unit at work has behind it."""
        text = self._steps[unit].text_bytes
        if self._ended_text and self._ended_planned:
            text = text * self._ended_planned // self._ended_text
        return min(text, self._ahead.units.get(unit, 0))

    def _seconds_of(self, unit: int, now: float) -> float:
        """What a unit at work still takes, at its own rate."""
        done, (begun, heard) = self._planned_of(unit), self._at_work[unit]
        left = self._ahead.units.get(unit, 0) - done
        return left * (heard - begun) / done - (now - heard) if done else 0.0


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
        one_line = Column(no_wrap=True, overflow="ellipsis")
        columns = BarColumn(bar_width=20), TextColumn("{task.description}", table_column=one_line)
        self._bar = Progress(*columns, console=self._console, transient=True)
        self._task = self._bar.add_task("", total=1.0)

    def waits(self, folder: Path) -> None:
        """Say for whom it waits."""
        self._console.print(f"{folder}: another limited run is at work here; this one waits for it")

    def planned(self, job: PrepareJob, ahead: Estimate, note: str) -> None:
        """Show what the work will take."""
        facts = job.facts
        on = "one worker" if ahead.workers == 1 else f"{ahead.workers} workers"
        for line in (
            f"{facts.source}: {ahead.n_files:,} files of {facts.dataset}"
            + (f" at {facts.revision[:12]}" if facts.revision else ""),
            f"  licence    {facts.licence}",
            f"  to read    {decimal(ahead.read_bytes)} in {len(ahead.units):,} units of work"
            + ("" if ahead.limit == NO_LIMIT else ", as far as the limit reaches"),
            f"  to write   about {ahead.tokens / 1e6:,.1f} M tokens, {decimal(ahead.disk_bytes)} "
            f"into {job.folder}",
            f"  tokenizer  {facts.tokenizer.name}, {facts.tokenizer.vocab_size:,} entries, {note}",
            f"  time       about {duration(ahead.seconds)} on {on}, at the rate of a first sample",
        ):
            self._console.print(line, markup=False)
        self._estimator, self._ahead = ProgressEstimator(ahead), ahead
        self._began = self._printed = time.monotonic()
        if self._console.is_terminal:
            self._bar.start()

    def step(self, step: Step) -> None:
        """Count a step; where no line moves, print one now and then."""
        if (estimator := self._estimator) is None:
            return
        now = time.monotonic()
        with self._lock:
            estimator.step(step, now)
            line = self._line(estimator, now)
            self._bar.update(self._task, completed=estimator.share, description=line)
        if not self._console.is_terminal and now - self._printed > PLAIN_INTERVAL_S:
            self._printed = now
            self._console.print(line, markup=False)

    def unit_done(self, position: int) -> None:
        """Count a unit."""
        if self._estimator is not None:
            with self._lock:
                self._estimator.unit_done(position)

    def close(self) -> None:
        """Stop the bar and write a last line, about all of the work."""
        if self._bar.live.is_started:
            self._bar.stop()
        if (estimator := self._estimator) is not None:
            rate = estimator.text_bytes / max(time.monotonic() - self._began, 1e-9)
            self._console.print(self._counts(estimator, rate), markup=False)
        self._estimator = None

    def _line(self, estimator: ProgressEstimator, now: float) -> str:
        left = estimator.seconds_left(now)
        eta = "" if left is None else f"{duration(left)} left, "
        return f"{estimator.share:.0%}, {eta}" + self._counts(
            estimator, estimator.bytes_per_second()
        )

    def _counts(self, estimator: ProgressEstimator, rate: float) -> str:
        of = f"/{len(self._ahead.units):,}" if self._ahead.limit == NO_LIMIT else ""
        return (
            f"{estimator.n_ended:,}{of} units, {estimator.documents:,} documents, "
            f"{estimator.tokens / 1e6:,.1f} M tokens, {rate / 1e6:,.1f} MB/s"
        )


def duration(seconds: float) -> str:
    """A time in the two units that suit it."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes, seconds = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {seconds:02} s" if minutes < 10 else f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours < 48 else f"{hours / 24:.1f} days"
