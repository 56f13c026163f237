"""What checkpoints cost training: `tiny` with asynchronous checkpoints, synchronous ones, or none.

    python tools/benchmarks/checkpoint.py --shards shards/ [--steps 80] [--every 10] [--rounds 3]

Each round trains three runs one after the other, in a process each: without checkpoints but the
last, with checkpoints that training waits for, and with asynchronous ones. The time is
that between the log's lines of step 5 and of the last step, the checkpoints in between with it.
Checkpoints come ten times as often as the 100 steps of the bar, or their cost would be lost in the
noise; it is given for one in 100 steps.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

from measure import spread
from tools.rehearsal.runs import train
from trainer.metrics.metrics import read_events, read_lines

WARM = 5  # below the first checkpoint, whose pause is in the sum of pauses
KINDS = {
    "none": ["checkpoint.interval_steps=0"],
    "synchronous": ["checkpoint.interval_steps={every}", "checkpoint.asynchronous=false"],
    "asynchronous": ["checkpoint.interval_steps={every}", "checkpoint.asynchronous=true"],
}


def seconds(shards: str, steps: int, sets: list[str], run: Path) -> float:
    """Wall seconds from step 5 to the last, checkpoints with them, by the run's own clocks."""
    arguments = ["--shards", shards, "--preset", "tiny"]
    for change in (*sets, f"max_steps={steps}", "validation.interval=0"):
        arguments += ["--set", change]
    train(arguments, run)
    lines = {line["step"]: line for line in read_lines(run / "metrics.jsonl")}
    done = [event for event in read_events(run) if event["event"] == "done"][-1]
    last = [event for event in read_events(run) if event["event"] == "checkpoint"][-1]
    trained = lines[steps]["time_s"] - lines[WARM]["time_s"]
    return float(trained + done["spent_s"]["checkpoint"] - last["took_s"])


def main() -> None:
    """Measure, and print ratios with their spread."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shards", required=True)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    took: dict[str, list[float]] = {kind: [] for kind in KINDS}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.rounds):
            for kind, texts in KINDS.items():
                run = Path(folder) / f"{number}-{kind.replace(' ', '-')}"
                sets = [text.format(every=options.every) for text in texts]
                took[kind].append(seconds(options.shards, options.steps, sets, run))
    timed = options.steps - WARM
    step_s = statistics.median(took["none"]) / timed
    checkpoints = options.steps // options.every - 1  # the last one is waited for, and left out
    print(f"a step without checkpoints: {step_s:.3f} s")
    for kind in ("synchronous", "asynchronous"):
        each = [(a - b) / checkpoints for a, b in zip(took[kind], took["none"], strict=True)]
        share = [100 * one / (100 * step_s) for one in each]
        print(f"{kind}: {spread(each, 's')} a checkpoint, {spread(share, '%')} of 100 steps")


if __name__ == "__main__":
    main()
