"""What must be right on a machine before a long run is started there: the list of checks.

Nothing is assumed: attention is compared with fp32 math, products, memory, all-reduce and real
training steps are timed, a file is written to the disk.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

import torch

from model.config import ModelError
from shards.errors import SummerError
from shards.reader import find_sources
from tools.diagnosis import data, machine, speed, trial
from tools.diagnosis.machine import CheckResult, Context
from trainer.config.config import configure
from trainer.config.resolve import fit_precision
from trainer.distributed.devices import pick_device

Check = Callable[[Context], Iterator[CheckResult]]
CHECKS: Final[tuple[Check, ...]] = (
    machine.versions, machine.devices, machine.memory_fits, machine.attention, speed.products,
    speed.bandwidth, speed.all_reduce, machine.numa_balancing, data.disk, machine.environment,
    trial.training, data.shards,
)  # fmt: skip


def make_context(
    *,
    preset: str,
    device: str,
    nproc: int | None,
    shards: Path | None,
    out: Path,
    sets: Sequence[str] = (),
    probe: bool = False,
) -> Context:
    """The context of all checks; ConfigError for a preset that does not exist.

    With shards, sequence length and vocabulary are theirs.
    """
    kind = pick_device(device)
    settings = (*sets, f"device={kind}")
    config, _ = fit_precision(configure(preset=preset, sets=settings))
    n_ranks = nproc or (torch.cuda.device_count() if kind == "cuda" else 1)
    if shards is not None:
        with contextlib.suppress(SummerError):  # what is wrong with them, a check will report
            facts = next(iter(find_sources(shards).values())).facts
            vocab_size = -(-facts.tokenizer.vocab_size // 128) * 128
            shape = replace(config.model, seq_len=facts.seq_len, vocab_size=vocab_size)
            config = replace(config, model=shape)
    return Context(
        config=config,
        settings=settings,
        device=kind,
        folder=out,
        nproc=n_ranks,
        shards=shards,
        probe=probe,
    )


def run_checks(context: Context, checks: Sequence[Check] = CHECKS) -> Iterator[CheckResult]:
    """All results, as they come; a check that raises an exception is a failure too."""
    for check in checks:
        try:
            yield from check(context)
        except Exception as error:  # a broken driver can raise anything, and that is the news
            text = " ".join(str(error).split())
            if not isinstance(error, SummerError | ModelError):
                text = f"{type(error).__name__}: {text}"
            yield CheckResult("fail", check.__name__.replace("_", "-"), text[:300])
