"""What a person sees of a run: a line that moves on a terminal, plain lines anywhere else."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, Final, TextIO

from rich.console import Console
from rich.live import Live
from rich.text import Text

_WIDTH: Final = 80


class Display:
    """Plain lines for files, pipes and CI; on a terminal a line that moves, text above it.

    Without a stream nothing is shown: for all ranks but the first.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream
        self._live: Live | None = None
        if stream is not None and stream.isatty():
            self._live = Live(
                console=Console(file=stream, highlight=False), auto_refresh=False, transient=True
            )
            self._live.start()

    def print(self, text: str) -> None:
        """Show a line that stays, if there is room: a full disk may hold the log as well."""
        try:
            if self._live is not None:
                self._live.console.print(text, markup=False)
            elif self._stream is not None:
                self._stream.write(f"{text}\n")
                self._stream.flush()
        except BrokenPipeError:  # `| head` has seen enough: the run goes on, and says no more
            if self._stream is not None:
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
            self._stream = None
        except OSError:
            pass

    def step(self, values: Mapping[str, Any]) -> None:
        """Show how a step went: the fields of metrics.jsonl, and max_steps, eta_s."""
        if self._live is None:
            self.print(step_line(values))
        elif "val_loss" in values or values["step"] == values["max_steps"]:  # these stay
            self._live.update("", refresh=True)
            self.print(step_line(values, self._live.console.width))
        else:
            self.wait(step_line(values, self._live.console.width))

    def wait(self, text: str) -> None:
        """Show what is done now: a line of a log, or the one that moves."""
        if self._live is not None:
            self._live.update(Text(text, no_wrap=True, overflow="ellipsis"), refresh=True)
        else:
            self.print(text)

    def close(self) -> None:
        """Leave the terminal in order: the last line that was printed is the last on it."""
        if self._live is not None:
            self._live.stop()


_COLUMNS: Final[dict[str, Callable[[Mapping[str, Any]], str]]] = {
    "step": lambda v: f"step {v['step']}/{v['max_steps']}",
    "eta_s": lambda v: f"ETA {timedelta(seconds=round(v['eta_s']))}",
    "loss": lambda v: f"loss {_number(v['loss'], '.4f')}",
    "val_loss": lambda v: f"held-out {v['val_loss']:.4f}",
    "val_bits_per_byte": lambda v: f"{v['val_bits_per_byte']:.4f} bits/byte",
    "tokens_per_s": lambda v: f"{v['tokens_per_s']:,.0f} tokens/s",
    "mfu": lambda v: f"MFU {100 * v['mfu']:.1f} % (causal)",
    "dollars": lambda v: (
        f"$ {v['dollars']:.2f} (+ {v['dollars_to_go']:.2f}"
        + (f", {v['dollars_left']:.2f} left)" if "dollars_left" in v else ")")
    ),
    "grad_norm": lambda v: f"grad norm {_number(v['grad_norm'], '.2f')}",
    "lr": lambda v: f"lr {v['lr']:.2e}",
    "data_wait": lambda v: f"data wait {100 * v['data_wait']:.1f} %",
}
"""How each field of a line in metrics.jsonl is shown, the most important first."""


def step_line(values: Mapping[str, Any], width: int = _WIDTH) -> str:
    """A step in one line of so many columns: as many fields as it takes."""
    line = ""
    for field, show in _COLUMNS.items():
        if field in values:
            longer = f"{line} · {show(values)}".removeprefix(" · ")
            if line and len(longer) > width:
                break
            line = longer
    return line


def _number(value: float | None, form: str) -> str:
    return "not finite" if value is None else format(value, form)
