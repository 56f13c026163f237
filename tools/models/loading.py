"""A run, a checkpoint or a Hugging Face folder -> the model with its tokenizer."""

import hashlib
import logging
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import torch
from torch import Tensor

from model.config import MAX_ALIBI_CONTEXT, ModelConfig, count_params
from model.transformer import Transformer
from pipeline.text.json_tokenizer import load_tokenizer
from shards.format import TOKENIZER, TOKENIZER_JSON, tokenizer_path
from tools.errors import ToolError
from tools.models.hf_folder import read_folder
from tools.models.tokenizers import Vocabulary, filled_up
from trainer.checkpoint.runs import (
    CONFIG,
    checkpoints,
    newest_checkpoint,
    newest_run,
    step_of,
)
from trainer.checkpoint.storage import load_weights, read_record
from trainer.config.config import load_config
from trainer.distributed.devices import keep_freed_memory, pick_device
from trainer.errors import CheckpointError

Precision = Literal["auto", "bf16", "fp32"]
DTYPES: Final = {"bf16": torch.bfloat16, "fp32": torch.float32}
VOCAB_MULTIPLE: Final = 128  # of a tokenizer's entries, rounded up to it, is a model's vocabulary


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Which model, where. With neither `run`, `checkpoint` nor `hf`, the newest run is meant.

    `auto` is an accelerator if there is one; it means bf16 on CUDA and ROCm, fp32 elsewhere.
    """

    run: Path | None = None
    checkpoint: Path | None = None
    hf: Path | None = None
    device: str = "auto"
    dtype: Precision = "auto"

    @property
    def checkpoint_dir(self) -> Path | None:
        """The checkpoint that is meant; None for a Hugging Face folder."""
        return None if self.hf else self.checkpoint or newest_checkpoint(self.run or newest_run())


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model in evaluation mode, on its device. `name` says where it came from."""

    name: str
    model: Transformer
    vocabulary: Vocabulary
    weights_sha256: str
    dtype: Literal["bf16", "fp32"]
    checkpoint: Path | None = None  # with its weights; None for a Hugging Face folder

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.head_weight.device

    @property
    def trained_context(self) -> int:
        """Tokens of a sequence in training."""
        return self.model.config.seq_len

    def autocast(self) -> AbstractContextManager[Any]:
        """The arithmetic of `dtype`: autocast as in training for bf16, nothing for fp32."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == "bf16")

    def describe(self) -> dict[str, object]:
        """What a score must say about its model."""
        return {
            "model": self.name,
            "parameters": count_params(self.model.config),
            "weights_sha256": self.weights_sha256,
            "tokenizer": self.vocabulary.name,
            "tokenizer_sha256": self.vocabulary.sha256,
            "trained_context": self.trained_context,
            "dtype": self.dtype,
            "device": self.device.type,
        }


def load(spec: ModelSpec) -> LoadedModel:
    """The chosen model in evaluation mode; ToolError where there is none or parts do not fit."""
    named = [path for path in (spec.run, spec.checkpoint, spec.hf) if path is not None]
    if len(named) > 1:
        raise ToolError(f"{named[0]} and {named[1]}: name one of --run, --checkpoint and --hf")
    if spec.device.startswith("cuda") and not torch.cuda.is_available():
        raise ToolError(f"device {spec.device}: torch sees no GPU here; use --device cpu")
    device = torch.device(pick_device(spec.device))
    if device.type == "cpu":
        keep_freed_memory()
    checkpoint = spec.checkpoint
    if spec.hf is not None:
        name, config, weights, vocabulary = str(spec.hf), *read_folder(spec.hf)
    else:
        if checkpoint is None:
            checkpoint, weights = newest_intact(spec.run or newest_run())
        else:
            weights = load_weights(checkpoint)
        name, config, vocabulary = _described(checkpoint)
    check_fit(name, config, weights, vocabulary)
    natural: Literal["bf16", "fp32"] = "bf16" if device.type == "cuda" else "fp32"
    with torch.device("meta"):  # never initialised at random on the way
        model = Transformer(config)
    model.to_empty(device=device).load_state_dict(weights)
    return LoadedModel(
        name=name,
        model=model.eval(),
        vocabulary=vocabulary,
        weights_sha256=sha256_of_weights(weights),
        dtype=natural if spec.dtype == "auto" else spec.dtype,
        checkpoint=checkpoint,
    )


def newest_intact(run: Path) -> tuple[Path, dict[str, Tensor]]:
    """The newest checkpoint of a run that is not damaged, with its weights; others are named."""
    newest_checkpoint(run)  # an error where there is none
    failures = []
    for checkpoint in reversed(checkpoints(run)):
        try:
            weights = load_weights(checkpoint)
        except CheckpointError as error:
            failures.append(error)
            continue
        for failure in failures:
            if os.environ.get("RANK", "0") == "0":  # of several processes one says it
                logging.getLogger(__name__).warning("! %s; USING %s", failure, checkpoint.name)
        return checkpoint, weights
    raise failures[0]


def has_conversed(checkpoint: Path) -> bool:
    """Whether a checkpoint's run has read conversations, or it cannot be known that it has not."""
    record = read_record(checkpoint)
    config, data = record.get("config") or {}, record.get("data") or {"": {}}
    shapes = {facts.get("shape", "") for facts in data.values()}
    return bool(config.get("init_from")) or not shapes.isdisjoint(("", "chat"))


def _described(checkpoint: Path) -> tuple[str, ModelConfig, Vocabulary]:
    """Name, shape and vocabulary of a checkpoint: its run holds configuration and tokenizer."""
    run = checkpoint.resolve().parents[1]
    path = tokenizer_path(run)
    for needed in (CONFIG, path.name):
        if not (run / needed).is_file():
            raise ToolError(
                f"{checkpoint}: its run {run} has no {needed}: copy {needed} and the checkpoint's "
                "folder (as checkpoints/step-N) into one folder"
            )
    config, vocabulary = load_config(run).model, Vocabulary.of(load_tokenizer(path))
    if path.name == TOKENIZER_JSON:
        vocabulary = filled_up(vocabulary, config.vocab_size)
    shown = run.relative_to(Path.cwd()) if run.is_relative_to(Path.cwd()) else run
    name = f"{shown}, step {step_of(checkpoint.resolve()):,}"
    return name, config, vocabulary


def check_fit(
    name: str, config: ModelConfig, weights: Mapping[str, Tensor], vocabulary: Vocabulary
) -> None:
    """ToolError unless weights and tokenizer are those that the configuration describes."""
    with torch.device("meta"):
        described = Transformer(config).state_dict()
    for tensor in sorted(described.keys() | weights.keys()):
        wanted, found = (
            str(list(side[tensor].shape)) if tensor in side else "absent"
            for side in (described, weights)
        )
        if wanted != found:
            raise ToolError(
                f"{name}: {tensor} is {found} and by {CONFIG} should be {wanted}: put the {CONFIG} "
                "back that belongs to the weights"
            )
    rounded = -(-len(vocabulary) // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
    if config.vocab_size not in (len(vocabulary), rounded):
        raise ToolError(
            f"{name}: the tokenizer {vocabulary.name} has {len(vocabulary):,} entries and the "
            f"weights are made for {config.vocab_size:,}: put the {TOKENIZER} back that they were "
            "trained with"
        )


def max_context(config: ModelConfig) -> int | None:
    """The longest context that the model computes exactly; None where nothing limits it."""
    return MAX_ALIBI_CONTEXT if config.alibi else None


def sha256_of_weights(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes and fp32 values in order of name, whatever files held them."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        values = weights[name].detach().to("cpu", torch.float32).contiguous()
        digest.update(f"{name} {list(values.shape)}\n".encode())
        digest.update(values.numpy().data)
    return digest.hexdigest()
