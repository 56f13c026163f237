"""What checkpoints cost training: `tiny` with asynchronous checkpoints, synchronous ones, or none.

    python tools/benchmarks/checkpoint.py --shards shards/
    python tools/benchmarks/checkpoint.py --shards shards/ --steps 20 --every 10 --rounds 1

Each round trains three runs one after the other, in a process each: without checkpoints but the
last, with checkpoints that training waits for, and with asynchronous ones. The time is
that between the log's lines of step 5 and of the last step, the checkpoints in between with it.
Checkpoints come ten times as often as the 100 steps of the bar, or their cost would be lost in the
noise; it is given for one in 100 steps.
"""

from __future__ import annotations

import statistics
import tempfile
from functools import partial
from pathlib import Path

from measure import in_turns, parse, spread
from tools.rehearsal.processes import train
from trainer.metrics.metrics import read_events, read_metrics

WARM = 5  # below the first checkpoint, whose pause is in the sum of pauses


def seconds(shards: str, steps: int, sets: list[str]) -> float:
    """Wall seconds from step 5 to the last, checkpoints with them, by the run's own clocks."""
    arguments = ["--shards", shards, "--preset", "tiny"]
    for change in (*sets, f"max_steps={steps}", "validation.interval=0"):
        arguments += ["--set", change]
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        train(arguments, run)
        lines = {line["step"]: line for line in read_metrics(run)}
        done = [event for event in read_events(run) if event["event"] == "done"][-1]
        last = [event for event in read_events(run) if event["event"] == "checkpoint"][-1]
    trained = lines[steps]["time_s"] - lines[WARM]["time_s"]
    return float(trained + done["spent_s"]["checkpoint"] - last["took_s"])


def main() -> None:
    """Measure, and print ratios with their spread."""
    options = parse(__doc__, shards={"required": True}, steps=80, every=10, rounds=3)
    every = f"checkpoint.interval_steps={options.every}"
    kinds = {
        "none": ["checkpoint.interval_steps=0"],
        "synchronous": [every, "checkpoint.asynchronous=false"],
        "asynchronous": [every, "checkpoint.asynchronous=true"],
    }
    runs = {k: partial(seconds, options.shards, options.steps, sets) for k, sets in kinds.items()}
    took = in_turns(runs, options.rounds)
    step_s = statistics.median(took["none"]) / (options.steps - WARM)
    checkpoints = options.steps // options.every - 1  # the last one is waited for, and left out
    print(f"a step without checkpoints: {step_s:.3f} s")
    for kind in ("synchronous", "asynchronous"):
        each = [(a - b) / checkpoints for a, b in zip(took[kind], took["none"], strict=True)]
        share = spread([one / step_s for one in each], "%")  # of 100 steps, in percent
        print(f"{kind}: {spread(each, 's')} a checkpoint, {share} of 100 steps")


if __name__ == "__main__":
    main()
