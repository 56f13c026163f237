"""The plan of a run: its configuration with nothing left open, its data, its batch, its memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Final

from model.config import ModelConfig, count_params, flops_per_token
from trainer.config.accelerators import find_accelerator
from trainer.config.config import RunConfig
from trainer.data.mixture import BatchShape

_MANY_EPOCHS: Final = 4
"""Muennighoff et al., Scaling data-constrained language models (2023)."""


@dataclass(frozen=True, kw_only=True)
class SourceFacts:
    """What a run needs to know of one source: its identity and its size."""

    root: str
    n_rows: int  # for training
    n_val_rows: int
    tokens_per_row: float  # padding left out
    excluded: str = ""  # evaluation tasks whose text was left out, and by which list
    shape: str = ""  # what records are: documents, lines or chat; empty where it is not known
    masked: bool = False  # whether only answers are targets
    dataset: str = ""
    licence: str = ""


@dataclass(frozen=True, kw_only=True)
class TrainPlan:
    """A run that can be: its configuration with nothing left open, its data, its batch."""

    config: RunConfig
    weights: dict[str, int]
    sources: dict[str, SourceFacts]
    evaluated: tuple[str, ...]  # sources that are held out entirely, and scored too
    pad_id: int
    tokenizer_sha256: str
    shape: BatchShape
    device: str
    device_name: str
    device_bytes: int
    memory: dict[str, int]
    notes: tuple[str, ...]

    @property
    def step_tokens(self) -> int:
        """Tokens in one step."""
        return self.shape.global_batch_size * self.config.model.seq_len

    @property
    def folders(self) -> dict[str, Path]:
        """Where each source's shards lie."""
        return {name: Path(self.config.shards) / name for name in self.sources}

    @property
    def peak_flops(self) -> float | None:
        """FLOP/s of all devices together, None where the device or its peak is not known."""
        known = find_accelerator(self.device_name)
        if known is None or self.config.precision != "bf16":
            return None
        return known.bf16_tflops * 1e12 * self.shape.world_size


def describe_plan(plan: TrainPlan, tokens_per_s: float | None = None) -> Iterator[str]:
    """The plan in lines, for people: configuration, data, batch, memory, length."""
    config, shape = plan.config, plan.shape
    model, n_params = config.model, count_params(config.model)
    keys = asdict(config)
    run = {"run": {key: value for key, value in keys.items() if not isinstance(value, dict)}}
    for name, table in {**run, **keys}.items():
        if isinstance(table, dict) and table:
            yield f"{name}: " + " ".join(f"{key}={_spell(value)}" for key, value in table.items())
    yield from (f"! {note}" for note in (*plan.notes, *_warnings(plan)))
    yield from _describe_sources(plan)
    yield (
        f"model: {n_params:,} parameters, {flops_per_token(model, model.seq_len) / 1e9:.4g} GFLOP "
        f"a token (causal, forward and backward)"
    )
    yield (
        f"step: {plan.step_tokens:,} tokens = {shape.global_batch_size} rows of {model.seq_len} = "
        f"{shape.grad_accum_steps} accumulations x {shape.world_size} ranks x "
        f"{shape.micro_batch_size} rows"
    )
    yield f"served: {served_by(model)}"
    parts = describe_bytes(plan.memory)
    yield f"memory on {plan.device_name} ({plan.device_bytes / 1e9:.1f} GB): {parts}"
    tokens = config.max_steps * plan.step_tokens
    yield f"run: {config.max_steps:,} steps, {tokens:,} tokens, {tokens / n_params:.1f} a parameter"
    if tokens_per_s:
        duration = timedelta(seconds=round(tokens / tokens_per_s))
        yield f"time: {duration} at the {tokens_per_s:,.0f} tokens/s that this run has measured"


def summarise_plan(plan: TrainPlan) -> Iterator[str]:
    """The plan in four lines of 80 columns, and its warnings; config.json has every key."""
    config, shape = plan.config, plan.shape
    n_params, total = count_params(config.model), sum(plan.weights.values())
    tokens = config.max_steps * plan.step_tokens
    shares = (f"{name} {weight / total:.0%}" for name, weight in plan.weights.items())
    for line in (
        f"model   {n_params:,} parameters, {config.model.n_layers} layers of "
        f"{config.model.d_model}, context {config.model.seq_len:,}",
        f"data    {', '.join(shares)}",
        f"step    {plan.step_tokens:,} tokens = {shape.micro_batch_size} sequences x "
        f"{shape.grad_accum_steps} accumulations x {shape.world_size} ranks",
        f"run     {config.max_steps:,} steps, {tokens:,} tokens, {tokens / n_params:.1f} a "
        f"parameter, {config.precision} on {plan.device_name}",
    ):
        yield line if len(line) <= 80 else f"{line[:77]}..."
    yield from (f"! {note}" for note in (*plan.notes, *_warnings(plan)))


def served_by(model: ModelConfig) -> str:
    """Which programs can run the exported model: worth knowing before it is trained."""
    if model.rope and not model.alibi:
        return "a plain Llama once exported, for transformers, llama.cpp, Ollama, vLLM"
    return (
        "by transformers alone (RoPE with ALiBi); model.alibi=false makes it a plain Llama, for "
        "llama.cpp, Ollama and vLLM too"
    )


def _warnings(plan: TrainPlan) -> Iterator[str]:
    """What is allowed, and seldom meant."""
    config, total = plan.config, sum(plan.weights.values())
    if config.optim.warmup_steps >= config.max_steps:
        yield (
            f"optim.warmup_steps={config.optim.warmup_steps} is not over at max_steps="
            f"{config.max_steps}: the learning rate never reaches optim.lr"
        )
    samples = config.max_steps * plan.shape.global_batch_size
    for name, facts in plan.sources.items():
        if (epochs := samples * plan.weights[name] / total / facts.n_rows) > _MANY_EPOCHS:
            yield (
                f"{name} is seen {epochs:.3g} times: beyond {_MANY_EPOCHS} repeated text teaches "
                "little; prepare more of it, or train for fewer steps"
            )
        if facts.shape == "chat" and not facts.masked:
            yield (
                f"{name} has conversations without a loss mask: questions are learnt as well as "
                "answers; prepare it with --loss-mask to learn answers alone"
            )
    if not any(facts.n_val_rows for facts in plan.sources.values()):
        yield "nothing is held out: prepare with --val-fraction to see what the model has learned"


def _spell(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str("auto" if value is None else value)


def _describe_sources(plan: TrainPlan) -> Iterator[str]:
    total = sum(plan.weights.values())
    for name, facts in plan.sources.items():
        share = plan.weights[name] / total
        yield (
            f"source {name}: {share:.1%} of samples, {facts.n_rows:,} rows "
            f"({facts.n_rows * facts.tokens_per_row:,.0f} tokens), {facts.n_val_rows:,} held out"
        )
    for name in plan.evaluated:
        yield f"source {name}: held out entirely, scored with the others"


def describe_bytes(parts: Mapping[str, int]) -> str:
    """The parts and their sum, in GB, for people."""
    listed = " + ".join(f"{name} {size / 1e9:.3g}" for name, size in parts.items() if size)
    return f"{listed} = {sum(parts.values()) / 1e9:.3g} GB"
