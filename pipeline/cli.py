"""`summer-prep`: text -> shards. Each command parses, calls the library, echoes.

Each imports what it needs, so that --help answers at once.
"""

from __future__ import annotations

import json
import re
import signal
import sys
from dataclasses import asdict, fields
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.inputs.sources import SOURCES, SourceOverrides, find
from shards.errors import one_line_failures
from shards.versions import VERSION

if TYPE_CHECKING:
    from pipeline.text.tokenizer import Tokenizer
    from shards.format import Split

PATH = click.Path(path_type=Path)
COUNT = click.IntRange(1)
MOST_WORKERS = 1024
MOST_COUNTED = 10**15

source_folder = click.argument("folder", type=PATH, metavar="SHARDS/SOURCE")
workers_option = click.option(
    "--workers", type=click.IntRange(1, MOST_WORKERS), help="Processes; default: all cores."
)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(VERSION, prog_name="summerlm")
def main() -> None:
    """Turn text into shards for training, each sequence with its checksum.

    \b
    summer-prep tokenize --source python-code --out shards/
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        before = signal.getsignal(number)
        if before != signal.SIG_IGN:  # as nohup leaves it
            signal.signal(number, _stop)
            click.get_current_context().call_on_close(partial(signal.signal, number, before))


def _stop(number: int, _frame: object) -> None:
    """An exit like any other: workers are ended, temporary files removed."""
    sys.exit(128 + number)


def _part(_context: object, _option: object, text: str) -> tuple[int, int]:
    number, slash, of = text.partition("/")
    if not (slash and number.isdigit() and of.isdigit()):
        raise click.BadParameter(f"{text!r}: two numbers are meant, as in 3/8")
    return int(number), int(of)


def _count(_context: object, _option: object, text: str | None) -> int | None:
    """A count as people write it: 5000, 10M, 1.5B, 2_000_000."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([KMBGT]?)", text.replace("_", "").upper())
    zeros = {"": 0, "K": 3, "M": 6, "B": 9, "G": 9, "T": 12}
    number = Decimal(found[1]).scaleb(zeros[found[2]]) if found else Decimal(0)
    if number != int(number) or not 1 <= number <= MOST_COUNTED:
        raise click.BadParameter(f"{text!r} is not a count: write it as in 5000, 10M or 1.5B")
    return int(number)


def _unescaped(_context: object, _option: object, text: str) -> str:
    return text.replace(r"\n", "\n").replace(r"\t", "\t")


@main.command()
@click.option("--source", "names", required=True, multiple=True, metavar="NAME",
              help="See `summer-prep sources`; may be repeated.")  # fmt: skip
@click.option("--data-files", multiple=True, metavar="GLOB",
              help="Files, a folder or a quoted pattern: parquet, jsonl, json, csv, arrow, txt, "
              "also compressed; or a URL (s3://, https://, ...); may be repeated. "
              "With --dataset: patterns inside it.")  # fmt: skip
@click.option("--list", "as_list", is_flag=True,
              help="Only list what is read, and what is left out with the reason.")  # fmt: skip
@click.option("--dataset", default="", metavar="ORG/NAME", help="Data set on the Hub.")
@click.option("--config", default="", metavar="C", help="Configuration of the data set.")
@click.option("--revision", default="", metavar="R", help="Commit, tag or branch.")
@click.option("--split", default="", help="Split of the data set or folder: train (default), test, "
              "...; all: every file.")  # fmt: skip
@click.option("--text-column", default="", metavar="COL", help="Column of the text.")
@click.option("--shape", type=click.Choice(["", "documents", "lines", "chat"]), default="",
              help="What a record is: a document, or turns (from/value, role/content); "
              "lines: each line of a text file is a document.")  # fmt: skip
@click.option("--separator", default="", metavar="TEXT", callback=_unescaped,
              help="What stands between the documents of a text file, e.g. '<|endoftext|>'; "
              r"\n and \t are meant.")  # fmt: skip
@click.option("--out", type=PATH, default=Path("shards"), show_default=True)
@workers_option
@click.option("--seq-len", type=click.IntRange(2, 1 << 20), default=4096, show_default=True)
@click.option("--tokenizer", type=PATH, help="A SentencePiece .model or a "
              "tokenizer.json (byte-level BPE); default: Mistral's, extended.")  # fmt: skip
@click.option("--bos", default="", metavar="TOKEN", help="Special token of a tokenizer.json that "
              "begins a document; default: what its folder says, else its --eos.")  # fmt: skip
@click.option("--eos", default="", metavar="TOKEN", help="And that ends one.")
@click.option("--max-documents", callback=_count, metavar="N",
              help="Take a fair sample of so many documents: 5000, 10M.")  # fmt: skip
@click.option("--max-tokens", callback=_count, metavar="N",
              help="Stop behind the document that reaches so many: 1.5B.")  # fmt: skip
@click.option(
    "--val-fraction",
    type=click.FloatRange(0, 1),
    help="Held out; default: 0.001, or more for some 20 documents.",
)
@click.option("--check-encoding", type=COUNT, default=8, show_default=True,
              help="Documents of each unit compared with sentencepiece's encoding.")  # fmt: skip
@click.option("--exclude", type=PATH, metavar="FILE",
              help="Leave out documents that share 13 words in a row with a task: a list of "
              "`summer-eval contamination --write`.")  # fmt: skip
@click.option("--loss-mask", is_flag=True, help="Chat: only the answers are targets.")
@click.option("--executor", type=click.Choice(["local", "ray"]), default="local", show_default=True)
@click.option("--address", default="", metavar="HOST:PORT", help="Ray cluster; default: one here.")
@click.option("--part", default="1/1", metavar="I/N", callback=_part,
              help="Do the I-th of N parts, counted from 1: for Slurm arrays.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print the manifest's facts as JSON.")
@one_line_failures()
def tokenize(names: tuple[str, ...], **options: Any) -> None:
    """Read sources, tokenize them, pack each into a folder of shards.

    Started again after any interruption, the same command goes on where it stopped. Ctrl-C ends it
    with exit code 130, SIGTERM with 143.

    \b
    summer-prep tokenize --source fineweb --max-tokens 1000000000
    summer-prep tokenize --source arxiv --data-files 'my/copy/*.jsonl.zst'
    summer-prep tokenize --source mine --dataset ORG/NAME --text-column text
    """
    from pipeline.checks.inspection import summary
    from pipeline.inputs.inputs import listing_lines
    from pipeline.inputs.listing import check_split_of_use
    from pipeline.inputs.urls import open_inputs
    from pipeline.prepare import prepare
    from pipeline.progress import PrepareDisplay
    from pipeline.text.exclude import read_exclusion
    from pipeline.units.executors import Executor, default_workers
    from pipeline.units.job import Limit
    from pipeline.units.recipe import PrepareRequest

    choice, same = _overrides(options), ("out", "seq_len", "val_fraction", "loss_mask", "part")
    if len(set(names)) > 1 and (choice.dataset or choice.data_files):
        raise click.UsageError("--dataset and --data-files go with a single --source")
    kind, address = options["executor"], options["address"]
    if address and kind != "ray":
        raise click.UsageError(f"--address {address} goes with --executor ray")
    workers = options["workers"] or (1 if kind == "ray" else default_workers())
    executor = Executor(kind, workers, address)
    requests = [
        PrepareRequest(
            source=find(name, choice),
            tokenizer=_tokenizer(options["tokenizer"], bos=options["bos"], eos=options["eos"]),
            exclude=read_exclusion(options["exclude"]) if options["exclude"] else None,
            data_files=() if options["dataset"] else options["data_files"],
            limit=Limit(options["max_documents"], options["max_tokens"]),
            check_encoding=options["check_encoding"],
            **{option: options[option] for option in same},
        )
        for name in dict.fromkeys(names)
    ]
    if not choice.dataset and choice.data_files:
        check_split_of_use(choice.data_files, choice.split)
    for request in requests:
        if options["as_list"]:
            click.echo("\n".join(listing_lines(open_inputs(request.source, request.data_files))))
            continue
        display = PrepareDisplay(sys.stderr)
        try:
            manifest = prepare(request, executor, display)
        except SystemExit:
            display.close()
            click.echo("stopped: the same command goes on from here", err=True)
            raise
        finally:
            display.close()
        folder = request.out / request.source.name
        if manifest is None:
            click.echo(f"{folder}: this part is done; others are not, so there is no manifest yet")
        else:
            click.echo(summary(folder, manifest, options["as_json"]))


@main.command()
@source_folder
@click.option("--row", "rows", type=int, multiple=True, help="Show this sequence; may be repeated.")
@click.option("--split", type=click.Choice(["train", "val"]), default="train", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="The numbers as JSON.")
@one_line_failures()
def inspect(folder: Path, rows: tuple[int, ...], split: Split, as_json: bool) -> None:
    """Show what a prepared source holds: counts, rejected records, sequences as text.

    \b
    summer-prep inspect shards/fineweb --row 0 --row 17
    """
    from pipeline.checks import inspection
    from shards.files import json_bytes

    for row in rows:
        click.echo(inspection.show_row(folder, split, row))
    if not rows:
        facts = inspection.report(folder)
        shown = json_bytes(facts).decode().rstrip() if as_json else inspection.report_lines(facts)
        click.echo(shown)


@main.command()
@click.argument("folder", type=PATH, metavar="SHARDS[/SOURCE]")
@one_line_failures()
def verify(folder: Path) -> None:
    """Check every shard and sequence of a source, or of all sources in a folder; name bad ones.

    \b
    summer-prep verify shards/
    """
    from pipeline.checks.verify import find_damage, source_folders

    bad = 0
    for source in source_folders(folder):
        found = 0
        for damage in find_damage(source):
            note = damage.is_stranger
            click.echo(f"{source.name}/{damage}{' (a note, no damage)' if note else ''}")
            found += not note
        click.echo(f"{source}: {f'{found} damaged' if found else 'intact'}")
        bad += found
    if bad:
        click.echo("error: `summer-prep repair SHARDS/SOURCE` makes damaged units again", err=True)
        raise SystemExit(1)


@main.command()
@source_folder
@click.option(
    "--data-files", multiple=True, metavar="GLOB", help="The local files that it was prepared from."
)
@workers_option
@one_line_failures()
def repair(folder: Path, data_files: tuple[str, ...], workers: int | None) -> None:
    """Tokenize the damaged units again, and only those; the bytes come out the same.

    \b
    summer-prep repair shards/fineweb
    """
    from pipeline.checks.repair import repair as repair_source
    from pipeline.units.executors import Executor, default_workers

    workers = workers or default_workers()
    for damage in repair_source(folder, data_files, Executor(workers=workers)):
        click.echo(f"repaired: {damage}")
    click.echo(f"{folder}: intact")


@main.command()
@click.option("--json", "as_json", is_flag=True, help="The table as JSON.")
@one_line_failures()
def sources(as_json: bool) -> None:
    """List the sources: share of the reference mixture, place, state, licence, substitute.

    \b
    summer-prep sources
    """
    if as_json:
        click.echo(json.dumps([asdict(source) for source in SOURCES], indent=1))
        return
    for source in SOURCES:
        share = f"{source.share:g} %" if source.share else ""
        click.echo(f"{source.name:<13}{share:>5}  {source.state:<18}{source.about}")
        where = source.dataset + (f", {source.config}" if source.config and not source.patterns
                                  else "")  # fmt: skip
        click.echo(f"{'':20}{where or source.unavailable or 'the running interpreter'}")
        click.echo(f"{'':20}licence: {source.licence}")
        if source.substitute:
            click.echo(f"{'':20}substitute: {source.substitute}")


@main.command()
@click.option("--train", is_flag=True, help="Learn a vocabulary from the sources or files.")
@click.option("--extend", type=PATH, metavar="FILE", help="Add control pieces to this model.")
@click.option("--show", type=PATH, metavar="FILE",
              help="Describe this model; `default` means the default one.")  # fmt: skip
@click.option("--source", "names", multiple=True, metavar="NAME", help="With --train: text from.")
@click.option("--data-files", multiple=True, metavar="GLOB", help="With --train: local files.")
@click.option("--text-column", default="", metavar="COL", help="With --train: column of the text.")
@click.option("--vocab-size", type=click.IntRange(300), default=32768, show_default=True)
@click.option("--max-mb", type=COUNT, default=100, show_default=True,
              help="With --train: text used of each source.")  # fmt: skip
@click.option("--piece", "pieces", multiple=True, help="With --extend: a control piece to add.")
@click.option("--out", type=PATH, metavar="FILE", help="Where to write it.")
@one_line_failures()
def tokenizer(**options: Any) -> None:
    """Learn, extend or show a SentencePiece vocabulary.

    \b
    summer-prep tokenizer --train --vocab-size 2000 --source python-code --out my.model
    summer-prep tokenizer --extend my.model --piece '[TOOL]' --out mine.model
    summer-prep tokenizer --show default
    """
    from pipeline import learn

    actions = [name for name in ("train", "extend", "show") if options[name]]
    if len(actions) != 1:
        raise click.UsageError("choose one of --train, --extend FILE, --show FILE")
    if actions != ["show"] and options["out"] is None:
        raise click.UsageError("name the file to write with --out FILE")
    if options["train"]:
        lines = learn.lines_of(options["names"], _overrides(options), options["max_mb"] << 20)
        made = learn.learn(lines, options["vocab_size"], options["out"])
    elif options["extend"]:
        made = learn.extended(options["extend"], options["pieces"], options["out"])
    else:
        made = _tokenizer(options["show"])
    click.echo(learn.describe_tokenizer(made))


def _overrides(options: dict[str, Any]) -> SourceOverrides:
    names = {field.name for field in fields(SourceOverrides)} & options.keys()
    return SourceOverrides(**{name: options[name] for name in names})


def _tokenizer(path: Path | None, **ends: str) -> Tokenizer:
    from pipeline.text.json_tokenizer import load_tokenizer
    from pipeline.text.tokenizer import Tokenizer

    named = {which: token for which, token in ends.items() if token}
    if path is not None and path != Path("default"):
        return load_tokenizer(path, **named)
    if named:
        raise click.UsageError(f"--{next(iter(named))} goes with --tokenizer tokenizer.json")
    return Tokenizer.default()


if __name__ == "__main__":
    main()
