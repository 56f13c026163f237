"""A run of ours -> a Hugging Face Llama, and back; nothing counts until the logits agree.

What is written goes into a folder beside the target, is read back from there by the other side,
and gets its name when both have computed the same logits.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from model.config import ModelConfig, count_params
from model.transformer import Transformer
from pipeline.tokenizer import Tokenizer
from shards.files import fsync_folder, publish_bytes
from shards.format import TOKENIZER
from tools.hugging_face import (
    is_llama_folder,
    read_model,
    read_sentencepiece,
    write_folder,
)
from tools.llama import ConversionError
from tools.loading import Choice, LoadedModel, load
from trainer.checkpoint import load_weights, save
from trainer.config import RunConfig, save_config
from trainer.distributed import World
from trainer.runs import COMMIT, newest_commit

Format = Literal["hf", "summer"]
ALONE = World(rank=0, local_rank=0, world_size=1, local_world_size=1, device=torch.device("cpu"))
_PROBES = (
    "The quick brown fox, 3.14 times.\n\n  def f(x):\n\treturn x  # twice\n",
    " a leading space, a trailing one ",
    "naïve façade, 東京, Ελλάδα, 😀, \u2028 and \x00",
)


@dataclass(frozen=True, kw_only=True)
class Converted:
    """What was made, and how far its logits are from the original's."""

    source: str
    target: Path
    format: Format
    parameters: int
    largest_difference: float
    limit: float


def convert(source: Path, target: Path, wanted: Format | None = None) -> Converted:
    """Convert a run (or one of its commits) or a Hugging Face folder into the other kind.

    ConversionError where the model has no equal on the other side, or where the logits differ.
    """
    have: Format = "hf" if is_llama_folder(source) else "summer"
    made: Format = "summer" if have == "hf" else "hf"
    if wanted not in (None, made):
        raise ConversionError(
            f"{source} is of format {have!r} already: leave --format out, or name another folder"
        )
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConversionError(f"{target} exists: give --to a new folder")
    _transformers()  # before work starts, not after it
    with _beside(target) as folder:
        converted = (_to_summer if made == "summer" else _to_hugging_face)(source, folder, target)
        if not converted.largest_difference <= converted.limit:  # so that NaN fails too
            raise ConversionError(
                f"{source}: the converted model's logits differ by"
                f" {converted.largest_difference:.2g} (limit {converted.limit:.2g}), so nothing was"
                " kept: this is a bug of ours, please report it with the folder's config.json"
            )
    return converted


def _to_summer(source: Path, folder: Path, target: Path) -> Converted:
    """A run with one commit, at step 0: `--run` reads it and `init_from` trains on from it."""
    config, weights = read_model(source)
    tokenizer = read_sentencepiece(source)
    if tokenizer.vocab_size > config.vocab_size:
        raise ConversionError(
            f"{source}: {TOKENIZER} has {tokenizer.vocab_size:,} entries and the weights are made"
            f" for {config.vocab_size:,}: put the model's own tokenizer back"
        )
    save_config(folder, RunConfig(preset="converted", model=config))
    publish_bytes(folder / TOKENIZER, tokenizer.model)
    record = {"step": 0, "next_index": 0, "converted_from": source.name}
    save(folder, {f"model.{name}": weight for name, weight in weights.items()}, record, ALONE)
    tokens = _tokens(config)
    logits = _logits(config, load_weights(newest_commit(folder)), tokens)
    difference, limit = same_logits(source, logits, tokens)
    return Converted(
        source=str(source),
        target=target,
        format="summer",
        parameters=count_params(config),
        largest_difference=difference,
        limit=limit,
    )


def _to_hugging_face(source: Path, folder: Path, target: Path) -> Converted:
    loaded = _load_ours(source)
    model, config = loaded.model, loaded.model.config
    run = source.resolve().parents[1] if (source / COMMIT).is_file() else source
    tokenizer = Tokenizer.load(run / TOKENIZER)
    write_folder(folder, config, model.state_dict(), tokenizer)
    _compare_ids(folder, tokenizer)
    tokens = _tokens(config)
    with torch.no_grad():
        logits = model.logits(tokens)
    difference, limit = same_logits(folder, logits, tokens)
    return Converted(
        source=loaded.name,
        target=target,
        format="hf",
        parameters=count_params(config),
        largest_difference=difference,
        limit=limit,
    )


def _load_ours(source: Path) -> LoadedModel:
    if not source.is_dir():
        raise ConversionError(f"{source}: no such folder: name a run or a Hugging Face folder")
    if (source / COMMIT).is_file():
        return load(Choice(checkpoint=source, device="cpu", dtype="fp32"))
    return load(Choice(run=source, device="cpu", dtype="fp32"))


def _compare_ids(folder: Path, tokenizer: Tokenizer) -> None:
    """ConversionError unless transformers gives our ids for texts of every kind."""
    theirs = _transformers().AutoTokenizer.from_pretrained(folder, local_files_only=True)
    for text in _PROBES:
        if theirs(text, add_special_tokens=False).input_ids != tokenizer.encode(text):
            raise ConversionError(
                f"{tokenizer.name}: transformers gives other ids for {text!r}, so nothing was kept:"
                " this is a bug of ours, please report it with the tokenizer.model"
            )


def same_logits(folder: Path, logits: Tensor, tokens: Tensor) -> tuple[float, float]:
    """The largest difference to what transformers computes from the folder, and the limit for it.

    The limit is 1e-4, or 1e-4 of the largest logit where that is above 1.
    """
    hub = _transformers()
    theirs = hub.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True
    )
    with torch.no_grad():
        expected = theirs.eval()(tokens).logits
    limit = 1e-4 * max(1.0, expected.abs().max().item())
    return (logits - expected).abs().max().item(), limit


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ConversionError(
            "nothing is converted unchecked, and comparing the logits needs transformers:"
            " pip install 'summerlm[hf]'"
        ) from error
    hub: Any = transformers
    hub.utils.logging.set_verbosity_error()
    hub.utils.logging.disable_progress_bar()
    return hub


def _logits(config: ModelConfig, weights: dict[str, Tensor], tokens: Tensor) -> Tensor:
    with torch.device("meta"):
        model = Transformer(config)
    model.to_empty(device="cpu")
    model.load_state_dict(weights)
    with torch.no_grad():
        return model.eval().logits(tokens)


def _tokens(config: ModelConfig) -> Tensor:
    """Random ids [2, T]: what to compare logits on."""
    shape = (2, min(64, config.seq_len))
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, config.vocab_size, shape, generator=generator)


@contextlib.contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """A folder that becomes `target` if all goes well, and vanishes if not."""
    folder = target.parent / f".{target.name}.converting-{os.getpid()}"
    folder.mkdir(parents=True)
    try:
        yield folder
        folder.rename(target)
        fsync_folder(target.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
