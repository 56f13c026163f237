"""Whole runs of `summer-train` for gpu.py: killed and resumed, compared with a file, watched.

They train on made-up rows that can be learnt: arithmetic sequences of tokens.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from shards.format import Facts, Part, TokenizerInfo, token_dtype
from shards.writer import ShardWriter, write_manifest
from trainer.checkpoint.runs import newest_checkpoint
from trainer.config.config import configure
from trainer.config.plan import TrainPlan
from trainer.config.resolve import make_plan
from trainer.metrics.metrics import read_lines
from trainer.session import network as parallel
from trainer.session.save import CheckpointSaver
from trainer.train import train

GOLDEN = Path(__file__).with_name("golden")
GOLDEN_STEPS = 20


def make_shards(folder: Path, *, rows: int, seq_len: int, vocab_size: int) -> Path:
    """A folder of shards with one source."""
    source = folder / "fineweb"
    source.mkdir(parents=True, exist_ok=True)
    tokenizer = TokenizerInfo(
        name="none", sha256="0" * 64, vocab_size=vocab_size, bos_id=1, eos_id=2, pad_id=0
    )
    facts = Facts(
        source="fineweb", dataset="none", revision="0" * 40, licence="none", seq_len=seq_len,
        dtype=token_dtype(vocab_size).name, packing="concat", val_fraction=0.0, tokenizer=tokenizer,
    )  # fmt: skip
    generator = np.random.default_rng(0)
    first, stride = generator.integers(0, vocab_size, (2, rows, 1))
    tokens = 3 + (first + (1 + stride % 7) * np.arange(seq_len)) % (vocab_size - 3)
    writer = ShardWriter(source, "00000", facts)
    numbers = np.arange(rows, dtype=np.uint32)
    writer.add("train", tokens.astype(facts.dtype), numbers * 0, numbers, None)
    writer.finish([], plan_sha256="0" * 64)
    write_manifest(source, facts, [Part(file="none", first=0, last=1)], 1)
    return folder


def run_sets(device: str, small: bool, **changes: Any) -> list[str]:
    """`--set` texts of a run that takes seconds; two underscores stand for a dot."""
    shape = {"n_layers": 2, "d_model": 32, "n_heads": 2, "d_ff": 64}
    if not small:
        shape = {"n_layers": 6, "d_model": 768, "n_heads": 8, "d_ff": 2688}
    keys: dict[str, Any] = {f"model.{name}": value for name, value in shape.items()}
    keys |= {
        "model.attention_dropout": 0.1 if device == "cuda" else 0.0,
        "device": device,
        "compile": not small,
        "max_steps": GOLDEN_STEPS,
        "global_batch_tokens": 256 if small else 32_768,
        "micro_batch_size": 4,
        "loader.num_workers": 0 if small else 1,
        "validation.interval": 0,
        "checkpoint.interval_steps": 0,
        "checkpoint.asynchronous": "false",
    }
    keys |= {name.replace("__", "."): value for name, value in changes.items()}
    return [f"{key}={str(value).lower()}" for key, value in keys.items()]


def killed_and_resumed(work: Path, device: str, small: bool, timeout_s: float) -> list[str]:
    """Lines that say whether a run killed twice ends with the bits of one left alone."""
    ends = {}
    for name, fault in (("left alone", ""), ("killed", "sigkill:0:6,sigkill:0:13")):
        run = work / name.replace(" ", "-")
        command = [sys.executable, "-m", "trainer.cli", "--shards", str(work / "shards")]
        command += ["--preset", "tiny", "--out", str(run)]
        for text in run_sets(device, small, checkpoint__interval_steps=4):
            command += ["--set", text]
        environment = {**os.environ, "SUMMER_FAULT": fault}
        starts, done = 0, None
        while starts < 4 and (done is None or done.returncode):
            starts += 1
            done = subprocess.run(command, capture_output=True, timeout=timeout_s, env=environment)
        if done is None or done.returncode:
            raise RuntimeError("" if done is None else done.stderr.decode()[-500:])
        checkpoint = newest_checkpoint(run)
        ends[name] = (
            {file.name: file.read_bytes() for file in sorted(checkpoint.glob("*.safetensors"))},
            [(line["step"], line["loss"]) for line in read_lines(run / "metrics.jsonl")],
            starts,
        )
    one, other = ends["left alone"], ends["killed"]
    n_bytes = sum(map(len, one[0].values()))
    same = {"weights and moments": one[0] == other[0], "losses": one[1] == other[1]}
    yes = {True: "the same bits", False: "DIFFERENT"}
    lines = [f"| {what} | {yes[equal]} |" for what, equal in same.items()]
    lines.append(f"| starts | {one[2]} and {other[2]}; {n_bytes / 1e6:.1f} MB compared |")
    return ["| a run killed twice, beside one left alone | |", "|---|---|", *lines]


def losses_of(work: Path, sets: list[str]) -> list[float]:
    """The loss of each step of a run of its own."""
    run = Path(tempfile.mkdtemp(dir=work))
    train(plan_of(work, sets), run)
    return [line["loss"] for line in read_lines(run / "metrics.jsonl")]


def plan_of(work: Path, sets: list[str]) -> TrainPlan:
    """The plan of a run on the made-up rows."""
    return make_plan(configure(preset="tiny", sets=sets, shards=str(work / "shards")), 1)


def curves(work: Path, device: str, small: bool) -> list[str]:
    """Lines that compare losses compiled and eager, all dropout on; other masks give the scale."""
    lines = ["| eager, beside | largest relative difference of the losses |", "|---|---|"]
    for precision in ("bf16", "fp32"):
        settings = {"precision": precision, "max_steps": 10}
        eager = losses_of(work, run_sets(device, small, compile=False, **settings))
        others = {
            "compiled": run_sets(device, small, compile=True, **settings),
            "without dropout": run_sets(
                device, small, compile=False, model__dropout=0, model__attention_dropout=0,
                **settings,
            ),
        }  # fmt: skip
        for name, sets in others.items():
            pairs = zip(eager, losses_of(work, sets), strict=True)
            worst = max(abs(a - b) / a for a, b in pairs)
            lines.append(f"| {name}, {precision} | {worst:.1e} |")
    return lines


def golden(work: Path, device: str, small: bool, folder: Path, out: Path) -> list[str]:
    """Lines that compare the losses of a fixed run with the device's file, or write that file."""
    sets = run_sets(device, small)
    losses = losses_of(work, sets)
    name = f"{device_slug(device)}{'-small' if small else ''}.json"
    found = {"torch": torch.__version__, "sets": sets, "losses": losses}
    (out / name).write_text(json.dumps(found, indent=1) + "\n")  # to be carried home
    known = folder / name
    if not known.exists():
        folder.mkdir(parents=True, exist_ok=True)
        known.write_text((out / name).read_text())
        return [f"{name}: written, {losses[0]:.6f} to {losses[-1]:.6f} in {len(losses)} steps"]
    old = json.loads(known.read_text())
    if old["sets"] != sets:
        return [f"{name}: of another run ({known}): remove it to write it anew"]
    pairs = list(zip(old["losses"], losses, strict=True))
    worst = max(abs(a - b) / a for a, b in pairs)
    verdict = "the same bits" if worst == 0.0 else f"DIFFERENT by up to {worst:.1e} relative"
    return [
        f"{name} (torch {old['torch']}; here {torch.__version__}): {verdict} in {len(pairs)} steps"
    ]


def device_slug(device: str) -> str:
    """The device's name as a file name."""
    name = torch.cuda.get_device_name() if device == "cuda" else ""
    if not name:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":")[1] for line in lines if line.startswith("model name")), "cpu")
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def waits(work: Path, device: str, small: bool) -> list[str]:
    """Lines that name every place that waited for the device from the fourth step to the end."""
    plan = plan_of(work, run_sets(device, small))
    reseed, checkpoint = parallel.reseed_attention_dropout, CheckpointSaver.checkpoint
    watch = contextlib.ExitStack()
    seen: list[warnings.WarningMessage] = []

    def begin(config: Any, step: int, micro_step: int, rank: int) -> None:
        if (step, micro_step) == (3, 0):
            log = watch.enter_context(warnings.catch_warnings(record=True))
            warnings.simplefilter("always")
            watch.callback(lambda: seen.extend(log or ()))
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("warn")
                watch.callback(lambda: torch.cuda.set_sync_debug_mode("default"))
        reseed(config, step, micro_step, rank)

    def end(saver: CheckpointSaver, **options: Any) -> None:
        watch.close()
        checkpoint(saver, **options)

    with (
        mock.patch("trainer.train.reseed_attention_dropout", begin),
        mock.patch.object(CheckpointSaver, "checkpoint", end),
    ):
        train(plan, work / "waits-run")
    places = Counter(
        f"{Path(w.filename).name}:{w.lineno}"
        for w in seen
        if "called a synchronizing" in str(w.message)
    )
    watched = f"steps 4 to {GOLDEN_STEPS}"
    if device != "cuda":
        return [f"{watched} ran; the CPU has nothing to wait for"]
    if not places:
        return [f"nothing waited for the device in {watched}"]
    return [f"- WAITED at {place}, {times} times in {watched}" for place, times in places.items()]
