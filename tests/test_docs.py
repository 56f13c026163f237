"""The documents and the commands say the same things."""

import ast
import importlib
import re
import subprocess
import sys
import tomllib

import pytest
from click.testing import CliRunner

from conftest import REPOSITORY
from shards.versions import VERSION

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
SCRIPTS: dict[str, str] = PROJECT["project"]["scripts"]
README = (REPOSITORY / "README.md").read_text()

SHOW_HELP = """
import importlib, sys
module, function = sys.argv[1].split(":")
command = getattr(importlib.import_module(module), function)
sys.argv = [sys.argv[2], *sys.argv[3:], "--help"]
try:
    command()
except SystemExit as end:
    assert not end.code, end.code
heavy = {"torch", "datasets", "pyarrow", "sentencepiece", "transformers", "jinja2", "ray"}
print("HEAVY", sorted(heavy & set(sys.modules)))
"""


def help_of(script: str, *subcommand: str) -> tuple[str, str]:
    """The help text of a command, and which heavy packages were imported to show it."""
    command = [sys.executable, "-c", SHOW_HELP, SCRIPTS[script], script, *subcommand]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    text, _, heavy = done.stdout.rpartition("HEAVY ")
    return text, heavy.strip()


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_instant_and_shows_an_example(script: str) -> None:
    text, heavy = help_of(script)
    assert heavy == "[]", f"{script} --help imports {heavy}"
    assert re.search(rf"{script} [\w-]", text.split("Usage:", 1)[1].split("\n", 1)[1]), text


@pytest.mark.parametrize(
    "arguments",
    [
        ["summer-train", "--preset", "tinny"],
        ["summer-train", "--preset", "tiny", "--shards", "nowhere"],
        ["summer-train", "--preset", "tiny", "--set", "optim.lrr=1"],
        ["summer-train", "--set", "stop_after=soon"],
        ["summer-plan", "--preset", "tiny", "--device", "mi300x", "--devices", "1"],
    ],
)
def test_mistakes_and_plans_do_not_wait_for_torch(arguments: list[str]) -> None:
    """What is asked of summer-plan is answered, the others are one line, without torch."""
    script, *rest = arguments
    code = (
        "import sys, importlib\n"
        f"sys.argv = {[script, *rest]!r}\n"
        f"module, _, name = {SCRIPTS[script]!r}.partition(':')\n"
        "try:\n"
        "    getattr(importlib.import_module(module), name)()\n"
        "except SystemExit:\n"
        "    pass\n"
        "print('torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1] == "False"
    assert (done.stderr.count("\n") == 1) == (script != "summer-plan"), done.stderr


def test_every_command_answers_h_and_version() -> None:
    """Installed or as `python -m`: the same help for -h, and the version's own number."""
    modules = [function.partition(":")[0] for function in SCRIPTS.values()]
    for module in (*modules, "tools.demo"):
        command = getattr(importlib.import_module(module), "main")  # noqa: B009
        long, short, version = (
            CliRunner().invoke(command, [option]) for option in ("--help", "-h", "--version")
        )
        assert (short.exit_code, short.output) == (0, long.output), module
        assert (version.exit_code, version.output) == (0, f"summerlm, version {VERSION}\n")
        wrong = CliRunner().invoke(command, ["--versio"])
        assert wrong.exit_code == 2, module
        assert re.search(r"[Dd]id you mean .?--version", wrong.output), module


@pytest.mark.parametrize("script", SCRIPTS)
def test_readme_names_every_command(script: str) -> None:
    assert f"`{script}" in README or f"    {script}" in README or f"\n{script}" in README


def test_subcommands_have_help_with_an_example() -> None:
    text, _ = help_of("summer-prep")
    names = re.findall(r"^  (\w+)  ", text.split("Commands:", 1)[1], re.MULTILINE)
    assert {"tokenize", "inspect", "sources", "tokenizer"} <= set(names)
    for name in names:
        assert f"summer-prep {name}" in help_of("summer-prep", name)[0].split("Usage:")[1][20:], (
            name
        )


def test_readme_and_makefile_agree() -> None:
    makefile = (REPOSITORY / "Makefile").read_text()
    for target in map("".join, re.findall(r"^make (\w+)|`make (\w+)`", README, re.MULTILINE)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"make {target} is no target"


def test_paths_the_readme_names_exist() -> None:
    for path in re.findall(r"\]\(([\w./-]+)\)", README):
        assert (REPOSITORY / path).exists(), path


def test_torch_is_pinned_as_promised() -> None:
    assert "torch==2.13.0" in (REPOSITORY / "constraints.txt").read_text().splitlines()
    assert "torch>=2.9" in PROJECT["project"]["dependencies"]


PRIVATE = re.compile(
    r"\b(mend(s|ed)?|told|proven|floors|beside|refuse[sd]?|receipts?|no-go|aftermath|anew)\b", re.I
)
ON_DISK = {"commit refused", "purge refused", "mirror refused", "refused", "anew", "mend"}


def test_messages_and_documents_use_the_fields_words() -> None:
    """Private words that were replaced: in strings of the code, help texts and documents."""
    shown = {}
    for layer in ("shards", "model", "pipeline", "trainer", "tools"):
        for path in (REPOSITORY / layer).rglob("*.py"):
            nodes = list(ast.walk(ast.parse(path.read_text())))
            bodies = [node.body[0] for node in nodes if isinstance(node, ast.FunctionDef)]
            silent = {id(first.value) for first in bodies if isinstance(first, ast.Expr)}
            command = path.name == "cli.py" or path.parent.name == "tools"
            for node in nodes:
                if isinstance(node, ast.Constant) and (command or id(node) not in silent):
                    text = node.value if isinstance(node.value, str) else ""
                    shown[f"{path}:{node.lineno}"] = "" if text in ON_DISK else text
    for name in ("README.md", "CONTRIBUTING.md", "tools/README.md", "shards/README.md"):
        shown[name] = (REPOSITORY / name).read_text()
    found = {place: found[0] for place, text in shown.items() if (found := PRIVATE.search(text))}
    assert not found
