"""Updates that would do harm: skipped on the device, noticed a step late, and never without end.

An update is skipped when the gradient's norm is not finite, or is a spike: its logarithm lies more
than `sigma` standard deviations above the mean of the last `window` accepted norms, and the norm is
at least `ratio` times their geometric mean. All of that is computed on the device from the reduced
gradient, which is the same on every rank: nothing waits for the host. Every checkpoint has the
window (trainer/session/state.py).

Six standard deviations over 128 steps, judged once half of them are there, is the rule of OLMo-core
(SkipStepOptimizer, rolling_interval_length=128, sigma_factor=6), but for logarithms, because norms
scatter by factors; for the window, so that one spike does not hide the next; and for `ratio`,
because in quiet training six standard deviations can be a few percent.

After more than `patience` skipped updates in a row the run goes back to the newest checkpoint from
before them and leaves out all samples from there to here (PaLM, Chowdhery et al. 2022, section
5.1). Each skipped update and each rollback is a line in events.jsonl; a run that resumes an earlier
checkpoint, or begins again with these events in its folder, does the same again, bit for bit.
Events from before a changed configuration, or before an explicit --resume, do not count.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from trainer.config.sections import GuardConfig


class Guard:
    """Says, on the device, which updates are skipped."""

    def __init__(self, config: GuardConfig, norms: Sequence[float], device: torch.device) -> None:
        self._config = config
        known = list(norms)[-config.window :]
        window = [float("nan")] * (config.window - len(known)) + known
        self._norms = torch.tensor(window, dtype=torch.float32, device=device)  # oldest first

    def should_skip(self, norm: Tensor, flagged: Tensor) -> Tensor:
        """[]: 1.0 if the update is to be skipped, also where `flagged` [] is above 0; else 0.0."""
        spike = self._is_spike(norm) if self._config.sigma > 0 else torch.zeros_like(norm).bool()
        skip = ~torch.isfinite(norm) | spike | (flagged > 0)
        longer = torch.cat([self._norms[1:], norm.float().view(1)])
        self._norms = torch.where(skip | (norm <= 0), self._norms, longer)
        return skip.float()

    def _is_spike(self, norm: Tensor) -> Tensor:
        config, known = self._config, torch.isfinite(self._norms)
        # the logarithm of the whole window each time: of one value alone, vectorized code may
        # give another last bit, and a resumed run would not be the same
        logs = torch.where(known, self._norms, 1.0).log()
        n = known.sum()
        mean = logs.sum() / n
        deviation = torch.where(known, logs - mean, 0.0).square().sum().div(n - 1).sqrt()
        excess = norm.float().log() - mean
        high = (excess > config.sigma * deviation) & (excess > math.log(config.ratio))
        return high & (n >= config.window // 2)
