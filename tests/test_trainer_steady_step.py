"""A step at full size on a device without memory: nothing in it waits for the host."""

import sys
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from model.transformer import Transformer
from trainer.config.config import configure
from trainer.config.sections import GuardConfig
from trainer.faults.guard import Guard
from trainer.metrics.metrics_logger import TARGETS, StepFlags, StepSums, flagged
from trainer.optimizer.optimizer import finish_gradients, make_optimizer, update
from trainer_samples import ALONE

META = torch.device("meta")
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "item")
"""Operators whose result the host has to wait for."""


class Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operators that run; one that the host would wait for is an error."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        assert not any(word in name for word in WAITING), f"{name}: the host waits for it"
        out = func(*args, **(kwargs or {}))
        given = [each for each in (*args, *(kwargs or {}).values()) if isinstance(each, Tensor)]
        made = out if isinstance(out, Tensor) else None
        if made is not None and made.device != META and any(g.device == META for g in given):
            raise AssertionError(f"{name}: a result comes back to {made.device}")
        self.counts[name] += 1
        return out


def steady_step(preset: str, rows: int = 1, micro_batches: int = 2) -> Counter[str]:
    """The operators of the second step of a preset, in fp32, all on the meta device."""
    config = configure(preset=preset).config
    with META:
        bare = Transformer(config.model)
    optimizer = make_optimizer(bare, config.optim)
    guard, T = Guard(GuardConfig(), [1.0] * 128, META), config.model.seq_len
    tokens = torch.zeros(rows, T, dtype=torch.int64, device=META)
    key = torch.zeros(rows, 2, dtype=torch.int32, device=META)
    for _ in range(2):
        with Operators() as operators:
            sums = StepSums(META)
            for _ in range(micro_batches):
                loss = bare(tokens, tokens, key)
                (loss * 1e-6).backward()
                sums.add(loss, tokens)
            reduced = sums.reduce(ALONE, StepFlags(False, False, False, False, 0))
            norm = finish_gradients(optimizer, rows * T, reduced[TARGETS], config.optim)
            skip = guard.should_skip(norm, flagged=flagged(reduced, "skip"))
            update(optimizer, skip)
    counts: Counter[str] = operators.counts
    return counts


@pytest.mark.parametrize("preset", ["tiny", "summer-4b"])
def test_a_steady_step_never_waits_for_the_host(
    monkeypatch: pytest.MonkeyPatch, preset: str
) -> None:
    """No number is read, no mask is counted, and every tensor is on the run's device."""
    monkeypatch.setattr(
        sys.modules["torch.optim.adam"], "_device_dtype_check_for_fused", lambda *of, **how: None
    )
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: False)  # meta has none
    counts = steady_step(preset)
    assert counts["_fused_adamw_"] and counts["_foreach_mul_"] and counts["mm"]


@pytest.mark.parametrize("op", [lambda x: x.item(), lambda x: bool(x), lambda x: x.nonzero()])
def test_the_guard_above_sees_what_waits(op: Any) -> None:
    with Operators(), pytest.raises(AssertionError, match="the host waits"):
        op(torch.ones(()))
