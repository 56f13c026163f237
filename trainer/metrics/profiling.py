"""Chosen steps under torch's profiler: a trace for chrome://tracing or Perfetto, and a table."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from trainer.errors import ConfigError


def parse_steps(text: str) -> range:
    """The steps that `profile_steps` names, counted from 1; empty for an empty text."""
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    if text and match is None:
        raise ConfigError(f"profile_steps={text}: write a step, 10, or first and last, 10-12")
    steps = range(int(match[1]), int(match[2] or match[1]) + 1) if match else range(0)
    if match and not (steps and steps[0]):
        raise ConfigError(f"profile_steps={text}: steps count from 1, the first one first: 10-12")
    return steps


class StepProfiler:
    """Profiles the steps asked for into RUN/profile; touches nothing before and after them."""

    def __init__(self, steps: range, run: Path) -> None:
        self._steps, self._folder = steps, run / "profile"
        self._profile: profile | None = None

    def before(self, step: int) -> None:
        """Begin, if this is the first step to profile."""
        if step in self._steps and self._profile is None:
            devices = [ProfilerActivity.CPU]
            devices += [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
            # there is one cycle alone; without this, torch 2.11 warns that it forgets others
            self._profile = profile(activities=devices, acc_events=True)
            self._profile.start()

    def after(self, step: int, *, last: bool = False) -> None:
        """Write what was seen, if this is the last step to profile, or of the run."""
        if self._profile is None or (step + 1 in self._steps and not last):
            return
        self._profile.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"steps-{self._steps.start}-{step}"
        self._profile.export_chrome_trace(f"{path}.json")
        sort = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = self._profile.key_averages().table(sort_by=sort, row_limit=40)
        path.with_suffix(".txt").write_text(table)
        self._profile = None
