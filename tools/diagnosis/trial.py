"""The first steps of the planned run, as summer-train makes them on all its ranks."""

from __future__ import annotations

import contextlib
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
from tools.rehearsal.processes import compare_checkpoints, last_step, train
from trainer.checkpoint.runs import checkpoint_path
from trainer.metrics.metrics import read_metrics

STEPS: Final = 20
LIMIT_S: Final = 120.0  # from the start, compilation included
PROBE: Final = 200
RESUMED: Final = 20  # of the probe's steps, made again from a checkpoint
_WARM: Final = 2  # steps before the first that counts
_ROWS: Final = 1024


def training(context: Context) -> Iterator[CheckResult]:
    """Tokens a second of the run's first steps: data, exchange and update included, no checkpoint.

    Trained are the given shards, or else random tokens. ToolError if the run ends before that.
    """
    if context.probe:
        yield from probe(context)
        return
    last = min(STEPS + _WARM, context.config.max_steps)
    with _arguments(context) as (arguments, folder):
        run, ends_at = folder / "run", time.monotonic() + LIMIT_S
        train(arguments, run, until=lambda: last_step(run) >= last or time.monotonic() >= ends_at)
        yield _rate(context, read_metrics(run)[_WARM:last])


def probe(context: Context) -> Iterator[CheckResult]:
    """The run's first 200 steps, and the last of them again from a checkpoint, bit for bit.

    Rate, memory, the price of the rest, and whether resuming gives the same bits on this machine.
    """
    last = min(PROBE, context.config.max_steps)
    begin = max(1, last - RESUMED)
    tokens = f"{context.config.global_batch_tokens:,} tokens"
    text = f"trains {last} steps of {tokens}, then {last - begin} of them again; Ctrl-C ends it"
    yield CheckResult("note", "probe", text)
    with _arguments(context) as (arguments, folder):
        run, again = folder / "run", folder / "again"
        saved = [f"checkpoint.interval_steps={begin}", f"checkpoint.keep_every={begin}"]
        arguments += [f"--set={each}" for each in (*saved, "checkpoint.asynchronous=false")]
        arguments.append(f"--set=max_steps={last}")
        train(arguments, run)
        lines = read_metrics(run)[_WARM:last]
        yield _rate(context, lines)
        yield from _rest(context, lines, last)
        train([*arguments, "--resume", str(checkpoint_path(run, begin))], again)
        same = compare_checkpoints(run, again, last).identical
    text = f"steps {begin + 1} to {last} again from the checkpoint: "
    yield (
        CheckResult("ok", "resume", f"{text}the same bits")
        if same
        else CheckResult(
            "warn",
            "resume",
            f"{text}OTHER BITS",
            "the run's start says which kernel does not repeat",
        )
    )


@contextlib.contextmanager
def _arguments(context: Context) -> Iterator[tuple[list[str], Path]]:
    """The command line of a trial, and a folder that is removed afterwards."""
    if context.device == "cuda":
        torch.cuda.empty_cache()  # of the checks before, which would be in the run's way
    folder = Path(mkdtemp(prefix=".doctor-", dir=context.folder))
    settings = (*context.settings, "log_interval=1", "validation.interval=0", "tensorboard=false")
    try:
        shards = context.shards or _random_shards(folder / "shards", context.config.model)
        arguments = ["--shards", str(shards), "--preset", context.config.preset]
        arguments += ["--nproc", str(context.nproc), *(f"--set={each}" for each in settings)]
        yield arguments, folder
    finally:
        while folder.exists():  # ranks that are just ending may still write into it
            shutil.rmtree(folder, ignore_errors=True)


def _rate(context: Context, lines: list[dict[str, Any]]) -> CheckResult:
    """The median of what steps logged; a note where there are none."""
    tokens = f"{context.config.global_batch_tokens:,} tokens"
    if not lines:
        text = f"no rate: {_WARM + 1} steps of {tokens} take longer than {LIMIT_S:.0f} s"
        return CheckResult("note", "training", text)
    logged = [name for name in ("tokens_per_s", "mfu") if name in lines[0]]
    figures: dict[str, float] = {
        name: statistics.median(line[name] for line in lines) for name in logged
    }
    context.measured.update(figures)
    text = f"{figures['tokens_per_s']:,.0f} tokens/s, the median of {len(lines)} steps of {tokens}"
    text += f" on {context.nproc} ranks; " if context.nproc > 1 else "; "
    text += f"{figures['mfu']:.1%} MFU (causal attention)" if "mfu" in figures else "MFU withheld"
    return CheckResult("ok", "training", text, figures=figures)


def _rest(context: Context, lines: list[dict[str, Any]], step: int) -> Iterator[CheckResult]:
    """Memory at the height, and time and money for the steps that are left."""
    config = context.config
    if peak := lines[-1].get("peak_memory_gb"):
        yield CheckResult("ok", "memory", f"{peak:.1f} GB at the height of a step")
    rate = context.measured["tokens_per_s"]
    hours = (config.max_steps - step) * config.global_batch_tokens / rate / 3600
    text = f"{config.max_steps - step:,} steps are left: {hours:,.1f} hours"
    if config.dollars_per_hour:
        text += f", ${hours * config.dollars_per_hour:,.2f}"
    yield CheckResult("ok", "the rest", f"{text}, evaluation and checkpoints not counted")


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
