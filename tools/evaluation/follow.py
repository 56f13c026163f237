"""Beside training: each checkpoint of a run is scored as it appears, and its cards go into the run.

    runs/NAME/evaluations/step-200/lambada.json, lambada.md, ...

A task whose card is there is not scored again, so the same command goes on after an interruption.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

from shards.errors import SummerError
from tools.evaluation.suite import Outcome, write_card
from trainer.checkpoint.runs import EVALUATIONS, checkpoints, step_of
from trainer.config.config import load_config

POLL_S: Final = 10.0

Evaluate = Callable[[Path, Sequence[str]], Iterator[Outcome]]
"""Scores a checkpoint on the named tasks."""


def follow(
    run: Path,
    tasks: Sequence[str],
    evaluate: Evaluate,
    wait: Callable[[float], None] = time.sleep,
) -> Iterator[tuple[int, Outcome]]:
    """Each new score with its step, until the checkpoint of the run's last step has been scored.

    Checkpoints that are there at first are taken oldest first. One that training purges before it
    could be read is passed over.
    """
    last_step = load_config(run).max_steps
    passed: set[Path] = set()
    while True:
        waiting = [checkpoint for checkpoint in checkpoints(run) if checkpoint not in passed]
        if not waiting:
            if any(step_of(checkpoint) >= last_step for checkpoint in passed):
                return
            wait(POLL_S)
            continue
        checkpoint = waiting[0]
        passed.add(checkpoint)
        missing = [task for task in tasks if not card_of(checkpoint, task).is_file()]
        try:
            for outcome in evaluate(checkpoint, missing) if missing else ():
                card = card_of(checkpoint, outcome.task)
                card.parent.mkdir(parents=True, exist_ok=True)
                write_card(card.with_suffix(".md"), [outcome])
                write_card(card, [outcome])  # last: it says that the task is done
                yield step_of(checkpoint), outcome
        except (SummerError, OSError):
            if checkpoint in checkpoints(run):
                raise


def card_of(checkpoint: Path, task: str) -> Path:
    """Where the figures of a checkpoint on a task are kept in its run."""
    return checkpoint.parents[1] / EVALUATIONS / checkpoint.name / f"{task}.json"
