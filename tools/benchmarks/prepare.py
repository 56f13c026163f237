"""The complete preparation, parquet -> shards: ours and others', the same cores for each.

    python tools/benchmarks/prepare.py                        # this interpreter's own sources
    python tools/benchmarks/prepare.py --corpus 'web/*.parquet' --text-column text
    python tools/benchmarks/prepare.py --megabytes 2 --repeats 1

Each figure is a fresh process's, its start included; sides take turns, `--repeats` times. Peers
(peers.py) that are not installed are left out; they may live in an environment of their own,
`--peers-python`. All input has been read once before, so it comes from memory.
"""

from __future__ import annotations

import glob
import json
import random
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from measure import Done, in_turns, machine, parse, ratios, run, spread
from pipeline.text.tokenizer import Tokenizer
from stages import breakdown
from tools.models.tokenizers import tokenizer_json

PEERS = Path(__file__).with_name("peers.py")
MODULES = {"gigatoken": "gigatoken", "megatron": "megatron.core", "datatrove": "datatrove"}
FILES = 16


@dataclass(frozen=True)
class PrepareBench:
    """One corpus, as parquet files in FOLDER/in, and who is to prepare it."""

    folder: Path
    column: str
    workers: int
    peers_python: str

    @property
    def files(self) -> list[str]:
        """The parquet files."""
        return sorted(str(path) for path in (self.folder / "in").iterdir())

    def command(self, workers: int) -> list[str]:
        """`summer-prep` without its --out."""
        command = [sys.executable, "-m", "pipeline.cli", "tokenize", "--source", "corpus"]
        command += ["--data-files", str(self.folder / "in" / "*.parquet")]
        return [*command, "--text-column", self.column, "--workers", str(workers)]

    def run(self, name: str, workers: int) -> Done:
        """One run into an empty folder."""
        out = self.folder / "out"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        if name == "ours":
            return run([*self.command(workers), "--out", str(out)], workers)
        job = {"folder": str(self.folder), "files": self.files, "column": self.column,
               "workers": workers, "out": str(out)}  # fmt: skip
        (self.folder / "job.json").write_text(json.dumps(job))
        return run([self.peers_python, str(PEERS), name, str(self.folder / "job.json")], workers)


def main() -> None:
    """Print the machine, the corpus, and a table for each question."""
    options = parse(
        __doc__,
        corpus={"metavar": "GLOB", "help": "parquet files; default: Python sources"},
        text_column="text",
        megabytes={"default": 128, "help": "of Python sources"},
        workers=2,
        repeats=3,
        peers_python=sys.executable,
    )
    print(machine("sentencepiece", "pyarrow", "gigatoken", "megatron-core", "datatrove"), "\n")
    with tempfile.TemporaryDirectory() as name:
        bench = PrepareBench(Path(name), options.text_column, options.workers, options.peers_python)
        n_bytes = write_inputs(bench, options.corpus, options.megabytes << 20)
        print(f"Corpus: {n_bytes / 1e6:.1f} MB of text, {len(bench.files)} parquet files.\n")
        print(*compare(bench, n_bytes, options.repeats), sep="\n", flush=True)
        print("\n".join(breakdown(bench.command(1)[3:], options.repeats)))


def write_inputs(bench: PrepareBench, pattern: str | None, max_bytes: int) -> int:
    """Bytes of text in the files, which are made, or linked; read once, also as json lines."""
    folder = bench.folder / "in"
    folder.mkdir()
    if pattern is None:
        texts = list(python_sources(max_bytes))
        for n in range(FILES):
            path = folder / f"{n:03d}.parquet"
            pq.write_table(pa.table({bench.column: texts[n::FILES]}), path, row_group_size=1000)
    else:
        for n, name in enumerate(sorted(glob.glob(pattern))):  # noqa: PTH207  (a user's pattern)
            (folder / f"{n:03d}.parquet").symlink_to(Path(name).absolute())
    if not bench.files:
        raise SystemExit(f"no file matches {pattern}")
    n_bytes = 0
    with (bench.folder / "lines.jsonl").open("w", encoding="utf-8") as lines:
        for file in bench.files:
            column = pq.read_table(file, columns=[bench.column])[bench.column].drop_null()
            n_bytes += pc.sum(pc.binary_length(column)).as_py()
            for text in column.to_pylist():
                lines.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    tokenizer = Tokenizer.default()
    (bench.folder / "tokenizer.model").write_bytes(tokenizer.model)
    (bench.folder / "tokenizer.json").write_text(json.dumps(tokenizer_json(tokenizer)))
    return n_bytes


def python_sources(max_bytes: int) -> Iterator[str]:
    """Installed .py files and the standard library's, each once, in a fixed disorder."""
    paths = sysconfig.get_paths()
    folders = {Path(paths[name]) for name in ("stdlib", "purelib", "platlib")}
    files = sorted({path for folder in folders for path in folder.rglob("*.py")})
    random.Random(1).shuffle(files)
    seen: set[str] = set()
    for path in files:
        text = path.read_text(errors="ignore")
        if text and text not in seen and max_bytes > 0:
            seen.add(text)
            max_bytes -= path.stat().st_size
            yield text


def compare(bench: PrepareBench, n_bytes: int, repeats: int) -> Iterator[str]:
    """MB a second and ours over each; ours with one worker, too."""
    sides = {"ours, 1 worker": partial(bench.run, "ours", 1)}
    for name in ("ours", *MODULES):
        if name == "ours" or is_installed(bench.peers_python, name):
            sides[name] = partial(bench.run, name, bench.workers)
    done = in_turns(sides, repeats)
    wall = {name: [one.wall_s for one in runs] for name, runs in done.items()}
    yield f"{bench.workers} workers on as many cores, {repeats} processes each\n"
    yield "| side | MB/s | ours / side | s | s of CPU | largest process |"
    yield "|---|---|---|---|---|---|"
    for name, runs in done.items():
        yield (
            f"| {name} | {spread([n_bytes / 1e6 / s for s in wall[name]], '')} "
            f"| {ratios(wall[name], wall['ours']) if name != 'ours' else ''} "
            f"| {spread(wall[name], '')} | {statistics.median(one.cpu_s for one in runs):.1f} "
            f"| {max(one.peak_mb for one in runs):.0f} MB |"
        )
    yield ""


def is_installed(python: str, side: str) -> bool:
    """Whether a peer can be imported; says so if not."""
    find = f"import importlib.util as u, sys; sys.exit(u.find_spec({MODULES[side]!r}) is None)"
    if subprocess.run([python, "-c", find], capture_output=True).returncode:
        print(f"{side} is not installed in {python}: left out")
        return False
    return True


if __name__ == "__main__":
    main()
