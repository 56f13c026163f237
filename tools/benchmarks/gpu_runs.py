"""Complete runs of `summer-train` for gpu.py: killed and resumed, compared with a golden file.

They train on made-up rows that can be learnt: arithmetic sequences of tokens.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from measure import write_shards
from trainer.checkpoint.runs import newest_checkpoint
from trainer.config.config import configure
from trainer.config.resolve import make_plan
from trainer.metrics.metrics import read_lines
from trainer.train import train

GOLDEN = Path(__file__).with_name("golden")
GOLDEN_STEPS = 20


def make_shards(folder: Path, *, rows: int, seq_len: int, vocab_size: int) -> None:
    """A folder of shards with one source of arithmetic sequences."""
    generator = np.random.default_rng(0)
    first, stride = generator.integers(0, vocab_size, (2, rows, 1))
    tokens = 3 + (first + (1 + stride % 7) * np.arange(seq_len)) % (vocab_size - 3)
    write_shards(folder / "fineweb", tokens, vocab_size)


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
    """Lines that say whether a run killed twice ends with the bits of an uninterrupted one."""
    ends = {}
    for name, fault in (("uninterrupted", ""), ("killed", "sigkill:0:6,sigkill:0:13")):
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
    one, other = ends["uninterrupted"], ends["killed"]
    n_bytes = sum(map(len, one[0].values()))
    same = {"weights and moments": one[0] == other[0], "losses": one[1] == other[1]}
    yes = {True: "the same bits", False: "DIFFERENT"}
    lines = [f"| {what} | {yes[equal]} |" for what, equal in same.items()]
    lines.append(f"| starts | {one[2]} and {other[2]}; {n_bytes / 1e6:.1f} MB compared |")
    return ["| a run killed twice, and one that was not | |", "|---|---|", *lines]


def losses_of(work: Path, sets: list[str]) -> list[float]:
    """The loss of each step of a run of its own."""
    run = Path(tempfile.mkdtemp(dir=work))
    train(make_plan(configure(preset="tiny", sets=sets, shards=str(work / "shards")), 1), run)
    return [line["loss"] for line in read_lines(run / "metrics.jsonl")]


def golden(work: Path, device: str, small: bool, folder: Path, out: Path) -> list[str]:
    """Lines that compare the losses of a fixed run with the device's file, or write that file."""
    sets = run_sets(device, small)
    losses = losses_of(work, sets)
    name = f"{device_slug(device)}{'-small' if small else ''}.json"
    found = {"torch": torch.__version__, "sets": sets, "losses": losses}
    (out / name).write_text(json.dumps(found, indent=1) + "\n")  # to be copied from the machine
    known = folder / name
    if not known.exists():
        folder.mkdir(parents=True, exist_ok=True)
        known.write_text((out / name).read_text())
        return [f"{name}: written, {losses[0]:.6f} to {losses[-1]:.6f} in {len(losses)} steps"]
    old = json.loads(known.read_text())
    if old["sets"] != sets:
        return [f"{name}: of another run ({known}): remove it to write a new one"]
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
