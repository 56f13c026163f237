"""What a run would cost: memory, time, money and disk, by arithmetic alone.

Rates come from the device's peak and an **assumed** share of it (MFU, counting causal attention);
nothing is measured here. A device whose peak is not known gets no rates.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

from model.config import count_params, flops_per_token
from shards.format import ROW_RECORD, token_dtype
from tools.errors import ToolError
from tools.roofline import step_parts
from trainer.config.accelerators import ACCELERATORS, find_accelerator
from trainer.config.config import RunConfig, configure
from trainer.config.memory import checkpoint_bytes, fits, largest_micro_batch, memory_by_part
from trainer.config.train_plan import served_by
from trainer.errors import did_you_mean

ASSUMED_MFU: Final = 0.32
"""The share of the peak that the reference run's budget was made with."""

_DAY_S: Final = 86_400


def plan_cost(
    *,
    preset: str = "summer-4b",
    device: str = "mi300x",
    devices: int = 8,
    dollars_per_hour: float | None = None,
    tokens: float | None = None,
    days: float | None = None,
    mfu: float = ASSUMED_MFU,
    roofline: bool = False,
) -> dict[str, Any]:
    """The requested run on paper, by name; None where the device's peak is not known.

    `dollars_per_hour` is for one device; `tokens` or `days` or neither are given; with `roofline`,
    a step's seconds by part. ToolError where the request is impossible.
    """
    _check(devices=devices, tokens=tokens, days=days, dollars_per_hour=dollars_per_hour, mfu=mfu)
    accelerator = find_accelerator(device)
    limit = accelerator.memory_gb * 10**9 if accelerator else 0
    kind = accelerator.kind if accelerator else "cuda"
    config = _divided_to_fit(configure(preset=preset).config, devices, kind, limit)
    flops = flops_per_token(config.model, config.model.seq_len, causal=True)
    rate = accelerator.bf16_tflops * 1e12 * devices * mfu / flops if accelerator else None
    if days is not None and rate is None:
        raise ToolError(
            f"--days {days}: the peak of {device!r} is not known, so no rate can be assumed; give"
            f" --tokens, or a device with a peak; {known_devices(device)}"
        )
    if days is not None and rate is not None:
        tokens = days * _DAY_S * rate
    n_tokens = int(tokens or config.max_steps * config.global_batch_tokens)
    days = n_tokens / rate / _DAY_S if rate else None
    micro_batch = _micro_batch(config, devices, kind, limit)
    parts = memory_by_part(config, micro_batch, kind)
    step = step_parts(config, accelerator, devices, micro_batch) if roofline and accelerator else []
    hours, price = (days or 0) * 24 * devices, dollars_per_hour
    return {
        "preset": preset,
        "device": accelerator.name if accelerator else device,
        "devices": devices,
        "parameters": count_params(config.model),
        "flops_per_token": flops,
        "micro_batch_size": micro_batch,
        "shard_degree": config.shard_degree,  # devices that hold one copy: the least that fits
        "memory_bytes": parts,
        "device_bytes": limit or None,
        "fits": fits(parts, limit) if limit else None,
        "assumed_mfu": mfu,
        "tokens": n_tokens,
        "steps": -(-n_tokens // config.global_batch_tokens),
        "tokens_per_s": rate,
        "days": days,
        "dollars": None if days is None or price is None else hours * price,
        "shard_bytes": _shard_bytes(config, n_tokens),
        "checkpoint_bytes": checkpoint_bytes(config.model),
        "checkpoints_kept": config.checkpoint.keep_last + 1,  # and the one being written
        "served_by": served_by(config.model),
        "mfu_is": "an assumption, not a measurement",
        "roofline_s": {part.name: [part.fast_s, part.slow_s] for part in step},
        "step_tokens": config.global_batch_tokens,
    }


def known_devices(device: str) -> str:
    """The devices whose peak is known, and which one is meant where the name is close to it."""
    names = {each.name.lower(): each.name for each in ACCELERATORS}
    near = did_you_mean(device.lower(), names)
    return f"{near}known: {', '.join(names.values())}"


def _check(*, mfu: float, dollars_per_hour: float | None, **positive: float | None) -> None:
    """ToolError for a number that cannot be."""
    if positive["tokens"] is not None and positive["days"] is not None:
        raise ToolError(
            f"--tokens {positive['tokens']} and --days {positive['days']}: give one of them"
        )
    if not 0 < mfu <= 1:
        raise ToolError(f"mfu {mfu}: give a share of the peak, above 0 and up to 1")
    for name, value in positive.items():
        if value is not None and not value > 0:
            raise ToolError(f"{name} {value}: give more than 0")
    if dollars_per_hour is not None and not dollars_per_hour >= 0:
        raise ToolError(f"dollars_per_hour {dollars_per_hour}: give 0 or more")


def _divided_to_fit(config: RunConfig, devices: int, kind: str, limit: int) -> RunConfig:
    """The configuration with the least `shard_degree` that fits; as it is where none does."""
    for degree in (n for n in range(1, devices + 1) if devices % n == 0):
        divided = replace(config, shard_degree=degree)
        if fits(memory_by_part(divided, 1, kind), limit):
            return divided
    return config


def _micro_batch(config: RunConfig, devices: int, kind: str, limit: int) -> int:
    """Sequences per device per forward: the most that fit, else 1; ToolError if no equal shares."""
    n_sequences = config.global_batch_tokens // config.model.seq_len
    if n_sequences < 1 or n_sequences % devices:
        raise ToolError(
            f"{devices} devices: a step of {config.global_batch_tokens:,} tokens has {n_sequences} "
            "sequences, which they cannot share equally; choose a number of devices that divides it"
        )
    largest = largest_micro_batch(config, n_sequences // devices, kind, limit)
    return config.micro_batch_size or largest or 1


def _shard_bytes(config: RunConfig, tokens: int) -> int:
    """Disk for as many tokens as the run sees, each once, with a digest for each sequence."""
    row_bytes = config.model.seq_len * token_dtype(config.model.vocab_size).itemsize
    return -(-tokens // config.model.seq_len) * (row_bytes + ROW_RECORD.itemsize)
