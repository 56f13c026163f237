"""summer-eval as it is typed: cards, JSON, and one clear line for whatever is wrong."""

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from click.testing import Result as Done

from hub_server import HubServer, Repo
from pipeline.text.tokenizer import train
from tools.evaluate import main
from tools.evaluation.cards import Metric, Result, to_text
from tools_samples import sample_text, write_run, write_two_sources

PERPLEXITY_KEYS = {
    "task", "token_perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte", "nats",
    "token_perplexity_error", "bits_per_byte_error", "protocol", "context", "stride", "bos",
    "read_as", "text_sha256", "text_bytes", "text_words", "text_tokens", "limit", "windows",
    "scored_tokens", "tail_dropped", "scored_share", "scored_bytes", "scored_words",
    "beyond_training", "model", "time_s", "official_text",
}  # fmt: skip
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate") / "runs" / "sample"
    write_run(folder)
    return folder


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.raw"
    path.write_text(sample_text()[:8000], encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_two_sources(tmp_path_factory.mktemp("shards"))


def command(*arguments: object) -> Done:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def damage(run: Path, kind: str) -> None:
    checkpoint = run / "checkpoints" / "step-4"
    if kind == "flipped bit":
        path = next(path for path in checkpoint.iterdir() if "model-00001" in path.name)
        content = bytearray(path.read_bytes())
        content[-5] ^= 1
        path.write_bytes(content)
    elif kind == "truncated":
        path = next(path for path in checkpoint.iterdir() if "model-00001" in path.name)
        path.write_bytes(path.read_bytes()[:-100])
    elif kind == "other tokenizer":
        lines = sample_text().splitlines()[:300]
        (run / "tokenizer.model").write_bytes(train(lines, 380))
    elif kind == "no tokenizer":
        (run / "tokenizer.model").unlink()
    elif kind == "other shape":
        config = json.loads((run / "config.json").read_text())
        config["model"]["d_ff"] = 96
        (run / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("flipped bit", "damaged"),
        ("truncated", "damaged"),
        ("other tokenizer", "has 380 entries and the weights are made for 512"),
        ("no tokenizer", "has no tokenizer.model"),
        ("other shape", "ffn.down.weight is [32, 64] and by config.json should be [32, 96]"),
    ],
)
def test_a_damaged_run_gives_one_line(
    tmp_path: Path, text_file: Path, kind: str, words: str
) -> None:
    run = tmp_path / "run"
    write_run(run, steps=(4,))
    damage(run, kind)
    result = command("wikitext2", "--run", run, "--data", text_file, "--device", "cpu")
    assert result.exit_code == 1
    assert words in result.stderr
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_the_command_prints_a_card(run: Path, text_file: Path) -> None:
    result = command("wikitext2", "--run", run, "--data", text_file, "--device", "cpu")
    assert result.exit_code == 0, result.stderr
    for words in ("token_perplexity", "bits_per_byte", "step 4", "protocol  disjoint", "sha256"):
        assert words in result.stdout
    longer = command("wikitext2", "--run", run, "--data", text_file, "--context", 64)
    assert "is beyond training" in longer.stdout


def test_json_holds_every_figure(run: Path, text_file: Path) -> None:
    arguments = ("--run", run, "--data", text_file, "--protocol", "stride", "--stride", 8)
    result = command("wikitext2", *arguments, "--limit", 9, "--json", "--device", "cpu")
    figures = json.loads(result.stdout)
    assert set(figures) == PERPLEXITY_KEYS
    assert (figures["protocol"], figures["stride"], figures["windows"]) == ("stride", 8, 9)
    assert figures["text_bytes"] == len(text_file.read_bytes())
    assert figures["text_words"] == len(text_file.read_text(encoding="utf-8").split())
    assert figures["model"]["parameters"] > 0


def test_heldout_prints_a_table_and_json(run: Path, shards: Path) -> None:
    result = command("heldout", "--run", run, "--shards", shards, "--device", "cpu")
    assert result.exit_code == 0, result.stderr
    for words in ("unigram", "code", "more", "all", "ABOVE the unigram"):
        assert words in result.stdout
    figures = json.loads(command("heldout", "--run", run, "--shards", shards, "--json").stdout)
    assert [source["source"] for source in figures["sources"]] == ["code", "more"]
    assert figures["total"]["gzip"] > 0


def test_two_tasks_are_two_lines_of_json(run: Path, shards: Path, text_file: Path) -> None:
    both = ("wikitext2", "heldout", "--run", run, "--shards", shards, "--data", text_file)
    lines = command(*both, "--json").stdout.splitlines()
    assert [json.loads(line)["task"] for line in lines] == ["wikitext2", "heldout"]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("sudoku",), 1, "task 'sudoku': there are: wikitext2,"),
        ((), 2, "TASK"),
        (("wikitext2", "--limit", "0"), 2, "--limit"),
        (("wikitext2", "--data", "nowhere.raw"), 1, "nowhere.raw"),
        (("wikitext2", "--data", "TEXT", "--context", "16449"), 1, "up to 16,448"),
        (("wikitext2", "--data", "TEXT", "--context", "9000"), 1, "choose a smaller --context"),
        (("wikitext2", "--data", "TEXT", "--stride", "4"), 1, "disjoint windows have none"),
        (("heldout", "--shards", "nowhere"), 1, "nowhere"),
    ],
)
def test_wrong_input_is_one_clear_line(
    run: Path, text_file: Path, arguments: tuple[str, ...], code: int, words: str
) -> None:
    given = [str(text_file) if argument == "TEXT" else argument for argument in arguments]
    result = command(*given, "--run", run, "--device", "cpu")
    assert result.exit_code == code
    assert words in result.stderr
    if code == 1:
        assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


def test_all_protocols_are_shown_side_by_side(run: Path, text_file: Path, tmp_path: Path) -> None:
    card = tmp_path / "card.json"
    arguments = ("wikitext2", "--run", run, "--data", text_file, "--device", "cpu", "--context", 16)
    result = command(*arguments, "--all-protocols", "--card", card)
    assert result.exit_code == 0, result.stderr
    figures = json.loads(card.read_text())
    assert [each["protocol"] for each in figures] == ["disjoint", "stride", "lm-eval", "llama.cpp"]
    assert len({each["token_perplexity"] for each in figures}) == 4
    for each in figures:
        alone = json.loads(command(*arguments, "--protocol", each["protocol"], "--json").stdout)
        assert alone["nats"] == each["nats"]
        assert f"{each['bits_per_byte']:.4f} ± {each['bits_per_byte_error']:.4f}" in result.stdout
    rejected = command(*arguments, "--all-protocols", "--stride", 4)
    assert rejected.exit_code == 1 and "takes each as it is" in rejected.stderr


def test_a_result_has_one_form_in_json_and_one_in_text() -> None:
    metrics: dict[str, Metric | float | None] = {
        "acc": Metric(0.5, 0.25),
        "ppl": Metric(None),
        "bits": 2e9,
    }
    flat = Result(task="t", metrics=metrics, settings={"limit": 3}, model={})
    figures = {"acc": 0.5, "acc_error": 0.25, "ppl": None, "ppl_error": None, "bits": 2e9}
    assert flat.to_json() == {"task": "t", **figures, "limit": 3}
    assert (flat["acc"], flat["bits"], flat["limit"]) == (0.5, 2e9, 3)
    grouped = replace(flat, metrics={"acc": metrics["acc"]}, grouped=True)
    nested = {"acc": {"value": 0.5, "error": 0.25}}
    assert grouped.to_json() == {"task": "t", "metrics": nested, "limit": 3}
    title, acc, ppl, bits, note = to_text([replace(flat, about="about", notes=["note"])])
    assert (title, note) == ("t: about", "note")
    assert (acc.split(), bits.split()) == (["acc", "0.5000", "±", "0.2500"], ["bits", "2.0000e+09"])
    assert "none" in ppl


def run_command(*arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tools.evaluate", *map(str, arguments), "--device", "cpu"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **variables},
        timeout=180,
    )


def test_processes_share_the_work_and_count_nothing_twice(run: Path, text_file: Path) -> None:
    arguments = ("wikitext2", "--run", run, "--data", text_file, "--batch-tokens", 100, "--json")
    done = run_command(*arguments, "--protocol", "lm-eval", "--nproc", 2)
    assert done.returncode == 0, done.stderr
    alone = json.loads(command(*arguments, "--protocol", "lm-eval", "--device", "cpu").stdout)
    together = json.loads(done.stdout)
    assert together.pop("time_s") and alone.pop("time_s")
    assert together == alone


def test_what_fails_in_every_process_is_said_once(run: Path) -> None:
    done = run_command("wikitext2", "--run", run, "--data", "nowhere.raw", "--nproc", 2)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("module", ["evaluate", "generate", "plan", "report"])
def test_help_is_instant(module: str) -> None:
    """Under half a second of CPU, which importing torch alone would exceed."""
    import resource

    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    code = f"import sys; from tools.{module} import main; sys.argv = ['summer', '--help']; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0 and "Example: summer-" in done.stdout
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5


def test_the_hub_out_of_reach_is_one_line_and_no_wait(run: Path) -> None:
    hub = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    done = run_command("wikitext2", "--run", run, **hub)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "cannot be reached" in done.stderr and "--data FILE" in done.stderr


CARD = """---
configs:
- config_name: wikitext-2-raw-v1
  data_files:
  - split: test
    path: wikitext-2-raw-v1/test-*
---
"""


def test_wikitext_comes_from_the_hub(run: Path, tmp_path: Path) -> None:
    """The command as it is typed without --data, against a Hub on loopback."""
    lines = sample_text()[:6000].split("\n")
    rows = pa.table({"text": [line + "\n" if line.strip() else "" for line in lines]})
    pq.write_table(rows, tmp_path / "test.parquet")
    files = {"wikitext-2-raw-v1/test-00000.parquet": (tmp_path / "test.parquet").read_bytes()}
    with HubServer({"Salesforce/wikitext": Repo(files, card=CARD)}) as hub:
        done = run_command("wikitext2", "--run", run, "--json", **hub.environment(tmp_path))
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    raw = "".join(line + "\n" if line.strip() else " \n" for line in lines)
    assert figures["text_bytes"] == len(raw.encode())
    assert figures["text_sha256"] == hashlib.sha256(raw.encode()).hexdigest()
