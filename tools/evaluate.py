"""summer-eval: what a model is worth on text it was not trained on, and by which rules.

summer-eval wikitext2                                    the newest run, text from the Hub
summer-eval wikitext2 --data wiki.test.raw --protocol stride --stride 512 --json
summer-eval heldout --run runs/tiny --shards shards/     beside a unigram, gzip and xz
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from model.config import ModelError
from shards.errors import one_line_failures

if TYPE_CHECKING:
    from tools.loading import LoadedModel
    from tools.scoring import Progress

_FOLDER = click.Path(path_type=Path)


@click.command(epilog="Example: summer-eval wikitext2 --data wiki.test.raw --protocol stride")
@click.argument(
    "tasks", nargs=-1, required=True, type=click.Choice(["wikitext2", "heldout"]), metavar="TASK..."
)
@click.option("--run", type=_FOLDER, help="A run, at its newest commit.  [default: newest run]")
@click.option("--checkpoint", type=_FOLDER, help="One commit: runs/NAME/checkpoints/step-N.")
@click.option("--hf", type=_FOLDER, help="A Llama-family folder (safetensors, tokenizer).")
@click.option("--data", type=_FOLDER, help="wikitext2: a local copy (.raw, .parquet, .jsonl).")
@click.option("--shards", type=_FOLDER, default=Path("shards"), help="heldout: prepared sources.")
@click.option(
    "--protocol", type=click.Choice(["disjoint", "stride"]), default="disjoint", show_default=True
)
@click.option("--context", type=int, help="Ids in a window.  [default: as in training]")
@click.option("--stride", type=int, help="Ids between windows' begins.  [default: half a window]")
@click.option(
    "--bos", type=click.Choice(["never", "start", "window"]), default="never", show_default=True
)
@click.option("--limit", type=click.IntRange(min=1), help="First N windows (heldout: documents).")
@click.option("--batch-tokens", type=click.IntRange(min=1), help="Ids through the model at once.")
@click.option("--dtype", type=click.Choice(["auto", "bf16", "fp32"]), default="auto")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda", "mps"]), default="auto")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a task.")
@one_line_failures(ModelError)
def main(tasks: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Score a model: wikitext2 (perplexities under a named protocol) or heldout (of the shards)."""
    from tools.loading import Choice, load

    named = {name: options.pop(name) for name in ("run", "checkpoint", "hf", "device", "dtype")}
    loaded = load(Choice(**named))
    if options["batch_tokens"] is None:
        options["batch_tokens"] = 32_768 if loaded.device.type == "cuda" else 8192
    for task in tasks:
        with _progress_bar(task) as progress:
            figures, card = _TASKS[task](loaded, options, progress)
        click.echo(json.dumps(figures) if as_json else "\n".join(card))


_Result = tuple[dict[str, object], list[str]]
"""The figures for a script, and lines for a person."""


def _wikitext2(loaded: LoadedModel, options: dict[str, Any], progress: Progress) -> _Result:
    from tools.cards import perplexity_card
    from tools.perplexity import measure
    from tools.protocols import Protocol
    from tools.wikitext import read_text

    protocol = Protocol(
        name=options["protocol"],
        context=options["context"] or loaded.trained_context,
        stride=options["stride"],
        bos=options["bos"],
        bos_id=loaded.vocabulary.bos_id,
    )
    result = measure(
        loaded,
        read_text(options["data"]),
        protocol,
        limit=options["limit"],
        batch_tokens=options["batch_tokens"],
        progress=progress,
    )
    return result.to_json(), perplexity_card(result)


def _heldout(loaded: LoadedModel, options: dict[str, Any], progress: Progress) -> _Result:
    from tools.cards import heldout_card
    from tools.heldout import evaluate_heldout

    result = evaluate_heldout(
        loaded,
        options["shards"],
        context=options["context"],
        limit=options["limit"],
        batch_tokens=options["batch_tokens"],
        progress=progress,
    )
    return result.to_json(), heldout_card(result)


_TASKS = {"wikitext2": _wikitext2, "heldout": _heldout}


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
