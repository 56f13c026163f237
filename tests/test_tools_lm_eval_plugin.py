"""`lm_eval --model summerlm`: the small package that lets the harness find our model by name.

How it listens is tried on a harness of six lines; the last test is the real one's command line, in
a fresh environment into which the package is installed (needs lm_eval).
"""

import json
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from conftest import REPOSITORY
from tools.evaluation.multiple_choice import Setting, evaluate_task
from tools.evaluation.tasks import TASKS
from tools.models.loading import ModelSpec, load
from tools_samples import write_run

PLUGIN = REPOSITORY / "tools" / "lm_eval_plugin"

REGISTRY = """
class Registry(dict):
    def register(self, name, target):
        self[name] = target
model_registry = Registry()
"""
TASK = """
task: here_or_not
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{query}}}}\\nAnswer:"
doc_to_choice: choices
doc_to_target: gold
"""
TABLE = """
from lm_eval.api.registry import model_registry
model_registry.register("hf", target="lm_eval.models.huggingface:HFLM")
"""


def make_environment(path: Path) -> Path:
    """A fresh environment that also sees this one's packages, with the plug-in installed in it."""
    pytest.importorskip("setuptools", minversion="77")  # it builds offline, with what is here
    venv.create(path, with_pip=False, symlinks=True)
    python = path / "bin" / "python"
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(subprocess.check_output([python, "-c", ask], text=True).strip())
    here = sysconfig.get_path("purelib")
    (site / "parent.pth").write_text(f"import site; site.addsitedir({here!r})\n")
    source = shutil.copytree(PLUGIN, path / "source")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    alone = ["--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*pip, *alone, str(source)], check=True, timeout=120)
    return python


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_environment(tmp_path_factory.mktemp("environment") / "venv")


def pretended_harness(folder: Path, registry: str = REGISTRY) -> Path:
    for name, text in {"": "", "api/": "", "api/registry": registry, "models/": TABLE}.items():
        path = folder / "lm_eval" / (f"{name}__init__.py" if name[-1:] in "/" else f"{name}.py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def say(python: Path, folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    command = [str(python), "-c", f"import sys; sys.path.insert(0, {str(folder)!r})\n{code}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_the_harness_learns_the_name_when_its_table_is_imported(
    environment: Path, tmp_path: Path
) -> None:
    code = """
import importlib.util, site
site.addsitedir(next(path for path in sys.path if path.endswith("site-packages")))  # once more
assert importlib.util.find_spec("lm_eval.models")  # to look is not yet to import
import lm_eval.models
print(*sorted(lm_eval.models.model_registry.items()), "torch" in sys.modules)
print([type(finder).__name__ for finder in sys.meta_path].count("TableFinder"))
"""
    said = say(environment, pretended_harness(tmp_path), code)
    ours = ("summerlm", "tools.evaluation.lm_eval_model:SummerLM")
    theirs = ("hf", "lm_eval.models.huggingface:HFLM")
    assert said.stdout.splitlines() == [f"{theirs} {ours} False", "1"]
    assert said.stderr == ""


def test_a_model_that_is_registered_already_stays(environment: Path, tmp_path: Path) -> None:
    code = """
from lm_eval.api.registry import model_registry
model_registry["summerlm"] = "the class"
import lm_eval.models
print(model_registry["summerlm"])
"""
    said = say(environment, pretended_harness(tmp_path), code)
    assert (said.stdout, said.stderr) == ("the class\n", "")


def test_a_harness_of_another_kind_works_without_us(environment: Path, tmp_path: Path) -> None:
    refusing = REGISTRY + "    def __contains__(self, name): raise RuntimeError('frozen')\n"
    refusing = refusing.replace("model_registry = Registry()\n", "") + "model_registry = Registry()"
    code = "import lm_eval.models; print(*lm_eval.models.model_registry)"
    said = say(environment, pretended_harness(tmp_path, refusing), code)
    assert said.stdout == "hf\n"
    assert "this lm_eval does not take summerlm by name: frozen" in said.stderr


def test_a_start_of_python_costs_one_small_module() -> None:
    code = f"""
import sys
before = set(sys.modules)
sys.path.insert(0, {str(PLUGIN)!r})
import summerlm_lm_eval
summerlm_lm_eval.install()
print(*sorted(set(sys.modules) - before))
"""
    said = subprocess.check_output([sys.executable, "-S", "-c", code], text=True)
    assert said.split() == ["__future__", "summerlm_lm_eval"]


def lm_eval(python: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("lm_eval")
    command = [str(python), str(Path(sys.executable).with_name("lm_eval")), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=folder)


def test_wrong_input_is_one_clear_line_in_the_harness_too(
    environment: Path, tmp_path: Path
) -> None:
    arguments = ["--model", "summerlm", "--model_args", "run=nowhere", "--tasks", "arc_easy"]
    done = lm_eval(environment, tmp_path, *arguments)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: nowhere: no config.json there")


@pytest.mark.slow
def test_the_harness_command_line_scores_our_model(environment: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_run(run)
    rows = [
        {"query": f"Question: The {name} is", "choices": ["here.", "not here."], "gold": n % 2}
        for n, name in enumerate(("cat", "river", "number 7", "end"))
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "task.yaml").write_text(TASK.format(data=data))
    arguments = ["--model", "summerlm", "--model_args", f"run={run},dtype=fp32"]
    where = ["--include_path", str(tmp_path), "--tasks", "here_or_not"]
    output = ["--output_path", str(tmp_path / "out"), "--log_samples"]
    done = lm_eval(environment, tmp_path, *arguments, *where, *output)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = next((tmp_path / "out").rglob("samples_*.jsonl")).read_text().splitlines()
    ours = load(ModelSpec(run=run, device="cpu", dtype="fp32"))
    _, answers = evaluate_task(ours, TASKS["arc_easy"], Setting(data=data))
    assert len(lines) == len(answers) == len(rows)
    for sample in map(json.loads, lines):
        likelihoods = [float(each[0]) for each in sample["filtered_resps"]]
        assert answers[sample["doc_id"]].log_likelihoods.tolist() == pytest.approx(likelihoods)
