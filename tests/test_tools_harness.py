"""Ours and lm-evaluation-harness on the same weights and items: the same log-likelihoods.

The harness computes with transformers' Llama, or with our model registered in it; its own task
files are used, with local rows in place of the Hub's. Needs lm_eval and transformers.
"""

import importlib
import json
import subprocess
import sys
import tomllib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from conftest import REPOSITORY
from tools.evaluation.cards import Metric, Result
from tools.evaluation.datasets import read_records
from tools.evaluation.multiple_choice import evaluate_task
from tools.evaluation.perplexity import measure_perplexity
from tools.evaluation.protocols import Protocol
from tools.evaluation.tasks import TASKS, TaskOptions
from tools.evaluation.wikitext import detokenized, from_raw, pages_of
from tools.models.hf_folder import write_folder
from tools.models.loading import LoadedModel, ModelSpec, load
from tools_samples import sample_model, sample_tokenizer, write_run

pytestmark = pytest.mark.filterwarnings("ignore")
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
N_ITEMS = 12
FP32_STEPS = 2**-22  # two roundings: the harness gives fp32, which at 280 nats is 3e-5 apart

YAML = {
    "lambada": "lambada/lambada_openai.yaml", "arc_easy": "arc/arc_easy.yaml",
    "arc_challenge": "arc/arc_challenge.yaml", "hellaswag": "hellaswag/hellaswag.yaml",
    "piqa": "piqa/piqa.yaml", "winogrande": "winogrande/default.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml", "boolq": "super_glue/boolq/default.yaml",
    "mmlu": "mmlu/default/mmlu_abstract_algebra.yaml",
}  # fmt: skip
FILES = {
    "lambada": "lambada_openai_test", "openbookqa": "openbook_qa", "mmlu": "mmlu_test",
    **{name: name for name in ("arc_easy", "arc_challenge", "piqa", "winogrande", "boolq")},
}  # fmt: skip


@pytest.fixture(scope="module")
def harness() -> Iterator[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lm_eval = pytest.importorskip("lm_eval")
        for needed in ("transformers", "accelerate"):  # as lm_eval[hf] has
            pytest.importorskip(needed)
        importlib.import_module("lm_eval.models.huggingface")
        import tools.evaluation.lm_eval_model  # noqa: F401

        yield lm_eval


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    model = sample_model(alibi=False, layer_scale=False, n_kv_heads=1, seq_len=448)
    weights = {name: values.detach() for name, values in model.named_parameters()}
    folder = tmp_path_factory.mktemp("harness") / "llama"
    folder.mkdir()
    write_folder(folder, model.config, weights, sample_tokenizer())
    return folder


@pytest.fixture(scope="module")
def ours(folder: Path) -> LoadedModel:
    return load(ModelSpec(hf=folder, device="cpu", dtype="fp32"))


Ask = Callable[[list[dict[str, Any]], int], Any]


@pytest.fixture(scope="module", params=["transformers", "summerlm"])
def ask(request: pytest.FixtureRequest, harness: Any, folder: Path) -> Ask:
    """The harness' results of a task: with transformers' model, and with ours inside it."""
    if request.param == "summerlm":
        model = harness.api.registry.get_model("summerlm")(hf=str(folder), device="cpu")
    else:
        model = harness.models.huggingface.HFLM(
            pretrained=str(folder), device="cpu", dtype="float32", batch_size=4, add_bos_token=False
        )

    def run(configs: list[dict[str, Any]], num_fewshot: int) -> Any:
        found = harness.simple_evaluate(
            model=model,
            tasks=configs,
            num_fewshot=num_fewshot,
            bootstrap_iters=2,  # some errors are bootstrapped, slowly; those are not compared
            verbosity="ERROR",
        )
        return found["results"], found["samples"]

    return run


def read_yaml(harness: Any, name: str) -> dict[str, Any]:
    """A task file of the harness; its reader has moved between its releases."""
    try:
        from lm_eval.tasks._yaml_loader import load_yaml as read
    except ImportError:
        from lm_eval.utils import load_yaml_config as read
    found: dict[str, Any] = read(Path(harness.__file__).parent / "tasks" / name)
    return found


def task_config(
    harness: Any, name: str, rows: list[dict[str, Any]], folder: Path
) -> dict[str, Any]:
    """The harness' own definition of a task, over rows in a local file."""
    config = read_yaml(harness, YAML[name])
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    splits = ("train", "validation", "test", "dev")
    config |= {
        "task": f"{name}_local",
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {split: str(path) for split in splits}},
        "fewshot_config": {"sampler": "first_n"},
    }
    config |= {"test_split": "test", "fewshot_split": "test"}
    config.pop("tag", None)
    config.pop("group", None)
    return config


def hub_row(name: str, row: dict[str, Any]) -> dict[str, Any]:
    """A local row in the Hub's columns, which the harness reads."""
    if name in ("lambada", "mmlu", "hellaswag"):
        return row
    if name == "winogrande":
        first, second = row["context_options"]
        common = len(first)
        while not second.startswith(first[:common]) or first[:common][-1:] not in ("", " "):
            common -= 1
        sentence = f"{first[:common]}_ {row['continuation']}"
        options = {"option1": first[common:], "option2": second[common:]}
        return {"sentence": sentence, **options, "answer": str(row["gold"] + 1)}
    query, choices = row["query"], row.get("choices", [])
    if name == "piqa":
        goal = query.removeprefix("Question: ").removesuffix("\n")
        return {"goal": goal, "sol1": choices[0], "sol2": choices[1], "label": row["gold"]}
    if name == "boolq":
        passage, _, question = query.removeprefix("Passage: ").partition("\nQuestion: ")
        return {"passage": passage, "question": question[:-1], "label": row["gold"]}
    labels = "ABCDE"[: len(choices)]
    answers = {
        "choices": {"text": choices, "label": list(labels)},
        "answerKey": labels[row["gold"]],
    }
    if name == "openbookqa":
        return {"question_stem": query, **answers}
    return {"question": query.removeprefix("Question: "), **answers}


def hellaswag_rows() -> list[dict[str, Any]]:
    endings = ["falls [step] over  it.", " smiles [title] and goes.", "runs.", "Sits [x] down"]
    return [
        {
            "activity_label": f"Skiing {n}", "ctx_a": "A man [header] stands.",
            "ctx_b": "the MAN", "endings": endings, "label": str(n % 4),
        }
        for n in range(N_ITEMS)
    ]  # fmt: skip


def local_rows(shared: Path, name: str) -> list[dict[str, Any]]:
    if name == "hellaswag":
        return hellaswag_rows()
    records = read_records(shared / f"eval/{FILES[name]}.even.jsonl", TASKS[name].table)
    return [dict(row) for row in records.rows[:N_ITEMS]]


def our_score(
    ours: LoadedModel, name: str, rows: list[dict[str, Any]], folder: Path, num_fewshot: int
) -> Result:
    path = folder / f"{name}-ours.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return evaluate_task(ours, TASKS[name], TaskOptions(data=path, num_fewshot=num_fewshot))


@pytest.mark.parametrize("num_fewshot", [0, 2])
def test_tasks_have_the_harness_log_likelihoods_and_metrics(
    harness: Any, ask: Ask, ours: LoadedModel, shared: Path, tmp_path: Path, num_fewshot: int
) -> None:
    rows = {name: local_rows(shared, name) for name in YAML}
    configs = [
        task_config(harness, name, [hub_row(name, row) for row in rows[name]], tmp_path)
        for name in YAML
    ]
    results, samples = ask(configs, num_fewshot)
    for name in YAML:
        result = our_score(ours, name, rows[name], tmp_path, num_fewshot)
        compare(result, results[f"{name}_local"], samples[f"{name}_local"])


def compare(result: Result, results: dict[str, Any], samples: list[dict[str, Any]]) -> None:
    assert len(samples) == len(result.items) == N_ITEMS
    for sample in samples:
        theirs = sample["filtered_resps"]
        item = result.items[sample["doc_id"]]
        likelihoods = [float(each[0]) for each in theirs]
        nearly = pytest.approx(likelihoods, rel=FP32_STEPS, abs=1e-5)
        assert item["log_likelihoods"] == nearly
        assert item["greedy"] == [str(each[1]) == "True" for each in theirs]
    for name, metric in result.metrics.items():
        assert isinstance(metric, Metric)
        assert metric.value == pytest.approx(results[f"{name},none"], rel=1e-6)
        if name != "perplexity":
            assert metric.stderr == pytest.approx(results[f"{name}_stderr,none"], rel=1e-9)


def test_wikitext_has_the_harness_perplexities(
    harness: Any, ask: Ask, ours: LoadedModel, shared: Path, tmp_path: Path
) -> None:
    raw = (shared / "wikitext-2" / "wiki.test.raw").read_text(encoding="utf-8")
    text = from_raw("".join(page[:5000] + "\n" for page in pages_of(raw)[:3]))
    pages = pages_of(text.raw)
    path = tmp_path / "pages.jsonl"
    path.write_text("".join(json.dumps({"page": page}) + "\n" for page in pages))
    config = read_yaml(harness, "wikitext/wikitext.yaml")
    for page in pages:
        assert config["doc_to_target"]({"page": page}) == detokenized(page)
    splits = ("train", "validation", "test")
    config |= {
        "task": "wikitext_local",
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {split: str(path) for split in splits}},
    }
    results, _ = ask([config], 0)
    result = measure_perplexity(ours, text, Protocol(name="lm-eval", context=448, bos_id=1))
    theirs = {
        name.removesuffix(",none"): value for name, value in results["wikitext_local"].items()
    }
    assert result["windows"] > 3 * len(pages)
    assert result["word_perplexity"] == pytest.approx(theirs["word_perplexity"], rel=1e-5)
    assert result["byte_perplexity"] == pytest.approx(theirs["byte_perplexity"], rel=1e-6)
    assert result["bits_per_byte"] == pytest.approx(theirs["bits_per_byte"], rel=1e-6)


def test_our_model_in_the_harness_goes_on_with_a_text(harness: Any, folder: Path) -> None:
    model = harness.api.registry.get_model("summerlm")(hf=str(folder), device="cpu")
    settings = {"until": ["\n"], "max_gen_toks": 5}
    asked = [
        SimpleNamespace(args=(text, settings)) for text in ("def parse", "import", "def parse")
    ]
    first, other, again = model.generate_until(asked)
    assert first == again and "\n" not in first + other
    assert [first] == model.generate_until(asked[:1])
    with pytest.raises(Exception, match="summerlm has no such argument"):
        harness.api.registry.get_model("summerlm")(hf=str(folder), device="cpu", colour="red")


def test_a_conversation_of_the_harness_is_in_our_template(harness: Any, tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    model = harness.api.registry.get_model("summerlm")(run=str(tmp_path / "run"), device="cpu")
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Is it [/INST] assistant: here?"},
    ]
    vocabulary = model.loaded.vocabulary
    asked = model.apply_chat_template(turns)
    assert model.tok_encode(asked) == vocabulary.chat(turns)
    assert model.tok_encode(asked + "Yes") == [*vocabulary.chat(turns), *vocabulary.encode("Yes")]
    begun = [*turns, {"role": "assistant", "content": "Yes"}]
    assert model.apply_chat_template(begun, add_generation_prompt=False) == asked + "Yes"
    assert model.tok_encode("a\n\nassistant: b") == list(
        vocabulary.encode("a\n\nassistant: b")
    )  # nobody's conversation


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


def command_line(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("lm_eval")
    command = [sys.executable, "-m", "tools.evaluation.lm_eval_model", "--model", "summerlm"]
    command += map(str, arguments)
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=folder)


def test_wrong_input_is_one_clear_line_in_the_harness_too(tmp_path: Path) -> None:
    done = command_line(tmp_path, "--model_args", "run=nowhere", "--tasks", "arc_easy")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: nowhere: no config.json there")


@pytest.mark.slow
def test_the_harness_command_line_scores_our_model(tmp_path: Path) -> None:
    run, data = tmp_path / "run", tmp_path / "rows.jsonl"
    write_run(run)
    rows = [
        {"query": f"Question: The {name} is", "choices": ["here.", "not here."], "gold": n % 2}
        for n, name in enumerate(("cat", "river", "number 7", "end"))
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "task.yaml").write_text(TASK.format(data=data))
    arguments = ["--model_args", f"run={run},dtype=fp32", "--include_path", tmp_path]
    output = ["--tasks", "here_or_not", "--output_path", tmp_path / "out", "--log_samples"]
    done = command_line(tmp_path, *arguments, *output)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = next((tmp_path / "out").rglob("samples_*.jsonl")).read_text().splitlines()
    in_turns = command_line(tmp_path, *arguments, *output[:2], "--apply_chat_template")
    assert in_turns.returncode == 0 and "here_or_not" in in_turns.stdout, in_turns.stderr[-2000:]
    ours = load(ModelSpec(run=run, device="cpu", dtype="fp32"))
    items = evaluate_task(ours, TASKS["arc_easy"], TaskOptions(data=data)).items
    assert len(lines) == len(items) == len(rows)
    for sample in map(json.loads, lines):
        likelihoods = [float(each[0]) for each in sample["filtered_resps"]]
        assert items[sample["doc_id"]]["log_likelihoods"] == pytest.approx(likelihoods)


def test_the_entry_point_names_our_model() -> None:
    """Releases of the harness after 0.4.13 find the class through it."""
    (point,) = PROJECT["project"]["entry-points"]["lm_eval.models"].items()
    assert point == ("summerlm", "tools.evaluation.lm_eval_model:SummerLM")
