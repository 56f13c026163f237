"""The complete preparation, parquet -> shards: ours and others', the same cores for each.

    python tools/benchmarks/prepare.py                        # this interpreter's own sources
    python tools/benchmarks/prepare.py --corpus 'web/*.parquet' --text-column text

Each figure is a fresh process's, its start included; sides take turns, `--repeats` times. Peers
(peers.py) that are not installed are left out; they may live in an environment of their own,
`--peers-python`. All input has been read once before, so it comes from memory.
"""

from __future__ import annotations

import argparse
import glob
import json
import random
import shutil
import statistics
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from measure import Done, machine, run, spread
from stages import breakdown

PEERS = Path(__file__).with_name("peers.py")
MODULES = {
    "gigatoken": "gigatoken",
    "gigatoken-pyarrow": "gigatoken",
    "megatron": "megatron.core",
    "datatrove": "datatrove",
}
TOKENS = {"megatron": "*.bin", "datatrove": "*.ds"}  # of the others *.npy
FILES = 16
SOURCES_BYTES = 128 << 20


def main() -> None:
    """Print the machine, the corpus, and a table for each question."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--corpus", metavar="GLOB", help="Parquet files; default: Python sources.")
    parser.add_argument("--text-column", default="text", metavar="COL")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peers-python", default=sys.executable, metavar="PATH")
    parser.add_argument("--sides", default=",".join(MODULES), help="Peers to run.")
    parser.add_argument("--only", choices=["compare", "scaling", "stages", "memory"])
    options = parser.parse_args()
    print(machine("sentencepiece", "pyarrow", "gigatoken", "megatron-core", "datatrove"), "\n")
    with tempfile.TemporaryDirectory() as name:
        corpus = make_corpus(options.corpus, options.text_column, Path(name))
        print(corpus.about, "\n")
        sides = [
            side for side in options.sides.split(",") if _is_installed(options.peers_python, side)
        ]
        bench = PrepareBench(
            corpus, Path(name), options.workers, options.repeats, options.peers_python
        )
        tables = {
            "compare": lambda: bench.compare(sides),
            "scaling": bench.scaling,
            "stages": lambda: breakdown(_ours(corpus.files, corpus.column, 1)[3:], options.repeats),
            "memory": bench.memory,
        }
        for title, rows in tables.items():
            if options.only in (None, title):
                for row in rows():
                    print(row, flush=True)
                print()


@dataclass(frozen=True)
class Corpus:
    """Parquet files under one folder, and what they hold."""

    files: tuple[str, ...]
    column: str
    text_bytes: int
    about: str
    tiny: tuple[str, ...]
    """The first document alone: what a side takes for it is its start."""


def make_corpus(pattern: str | None, column: str, folder: Path) -> Corpus:
    """The named files, or this interpreter's sources as parquet; read once, and counted."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    there = folder / "in"
    there.mkdir()
    if pattern is None:
        column = "text"
        texts = list(_python_sources())
        share = -(-len(texts) // FILES)
        for n in range(FILES):
            table = pa.table({column: texts[n * share : (n + 1) * share]})
            pq.write_table(table, there / f"{n:03d}.parquet", row_group_size=1000)
    else:
        for n, path in enumerate(sorted(glob.glob(pattern))):  # noqa: PTH207  (a user's pattern)
            (there / f"{n:03d}.parquet").symlink_to(Path(path).absolute())
    files = tuple(sorted(str(path) for path in there.iterdir()))
    if not files:
        raise SystemExit(f"no file matches {pattern}")
    n_bytes = documents = 0
    for path in files:
        texts = pq.read_table(path, columns=[column])[column].drop_null().combine_chunks()
        n_bytes += pc.sum(pc.binary_length(texts)).as_py()
        documents += len(texts)
    tiny = folder / "tiny" / "000.parquet"
    tiny.parent.mkdir()
    pq.write_table(pa.table({column: texts[:1]}), tiny)
    about = (
        f"Corpus: {n_bytes / 1e6:.1f} MB of text in {documents:,} documents, {len(files)} parquet "
        "files."
    )
    return Corpus(files, column, n_bytes, about, (str(tiny),))


def _python_sources() -> Iterator[str]:
    """Installed .py files and the standard library's, each once, in a fixed disorder."""
    paths = sysconfig.get_paths()
    folders = {Path(paths[name]) for name in ("stdlib", "purelib", "platlib")}
    files = sorted({path for folder in folders for path in folder.rglob("*.py")})
    random.Random(1).shuffle(files)
    seen: set[str] = set()
    left = SOURCES_BYTES
    for path in files:
        text = path.read_text(errors="ignore")
        if text and text not in seen and left > 0:
            seen.add(text)
            left -= path.stat().st_size
            yield text


@dataclass(frozen=True)
class PrepareBench:
    """Runs of one corpus, and the tables they make."""

    corpus: Corpus
    folder: Path
    workers: int
    repeats: int
    peers_python: str

    def compare(self, sides: list[str]) -> Iterator[str]:
        """MB a second, the start's seconds, and ours over each."""
        self._write_tokenizers()
        names = ["ours", *sides]
        total: dict[str, list[Done]] = {name: [] for name in names}
        start: dict[str, list[Done]] = {name: [] for name in names}
        for _ in range(self.repeats):
            for name in names:
                total[name].append(self._run(name, self.corpus.files))
                start[name].append(self._run(name, self.corpus.tiny))
        yield f"{self.workers} workers on {self.workers} cores, {self.repeats} processes each\n"
        yield "| side | MB/s | ours / side | s | of it start | s of CPU | largest | tokens |"
        yield "|---|---|---|---|---|---|---|---|"
        ours = [done.wall_s for done in total["ours"]]
        for name in names:
            wall = [done.wall_s for done in total[name]]
            pairs = [theirs / mine for theirs, mine in zip(wall, ours, strict=True)]
            yield (
                f"| {name} | {spread([self.corpus.text_bytes / 1e6 / s for s in wall], '')} "
                f"| {spread(pairs, 'x') if name != 'ours' else ''} | {spread(wall, '')} "
                f"| {statistics.median(done.wall_s for done in start[name]):.2f} "
                f"| {statistics.median(done.cpu_s for done in total[name]):.1f} "
                f"| {max(done.peak_mb for done in total[name]):.0f} MB "
                f"| {total[name][0].output} |"
            )

    def scaling(self) -> Iterator[str]:
        """Ours with one worker and with all of them."""
        wall: dict[int, list[float]] = {1: [], self.workers: []}
        for _ in range(self.repeats):
            for workers, seconds in wall.items():
                seconds.append(self._run("ours", self.corpus.files, workers).wall_s)
        gain = [one / many for one, many in zip(wall[1], wall[self.workers], strict=True)]
        few, many = spread(wall[1], "s"), spread(wall[self.workers], "s")
        yield f"1 worker {few}, {self.workers} workers {many}: {spread(gain, 'times as fast')}"

    def memory(self) -> Iterator[str]:
        """The largest process on records of 8 MB, and on one line of 100 MB."""
        text = self._lines(self.corpus.files).read_text(encoding="utf-8")[:180_000_000]
        text *= -(-180_000_000 // len(text))
        path = self.folder / "large" / "large.jsonl"
        path.parent.mkdir()
        for records, size in ((40, 8_000_000), (1, 100_000_000)):
            with path.open("w", encoding="utf-8") as lines:
                for n in range(records):
                    part = text[n * 2_000_000 :][:size].encode()[:size].decode(errors="ignore")
                    lines.write(json.dumps({"text": part}, ensure_ascii=False) + "\n")
            done = self._run("ours", (str(path),), 1, column="text")
            what = f"{records} records of {size / 1e6:.0f} MB"
            yield f"{what}: largest process {done.peak_mb:.0f} MB, {done.wall_s:.1f} s  "

    def _run(self, name: str, files: tuple[str, ...], workers: int = 0, column: str = "") -> Done:
        """One run; its output is the number of tokens."""
        workers, column = workers or self.workers, column or self.corpus.column
        out = self.folder / "out"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        if name == "ours":
            done = run([*_ours(files, column, workers), "--out", str(out), "--json"], workers)
            return _with_tokens(done, json.loads(done.output)["n_tokens"])
        job = {
            "files": files, "column": column, "workers": workers, "out": str(out),
            "lines": str(self._lines(files)) if name == "megatron" else "",
            "model": str(self.folder / "tokenizer.model"),
            "tokenizer": str(self.folder / "tokenizer.json"),
        }  # fmt: skip
        (self.folder / "job.json").write_text(json.dumps(job))
        done = run([self.peers_python, str(PEERS), name, str(self.folder / "job.json")], workers)
        written = out.glob(TOKENS.get(name, "*.npy"))
        return _with_tokens(done, sum(path.stat().st_size for path in written) // 2)

    def _lines(self, files: tuple[str, ...]) -> Path:
        """The same documents as json lines, which is what some read; making them is not counted."""
        import pyarrow.parquet as pq

        path = Path(files[0]).parent.with_suffix(".jsonl")
        if not path.exists():
            with path.open("w", encoding="utf-8") as lines:
                for file in files:
                    for row in pq.ParquetFile(file).iter_batches(columns=[self.corpus.column]):
                        for text in row.column(0).drop_null().to_pylist():
                            lines.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
        return path

    def _write_tokenizers(self) -> None:
        from pipeline.text.tokenizer import Tokenizer
        from tools.models.tokenizer_json import tokenizer_json

        tokenizer = Tokenizer.default()
        (self.folder / "tokenizer.model").write_bytes(tokenizer.model)
        (self.folder / "tokenizer.json").write_text(json.dumps(tokenizer_json(tokenizer)))


def _ours(files: tuple[str, ...], column: str, workers: int) -> list[str]:
    """`summer-prep` without its --out."""
    pattern = str(Path(files[0]).with_name("*" + Path(files[0]).suffix))
    command = [sys.executable, "-m", "pipeline.cli", "tokenize", "--source", "corpus"]
    return [*command, "--data-files", pattern, "--text-column", column, "--workers", str(workers)]


def _with_tokens(done: Done, tokens: int) -> Done:
    return Done(done.wall_s, done.cpu_s, done.peak_mb, f"{tokens / 1e6:.2f} M")


def _is_installed(python: str, side: str) -> bool:
    """Whether a peer can be imported; says so if not."""
    if side not in MODULES:
        raise SystemExit(f"--sides {side}: there are {', '.join(MODULES)}")
    find = f"import importlib.util as u, sys; sys.exit(u.find_spec({MODULES[side]!r}) is None)"
    try:
        run([python, "-c", find])
    except SystemExit:
        print(f"{side} is not installed in {python}: left out")
        return False
    return True


if __name__ == "__main__":
    main()
