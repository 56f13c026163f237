"""Updates that would do harm: refused on the device, noticed a step late, and never without end.

An update is refused when the gradient's norm is not finite, or is a spike: its logarithm lies more
than `sigma` standard deviations above the mean of the last `window` accepted norms, and the norm is
at least `ratio` times their geometric mean. All of that is computed on the device from the reduced
gradient, which is the same on every rank: nobody waits and nobody asks. The window goes into every
checkpoint, as the host reads it (trainer/session/state.py).

Six standard deviations over 128 steps, judged once half of them are there, is the rule of OLMo-core
(SkipStepOptimizer, rolling_interval_length=128, sigma_factor=6). Ours differs in three ways. It
looks at logarithms, because norms scatter by factors. It lets only accepted norms into the window,
so that one spike does not hide the next. And it refuses nothing below `ratio`: in a quiet stretch
six standard deviations can be a few percent, and what clipping mends is no reason to lose a step.

More than `patience` refusals in a row mean that the weights or the data are at fault. Then the run
goes back to the newest checkpoint from before them and leaves out all samples from there to here,
as was done by hand for PaLM (Chowdhery et al. 2022, section 5.1: 100 steps back, 200 to 500 batches
left out). Each refusal and each return is a line in events.jsonl; a run that goes on from an
earlier checkpoint, or begins again beside these events, does the same again: bit for bit, whether
or not what caused them still happens. Events from before a changed configuration, or from before an
explicit --resume, do not count: that is another history.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

import torch
from torch import Tensor

from trainer.checkpoint.runs import EVENTS
from trainer.errors import at_least
from trainer.metrics.metrics import read_lines

REFUSED: Final = "refused"
ROLLBACK: Final = "rollback"


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """When an update is refused, and what follows when that does not end.

    `sigma=0` refuses only what is not finite. `max_rollbacks` counts over the whole run. A rank
    that shows no sign of life for `hang_timeout_s` is taken for lost (0: never).
    """

    window: int = 128
    sigma: float = 6.0
    ratio: float = 2.0
    patience: int = 20
    max_rollbacks: int = 3
    hang_timeout_s: float = 600.0

    def __post_init__(self) -> None:
        at_least("guard.", self, window=8, sigma=0, ratio=1, patience=1, max_rollbacks=0)
        at_least("guard.", self, hang_timeout_s=0)


class Guard:
    """Says, on the device, which updates are refused."""

    def __init__(self, config: GuardConfig, norms: Sequence[float], device: torch.device) -> None:
        self._config = config
        known = list(norms)[-config.window :]
        window = [float("nan")] * (config.window - len(known)) + known
        self._norms = torch.tensor(window, dtype=torch.float32, device=device)  # oldest first

    def refuse(self, norm: Tensor, wished: Tensor) -> Tensor:
        """[]: 1.0 if the update is refused, also where `wished` [] is above 0; otherwise 0.0."""
        spike = self._is_spike(norm) if self._config.sigma > 0 else torch.zeros_like(norm).bool()
        refused = ~torch.isfinite(norm) | spike | (wished > 0)
        longer = torch.cat([self._norms[1:], norm.float().view(1)])
        self._norms = torch.where(refused | (norm <= 0), self._norms, longer)
        return refused.float()

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


class Recorded(NamedTuple):
    """What events.jsonl says of a run's history that its checkpoints may not know yet."""

    refused: frozenset[int]  # the first sample of each step whose update was refused
    skipped: tuple[tuple[int, int], ...]  # samples [begin, end) left out
    rollbacks: int


NOTHING_RECORDED: Final = Recorded(frozenset(), (), 0)


def recorded(run: Path) -> Recorded:
    """The refusals and returns since the run's history began."""
    refused: set[int] = set()
    skipped: tuple[tuple[int, int], ...] = ()
    rollbacks = 0
    for event in read_lines(run / EVENTS):
        if event.get("anew"):
            refused, skipped, rollbacks = set(), (), 0
        if event["event"] == REFUSED and "first_index" in event:
            refused.add(int(event["first_index"]))
        if event["event"] == ROLLBACK:
            rollbacks += 1
            begin, end = event["skipped"]
            skipped = add_skipped(skipped, int(begin), int(end))
    return Recorded(frozenset(refused), skipped, rollbacks)


def add_skipped(
    skipped: Sequence[tuple[int, int]], begin: int, end: int
) -> tuple[tuple[int, int], ...]:
    """Stretches, ascending, with one more that ends after them all and takes in what it covers."""
    return (*((b, min(e, begin)) for b, e in skipped if b < begin), (begin, end))
