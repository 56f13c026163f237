"""The layers of the code: who may import what, and that every name and folder stays findable."""

import ast
import graphlib
import importlib.util
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from conftest import REPOSITORY

LAYERS = ("shards", "model", "pipeline", "trainer", "tools")

MAY_IMPORT = {
    "shards": {"shards", "numpy", "xxhash"},
    "model": {"model", "torch"},
    "pipeline": {
        "pipeline", "shards", "datasets", "huggingface_hub", "fsspec", "sentencepiece", "google",
        "pyarrow", "zstandard", "numpy", "xxhash", "click", "rich", "ray", "httpx", "httpx2",
        "tokenizers",
    },
    "trainer": {"trainer", "shards", "model", "torch", "numpy", "click", "rich", "tensorboard"},
    "tools": {
        *LAYERS, "torch", "numpy", "click", "rich", "pyarrow", "zstandard", "sentencepiece",
        "xxhash", "jinja2", "safetensors", "huggingface_hub", "transformers", "tokenizers",
        "lm_eval", "starlette", "uvicorn",
    },
}  # fmt: skip

ONLY_IN = {
    "ray": {"pipeline/units/cluster.py"}, "uvicorn": {"tools/serve.py"},
    "starlette": {"tools/serving/api.py"},
}  # fmt: skip


def imports(path: Path) -> set[tuple[str, int]]:
    """(top-level package, line) of every import in a file, those inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {(alias.name.split(".")[0], node.lineno) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            found.add(((node.module or "").split(".")[0], node.lineno))
    return found


def source_files(layer: str) -> list[Path]:
    return sorted((REPOSITORY / layer).rglob("*.py"))


@pytest.mark.parametrize("layer", LAYERS)
def test_layer_imports_only_what_it_may(layer: str) -> None:
    allowed = MAY_IMPORT[layer] | set(sys.stdlib_module_names)
    files = [path for path in source_files(layer) if "benchmarks" not in path.parts]
    assert files
    wrong = [
        f"{path.relative_to(REPOSITORY)}:{line} imports {name}"
        for path in files
        for name, line in sorted(imports(path))
        if name not in allowed
        or str(path.relative_to(REPOSITORY))
        not in ONLY_IN.get(name, {str(path.relative_to(REPOSITORY))})
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("layer", LAYERS)
def test_layer_resolves_inside_the_repository(layer: str) -> None:
    spec = importlib.util.find_spec(layer)
    assert spec is not None and spec.origin is not None
    assert Path(spec.origin) == REPOSITORY / layer / "__init__.py"


def test_package_files_are_docstrings() -> None:
    for layer in LAYERS:
        for path in source_files(layer):
            if path.name == "__init__.py":
                tree = ast.parse(path.read_text())
                assert ast.get_docstring(tree) and len(tree.body) == 1, path


def test_nobody_imports_tools() -> None:
    for layer in LAYERS[:-1]:
        for path in source_files(layer):
            assert "tools" not in {name for name, _ in imports(path)}, path


def test_no_test_folder_shadows_a_layer() -> None:
    assert not [path for path in (REPOSITORY / "tests").iterdir() if path.name in LAYERS]


def test_library_code_neither_prints_nor_exits() -> None:
    """Commands live in cli.py and in the tools that a command is named after."""
    commands = {"cli.py"} | {f"{name}.py" for name in TOOL_COMMANDS}
    wrong = []
    for layer in LAYERS:
        for path in source_files(layer):
            if path.name in commands or "benchmarks" in path.parts:
                continue
            if "click" in {name for name, _ in imports(path)}:
                wrong.append(f"{path} imports click")
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and ast.unparse(node.func) in (
                    "print",
                    "sys.exit",
                    "exit",
                ):
                    wrong.append(f"{path}:{node.lineno} calls {ast.unparse(node.func)}")
    allowed_prints = [line for line in wrong if "shards/errors.py" in line]  # the one decorator
    assert wrong == allowed_prints, "\n".join(wrong)


TOOL_COMMANDS = (
    "evaluate", "generate", "trace", "convert", "plan", "doctor", "report", "rehearse", "serve",
    "demo", "environment", "command",
)  # fmt: skip


MOST_FILES, LONGEST_CHAIN = 16, 10


@cache
def modules() -> dict[str, Path]:
    """Dotted name -> file, of all code but the benchmarks."""
    files = [path for layer in LAYERS for path in source_files(layer) if path.stem != "__init__"]
    return {
        ".".join(path.relative_to(REPOSITORY).with_suffix("").parts): path
        for path in files
        if "benchmarks" not in path.parts
    }


@cache
def imported() -> dict[str, set[str]]:
    """Module -> modules of ours that it imports, inside functions and for types alone too."""
    return {name: set(_imported_by(path)) for name, path in modules().items()}


def _imported_by(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules())
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            yield from (name for name in names if name in modules())


def test_no_import_goes_in_a_circle() -> None:
    list(graphlib.TopologicalSorter(imported()).static_order())  # CycleError names the circle


@pytest.mark.parametrize("layer", LAYERS)
def test_no_chain_of_imports_is_long(layer: str) -> None:
    """Whoever follows one layer's imports from any file has to open few files."""

    @cache
    def chain(module: str) -> tuple[str, ...]:
        inside = [name for name in imported()[module] if name.split(".")[0] == layer]
        return (module, *max(map(chain, inside), key=len, default=()))

    longest = max((chain(name) for name in modules() if name.split(".")[0] == layer), key=len)
    assert len(longest) <= LONGEST_CHAIN, " -> ".join(longest)


def test_no_folder_is_crowded() -> None:
    sizes = Counter(path.parent for path in modules().values())
    assert not {str(folder): n for folder, n in sizes.items() if n > MOST_FILES}


def test_no_name_stands_for_two_things() -> None:
    """Classes; modules but errors.py, cli.py and those that their folder is named after."""
    places = defaultdict(set)
    for module, path in modules().items():
        *folder, name = module.split(".")
        if name not in ("errors", "cli") and name != folder[-1]:
            places[f"module {name}"].add(module)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                places[f"class {node.name}"].add(module)
    assert not {name: found for name, found in places.items() if len(found) > 1}
