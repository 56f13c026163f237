"""What a run would cost: memory, time, money and disk, by arithmetic alone.

Rates come from the device's peak and an **assumed** share of it (MFU, counting causal attention);
nothing is measured here. A device whose peak is not known gets no rates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Final

from model.config import count_params, flops_per_token
from shards.format import ROW_RECORD, token_dtype
from tools.errors import PlanError
from trainer.config.config import RunConfig, configure
from trainer.config.memory import checkpoint_bytes, fits, largest_micro_batch, memory_by_part
from trainer.distributed.devices import ACCELERATORS, find_accelerator
from trainer.errors import did_you_mean

ASSUMED_MFU: Final = 0.32
"""The share of the peak that the reference run's budget was made with."""

_DAY_S: Final = 86_400


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """The run to plan. `dollars_per_hour` is for one device; tokens or days, or neither."""

    preset: str = "summer-4b"
    device: str = "mi300x"
    devices: int = 8
    dollars_per_hour: float | None = None
    tokens: int | None = None
    days: float | None = None
    mfu: float = ASSUMED_MFU

    def __post_init__(self) -> None:
        if self.tokens is not None and self.days is not None:
            raise PlanError(f"--tokens {self.tokens} and --days {self.days}: give one of them")
        if not 0 < self.mfu <= 1:
            raise PlanError(f"mfu {self.mfu}: give a share of the peak, above 0 and up to 1")
        for name in ("devices", "tokens", "days"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise PlanError(f"{name} {value}: give more than 0")
        if self.dollars_per_hour is not None and not self.dollars_per_hour >= 0:
            raise PlanError(f"dollars_per_hour {self.dollars_per_hour}: give 0 or more")


@dataclass(frozen=True, kw_only=True)
class CostPlan:
    """A run on paper. Rates are None where the device's peak is not known."""

    preset: str
    device: str
    devices: int
    parameters: int
    flops_per_token: float
    micro_batch_size: int
    shard_degree: int  # devices that hold one copy of weights and moments: the least that fits
    memory_bytes: Mapping[str, int]
    device_bytes: int | None
    fits: bool | None
    assumed_mfu: float
    tokens: int
    steps: int
    tokens_per_s: float | None
    days: float | None
    dollars: float | None
    shard_bytes: int
    checkpoint_bytes: int
    checkpoints_kept: int

    def to_json(self) -> dict[str, object]:
        """All figures under their names."""
        return {**asdict(self), "mfu_is": "an assumption, not a measurement"}


def plan_cost(request: PlanRequest) -> CostPlan:
    """What the requested run needs and costs; PlanError where the request is impossible."""
    accelerator = find_accelerator(request.device)
    limit = accelerator.memory_gb * 10**9 if accelerator else 0
    config = _divided_to_fit(configure(preset=request.preset).config, request.devices, limit)
    model = config.model
    flops = flops_per_token(model, model.seq_len, causal=True)
    peak = accelerator.bf16_tflops * 1e12 * request.devices if accelerator else None
    rate = peak * request.mfu / flops if peak else None
    tokens = _tokens(request, config, rate)
    days = tokens / rate / _DAY_S if rate else None
    micro_batch = _micro_batch(config, request.devices, limit)
    parts = memory_by_part(config, micro_batch, "cuda")
    price = request.dollars_per_hour
    return CostPlan(
        preset=request.preset,
        device=accelerator.name if accelerator else request.device,
        devices=request.devices,
        parameters=count_params(model),
        flops_per_token=flops,
        micro_batch_size=micro_batch,
        shard_degree=config.shard_degree,
        memory_bytes=parts,
        device_bytes=limit or None,
        fits=fits(parts, limit) if limit else None,
        assumed_mfu=request.mfu,
        tokens=tokens,
        steps=-(-tokens // config.global_batch_tokens),
        tokens_per_s=rate,
        days=days,
        dollars=days * 24 * request.devices * price if days and price is not None else None,
        shard_bytes=_shard_bytes(config, tokens),
        checkpoint_bytes=checkpoint_bytes(model),
        checkpoints_kept=config.checkpoint.keep_last + 1,  # and the one being written
    )


def known_devices(device: str) -> str:
    """The devices whose peak is known, and which one is meant where the name is close to it."""
    names = {each.name.lower(): each.name for each in ACCELERATORS}
    near = did_you_mean(device.lower(), names)
    return f"{near}known: {', '.join(names.values())}"


def _tokens(request: PlanRequest, config: RunConfig, rate: float | None) -> int:
    """Tokens of the run: as requested, as the days allow, or the preset's."""
    if request.tokens is not None:
        return request.tokens
    if request.days is None:
        return config.max_steps * config.global_batch_tokens
    if rate is None:
        raise PlanError(
            f"--days {request.days}: the peak of {request.device!r} is not known, so no rate can "
            f"be assumed; give --tokens, or a device with a peak; {known_devices(request.device)}"
        )
    return int(request.days * _DAY_S * rate)


def _divided_to_fit(config: RunConfig, devices: int, limit: int) -> RunConfig:
    """The configuration with the least `shard_degree` that fits; as it is where none does."""
    for degree in (n for n in range(1, devices + 1) if devices % n == 0):
        divided = replace(config, shard_degree=degree)
        if fits(memory_by_part(divided, 1, "cuda"), limit):
            return divided
    return config


def _micro_batch(config: RunConfig, devices: int, limit: int) -> int:
    """Sequences per device per forward: the most that fit, else 1; PlanError if no equal shares."""
    n_sequences = config.global_batch_tokens // config.model.seq_len
    if n_sequences < 1 or n_sequences % devices:
        raise PlanError(
            f"{devices} devices: a step of {config.global_batch_tokens:,} tokens has {n_sequences} "
            "sequences, which they cannot share equally; choose a number of devices that divides it"
        )
    largest = largest_micro_batch(config, n_sequences // devices, "cuda", limit)
    return config.micro_batch_size or largest or 1


def _shard_bytes(config: RunConfig, tokens: int) -> int:
    """Disk for as many tokens as the run sees, each once, with a digest for each sequence."""
    row_bytes = config.model.seq_len * token_dtype(config.model.vocab_size).itemsize
    return -(-tokens // config.model.seq_len) * (row_bytes + ROW_RECORD.itemsize)
