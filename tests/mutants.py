"""Small changes to the numerics, one at a time: does a test notice each of them?

    make mutants                                        a sample of every module
    .venv/bin/python tests/mutants.py --module shards.reader --all
    .venv/bin/python tests/mutants.py --per-module 30 --seed 1

A mutant is a module with one change of its syntax tree: `<` to `<=`, `+` to `-`, `and` to `or`,
a number one larger, a keyword argument or a statement left out, a condition turned over. Torch
and its like are imported once; then each mutant is a fork that imports the module in its changed
form, in processes that it starts as well, and runs the tests of TESTS that called the changed
function. A mutant that no test notices is a survivor: it needs a test, or an entry in mutants.toml
that says why no test could notice; the entry is the changed source, or the source as it is where
no change to it could be noticed. Prints the survivors that are not listed there, and the share of
mutants that were caught; exit code 1 if any survives, so also below 95 %.
"""

import argparse
import ast
import contextlib
import hashlib
import importlib
import json
import os
import signal
import sys
import tempfile
import time
import tomllib
import traceback
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Final

from mutations import Mutant, change, mutants_of

TESTS: Final = {
    "model.attention": "reference_training model_attention model_positions model_cache "
    "model_dropout",
    "model.config": "model_config model_transformer model_attention",
    "model.self_test": "model_attention",
    "model.dropout": "reference_training model_dropout",
    "model.layers": "reference_training model_positions model_transformer model_dropout",
    "model.loss": "reference_training model_loss",
    "model.positions": "reference_training model_positions model_attention",
    "model.transformer": "reference_training model_transformer model_config model_cache",
    "trainer.optimizer.optimizer": "reference_training trainer_optimizer trainer_schedule",
    "trainer.optimizer.muon": "trainer_muon trainer_optimizer",
    "trainer.optimizer.schedule": "reference_training trainer_schedule",
    "trainer.faults.guard": "reference_training trainer_guard trainer_optimizer",
    "trainer.data.mixture": "trainer_mixture trainer_loader trainer_plan",
    "trainer.data.batches": "trainer_loader trainer_mixture trainer_guard",
    "trainer.session.network": "reference_training trainer_parallel trainer_sharded trainer_train "
    "trainer_determinism trainer_distributed",
    "trainer.train": "reference_training trainer_train trainer_guard trainer_resume "
    "trainer_validation",
    "pipeline.text.columnar": "pipeline_columnar",
    "pipeline.text.slices": "pipeline_columnar pipeline_rejections",
    "pipeline.text.encode": "reference_packing pipeline_encode pipeline_columnar",
    "pipeline.text.pack": "reference_packing pipeline_pack",
    "pipeline.text.documents": "reference_packing pipeline_documents pipeline_chat "
    "pipeline_hostile",
    "shards.format": "shards_format shards_reader shards_readme",
    "shards.reader": "shards_reader shards_format",
    "shards.writer": "shards_reader shards_format shards_readme reference_packing",
    "tools.evaluation.scoring": "tools_protocols reference_scoring tools_perplexity",
    "tools.evaluation.protocols": "tools_protocols reference_scoring tools_perplexity",
    "tools.evaluation.perplexity": "tools_perplexity reference_scoring tools_evaluate",
    "tools.evaluation.multiple_choice": "tools_tasks reference_scoring",
    "tools.evaluation.wikitext": "tools_perplexity reference_scoring",
    "tools.generation.generation": "reference_sampling tools_generate",
}
"""Each module, and the files of tests (test_NAME.py) that must notice a change in it."""

IMPORTED_ONCE: Final = (
    "torch._dynamo", "torch.distributed.checkpoint", "numpy", "pyarrow.compute", "pyarrow.parquet",
    "pytest", "hypothesis.strategies", "sentencepiece", "click.testing", "rich.progress",
    "safetensors.torch", "fsspec", "zstandard", "huggingface_hub", "google.protobuf",
)  # fmt: skip
ROOT: Final = Path(__file__).resolve().parents[1]
EQUIVALENT: Final = ROOT / "tests" / "mutants.toml"

Calls = dict[str, set[int]]
"""Of each test, the first lines of the module's functions that it calls; "" is the import."""


def path_of(module: str) -> Path:
    """The file of a module."""
    return ROOT.joinpath(*module.split(".")).with_suffix(".py")


class Chosen:
    """A pytest plugin: tests in a given order, others behind; what each calls, and its time."""

    def __init__(self, file: str, order: Sequence[str] = ()) -> None:
        self.file, self.now = file, ""
        self.place = {test: place for place, test in enumerate(order)}
        self.calls: dict[str, set[int]] = defaultdict(set)
        self.seconds: dict[str, float] = {"": 0.0}

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        """Sort the tests."""
        items.sort(key=lambda item: self.place.get(item.nodeid, len(self.place)))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Note which test runs."""
        self.now, self.seconds[nodeid] = nodeid, -time.monotonic()

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        """Note how long it took."""
        self.seconds[nodeid] += time.monotonic()

    def trace(self, frame: FrameType, event: str, argument: object) -> None:
        """Note a function of the module that is called."""
        if frame.f_code.co_filename == self.file:
            self.calls[self.now].add(frame.f_code.co_firstlineno)


def run_tests(files: list[str], plugin: Chosen, folder: Path) -> int:
    """pytest's exit code: 0 if every test passed."""
    import hypothesis
    import pytest

    hypothesis.settings.register_profile(
        "mutants",
        database=None,
        derandomize=True,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
    )
    hypothesis.settings.load_profile("mutants")
    options = ["-x", "-q", "-m", "not slow", "--tb=short", "--show-capture=no"]
    options += ["-p", "no:cacheprovider"]
    options += ["-W", "ignore::pytest.PytestAssertRewriteWarning", f"--basetemp={folder / 'tests'}"]
    return int(pytest.main([*options, *files], [plugin]))


def forked(work: Callable[[], int], log: Path, limit_s: float) -> int | None:
    """The exit code of `work` in a process of its own; None if it took longer than the limit."""
    child = os.fork()
    if not child:
        os.setsid()
        signal.alarm(int(limit_s) + 5)  # ends a hanging mutant whose parent was killed
        with log.open("wb") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        code = 1
        try:
            code = work()
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(code)
    ends, status = time.monotonic() + limit_s, (0, 0)
    while not status[0] and time.monotonic() < ends:
        time.sleep(0.01)
        status = os.waitpid(child, os.WNOHANG)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # what the tests have left behind ends too
    if not status[0]:
        os.waitpid(child, 0)
        return None
    return os.waitstatus_to_exitcode(status[1])


def calls_of(module: str, folder: Path) -> tuple[Calls, float]:
    """First lines of the module's functions that each test calls, and the time of all tests."""
    plugin, kept, started = Chosen(str(path_of(module))), folder / "calls", time.monotonic()
    names = [ROOT / "tests" / f"test_{name}.py" for name in TESTS[module].split()]

    def work() -> int:
        sys.settrace(plugin.trace)
        code = run_tests([str(path) for path in names if path.exists()], plugin, folder)
        sys.settrace(None)
        quickest_first = sorted(plugin.seconds, key=plugin.seconds.__getitem__)
        kept.write_text(json.dumps({test: [*plugin.calls[test]] for test in quickest_first}))
        return code

    if forked(work, folder / "log", 900):
        sys.exit(f"{module}: its tests fail as it is\n{(folder / 'log').read_text()[-3000:]}")
    calls = {test: set(lines) for test, lines in json.loads(kept.read_text()).items()}
    return calls, time.monotonic() - started


def tried(
    mutant: Mutant, module: str, tree: ast.Module, calls: Calls, limit_s: float, folder: Path
) -> int | None:
    """What the tests that call the function, and others in their files, end with: 0 if all pass.

    None: they took too long, which counts as noticed. A function that none of them calls itself may
    be called in processes that they start: then these are all tests.
    """
    at_import = mutant.function is None or mutant.function in calls.get("", ())
    tests = [test for test in calls if test]
    order = [test for test in tests if at_import or mutant.function in calls[test]] or tests
    files = sorted({test.partition("::")[0] for test in order})

    def work() -> int:
        setattr(mutant.holder, mutant.field, mutant.value)
        change(module, path_of(module), tree, folder)
        return run_tests(files, Chosen("", order), folder)

    return forked(work, folder / "log", limit_s)


def check(module: str, sampled: int | None, seed: int, known: dict[str, str]) -> tuple[int, int]:
    """Mutants caught and mutants tried; prints each survivor. `known` are equivalent ones."""
    tree, mutants = mutants_of(path_of(module))
    sources = {source for mutant in mutants for source in (mutant.before, mutant.after)}
    for stale in known.keys() - sources:
        sys.exit(f"{EQUIVALENT.name}: no change of {module} reads {stale!r} any more")
    n_mutants = len(mutants)
    mutants = [each for each in mutants if not known.keys() & {each.before, each.after}]
    mutants.sort(key=lambda each: hashlib.sha256(f"{seed} {each.after}".encode()).digest())
    codes: list[int | None] = []
    with tempfile.TemporaryDirectory() as folder:
        calls, seconds = calls_of(module, Path(folder))
        for mutant in mutants[:sampled]:
            codes.append(tried(mutant, module, tree, calls, 10 + 3 * seconds, Path(folder)))
            if codes[-1] == 0:
                where = f"{path_of(module).relative_to(ROOT)}:{mutant.line}"
                print(f"{where}: {mutant.before}\n    {mutant.after}", flush=True)
    caught = len(codes) - codes.count(0)
    late, equivalent = codes.count(None), n_mutants - len(mutants)
    print(
        f"{module}: {caught} / {len(codes)} ({late} by time), {equivalent} equivalent", flush=True
    )
    return caught, len(codes)


def main() -> None:
    """Try a sample of the mutants of every module, or of one; exit code 1 if one survives."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--module", action="append", choices=TESTS, help="only this one")
    parser.add_argument("--per-module", type=int, default=10, help="mutants of each (default 10)")
    parser.add_argument("--all", action="store_true", help="every mutant; hours")
    parser.add_argument("--seed", type=int, default=0, help="another sample")
    options = parser.parse_args()
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
    for name in IMPORTED_ONCE:
        importlib.import_module(name)
    sys.modules["torch"].set_num_threads(1)
    known = tomllib.loads(EQUIVALENT.read_text())
    sampled = None if options.all else options.per_module
    figures = [
        check(module, sampled, options.seed, known.get(module, {}))
        for module in options.module or TESTS
    ]
    caught, of = (sum(each) for each in zip(*figures, strict=True))
    print(f"{sum(os.times()[:4]) / 60:.1f} minutes of a core")  # user and system, with children
    print(f"caught {caught} / all that are not equivalent {of} = {caught / max(1, of):.1%}")
    sys.exit(caught < of)


if __name__ == "__main__":
    main()
