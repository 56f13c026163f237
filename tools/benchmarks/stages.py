"""Where the time of `summer-prep tokenize` goes, by stage, in one process with one worker.

    python tools/benchmarks/stages.py tokenize --source mine --data-files 'in/*.parquet' --out out

A clock is switched whenever one stage calls another, so that each has what is its own.
"""

from __future__ import annotations

import functools
import inspect
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

from measure import run

REST = "start: imports, tokenizer, plan, end"
LAST = ("packing", "checksums", "writing")
STAGES = {
    "sample": ["pipeline.prepare:take_sample"],
    "reading": ["pipeline.inputs.reading:PartReader.read"],
    "documents: UTF-8, held out, batches": [
        "pipeline.text.documents:DocumentMaker.documents",
        "pipeline.units.work:in_batches",
    ],
    "checking ids with sentencepiece": ["pipeline.text.encode:CheckedEncoder._compare"],
    "encoding": ["pipeline.units.work:encode_documents", "pipeline.units.work:make_encoder"],
    "packing": ["pipeline.units.work:Packer.add", "pipeline.units.work:Packer.finish",
                "pipeline.text.encode:Encoded.choose"],
    "checksums": ["shards.writer:row_digests"],
    "writing": ["pipeline.units.work:ShardWriter.add", "pipeline.units.work:ShardWriter.finish",
                "pipeline.prepare:write_manifest"],
}  # fmt: skip


def breakdown(arguments: list[str], repeats: int) -> Iterator[str]:
    """A table of stages: median seconds of CPU and of the wall clock, and their shares."""
    runs = []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            done = run([sys.executable, __file__, *arguments, "--out", folder], 1)
        runs.append(json.loads(done.output.splitlines()[-1]))
    middle = sorted(runs, key=lambda spent: sum(cpu for cpu, _ in spent.values()))[repeats // 2]
    cpu_s, wall_s = (sum(column) for column in zip(*middle.values(), strict=True))
    yield f"One worker on one core, the middle of {repeats} runs\n"
    yield "| stage | s of CPU | share | s | share |\n|---|---|---|---|---|"
    last = [sum(middle[stage][column] for stage in LAST) for column in (0, 1)]
    rows = {**middle, ", ".join(LAST): last, "all": (cpu_s, wall_s)}
    for stage, (cpu, wall) in rows.items():
        yield f"| {stage} | {cpu:.2f} | {cpu / cpu_s:.1%} | {wall:.2f} | {wall / wall_s:.1%} |"


class Clocks:
    """Seconds of CPU and of the wall that each stage has had."""

    def __init__(self) -> None:
        self.spent = {stage: [0.0, 0.0] for stage in (REST, *STAGES)}
        self._stack = [REST]
        self._last = (0.0, time.perf_counter())  # CPU: from the start of the process

    def _switch(self) -> None:
        now = (time.process_time(), time.perf_counter())
        for place, last in enumerate(self._last):
            self.spent[self._stack[-1]][place] += now[place] - last
        self._last = now

    def enter(self, stage: str) -> None:
        """From now on it is this stage's time."""
        self._switch()
        self._stack.append(stage)

    def leave(self) -> None:
        """It is the caller's time again."""
        self._switch()
        self._stack.pop()

    def timed(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function on this stage's time; of a generator, each of its steps."""

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            self.enter(stage)
            try:
                return function(*args, **kwargs)
            finally:
                self.leave()

        @functools.wraps(function)
        def steps(*args: Any, **kwargs: Any) -> Any:
            ended = object()
            values = function(*args, **kwargs)
            step = self.timed(stage, lambda: next(values, ended))
            while (value := step()) is not ended:
                yield value

        return steps if inspect.isgeneratorfunction(function) else call


def measured(arguments: list[str]) -> dict[str, list[float]]:
    """Seconds of CPU and of the wall by stage, of `summer-prep` with these arguments."""
    clocks = Clocks()
    for stage, places in STAGES.items():
        for place in places:
            module, _, path = place.partition(":")
            *parents, name = path.split(".")
            owner: Any = functools.reduce(getattr, parents, _imported(module))
            setattr(owner, name, clocks.timed(stage, getattr(owner, name)))
    from pipeline.cli import main

    main(arguments, standalone_mode=False)
    clocks.enter(REST)
    return clocks.spent


def _imported(module: str) -> Any:
    __import__(module)
    return sys.modules[module]


if __name__ == "__main__":
    print(json.dumps(measured(sys.argv[1:])))
