"""What a person sees of a preparation: the plan before it starts, then a line that moves."""

from __future__ import annotations

import threading
import time
from typing import Final, TextIO

from rich.console import Console
from rich.live import Live
from rich.text import Text

from pipeline.estimate import Estimate
from pipeline.prepare import Watch
from pipeline.work import Job, Step

PLAIN_INTERVAL_S: Final = 30.0
"""How often a line is written where nothing can move: files, pipes, CI."""


class Screen(Watch):
    """Tells a stream; on a terminal its last line is kept up to date."""

    def __init__(self, stream: TextIO) -> None:
        self._console = Console(file=stream, highlight=False, soft_wrap=True)
        self._live = Live(console=self._console, auto_refresh=False, transient=True)
        self._lock = threading.Lock()  # steps come from a thread that listens to the workers
        self._done, self._units = Step(), 0
        self._ahead: Estimate | None = None
        self._began = self._told = 0.0

    def planned(self, job: Job, ahead: Estimate, note: str) -> None:
        """Show what the work will take."""
        facts = job.facts
        for line in (
            f"{facts.source}: {ahead.n_files:,} files of {facts.dataset}"
            + (f" at {facts.revision[:12]}" if facts.revision else ""),
            f"  licence    {facts.licence}",
            f"  to read    {size(ahead.read_bytes)} in {ahead.n_units:,} units of work",
            f"  to write   about {ahead.tokens / 1e6:,.1f} M tokens, {size(ahead.disk_bytes)} "
            f"into {job.folder}",
            f"  tokenizer  {facts.tokenizer.name}, {facts.tokenizer.vocab_size:,} entries, {note}",
            f"  time       about {duration(ahead.hours * 3600)} at the rate of a first sample",
        ):
            self._console.print(line, markup=False)
        self._ahead = ahead
        self._began = self._told = time.monotonic()
        if self._console.is_terminal:
            self._live.start()

    def step(self, step: Step) -> None:
        """Renew the line."""
        with self._lock:
            self._done += step
            now = time.monotonic()
            if self._console.is_terminal:
                self._live.update(Text(self._line(now), no_wrap=True), refresh=True)
            elif now - self._told > PLAIN_INTERVAL_S:
                self._told = now
                self._console.print(self._line(now), markup=False)

    def unit_done(self) -> None:
        """Count a unit."""
        with self._lock:
            self._units += 1

    def close(self) -> None:
        """Leave the screen in order, with the last line standing."""
        if self._live.is_started:
            self._live.stop()
        if self._ahead is not None:
            self._console.print(self._line(time.monotonic()), markup=False)

    def _line(self, now: float) -> str:
        seconds, done, ahead = max(now - self._began, 1e-9), self._done, self._ahead
        tokens = done.amount.tokens
        left = ""
        if ahead is not None and 0 < tokens < ahead.tokens:
            left = f", {duration(seconds * (ahead.tokens / tokens - 1))} left"
        return (
            f"{self._units:,}/{ahead.n_units if ahead else 0:,} units, "
            f"{done.amount.documents:,} documents, {tokens / 1e6:,.1f} M tokens, "
            f"{done.text_bytes / 1e6 / seconds:,.1f} MB/s{left}"
        )


def size(n_bytes: float) -> str:
    """Bytes in the unit that suits them."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if n_bytes >= scale:
            return f"{n_bytes / scale:,.1f} {unit}"
    return f"{n_bytes / 1e3:,.1f} kB"


def duration(seconds: float) -> str:
    """A time in the two units that suit it."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    if minutes < 60:
        return f"{minutes:.0f} min"
    hours = minutes / 60
    return f"{hours:.1f} h" if hours < 48 else f"{hours / 24:.1f} days"
