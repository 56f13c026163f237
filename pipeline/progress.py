"""What a person sees of a preparation: the plan before it starts, then a line that moves."""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TextIO

from rich.console import Console
from rich.live import Live
from rich.text import Text

from pipeline.estimate import Estimate
from pipeline.prepare import Watch
from pipeline.units.work import NO_LIMIT, Job, Step

PLAIN_INTERVAL_S: Final = 30.0
"""How often a line is written where nothing can move: files, pipes, CI."""
LEAST_MARKS: Final = 3
"""Steps of each worker, at least, that the rate is taken from."""
MOST_MARKS: Final = 1000
"""Steps kept of the whole time, at most; of a long run only some."""


@dataclass(frozen=True)
class Mark:
    """How much text was done at a time."""

    at: float
    text_bytes: int


class Course:
    """How far the work is, how fast it goes and what is left of it. It is told the time.

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
        self._trail: deque[Mark] = deque()
        self._last = Mark(0.0, 0)

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
        self._note(now)

    def unit_done(self, position: int) -> None:
        """A unit is done; its last step may be told later."""
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
        if limit.documents:
            shares.append(self.documents / limit.documents)
        if limit.tokens:
            shares.append(self.tokens / limit.tokens)
        return min(1.0, max(shares))

    def bytes_per_second(self) -> float:
        """Text of late, a second; 0 if nothing tells yet."""
        first, last = self._trail[0] if self._trail else self._last, self._last
        done, seconds = last.text_bytes - first.text_bytes, last.at - first.at
        return done / seconds if done > 0 and seconds > 0 else 0.0

    def seconds_left(self, now: float) -> float | None:
        """Seconds until all is done, or None if nothing tells yet."""
        rate, share = self.bytes_per_second(), self.share
        if not rate or not share:
            return None
        left = self.text_bytes * (1 - share) / share / rate - (now - self._last.at)
        if self._ahead.limit == NO_LIMIT:  # with few units left, the longest of them tells
            left = max([left, *(self._seconds_of(unit, now) for unit in self._at_work)])
        return max(0.0, left)

    def _note(self, now: float) -> None:
        trail, self._last = self._trail, Mark(now, self.text_bytes)
        if not self.text_bytes:
            return  # the first text is the slowest: the rate is taken from what comes after it
        if not trail:
            self._began = now
            trail.append(self._last)
        if self.text_bytes > trail[-1].text_bytes:
            if now - trail[-1].at > (now - self._began) / MOST_MARKS:
                trail.append(self._last)
        elif self.text_bytes < trail[-1].text_bytes:  # a unit was lost: no rate is made of that
            trail.clear()
            trail.append(self._last)
        half, least = (self._began + now) / 2, LEAST_MARKS * max(1, len(self._at_work))
        while len(trail) > least and (
            trail[1].at <= half or trail[1].text_bytes <= self.text_bytes / 2
        ):
            trail.popleft()

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


class Screen(Watch):
    """Tells a stream; on a terminal its last line is kept up to date."""

    def __init__(self, stream: TextIO) -> None:
        self._console = Console(
            file=stream, highlight=False, soft_wrap=True, force_terminal=stream.isatty()
        )
        self._lock = threading.Lock()  # steps come from a thread that listens to the workers
        self._course: Course | None = None
        self._ahead: Estimate
        self._began = self._told = 0.0
        self._live = Live(
            console=self._console,
            get_renderable=lambda: Text(self._line(), no_wrap=True, overflow="ellipsis"),
            transient=True,
        )

    def waits(self, folder: Path) -> None:
        """Say for whom it waits."""
        self._console.print(f"{folder}: another limited run is at work here; this one waits for it")

    def planned(self, job: Job, ahead: Estimate, note: str) -> None:
        """Show what the work will take."""
        facts = job.facts
        on = "one worker" if ahead.workers == 1 else f"{ahead.workers} workers"
        for line in (
            f"{facts.source}: {ahead.n_files:,} files of {facts.dataset}"
            + (f" at {facts.revision[:12]}" if facts.revision else ""),
            f"  licence    {facts.licence}",
            f"  to read    {size(ahead.read_bytes)} in {len(ahead.units):,} units of work"
            + ("" if ahead.limit == NO_LIMIT else ", as far as the limit reaches"),
            f"  to write   about {ahead.tokens / 1e6:,.1f} M tokens, {size(ahead.disk_bytes)} "
            f"into {job.folder}",
            f"  tokenizer  {facts.tokenizer.name}, {facts.tokenizer.vocab_size:,} entries, {note}",
            f"  time       about {duration(ahead.seconds)} on {on}, at the rate of a first sample",
        ):
            self._console.print(line, markup=False)
        self._course, self._ahead = Course(ahead), ahead
        self._began = self._told = time.monotonic()
        if self._console.is_terminal:
            self._live.start()

    def step(self, step: Step) -> None:
        """Count a step; where no line moves, print one now and then."""
        if self._course is None:
            return
        with self._lock:
            self._course.step(step, time.monotonic())
        now = time.monotonic()
        if not self._console.is_terminal and now - self._told > PLAIN_INTERVAL_S:
            self._told = now
            self._console.print(self._line(), markup=False)

    def unit_done(self, position: int) -> None:
        """Count a unit."""
        if self._course is not None:
            with self._lock:
                self._course.unit_done(position)

    def close(self) -> None:
        """Leave the screen in order, with the last line standing."""
        if self._live.is_started:
            self._live.stop()
        if self._course is not None:
            self._console.print(self._line(last=True), markup=False)
        self._course = None

    def _line(self, last: bool = False) -> str:
        course, now = self._course, time.monotonic()
        if course is None:
            return ""
        with self._lock:
            left = None if last else course.seconds_left(now)
            rate = course.bytes_per_second()
            if last:
                rate = course.text_bytes / max(now - self._began, 1e-9)
            of = f"/{len(self._ahead.units):,}" if self._ahead.limit == NO_LIMIT else ""
            return (
                ("" if last else f"{course.share:.0%}, ")
                + ("" if left is None else f"{duration(left)} left, ")
                + f"{course.n_ended:,}{of} units, {course.documents:,} documents, "
                f"{course.tokens / 1e6:,.1f} M tokens, {rate / 1e6:,.1f} MB/s"
            )


def size(n_bytes: float) -> str:
    """Bytes in the unit that suits them."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if n_bytes >= scale:
            return f"{n_bytes / scale:,.1f} {unit}"
    return f"{n_bytes / 1e3:,.1f} kB"


def duration(seconds: float) -> str:
    """A time in the two units that suit it."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes, seconds = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {seconds:02} s" if minutes < 10 else f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours < 48 else f"{hours / 24:.1f} days"
