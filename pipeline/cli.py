"""`summer-prep`: text -> shards. Each command parses, calls the library, echoes.

Only click and the table of sources are imported here; the rest is imported by the command that
needs it, so that --help answers at once.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.sources import Choice, find
from shards.errors import one_line_failures

if TYPE_CHECKING:
    from pipeline.tokenizer import Tokenizer
    from shards.format import Manifest


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
def main() -> None:
    """Turn text into shards that a training run can trust.

    \b
    summer-prep tokenize --source python-code --out shards/
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # workers are ended, locks let go


def _chosen(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that choose a source and its files."""
    for option in (
        click.option("--text-column", default="", metavar="COL", help="Column of the text."),
        click.option("--split", default="", help="Split of the data set; default: train."),
        click.option("--revision", default="", metavar="R", help="Commit, tag or branch."),
        click.option("--config", default="", metavar="C", help="Configuration of the data set."),
        click.option("--dataset", default="", metavar="ORG/NAME", help="Data set on the Hub."),
        click.option(
            "--data-files",
            multiple=True,
            metavar="GLOB",
            help="Local parquet, jsonl, txt files (also .zst, .gz), quoted; may be repeated. "
            "With --dataset: patterns inside it.",
        ),
    ):
        command = option(command)
    return command


@main.command()
@click.option("--source", required=True, metavar="NAME", help="See `summer-prep sources`.")
@_chosen
@click.option("--out", type=click.Path(path_type=Path), default=Path("shards"), show_default=True)
@click.option("--workers", type=click.IntRange(1), help="Processes; default: all cores.")
@click.option("--seq-len", type=click.IntRange(2), default=4096, show_default=True)
@click.option(
    "--tokenizer",
    type=click.Path(path_type=Path),
    help="SentencePiece .model; default: Mistral's v3 vocabulary, extended.",
)
@click.option("--max-documents", type=click.IntRange(1), help="Take a fair sample of so many.")
@click.option("--max-tokens", type=click.IntRange(1), help="Take a fair sample of so many.")
@click.option(
    "--val-fraction", type=click.FloatRange(0, 1), help="Documents held out; default: 0.001."
)
@click.option(
    "--check-encoding",
    type=click.IntRange(1),
    default=8,
    show_default=True,
    help="Documents of each unit that are encoded again with sentencepiece, and compared.",
)
@click.option("--loss-mask", is_flag=True, help="Chat: only the answers are targets.")
@click.option("--executor", type=click.Choice(["local", "ray"]), default="local", show_default=True)
@click.option("--address", default="", help="Ray cluster; default: one on this machine.")
@click.option("--part", default="1/1", metavar="I/N", help="Do the I-th of N parts (from 1).")
@click.option("--json", "as_json", is_flag=True, help="Print the manifest's facts as JSON.")
@one_line_failures()
def tokenize(source: str, **options: Any) -> None:
    """Read a source, tokenize it, pack it into shards.

    Started again after any interruption, the same command goes on where it stopped.

    \b
    summer-prep tokenize --source fineweb --max-tokens 1000000000
    summer-prep tokenize --source arxiv --data-files 'my/copy/*.jsonl.zst'
    summer-prep tokenize --source mine --dataset ORG/NAME --text-column text
    """
    from pipeline.executors import Executor, default_workers
    from pipeline.prepare import Request, prepare
    from pipeline.progress import Screen
    from pipeline.work import Limit

    request = Request(
        source=find(source, _choice(options)),
        tokenizer=_tokenizer(options["tokenizer"]),
        out=options["out"],
        data_files=() if options["dataset"] else options["data_files"],
        seq_len=options["seq_len"],
        val_fraction=options["val_fraction"],
        loss_mask=options["loss_mask"],
        limit=Limit(options["max_documents"], options["max_tokens"]),
        check_encoding=options["check_encoding"],
        part=_part(options["part"]),
    )
    workers = options["workers"] or default_workers()
    executor = Executor(options["executor"], workers, options["address"])
    screen = Screen(sys.stderr)
    try:
        manifest = prepare(request, executor, screen)
    finally:
        screen.close()
    _tell(request.out / source, manifest, options["as_json"])


def _choice(options: dict[str, Any]) -> Choice:
    return Choice(
        **{name: options[name] for name in Choice.__dataclass_fields__ if name in options}
    )


def _tokenizer(path: Path | None) -> Tokenizer:
    from pipeline.tokenizer import Tokenizer

    return Tokenizer.default() if path is None else Tokenizer.load(path)


def _part(text: str) -> tuple[int, int]:
    number, slash, of = text.partition("/")
    if not (slash and number.isdigit() and of.isdigit()):
        raise click.BadParameter(f"{text!r}: two numbers are meant, as in 3/8", param_hint="--part")
    return int(number), int(of)


def _tell(folder: Path, manifest: Manifest | None, as_json: bool) -> None:
    """The result, in three lines or as JSON."""
    if manifest is None:
        click.echo(f"{folder}: this part is done; others are not, so there is no manifest yet")
        return
    if as_json:
        from shards.files import json_bytes

        facts = manifest.to_json()
        del facts["parts"], facts["shards"]
        click.echo(json_bytes(facts), nl=False)
        return
    n_train = manifest.n_rows - manifest.n_val_rows
    click.echo(
        f"{folder}: {manifest.n_documents:,} documents, {manifest.n_tokens:,} tokens in "
        f"{n_train:,} rows of {manifest.facts.seq_len} for training and "
        f"{manifest.n_val_rows:,} held out"
    )
    if not manifest.n_val_rows and manifest.facts.val_fraction:
        click.echo("  no document is held out: the source is small; --val-fraction 0.01 takes more")
    for reason, count in manifest.rejected.items():
        click.echo(f"  refused: {count:,} records, {reason} (see *.rejected.jsonl)")
    click.echo(f"  root {manifest.root}")
