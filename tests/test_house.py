"""The floors of the house: who may import what."""

import ast
import importlib.util
import sys
from pathlib import Path

import pytest

from conftest import REPOSITORY

FLOORS = ("shards", "model", "pipeline", "trainer", "tools")

MAY_IMPORT = {
    "shards": {"shards", "numpy", "xxhash"},
    "model": {"model", "torch"},
    "pipeline": {
        "pipeline", "shards", "datasets", "huggingface_hub", "fsspec", "sentencepiece", "google",
        "pyarrow", "zstandard", "numpy", "xxhash", "click", "rich", "ray", "httpx", "httpx2",
    },
    "trainer": {"trainer", "shards", "model", "torch", "numpy", "click", "rich", "tensorboard"},
    "tools": {
        *FLOORS, "torch", "numpy", "click", "rich", "pyarrow", "zstandard", "sentencepiece",
        "xxhash", "matplotlib", "safetensors", "transformers", "lm_eval", "setuptools",
    },
}  # fmt: skip

ONLY_IN = {"ray": {"pipeline/units/cluster.py"}, "setuptools": {"tools/lm_eval_plugin/setup.py"}}


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


def source_files(floor: str) -> list[Path]:
    return sorted((REPOSITORY / floor).rglob("*.py"))


@pytest.mark.parametrize("floor", FLOORS)
def test_floor_imports_only_what_it_may(floor: str) -> None:
    allowed = MAY_IMPORT[floor] | set(sys.stdlib_module_names)
    files = [path for path in source_files(floor) if "benchmarks" not in path.parts]
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


@pytest.mark.parametrize("floor", FLOORS)
def test_floor_resolves_inside_the_repository(floor: str) -> None:
    spec = importlib.util.find_spec(floor)
    assert spec is not None and spec.origin is not None
    assert Path(spec.origin) == REPOSITORY / floor / "__init__.py"


@pytest.mark.parametrize("floor", FLOORS)
def test_package_file_is_a_docstring(floor: str) -> None:
    tree = ast.parse((REPOSITORY / floor / "__init__.py").read_text())
    assert ast.get_docstring(tree)
    assert len(tree.body) == 1


def test_nobody_imports_tools() -> None:
    for floor in FLOORS[:-1]:
        for path in source_files(floor):
            assert "tools" not in {name for name, _ in imports(path)}, path


def test_no_test_folder_shadows_a_floor() -> None:
    assert not [path for path in (REPOSITORY / "tests").iterdir() if path.name in FLOORS]


def test_library_code_neither_prints_nor_exits() -> None:
    """Commands live in cli.py and in the tools that a command is named after."""
    commands = {"cli.py"} | {f"{name}.py" for name in TOOL_COMMANDS}
    wrong = []
    for floor in FLOORS:
        for path in source_files(floor):
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
    "evaluate", "generate", "trace", "convert", "plan", "doctor", "report", "rehearse", "demo",
    "environment", "soak",
)  # fmt: skip
