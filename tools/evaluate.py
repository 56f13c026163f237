"""summer-eval: what a model is worth on text it was not trained on, and by which rules.

summer-eval wikitext2                                    the newest run, text from the Hub
summer-eval wikitext2 --data wiki.test.raw --all-protocols --card card.md
summer-eval arc_easy hellaswag --hf SmolLM2-135M --limit 100
summer-eval mmlu --num-fewshot 5 --log-items mmlu.jsonl
summer-eval heldout --run runs/tiny --shards shards/     beside a unigram, gzip and xz
summer-eval contamination --task arc_easy --shards shards/ --run runs/tiny
summer-eval lambada piqa --follow runs/tiny              each new checkpoint, beside training
summer-eval selftest                                     can the evaluator itself be believed here?
summer-eval mmlu --nproc 8                               the work shared by eight devices
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from model.config import ModelError
from shards.errors import one_line_failures
from tools.errors import EvaluationError

if TYPE_CHECKING:
    from tools.evaluation.scoring import Progress
    from tools.evaluation.suite import Outcome

NAMES: Final = (
    "wikitext2", "wikitext103", "heldout", "lambada", "arc_easy", "arc_challenge", "mmlu",
    "hellaswag", "piqa", "winogrande", "openbookqa", "boolq",
)  # fmt: skip
ALONE: Final = ("contamination", "selftest")
"""What is named in place of tasks."""
PROTOCOLS: Final = ("disjoint", "stride", "lm-eval", "llama.cpp")
_FOLDER = click.Path(path_type=Path)
_COUNT = click.IntRange(min=1)


@click.command(epilog="Example: summer-eval wikitext2 --data wiki.test.raw --protocol stride")
@click.argument("tasks", nargs=-1, required=True, metavar="TASK...")
@click.option("--run", type=_FOLDER, help="A run, at its newest checkpoint.  [default: newest run]")
@click.option("--checkpoint", type=_FOLDER, help="One checkpoint: runs/NAME/checkpoints/step-N.")
@click.option("--follow", type=_FOLDER, help="Score each checkpoint of a run as it appears.")
@click.option("--hf", type=_FOLDER, help="A Llama-family folder (safetensors, tokenizer).")
@click.option("--data", type=_FOLDER, help="A local copy (.parquet, .jsonl; wikitext: .raw).")
@click.option("--shards", type=_FOLDER, default=Path("shards"), help="Prepared sources.")
@click.option("--contamination", is_flag=True, help="Tell each card the overlap with --shards.")
@click.option("--task", "of", type=click.Choice(NAMES), multiple=True, help="contamination: of.")
@click.option(
    "--protocol", type=click.Choice(PROTOCOLS), default="disjoint", help="Of a perplexity."
)
@click.option("--all-protocols", is_flag=True, help="Perplexities under each, side by side.")
@click.option("--context", type=int, help="Ids in a window.  [default: as in training]")
@click.option("--stride", type=int, help="Ids between windows' begins.  [default: half a window]")
@click.option(
    "--bos",
    type=click.Choice(["never", "start", "window"]),
    help="Where BOS stands.  [default: the protocol's habit; never in tasks]",
)
@click.option("--limit", type=_COUNT, help="First N windows, pages, documents or questions.")
@click.option("--num-fewshot", type=click.IntRange(min=0), default=0, help="Examples shown first.")
@click.option("--fewshot-data", type=_FOLDER, help="A local file to take the examples from.")
@click.option("--log-items", type=_FOLDER, help="Write each question's scores (.jsonl).")
@click.option("--card", type=_FOLDER, help="Write the cards (.md) or all figures (.json).")
@click.option("--batch-tokens", type=_COUNT, help="Ids through the model at once.")
@click.option("--nproc", type=_COUNT, default=1, help="Processes that share the work.")
@click.option("--dtype", type=click.Choice(["auto", "bf16", "fp32"]), default="auto")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda", "mps"]), default="auto")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a score.")
@one_line_failures(ModelError)
def main(
    tasks: tuple[str, ...],
    of: tuple[str, ...],
    follow: Path | None,
    nproc: int,
    as_json: bool,
    card: Path | None,
    log_items: Path | None,
    **options: Any,
) -> None:
    """Score a model on TASKs, each under rules that its card names.

    Perplexities: wikitext2, wikitext103, heldout (documents of the shards that were kept out of
    training). Questions: lambada, arc_easy, arc_challenge, mmlu, hellaswag, piqa, winogrande,
    openbookqa, boolq, as lm-evaluation-harness puts them.

    In place of tasks: contamination (which items of a --task stand in the training shards), and
    selftest (closed-form models through all plans; needs no data).
    """
    if unknown := [task for task in tasks if task not in (*NAMES, *ALONE)]:
        raise EvaluationError(
            f"task {unknown[0]!r} is unknown: choose of {', '.join((*NAMES, *ALONE))}"
        )
    if len(tasks) > 1 and set(tasks) & set(ALONE):
        raise click.UsageError(f"{', '.join(ALONE)} stand alone, without other tasks")
    if tasks == ("selftest",):
        sys.exit(_selftest())
    if nproc > 1 and "RANK" not in os.environ:
        from tools.evaluation.sharing import run_shared

        sys.exit(run_shared("tools.evaluate", sys.argv[1:], nproc))
    from trainer.distributed.world import join_world

    with join_world(options["device"]) as world:
        outcomes = []
        if tasks == ("contamination",):
            found = _search(of, options)
        else:
            found = _score(tasks, options) if follow is None else _follow(follow, tasks, options)
        for outcome in found:
            outcomes.append(outcome)
            if world.is_main:
                records = map(json.dumps, outcome.figures)
                click.echo("\n".join(records if as_json else outcome.card))
        if world.is_main:
            _write(outcomes, card, log_items)


def _selftest() -> int:
    """The exit code: 0 if every check passed. Each is a line."""
    from tools.evaluation.selftest import run_checks

    failed = 0
    for check in run_checks():
        failed += bool(check.failure)
        word, complaint = ("FAIL", f": {check.failure}") if check.failure else ("ok", "")
        click.echo(f"{word:<5} {check.name}{complaint} ({check.time_s:.1f} s)")
    return int(failed > 0)


def _follow(run: Path, tasks: Sequence[str], options: dict[str, Any]) -> Iterator[Outcome]:
    """The outcomes of each checkpoint of a run, oldest first, until its last step."""
    from tools.evaluation.follow import follow

    def evaluate(checkpoint: Path, missing: Sequence[str]) -> Iterator[Outcome]:
        return _score(missing, {**options, "run": None, "checkpoint": checkpoint})

    if any(options[name] for name in ("run", "checkpoint", "hf")):
        raise click.UsageError("--follow names the run: leave --run, --checkpoint and --hf out")
    for _, outcome in follow(run, tasks, evaluate):
        yield outcome


def _score(tasks: Sequence[str], options: dict[str, Any]) -> Iterator[Outcome]:
    """Each task's outcome for the model that the options choose."""
    from tools.evaluation.suite import Options, run_task
    from tools.models.loading import ModelSpec, load

    named = {name: options.pop(name) for name in ("run", "checkpoint", "hf", "device", "dtype")}
    choice = ModelSpec(**named)
    loaded = load(choice)
    given = Options(
        **options, checkpoint=choice.checkpoint_dir if options["contamination"] else None
    )
    for task in tasks:
        with _progress_bar(task) as progress:
            yield run_task(task, loaded, given, progress)


def _search(tasks: Sequence[str], options: dict[str, Any]) -> Iterator[Outcome]:
    """The contamination of each task; with a run, also by what that has seen."""
    from tools.evaluation.cards import contamination_card
    from tools.evaluation.suite import Options, Outcome, search_contamination
    from tools.models.loading import ModelSpec

    if not tasks:
        raise click.UsageError("contamination needs a --task (as often as you like)")
    named = {name: options.pop(name) for name in ("run", "checkpoint", "hf", "device", "dtype")}
    has_run = named["run"] or named["checkpoint"]
    given = Options(**options, checkpoint=ModelSpec(**named).checkpoint_dir if has_run else None)
    for task in tasks:
        with _progress_bar(task) as progress:
            found = search_contamination(task, given, progress)
        yield Outcome(task, [found.to_json()], contamination_card(found))


def _write(outcomes: Sequence[Outcome], card: Path | None, log_items: Path | None) -> None:
    from shards.files import publish_bytes
    from tools.evaluation.suite import write_card

    if card is not None:
        write_card(card, outcomes)
    if log_items is not None:
        lines = (json.dumps({"task": o.task, **item}) for o in outcomes for item in o.items)
        publish_bytes(log_items, "".join(f"{line}\n" for line in lines).encode())


@contextlib.contextmanager
def _progress_bar(label: str) -> Iterator[Progress]:
    """A bar on the terminal (none where nobody watches) that follows the windows scored."""
    from rich.console import Console
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    with Bar(console=console, transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


if __name__ == "__main__":
    main()
