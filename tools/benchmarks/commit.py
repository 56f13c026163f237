"""What commits cost training: `tiny` with a commit every 100 steps, written beside it, or not.

    python tools/benchmarks/commit.py --shards shards/ [--steps 400] [--rounds 3]

Each round trains three runs one after the other, in a process each: without commits but the last,
with commits that training waits for, and with commits written beside it. The time is that between
the log's lines of step 50 and of the last step, the commits in between with it.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

from tools.interruption import train
from trainer.metrics import read_lines
from trainer.runs import EVENTS

WARM = 50
EVERY = 100
KINDS = {
    "none": ["checkpoint.interval_steps=0"],
    "waited for": [f"checkpoint.interval_steps={EVERY}", "checkpoint.asynchronous=false"],
    "beside": [f"checkpoint.interval_steps={EVERY}", "checkpoint.asynchronous=true"],
}


def seconds(shards: str, steps: int, sets: list[str], run: Path) -> float:
    """Wall seconds from step 50 to the last, commits with them, by the run's own clocks."""
    arguments = ["--shards", shards, "--preset", "tiny"]
    for change in (*sets, f"max_steps={steps}", "validation.interval=0"):
        arguments += ["--set", change]
    train(arguments, run)
    lines = {line["step"]: line for line in read_lines(run / "metrics.jsonl")}
    done = [event for event in read_lines(run / EVENTS) if event["event"] == "done"][-1]
    last = [event for event in read_lines(run / EVENTS) if event["event"] == "commit"][-1]
    trained = lines[steps]["time_s"] - lines[WARM]["time_s"]
    return float(trained + done["spent_s"]["checkpoint"] - last["took_s"])


def main() -> None:
    """Measure, and print ratios with their spread."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shards", required=True)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=3)
    wish = parser.parse_args()
    took: dict[str, list[float]] = {kind: [] for kind in KINDS}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(wish.rounds):
            for kind, sets in KINDS.items():
                run = Path(folder) / f"{number}-{kind.replace(' ', '-')}"
                took[kind].append(seconds(wish.shards, wish.steps, sets, run))
    for kind in ("waited for", "beside"):
        ratios = sorted(a / b for a, b in zip(took[kind], took["none"], strict=True))
        print(
            f"{kind}: {100 * (statistics.median(ratios) - 1):+.2f} % of training time "
            f"({', '.join(f'{100 * (ratio - 1):+.2f}' for ratio in ratios)}), "
            f"a commit every {EVERY} steps of {took['none'][0] / (wish.steps - WARM):.3f} s"
        )


if __name__ == "__main__":
    main()
