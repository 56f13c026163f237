"""Chosen steps under torch's profiler: a trace for chrome://tracing or Perfetto, and a table."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


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
