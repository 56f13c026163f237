"""summer-eval: how good a model is on text it was not trained on, and by which rules.

summer-eval wikitext2                                    the newest run, text from the Hub
summer-eval wikitext2 --data wiki.test.raw --all-protocols --card card.md
summer-eval arc_easy hellaswag --hf SmolLM2-135M --limit 100
summer-eval mmlu --num-fewshot 5 --log-items mmlu.jsonl
summer-eval heldout --run runs/tiny --shards shards/     compared with a unigram, gzip and xz
summer-eval contamination --task wikitext2 --write tests.ngrams   for summer-prep --exclude
summer-eval contamination --task arc_easy --shards shards/ --run runs/tiny
summer-eval lambada piqa --follow runs/tiny              each new checkpoint, during training
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
from tools.command import FOLDER, Destination, command, model_options
from tools.errors import EvaluationError
from tools.evaluation.tasks import CORPORA, TASKS, TaskOptions
from trainer.errors import did_you_mean

if TYPE_CHECKING:
    from tools.evaluation.cards import Result
    from tools.evaluation.scoring import Progress
    from tools.models.loading import LoadedModel

NAMES: Final = (*CORPORA, "heldout", *TASKS)
PROTOCOLS: Final = ("disjoint", "stride", "lm-eval", "llama.cpp")
_COUNT = click.IntRange(min=1)


@command("summer-eval wikitext2 --data wiki.test.raw --protocol stride")
@click.argument("tasks", nargs=-1, required=True, metavar="TASK...")
@model_options
@click.option("--follow", type=FOLDER, help="Score each checkpoint of a run as it appears.")
@click.option("--data", type=FOLDER, help="A local copy (.parquet, .jsonl; wikitext: .raw).")
@click.option("--shards", type=FOLDER, help="Prepared sources.  [default: the run's, or shards]")
@click.option("--contamination", is_flag=True, help="Add the overlap with --shards to each card.")
@click.option(
    "--task", "of", type=click.Choice(NAMES), multiple=True, help="The tasks of `contamination`."
)
@click.option(
    "--protocol", type=click.Choice(PROTOCOLS), default="disjoint", help="For perplexities."
)
@click.option("--all-protocols", is_flag=True, help="Perplexities under each, side by side.")
@click.option("--context", type=_COUNT, help="Tokens in a window.  [default: as in training]")
@click.option("--stride", type=_COUNT, help="Tokens from window to window.  [default: half]")
@click.option(
    "--bos",
    type=click.Choice(["never", "start", "window"]),
    help="Where BOS is put.  [default: the protocol's; never in tasks]",
)
@click.option("--limit", type=_COUNT, help="First N windows, pages, documents or questions.")
@click.option("--num-fewshot", type=click.IntRange(min=0), default=0, help="Examples shown first.")
@click.option("--fewshot-data", type=FOLDER, help="A local file to take the examples from.")
@click.option("--write", type=FOLDER, help="Contamination: a list for summer-prep --exclude.")
@click.option("--log-items", type=Destination(), help="Write each question's scores (.jsonl).")
@click.option("--card", type=Destination(".md", ".json"), help="Write cards or all results.")
@click.option("--batch-tokens", type=_COUNT, help="Tokens through the model at once.")
@click.option("--nproc", type=_COUNT, default=1, help="Processes that share the work.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a score.")
def main(tasks: tuple[str, ...], nproc: int, **options: Any) -> None:
    """Score a model on TASKs, each under rules that its card names.

    Perplexities: wikitext2, wikitext103, heldout (documents of the shards that were kept out of
    training). Questions: lambada, arc_easy, arc_challenge, mmlu, hellaswag, piqa, winogrande,
    openbookqa, boolq, asked as lm-evaluation-harness does.

    In place of tasks: contamination (which items of a --task are in the training shards); compare
    A B --task NAME (runs, checkpoints or Hugging Face folders, on the same items, with the error
    of their differences).
    """
    if tasks[0] == "compare":
        if nproc > 1:
            raise click.UsageError("--nproc does not go with compare")
        _compare([Path(each) for each in tasks[1:]], options)
        return
    if unknown := [task for task in tasks if task not in (*NAMES, "contamination")]:
        choices = (*NAMES, "contamination")
        near = did_you_mean(unknown[0], choices)
        raise EvaluationError(f"task {unknown[0]!r}: {near}there are: {', '.join(choices)}")
    if options["write"] is not None:
        _write_exclusion(tasks, options)
        return
    if "contamination" in tasks and (len(tasks) > 1 or options["follow"]):
        raise click.UsageError("contamination is named alone, without other tasks or --follow")
    from trainer.distributed.launch import EXIT_REASON, Launch, run_on_all, write_exit_reason

    if nproc > 1 and "RANK" not in os.environ:
        launch = Launch(nproc, options=("--max-restarts=0",), module="tools.evaluate")
        sys.exit(run_on_all(launch, sys.argv[1:]))
    if EXIT_REASON in os.environ:  # one of those processes
        write_exit_reason(lambda: _evaluate(tasks, options), OSError, ModelError)
    else:
        _evaluate(tasks, options)


def _compare(folders: Sequence[Path], options: dict[str, Any]) -> None:
    """Print how models differ on each --task, the first being what others are compared with."""
    from tools.evaluation.cards import to_text
    from tools.evaluation.compare import compare, spec_of
    from tools.models.loading import load

    of, where = options.pop("of"), {name: options.pop(name) for name in ("device", "dtype")}
    as_json, card = options.pop("as_json"), options.pop("card")
    if len(folders) < 2 or not of or "heldout" in of:
        raise click.UsageError(
            "write it as compare A B --task NAME: two models or more, and a task (not heldout)"
        )
    for name in ("run", "checkpoint", "hf", "write", "follow", "log_items", "contamination",
                 "all_protocols"):  # fmt: skip
        if options.pop(name):
            raise click.UsageError(f"--{name.replace('_', '-')} does not go with compare")
    given = TaskOptions(**{**options, "shards": options["shards"] or Path("shards")})
    scores: dict[str, list[Result]] = {task: [] for task in of}
    for folder in folders:
        loaded = load(spec_of(folder, **where))
        for task in of:
            with _progress_bar(f"{task}, {folder.name}") as progress:
                scores[task] += _run_task(task, loaded, given, progress)
    compared = [[compare(results)] for results in scores.values()]
    for [result] in compared:
        click.echo(json.dumps(result.to_json()) if as_json else "\n".join(to_text([result])))
    _write(compared, card, None)


def _write_exclusion(tasks: Sequence[str], options: dict[str, Any]) -> None:
    """The list of some tasks' items, in place of a search for them."""
    from tools.evaluation.contamination import write_exclusion

    if tuple(tasks) != ("contamination",) or not options["of"]:
        raise click.UsageError("--write goes with contamination --task NAME")
    given = TaskOptions(data=options["data"], limit=options["limit"])
    click.echo(write_exclusion(options["of"], given, options["write"]))


def _evaluate(tasks: Sequence[str], options: dict[str, Any]) -> int:
    """Score, print and write; the exit code."""
    from tools.evaluation.cards import to_text
    from trainer.distributed.world import join_world

    options.pop("write")
    follow, as_json, card, log_items = map(options.pop, ("follow", "as_json", "card", "log_items"))
    done = []
    with join_world(options["device"]) as world:
        for results in _follow(follow, tasks, options) if follow else _results(tasks, options):
            done.append(results)
            if world.is_main:
                records = (json.dumps(result.to_json()) for result in results)
                click.echo("\n".join(records if as_json else to_text(results)))
        if world.is_main:
            _write(done, card, log_items)
    return 0


def _follow(run: Path, tasks: Sequence[str], options: dict[str, Any]) -> Iterator[Sequence[Result]]:
    """The results of each checkpoint of a run, oldest first, until its last step."""
    from tools.evaluation.cards import follow

    if any(options[name] for name in ("run", "checkpoint", "hf")):
        raise click.UsageError("--follow names the run: leave --run, --checkpoint and --hf out")
    return follow(
        run, tasks, lambda step, missing: _results(missing, {**options, "checkpoint": step})
    )


def _results(tasks: Sequence[str], options: dict[str, Any]) -> Iterator[Sequence[Result]]:
    """The results of each task for the model that the options choose."""
    from tools.evaluation.heldout import shards_of
    from tools.models.loading import ModelSpec, load

    named = {name: options[name] for name in ("run", "checkpoint", "hf", "device", "dtype")}
    of, search, choice = options["of"], "contamination" in tasks, ModelSpec(**named)
    if search and not of:
        raise click.UsageError("contamination needs a --task (as often as you like)")
    has_run = named["run"] or named["checkpoint"] if search else options["contamination"]
    own = {name: value for name, value in options.items() if name not in (*named, "of")}
    loaded = None if search else load(choice)
    trained = loaded.checkpoint if loaded else choice.checkpoint_dir
    own["shards"] = own["shards"] or shards_of(trained)
    given = TaskOptions(**own, seen_by=trained if has_run else None)
    for task in of if search else tasks:
        with _progress_bar(task) as progress:
            yield _run_task(task, loaded, given, progress)


def _run_task(
    name: str, loaded: LoadedModel | None, options: TaskOptions, progress: Progress
) -> Sequence[Result]:
    """The results of a model on a task, one for each protocol; without a model, its overlap."""
    from tools.evaluation.contamination import contamination, with_contamination
    from tools.evaluation.heldout import evaluate_heldout
    from tools.evaluation.multiple_choice import evaluate_task
    from tools.evaluation.perplexity import evaluate_corpus

    if loaded is None:
        return [contamination(name, options, progress)]
    if name == "heldout":
        return [evaluate_heldout(loaded, options, progress)]
    if name in CORPORA:
        results = evaluate_corpus(loaded, name, options, progress)
    else:
        results = [evaluate_task(loaded, TASKS[name], options, progress)]
    if options.contamination:
        return with_contamination(results, contamination(name, options, progress))
    return results


def _write(tasks: Sequence[Sequence[Result]], card: Path | None, log_items: Path | None) -> None:
    from shards.files import publish_bytes
    from tools.evaluation.cards import write_results

    if card is not None:
        write_results(card, tasks)
    if log_items is not None:
        every = [result for results in tasks for result in results]
        lines = (json.dumps({"task": each.task, **item}) for each in every for item in each.items)
        publish_bytes(log_items, "".join(f"{line}\n" for line in lines).encode())


@contextlib.contextmanager
def _progress_bar(label: str) -> Iterator[Progress]:
    """A bar on the terminal, if there is one, that follows the windows scored."""
    from rich.console import Console
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    with Bar(console=console, transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


if __name__ == "__main__":
    main()
