"""Where the time of `summer-prep tokenize` goes, by stage, in one process with one worker.

    python tools/benchmarks/stages.py tokenize --source mine --data-files 'in/*.parquet' --out out

A clock is switched whenever one stage calls another, so that each has what is its own. prepare.py
prints the table.
"""

from __future__ import annotations

import functools
import importlib
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from measure import run

REST = "reading, documents, start and end"
LAST = ("packing", "checksums", "writing")
STAGES = {
    "sample": ["pipeline.prepare:take_sample"],
    "encoding": ["pipeline.units.work:encode_documents", "pipeline.units.work:make_encoder"],
    "checking ids with sentencepiece": ["pipeline.text.encode:CheckedEncoder._compare"],
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


def measured(arguments: list[str]) -> dict[str, list[float]]:
    """Seconds of CPU and of the wall by stage, of `summer-prep` with these arguments."""
    spent = {stage: np.zeros(2) for stage in (REST, *STAGES)}
    stage, last = REST, np.array([0.0, time.perf_counter()])  # CPU: from the start of the process

    def switch(to: str) -> str:
        """Make the time from now on this stage's; returns whose it was."""
        nonlocal stage, last
        now = np.array([time.process_time(), time.perf_counter()])
        spent[stage] += now - last
        before, stage, last = stage, to, now
        return before

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            before = switch(name)
            try:
                return function(*args, **kwargs)
            finally:
                switch(before)

        return call

    for name, places in STAGES.items():
        for place in places:
            module, _, path = place.partition(":")
            *parents, attribute = path.split(".")
            owner: Any = functools.reduce(getattr, parents, importlib.import_module(module))
            setattr(owner, attribute, timed(name, getattr(owner, attribute)))
    from pipeline.cli import main

    main(arguments, standalone_mode=False)
    switch(REST)
    return {name: seconds.tolist() for name, seconds in spent.items()}


if __name__ == "__main__":
    print(json.dumps(measured(sys.argv[1:])))
