"""The first steps of the planned run, as summer-train makes them on all its ranks."""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from model.config import ModelConfig
from shards.format import Facts, ManifestTokenizer, Part, token_dtype
from shards.writer import ShardWriter, write_manifest
from tools.diagnosis.machine import CheckResult, Context
from tools.rehearsal.processes import last_step, train
from trainer.metrics.metrics import read_metrics

STEPS: Final = 20
LIMIT_S: Final = 120.0  # from the start, compilation included
_WARM: Final = 2  # steps before the first that counts
_ROWS: Final = 1024


def training(context: Context) -> Iterator[CheckResult]:
    """Tokens a second of the run's first steps: data, exchange and update included, no checkpoint.

    Trained are the given shards, or else random tokens. ToolError if the run ends before that.
    """
    if context.device == "cuda":
        torch.cuda.empty_cache()  # of the checks before, which would be in the run's way
    folder = Path(mkdtemp(prefix=".doctor-", dir=context.folder))
    try:
        shards = context.shards or _random_shards(folder / "shards", context.config.model)
        lines = _first_steps(context, shards, folder / "run")
    finally:
        while folder.exists():  # ranks that are just ending may still write into it
            shutil.rmtree(folder, ignore_errors=True)
    tokens = f"{context.config.global_batch_tokens:,} tokens"
    if not lines:
        text = f"no rate: {_WARM + 1} steps of {tokens} take longer than {LIMIT_S:.0f} s"
        yield CheckResult("note", "training", text)
        return
    logged = [name for name in ("tokens_per_s", "mfu") if name in lines[0]]
    figures: dict[str, float] = {
        name: statistics.median(line[name] for line in lines) for name in logged
    }
    context.measured.update(figures)
    text = f"{figures['tokens_per_s']:,.0f} tokens/s, the median of {len(lines)} steps of {tokens}"
    text += f" on {context.nproc} ranks; " if context.nproc > 1 else "; "
    text += f"{figures['mfu']:.1%} MFU (causal attention)" if "mfu" in figures else "MFU withheld"
    yield CheckResult("ok", "training", text, figures=figures)


def _first_steps(context: Context, shards: Path, run: Path) -> list[dict[str, Any]]:
    """What the run logged of its steps when warm, up to STEPS of them within LIMIT_S."""
    ends_at, last = time.monotonic() + LIMIT_S, min(STEPS + _WARM, context.config.max_steps)
    settings = (*context.settings, "log_interval=1", "validation.interval=0", "tensorboard=false")
    arguments = ["--shards", str(shards), "--preset", context.config.preset]
    arguments += ["--nproc", str(context.nproc), *(f"--set={each}" for each in settings)]
    train(arguments, run, until=lambda: last_step(run) >= last or time.monotonic() >= ends_at)
    return read_metrics(run)[_WARM:last]


def _random_shards(folder: Path, model: ModelConfig) -> Path:
    """A folder with one source of random tokens, in the shape of the model's sequences."""
    drawn = np.random.default_rng(0).integers(3, model.vocab_size, (_ROWS, model.seq_len))
    write_shards(folder / "random", drawn, model.vocab_size)
    return folder


def write_shards(folder: Path, tokens: npt.NDArray[Any], vocab_size: int) -> None:
    """A prepared source of these rows [N, seq_len], each a document of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = ManifestTokenizer(
        name="none", sha256="0" * 64, vocab_size=vocab_size, bos_id=1, eos_id=2, pad_id=0
    )
    facts = Facts(
        source=folder.name, dataset="none", revision="0" * 40, licence="none",
        seq_len=tokens.shape[1], dtype=token_dtype(vocab_size).name, packing="concat",
        val_fraction=0.0, tokenizer=tokenizer,
    )  # fmt: skip
    writer = ShardWriter(folder, "00000", facts)
    for first in range(0, len(tokens), 1000):
        rows = tokens[first : first + 1000].astype(facts.dtype)
        numbers = np.arange(first, first + len(rows), dtype=np.uint32)
        writer.add("train", rows, numbers * 0, numbers, None)
    writer.finish([], plan_sha256="0" * 64)
    write_manifest(folder, facts, [Part(file="none", first=0, last=1)], 1)
