"""Evaluation during training: each checkpoint is scored as it appears, the results kept in the run.

    runs/NAME/evaluations/step-200/lambada.json, lambada.md, ...

A task whose card exists is not scored twice, so the same command resumes after an interruption.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

from shards.errors import SummerError
from tools.evaluation.cards import Result, write_results
from trainer.checkpoint.runs import EVALUATIONS, checkpoints, step_of
from trainer.config.config import load_config

POLL_S: Final = 10.0

Evaluate = Callable[[Path, Sequence[str]], Iterator[Sequence[Result]]]  # checkpoint, tasks


def follow(
    run: Path,
    tasks: Sequence[str],
    evaluate: Evaluate,
    wait: Callable[[float], None] = time.sleep,
) -> Iterator[Sequence[Result]]:
    """The results of each task at each checkpoint, until the run's last step has been scored.

    Checkpoints that exist already are taken oldest first. One that training deletes before it
    could be read is skipped.
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
            for results in evaluate(checkpoint, missing) if missing else ():
                card = card_of(checkpoint, results[0].task)
                card.parent.mkdir(parents=True, exist_ok=True)
                write_results(card.with_suffix(".md"), [results])
                write_results(card, [results])  # last: it says that the task is done
                yield results
        except (SummerError, OSError):
            if checkpoint in checkpoints(run):
                raise


def card_of(checkpoint: Path, task: str) -> Path:
    """Where the results of a checkpoint on a task are kept in its run."""
    return checkpoint.parents[1] / EVALUATIONS / checkpoint.name / f"{task}.json"
