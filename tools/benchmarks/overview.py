"""The whole way once, as a user walks it: preparation, training and start-up, in one table.

    python tools/benchmarks/overview.py            # about four minutes on two cores

Every figure comes from a command run as a process of its own. Repeated ones are given as
median (lowest .. highest). Nothing is asserted here: RESULTS.md keeps what was measured.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from measure import Done, machine, run, spread

COMMANDS = ("pipeline.cli", "trainer.cli", "tools.evaluate", "tools.generate")


def main() -> None:
    """Print the machine and the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()
    print(machine("torch", "sentencepiece", "pyarrow"), end="\n\n")
    print("| what | figure | how |\n|---|---|---|")
    for row in start_up(options.repeats):
        print("|", " | ".join(row), "|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for row in [
            *preparation(Path(folder), options.repeats),
            *training(Path(folder), options.steps),
        ]:
            print("|", " | ".join(row), "|", flush=True)


def start_up(repeats: int) -> list[tuple[str, str, str]]:
    """CPU seconds of each command's --help."""
    rows = []
    for command in COMMANDS:
        seconds = [run_module([command, "--help"]).cpu_s for _ in range(repeats)]
        rows.append((f"`{command} --help`", spread(seconds, "s of CPU"), f"{repeats} processes"))
    return rows


def preparation(folder: Path, repeats: int) -> list[tuple[str, str, str]]:
    """MB of text a second through `summer-prep tokenize`, start-up included."""
    corpus = folder / "corpus.parquet"
    text_bytes = write_corpus(corpus)
    rates, peaks = [], []
    for attempt in range(repeats):
        done = run_module(
            ["pipeline.cli", "tokenize", "--source", "code", "--data-files", str(corpus),
             "--seq-len", "256", "--workers", "1", "--out", str(folder / f"shards-{attempt}")]
        )  # fmt: skip
        rates.append(text_bytes / done.wall_s / 1e6)
        peaks.append(done.peak_mb)
    how = f"{text_bytes / 1e6:.0f} MB in parquet, one worker, whole command, {repeats} runs"
    return [
        ("`summer-prep tokenize`", spread(rates, "MB/s"), how),
        ("its peak memory", spread(peaks, "MB"), "largest process"),
    ]


def write_corpus(path: Path) -> int:
    """Bytes of text in a parquet file of the standard library's sources, twenty times over."""
    texts = [
        file.read_text(errors="ignore") for file in sorted(Path(os.__file__).parent.glob("*.py"))
    ]
    pq.write_table(pa.table({"text": texts * 20}), path, row_group_size=1000)
    return 20 * sum(len(text.encode()) for text in texts)


def training(folder: Path, steps: int) -> list[tuple[str, str, str]]:
    """tokens/s of `tiny` once it is warm, time to its first step, and peak memory."""
    rows = []
    arguments = [
        "trainer.cli", "--shards", str(folder / "shards-0"), "--preset", "tiny",
        "--set", "mixture.code=1",
        "--set", f"max_steps={steps}",
    ]  # fmt: skip
    for name in ("cold", "warm"):
        out = folder / name
        done = run_module(
            [*arguments, "--out", str(out)], TORCHINDUCTOR_CACHE_DIR=str(folder / "cache")
        )
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        rates = [line["tokens_per_s"] for line in lines[len(lines) // 4 :]]
        stepping_s = lines[-1]["time_s"] - lines[0]["time_s"]
        rows.append(
            (
                f"`tiny` without its steps, {name}",
                f"{done.wall_s - stepping_s:.1f} s",
                f"start, compilation ({name} cache), first step, end",
            )
        )
    rows.append(("training `tiny`", spread(rates, "tokens/s"), f"{steps} steps, bf16, compiled"))
    rows.append(("its peak memory", f"{done.peak_mb:.0f} MB", "largest process"))
    return rows


def run_module(arguments: Sequence[str], **environment: str) -> Done:
    """Run a module as a process."""
    return run([sys.executable, "-m", *arguments], environment=environment)


if __name__ == "__main__":
    main()
