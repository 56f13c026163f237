"""What older versions wrote is read, gone on with, traced, scored and exported as they did.

Bits depend on the processor and on torch, so weights and moments must be equal bit for bit where
torch, its instructions and what they give are those of the folder, and elsewhere within 1e-5 of
each tensor's largest entry: AVX2 and plain kernels differ from AVX-512 by 3.4e-7 there.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import golden
from conftest import REPOSITORY
from golden import EXPECTED, LOGITS, MAX_STEPS, RESUMED, RUNS
from pipeline.cli import main as prepare
from tools.models.loading import ModelSpec, load

FOLDERS = sorted(path.parent for path in (REPOSITORY / "tests" / "data").glob(f"*/{EXPECTED}"))
NEAR = 1e-5  # relative, of figures on any machine

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=FOLDERS, ids=lambda path: path.name)
def expected(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Any]:
    """The figures of a golden folder, with a copy of it as the current folder."""
    shutil.copytree(request.param, tmp_path / "golden")
    monkeypatch.chdir(tmp_path / "golden")
    figures: dict[str, Any] = json.loads(Path(EXPECTED).read_text())
    return figures


def near(value: Any) -> Any:
    """A value that equals another with equal texts and whole numbers, and numbers near by."""
    if isinstance(value, dict):
        return {key: near(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [near(entry) for entry in value]
    return pytest.approx(value, rel=NEAR) if isinstance(value, float) else value


def test_there_are_golden_folders() -> None:
    assert "v0.1" in [folder.name for folder in FOLDERS]


def test_the_run_goes_on_to_the_same_weights_and_moments(expected: dict[str, Any]) -> None:
    exact = expected["made_with"] == golden.arithmetic()
    out = golden.train_on("alibi")
    assert golden.logged(out) == (expected["logged"] if exact else near(expected["logged"]))
    reached = out / "checkpoints" / f"step-{MAX_STEPS}"
    files = sorted(path.name for path in RESUMED.glob("*.safetensors"))
    assert files and files == sorted(path.name for path in reached.glob("*.safetensors"))
    for name in files:
        ours, theirs = load_file(reached / name), load_file(RESUMED / name)
        assert ours.keys() == theirs.keys()
        for key, tensor in theirs.items():
            limit = 0 if exact else NEAR * tensor.abs().max().item()
            torch.testing.assert_close(ours[key], tensor, rtol=0, atol=limit)


def test_the_older_of_two_checkpoints_leads_there_too(expected: dict[str, Any]) -> None:
    exact = expected["made_with"] == golden.arithmetic()
    (Path("runs") / "alibi" / "checkpoints" / "step-4" / "COMMIT.json").unlink()
    out = golden.train_on("alibi")
    assert golden.logged(out) == (expected["logged"] if exact else near(expected["logged"]))


def test_traced_it_saw_the_same(expected: dict[str, Any]) -> None:
    assert golden.traced() == expected["traced"]


def test_scored_it_is_worth_the_same(expected: dict[str, Any]) -> None:
    for name in RUNS:
        figures = near(expected["scored"][name])
        newest = max(Path("runs", name, "checkpoints").iterdir())
        for model in (("--run", f"runs/{name}"), ("--checkpoint", str(newest)),
                      ("--hf", f"exports/{name}")):  # fmt: skip
            assert golden.scored(*model) == figures


def test_the_shards_are_intact_and_made_again_the_same(expected: dict[str, Any]) -> None:
    golden.run(prepare, "verify", "shards")
    for source, file, *flags in (("prose", "prose"), ("slimorca", "chat", "--loss-mask")):
        before = Path("shards", source, "manifest.json").read_bytes()
        facts = json.loads(before)
        golden.run(
            prepare, "tokenize", "--source", source, "--data-files", f"text/{file}.jsonl",
            "--out", "again", "--tokenizer", f"shards/{source}/tokenizer.model",
            "--seq-len", str(facts["seq_len"]), "--val-fraction", str(facts["val_fraction"]),
            "--workers", "1", *flags,
        )  # fmt: skip
        made = json.loads(Path("again", source, "manifest.json").read_bytes())
        assert {key: made[key] for key in facts} == facts  # a later version may say more


IN_PLAIN_TRANSFORMERS = """
import sys
sys.path = [place for place in sys.path if place != sys.argv[1]]
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

torch.set_num_threads(1)
expected = load_file(sys.argv[2])
texts = ["The run", "How much is 3 and 4?", "  naïve\\n"]
for name in sys.argv[3:]:
    ids = []
    for folder in (f"exports/{name}", f"again/{name}"):
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
        with torch.inference_mode():
            logits = model(expected["tokens"]).logits
        torch.testing.assert_close(logits, expected[name], rtol=0, atol=1e-5)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        ids.append([tokenizer(text).input_ids for text in texts])
    assert ids[0] == ids[1]
    print(name, "is the same")
"""


def test_exported_it_computes_the_same(expected: dict[str, Any], tmp_path: Path) -> None:
    """The stored folders and those that this version makes of the same runs, in transformers."""
    pytest.importorskip("transformers")
    logits = load_file(LOGITS)
    for name in RUNS:
        golden.export(name, Path("again", name))
        ours = load_file(Path("again", name, "model.safetensors"))
        theirs = load_file(Path("exports", name, "model.safetensors"))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
        read = load(ModelSpec(hf=Path("exports", name), device="cpu", dtype="fp32"))
        with torch.inference_mode():
            found = read.model.logits(logits["tokens"])
        torch.testing.assert_close(found, logits[name], rtol=0, atol=1e-5)
    plain = subprocess.run(
        [sys.executable, "-I", "-c", IN_PLAIN_TRANSFORMERS, REPOSITORY, LOGITS, *RUNS],
        env=os.environ | {"HF_HOME": str(tmp_path / "cache")}, capture_output=True, text=True,
    )  # fmt: skip
    assert plain.returncode == 0, plain.stderr
    assert plain.stdout.splitlines() == [f"{name} is the same" for name in RUNS]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_it_is_small_and_names_no_machine_and_no_place(folder: Path) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 2_000_000
    home = str(Path.home())
    here = (f"{socket.gethostname()}/", str(REPOSITORY), *([home] if len(home) > 1 else []))
    for path in files:
        data = path.read_bytes().decode(errors="replace")
        assert not [text for text in here if text in data], path
        if path.parts[len(folder.parts)] in ("runs", "resumed", "shards") and "json" in path.suffix:
            assert '"/' not in data, path  # an absolute path
