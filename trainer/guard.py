"""Refused updates: each is an event, and too many in a row end the run while it can be saved.

The refusal itself happens on the device (trainer/optimizer.py): weights and moments are as if the
step had not been. Here it is noticed, one step late.
"""

from __future__ import annotations

from typing import Final

from trainer.errors import TrainingError
from trainer.tally import Reading

PATIENCE: Final = 20
"""Refused updates in a row that a run may have."""


def judge(reading: Reading, step: int, refused_before: int) -> int:
    """How many updates in a row have been refused up to `step`; TrainingError beyond PATIENCE."""
    if not reading.refused:
        return 0
    refused = refused_before + 1
    if refused > PATIENCE:
        raise TrainingError(
            f"step {step}: {refused} updates in a row had a gradient that is not finite; "
            "go on from an earlier commit (--resume runs/NAME/checkpoints/step-N) with a lower "
            "optim.lr, or with precision=fp32"
        )
    return refused
