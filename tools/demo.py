"""`make demo`: from text that every Python carries to a scored model, with a SIGKILL on the way.

    python -m tools.demo            # about five minutes on two cores; everything goes to demo/

1. learns a vocabulary of 2,048 entries from the standard library's sources and pydoc's topics;
2. prepares both as sources: shards, with 2 % of the documents held out;
3. trains a small model on their mixture, kills it with SIGKILL in the middle, starts it again;
4. trains an uninterrupted twin up to a checkpoint past the kill, and compares every file of the two
   checkpoints, weights and optimizer moments, by SHA-256;
5. scores the model on the held-out documents, next to a unigram model, gzip and xz;
6. shows what it writes at the beginning, in the middle and at the end of training.

A second call keeps what is there and says so; after `rm -r demo` everything is made again.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tools.command import command
from tools.rehearsal.processes import (
    SOURCES,
    Comparison,
    compare_checkpoints,
    last_step,
    learn_vocabulary,
    prepare_source,
    record_of,
    train,
)
from trainer.metrics.metrics import read_metrics

if TYPE_CHECKING:
    from tools.evaluation.cards import Result

DEMO: Final = Path("demo")
SHARDS: Final = DEMO / "shards"
TOKENIZER: Final = DEMO / "tokenizer.model"
RUN: Final = DEMO / "runs" / "main"
TWIN: Final = DEMO / "runs" / "twin"
RESULT: Final = DEMO / "result.json"

STEPS, CHECKPOINT_EVERY, KILL_AFTER = 240, 40, 105
TWIN_STEPS = 120  # the twin's last checkpoint: the first one past the kill
SETTINGS: Final = {
    "max_steps": STEPS,
    "global_batch_tokens": 4096,
    "model.dropout": 0.0,  # this little data is seen less than twice
    "optim.lr": 4e-3,
    "mixture.python-code": 80,
    "mixture.python-docs": 20,
    "validation.interval": CHECKPOINT_EVERY,
    "checkpoint.interval_steps": CHECKPOINT_EVERY,
    "checkpoint.keep_every": CHECKPOINT_EVERY,
}
PROMPT: Final = "def __init__(self, "


@command("python -m tools.demo")
def main() -> None:
    """Prepare, train with a kill, compare with a twin, score, sample: four minutes, into demo/."""
    started = time.monotonic()
    DEMO.mkdir(exist_ok=True)
    heading("1. A vocabulary, learnt from text that comes with Python")
    if TOKENIZER.exists():
        print(f"{TOKENIZER} is there already: kept")
    else:
        learn_vocabulary(TOKENIZER, shown=True)
    heading("2. Text -> shards")
    for source in SOURCES:
        prepare_source(source, TOKENIZER, SHARDS, shown=True)  # sees what is done already
    heading(f"3. Training {STEPS} steps, with kill -9 in the middle")
    killed_at = train_with_a_kill()
    heading("4. Did that change anything? Compared with an uninterrupted twin")
    comparison = compare_with_twin(killed_at)
    heading("5. The score, on documents that were held out of training")
    score = evaluate()
    heading("6. What it writes, as training goes on")
    show_samples()
    close(comparison, score, time.monotonic() - started)


def heading(text: str) -> None:
    """Print a section's title."""
    print(f"\n\033[1m{text}\033[0m" if sys.stdout.isatty() else f"\n{text}", flush=True)


def training_arguments() -> list[str]:
    """The arguments of `summer-train`, the same for the run and its twin."""
    settings = [text for key, value in SETTINGS.items() for text in ("--set", f"{key}={value}")]
    return ["--shards", str(SHARDS), "--preset", "tiny", *settings]


class StepLine:
    """Prints how far training is: on one line of a terminal, elsewhere every twentieth step."""

    def __init__(self) -> None:
        self._shown = -1

    def __call__(self, step: int) -> None:
        """Show `step`, once."""
        in_place = sys.stdout.isatty()
        if step == self._shown or not (in_place or step % 20 == 0):
            return
        self._shown = step
        text = "compiling the model ..." if step == 0 else f"step {step}/{STEPS}"
        print(f"  {text:<30}", end="\r" if in_place else "\n", flush=True)


def train_with_a_kill() -> int | None:
    """Train the run; the step at which it was killed, None if it was there already."""
    if record_of(RUN, STEPS).exists():
        print(f"{RUN} is trained already: kept")
        return None
    print(f"summer-train {' '.join(training_arguments())} --out {RUN}")
    killed_at = None
    if last_step(RUN) < KILL_AFTER:
        train(training_arguments(), RUN, StepLine(), until=lambda: last_step(RUN) >= KILL_AFTER)
        killed_at = last_step(RUN)
        resumed_from = killed_at // CHECKPOINT_EVERY * CHECKPOINT_EVERY
        print(f"killed with SIGKILL after step {killed_at}; the same command resumes from the")
        print(f"last checkpoint, step {resumed_from}")
    train(training_arguments(), RUN, StepLine())
    losses = read_metrics(RUN)
    steps = [line["step"] for line in losses]
    print(f"trained: {len(steps)} steps in metrics.jsonl, each once: {steps == sorted(set(steps))}")
    print(f"loss {losses[0]['loss']:.3f} -> {losses[-1]['loss']:.3f} nats a token")
    return killed_at


def compare_with_twin(killed_at: int | None) -> Comparison:
    """Train the twin, if it is not there, and compare."""
    there = record_of(TWIN, TWIN_STEPS).exists
    if not there():
        train(training_arguments(), TWIN, StepLine(), until=there)
    comparison = compare_checkpoints(RUN, TWIN, TWIN_STEPS)
    for name, (ours, other) in comparison.files.items():
        print(f"  {name}: {(ours or 'absent')[:16]} and {(other or 'absent')[:16]}")
    verdict = "bit for bit the same" if comparison.identical else "DIFFERENT"
    when = f"killed after step {killed_at}" if killed_at else "killed during training"
    print(f"the run ({when}) and its twin at step {comparison.step}: {verdict}")
    return comparison


def evaluate() -> Result:
    """The held-out score of the finished run, as a table."""
    from tools.evaluation.cards import to_text
    from tools.evaluation.heldout import evaluate_heldout
    from tools.evaluation.tasks import TaskOptions
    from tools.models.loading import ModelSpec, load

    score = evaluate_heldout(load(ModelSpec(run=RUN)), TaskOptions(shards=SHARDS))
    print("\n".join(to_text([score])))
    return score


def show_samples() -> None:
    """Continuations of one prompt by the first, a middle and the last checkpoint."""
    from tools.generation.generation import Generation, Sampling, complete
    from tools.models.loading import ModelSpec, load

    for step in (CHECKPOINT_EVERY, STEPS // 2, STEPS):
        loaded = load(ModelSpec(checkpoint=record_of(RUN, step).parent))
        options = Generation(max_tokens=60, sampling=Sampling(temperature=0.5, top_k=40, seed=2))
        text = complete(loaded, PROMPT, options)
        print(f"  step {step}:")
        print("\n".join(f"    | {line}" for line in (PROMPT + text).splitlines()[:8]))


def close(comparison: Comparison, score: Result, time_s: float) -> None:
    """The loss chart, the paths, and what comes next; exit code 1 if a check failed."""
    from shards.files import publish_json
    from tools.reporting.page import write_loss_chart

    chart = write_loss_chart([RUN], DEMO / "loss.svg")
    passed = comparison.identical and score["below_unigram"] >= 0.25
    publish_json(RESULT, {"identical": comparison.identical, "heldout": score.to_json()})
    heading(f"Done in {time_s:.0f} s. What was made:")
    print(f"  {SHARDS!s:<22} the shards: `summer-prep inspect {SHARDS / SOURCES[0]}`")
    print(f"  {RUN!s:<22} the run: `summer-report {RUN}`, `summer-generate --run {RUN}`")
    print(f"  {chart!s:<22} the loss curve")
    print(f"  {RESULT!s:<22} the figures above")
    print("\nThe real thing is three commands:")
    print("  summer-prep tokenize --source fineweb\n  summer-train --shards shards/")
    print("  summer-eval wikitext2")
    if not passed:
        raise SystemExit("error: a check of the demo failed (see above)")


if __name__ == "__main__":
    main()
