"""The tokens a second that a preset can be expected to reach on this machine: an estimate.

Where one layer of the preset fits and is quick enough, a model of that one layer is trained for
real, by the trainer's own parts, compiled where the preset is: its step, its block alone and its
update are timed. A step is then

    accumulations x (one-layer model + (layers - 1) x block) + update x parameters + exchange.

That was 0.98 to 1.10 of the rate of the whole `tiny` (rows of 1024, one CPU thread, CPU seconds).
Elsewhere it is made of the measured rates alone: products at the rate of large square products,
each saved activation moved four times, forty bytes a parameter for clipping and AdamW. That is an
upper bound, as small or oddly shaped work is slower: on the same CPU 4 times too high compiled, 7
times not. Both leave out waiting for data, checkpoints and validation. Of the exchange, what the
last backward pass (two thirds of its micro-batch) does not cover counts, at least a block's part;
on the CPU all of it, for there is nothing to cover it with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

import torch

from model.config import count_params, flops_per_token
from model.dropout import row_state
from tools.diagnosis.findings import Subject
from tools.diagnosis.rates import time_of
from trainer.config import memory
from trainer.config.config import RunConfig
from trainer.distributed.devices import device_memory_bytes
from trainer.distributed.world import World
from trainer.optimizer.optimizer import finish_gradients, make_optimizer, update
from trainer.session.network import Network, autocast, build_network

MFU_CONVENTION: Final = "causal attention, nothing recomputed, of the dense bf16 peak"
_LONGEST_S: Final = 2.5  # for one pass through a single layer; it is run several times
_BYTES_UPDATED: Final = 40  # a parameter: norm 4, clipping 8, AdamW reads 16 and writes 12
_MOVES: Final = 4  # of what is saved: written and read forward and backward


@dataclass(frozen=True, kw_only=True)
class Expectation:
    """Seconds of a step, by part, and what follows. `how` says where the figures come from."""

    seconds: Mapping[str, float]
    tokens: int
    how: str
    by_rates_alone: float  # tokens a second, by the second way, for comparison

    @property
    def tokens_per_s(self) -> float:
        """Of all devices together."""
        return self.tokens / sum(self.seconds.values())


def expect(subject: Subject) -> Expectation:
    """The step of the run on this subject, from what was measured there before."""
    config, device = subject.config, subject.device
    rows = max(1, config.global_batch_tokens // config.model.seq_len)
    on_rank = max(1, rows // subject.nproc)
    limit = device_memory_bytes(device, subject.nproc)
    size = config.micro_batch_size or memory.largest_micro_batch(config, on_rank, device, limit)
    size = _quick_size(subject, size or 1, limit)
    quick = size > 0
    size = max(1, size)
    together = 1 if device == "cpu" else subject.nproc  # ranks on one CPU share its cores
    passes = rows / size / together
    plain = _by_rates(subject, size)
    alone = _with_exchange(subject, _step(plain, passes))
    tokens = rows * config.model.seq_len
    by_rates = tokens / sum(alone.values())
    if not quick:
        how = "an upper bound, from the measured rates alone"
        return Expectation(seconds=alone, tokens=tokens, how=how, by_rates_alone=by_rates)
    pieces = _timed(config, size, device)
    seconds = _with_exchange(subject, _step(pieces, passes))
    how = (
        f"one layer trained for real, {size} rows at a time, "
        f"{'compiled' if pieces['compiled'] else 'not compiled'}"
    )
    return Expectation(seconds=seconds, tokens=tokens, how=how, by_rates_alone=by_rates)


def _step(pieces: Mapping[str, float], passes: float) -> dict[str, float]:
    return {
        "forward and backward": passes * pieces["pass"],
        "one pass": pieces["pass"],
        "update": pieces["update"],
    }


def _with_exchange(subject: Subject, parts: dict[str, float]) -> dict[str, float]:
    """The parts of a step, with as much of the exchange of gradients as nothing covers."""
    covered = 0.0 if subject.device == "cpu" else 2 / 3 * parts.pop("one pass")
    parts.pop("one pass", None)
    if "exchange_bytes_per_s" in subject.measured:
        n_params = count_params(subject.config.model)
        whole = 4 * n_params / subject.measured["exchange_bytes_per_s"]
        parts["exchange"] = max(whole - covered, whole / subject.config.model.n_layers)
    return parts


def _by_rates(subject: Subject, size: int) -> dict[str, float]:
    """Seconds of one pass and of an update, from products and bytes."""
    config, model = subject.config, subject.config.model
    flops = size * model.seq_len * flops_per_token(model, model.seq_len)
    saved = memory.memory_by_part(config, size, subject.device)["activations"]
    products = flops / subject.measured["product_flops_per_s"]
    bandwidth = subject.measured["memory_bytes_per_s"]
    return {
        "pass": products + _MOVES * saved / bandwidth,
        "update": _BYTES_UPDATED * count_params(model) / bandwidth,
    }


def _quick_size(subject: Subject, size: int, limit: int) -> int:
    """Rows, up to `size`, with which a single layer fits and trains in seconds; 0 if not one."""
    single = _single(subject.config)
    while size:
        seconds = sum(_by_rates(replace(subject, config=single), size).values())
        needed = memory.memory_by_part(single, size, subject.device)
        if seconds <= _LONGEST_S and memory.fits(needed, limit):
            break
        size //= 2
    return size


def _single(config: RunConfig) -> RunConfig:
    return replace(config, model=replace(config.model, n_layers=1), shard_degree=1)


def _timed(config: RunConfig, size: int, device: str) -> dict[str, float]:
    """Seconds of one pass and of an update of the whole model, from those of one layer."""
    model, single = config.model, _single(config)
    place = torch.device(device)
    world = World(rank=0, local_rank=0, world_size=1, local_world_size=1, device=place)
    network = build_network(single, world)
    tokens = torch.randint(model.vocab_size, (size, model.seq_len), device=place)
    key = torch.zeros(size, 2, dtype=torch.int32, device=place)

    def one_pass() -> None:
        with autocast(single, place):
            loss = network.model(tokens, tokens, key)
        (loss / tokens.numel()).backward()

    whole = time_of(one_pass, device)
    block = _time_of_block(network, single, tokens, key)
    share = count_params(model) / count_params(single.model)
    return {
        "pass": whole + (model.n_layers - 1) * block,
        "update": share * _time_of_update(network, single, device),
        "compiled": float(config.compile and not any("not compiled" in n for n in network.notes)),
    }


def _time_of_block(
    network: Network, config: RunConfig, tokens: torch.Tensor, key: torch.Tensor
) -> float:
    """Seconds of a block's forward and backward pass."""
    model, place = network.bare, tokens.device
    positions = model.positions(0, tokens.shape[1])
    rows = row_state(key, tokens.shape[1])
    x = torch.randn(*tokens.shape, config.model.d_model, device=place, requires_grad=True)
    gradient = torch.randn_like(x)

    def one_block() -> None:
        with autocast(config, place):
            out = model.blocks[0](x, positions, rows)
        out.backward(gradient)

    return time_of(one_block, place.type)


def _time_of_update(network: Network, config: RunConfig, device: str) -> float:
    """Seconds of clipping and the optimizer's step."""
    optimizer = make_optimizer(network.bare, config.optim)
    parameters = list(network.bare.parameters())
    gradients = [torch.randn_like(parameter) for parameter in parameters]
    refused, count = torch.zeros((), device=device), torch.ones((), device=device)

    def one_update() -> None:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        finish_gradients(optimizer, 1, count, config.optim)
        update(optimizer, refused)

    return time_of(one_update, device)
