"""What a person sees of a run: a line that moves on a terminal, plain lines anywhere else."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any, Protocol, TextIO

from rich.console import Console
from rich.live import Live
from rich.text import Text


class Screen(Protocol):
    """Where a run speaks."""

    def say(self, text: str) -> None:
        """Tell something that stays on the screen."""

    def step(self, values: Mapping[str, Any]) -> None:
        """Show how a step went: the fields of metrics.jsonl, and max_steps, eta_s."""

    def close(self) -> None:
        """Leave the screen in order."""


class Silent:
    """For ranks that do not speak, and for tests."""

    def say(self, text: str) -> None:
        """Nothing."""

    def step(self, values: Mapping[str, Any]) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class PlainLines:
    """One line for each logged step, for files, pipes and CI."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def say(self, text: str) -> None:
        """Write the text, now or when there is room: a full disk may hold the log as well."""
        try:
            self._stream.write(f"{text}\n")
            self._stream.flush()
        except BrokenPipeError:
            raise
        except OSError:
            pass

    def step(self, values: Mapping[str, Any]) -> None:
        """Write the step's line."""
        self.say(step_line(values))

    def close(self) -> None:
        """Nothing is left open."""


class LiveLine:
    """One line at the bottom of a terminal; what is said scrolls by above it."""

    def __init__(self, stream: TextIO) -> None:
        self._console = Console(file=stream, highlight=False)
        self._live = Live(console=self._console, auto_refresh=False)
        self._live.start()

    def say(self, text: str) -> None:
        """Write the text above the line."""
        self._console.print(text, markup=False)

    def step(self, values: Mapping[str, Any]) -> None:
        """Renew the line; steps with a held-out loss stay."""
        line = Text(step_line(values), no_wrap=True, overflow="ellipsis")
        if "val_loss" in values:
            self._console.print(line)
        self._live.update(line, refresh=True)

    def close(self) -> None:
        """Leave the last line standing."""
        self._live.stop()


def open_screen(stream: TextIO) -> Screen:
    """The screen that fits the stream."""
    return LiveLine(stream) if stream.isatty() else PlainLines(stream)


def step_line(values: Mapping[str, Any]) -> str:
    """A step in one line."""
    parts = [
        f"step {values['step']}/{values['max_steps']}",
        f"loss {_number(values['loss'], '.4f')}",
        f"lr {values['lr']:.2e}",
        f"norm {_number(values['grad_norm'], '.2f')}",
        f"{values['tokens_per_s']:,.0f} tokens/s",
    ]
    if "mfu" in values:
        parts.append(f"MFU {100 * values['mfu']:.1f} % (causal)")
    if "dollars" in values:
        left = f", {values['dollars_left']:.2f} left" if "dollars_left" in values else ""
        parts.append(f"$ {values['dollars']:.2f} (+ {values['dollars_to_go']:.2f}{left})")
    parts.append(f"data wait {100 * values['data_wait']:.1f} %")
    if "val_loss" in values:
        parts.append(f"held-out {values['val_loss']:.4f}")
    if "val_bits_per_byte" in values:
        parts.append(f"{values['val_bits_per_byte']:.4f} bits/byte")
    parts.append(f"ETA {timedelta(seconds=round(values['eta_s']))}")
    return " · ".join(parts)


def _number(value: float | None, form: str) -> str:
    return "not finite" if value is None else format(value, form)
