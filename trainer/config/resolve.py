"""The configuration, the data and the machine brought together, and rejected where they do not fit.

`make_plan` is the one place where the model is checked against the shards, the batch against the
ranks and the bytes against the device; what it returns is all that training needs to know.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from model.config import ModelConfig, ModelError
from shards.format import Manifest
from shards.reader import check_files, find_sources
from trainer.config import memory
from trainer.config.config import Configured, RunConfig, configure, presets
from trainer.config.shares import choose_weights
from trainer.config.train_plan import SourceFacts, TrainPlan, describe_bytes
from trainer.data.mixture import BatchShape
from trainer.distributed.devices import (
    device_memory_bytes,
    device_name,
    emulates_bf16,
    kernel_kind,
    pick_device,
)
from trainer.errors import ConfigError


def make_plan(
    configured: Configured,
    world_size: int = 1,
    sharers: int = 1,
    earlier: RunConfig | None = None,
) -> TrainPlan:
    """The plan of a run on so many ranks, `sharers` a machine; ConfigError, ShardError.

    A run that goes on keeps the mixture (if it has one) and the precision of its `earlier`
    configuration, whatever was prepared since and wherever it goes on, unless they were set.
    """
    config, explicit = configured
    if earlier and earlier.mixture and not any(key.startswith("mixture.") for key in explicit):
        config = replace(config, mixture=earlier.mixture)
    config, slow = fit_precision(configured._replace(config=config), earlier)
    manifests = find_sources(Path(config.shards))
    for name, manifest in manifests.items():
        check_files(Path(config.shards) / name, manifest)
    fixed = {n: s for n, s in config.mixture.items() if f"mixture.{n}" in explicit}
    preset = {n: s for n, s in config.mixture.items() if n not in fixed}
    rows = {name: m.n_rows - m.n_val_rows for name, m in manifests.items()}
    weights, notes = choose_weights(preset, fixed, rows)
    drawn = {name: manifests[name] for name in weights}
    evaluated, left = _find_evaluated(manifests, next(iter(drawn.values())))
    config = replace(
        config,
        mixture={name: float(weight) for name, weight in weights.items()},
        model=_fit_model(config.model, explicit, drawn),
    )
    device = pick_device(config.device)
    limit, kind = device_memory_bytes(device, sharers), kernel_kind(device)
    config, shape = _deal_out(config, world_size, kind, limit)
    facts = next(iter(drawn.values())).facts
    return TrainPlan(
        config=config,
        weights=weights,
        sources={
            name: SourceFacts(
                root=manifest.root,
                n_rows=rows[name],
                n_val_rows=manifest.n_val_rows,
                tokens_per_row=manifest.n_tokens / manifest.n_rows,
                excluded=_excluded(manifest),
                shape=manifest.facts.shape,
                masked=manifest.facts.masked,
                dataset=manifest.facts.dataset,
                licence=manifest.facts.licence,
            )
            for name, manifest in drawn.items()
        },
        pad_id=facts.tokenizer.pad_id,
        tokenizer_sha256=facts.tokenizer.sha256,
        shape=shape,
        device=device,
        device_name=device_name(device),
        device_bytes=limit,
        memory=memory.memory_by_part(config, shape.micro_batch_size, kind),
        notes=(*notes, *left, *slow),
        evaluated=evaluated,
    )


def fit_precision(
    configured: Configured, earlier: RunConfig | None = None
) -> tuple[RunConfig, tuple[str, ...]]:
    """The configuration in fp32, and a note, where bf16 was not asked for and the CPU has none."""
    config, explicit = configured
    if "precision" in explicit:
        return config, ()
    if earlier is not None:
        return replace(config, precision=earlier.precision), ()
    if config.precision == "fp32" or pick_device(config.device) != "cpu" or not emulates_bf16():
        return config, ()
    note = "this CPU has no bf16 arithmetic: precision is fp32 (--set precision=bf16 is far slower)"
    return replace(config, precision="fp32"), (note,)


def _find_evaluated(
    manifests: Mapping[str, Manifest], drawn: Manifest
) -> tuple[tuple[str, ...], list[str]]:
    """The sources without a training row whose rows this model can be scored on, and who cannot."""
    held_out = {n: m.facts for n, m in manifests.items() if 0 < m.n_rows == m.n_val_rows}
    ours, fit, notes = drawn.facts, [], []
    for name, facts in held_out.items():
        if (facts.seq_len, facts.tokenizer.sha256) == (ours.seq_len, ours.tokenizer.sha256):
            fit.append(name)
        else:
            notes.append(
                f"{name} is not scored: it has rows of {facts.seq_len} tokens by "
                f"{facts.tokenizer.name}, the model's have {ours.seq_len} by {ours.tokenizer.name}"
            )
    return tuple(fit), notes


def _fit_model(
    model: ModelConfig, explicit: frozenset[str], drawn: Mapping[str, Manifest]
) -> ModelConfig:
    """The model with the vocabulary and row length of the data; ConfigError where they clash."""
    first_name, first = next(iter(drawn.items()))
    for name, manifest in drawn.items():
        ours, theirs = first.facts, manifest.facts
        if theirs.tokenizer.sha256 != ours.tokenizer.sha256:
            raise ConfigError(
                f"{first_name} and {name} were made with different tokenizers "
                f"({ours.tokenizer.name}, {theirs.tokenizer.name}): prepare one of them again"
            )
        if theirs.seq_len != ours.seq_len:
            raise ConfigError(
                f"{first_name} has rows of {ours.seq_len} tokens and {name} of {theirs.seq_len}: "
                "prepare one of them again with the other's --seq-len"
            )
    seq_len, n_ids = first.facts.seq_len, first.facts.tokenizer.vocab_size
    if "model.seq_len" in explicit and model.seq_len != seq_len:
        raise ConfigError(
            f"model.seq_len={model.seq_len}: the shards' rows have {seq_len} tokens; leave the key "
            f"out, or prepare the sources with --seq-len {model.seq_len}"
        )
    vocab_size = model.vocab_size if "model.vocab_size" in explicit else -(-n_ids // 128) * 128
    if vocab_size < n_ids:
        raise ConfigError(
            f"model.vocab_size={vocab_size}: the shards' tokenizer has {n_ids} entries, which do "
            "not fit; leave the key out"
        )
    try:
        return replace(model, seq_len=seq_len, vocab_size=vocab_size)
    except ModelError as error:
        raise ConfigError(f"{error} (the row length is that of the shards)") from error


def _excluded(manifest: Manifest) -> str:
    """The evaluation tasks whose text was left out of a source, for people."""
    made = manifest.facts.exclude
    return f"{', '.join(made['tasks'])} (list {made['sha256']})" if made else ""


def _deal_out(
    config: RunConfig, world_size: int, device: str, limit: int
) -> tuple[RunConfig, BatchShape]:
    """The configuration with its micro-batch, and how a step's rows are dealt out."""
    if world_size % config.shard_degree:
        raise ConfigError(
            f"shard_degree={config.shard_degree}: {world_size} ranks cannot be divided into "
            "groups of that many; choose a divisor, or another --nproc"
        )
    seq_len = config.model.seq_len
    n_rows = max(1, config.global_batch_tokens // seq_len)
    if n_rows % world_size:
        raise ConfigError(
            f"global_batch_tokens={config.global_batch_tokens} is {n_rows} rows of {seq_len}, "
            f"which {world_size} ranks cannot share evenly: make it a multiple of "
            f"{world_size * seq_len}, or choose another --nproc"
        )
    size = config.micro_batch_size
    if size is None:
        size = memory.largest_micro_batch(config, n_rows // world_size, device, limit)
    elif n_rows % (size * world_size):
        raise ConfigError(
            f"micro_batch_size={size} on {world_size} ranks does not divide the {n_rows} rows of a "
            "step: choose a divisor, or leave the key out"
        )
    if size is None or not memory.fits(memory.memory_by_part(config, size, device), limit):
        raise ConfigError(_does_not_fit(config, size or 1, world_size, device, limit))
    return replace(config, micro_batch_size=size), BatchShape(n_rows, size, world_size)


def _does_not_fit(config: RunConfig, size: int, world_size: int, device: str, limit: int) -> str:
    """The error's text, with the arithmetic and what would fit."""
    parts = memory.memory_by_part(config, size, device)
    fitting = []
    for name in presets():
        if name in (config.preset, "chat"):
            continue
        shape = configure(preset=name).config.model
        shape = replace(shape, seq_len=config.model.seq_len, vocab_size=config.model.vocab_size)
        needed = memory.memory_by_part(replace(config, model=shape, compile=True), 1, device)
        if memory.fits(needed, limit):
            fitting.append(f"{name} ({sum(needed.values()) / 1e9:.1f} GB)")
    instead = f"presets that fit: {', '.join(fitting)}" if fitting else "no preset fits"
    spread = f", and so does shard_degree={world_size}" if world_size > config.shard_degree else ""
    return (
        f"{config.preset} does not fit {device} with {limit / 1e9:.1f} GB ({memory.USABLE:.0%} of "
        f"it usable) in micro-batches of {size}: {describe_bytes(parts)}; {instead}; "
        f"activation_checkpointing=full needs less{spread}"
    )
