"""Runs and checkpoints as models, and what is said when there are none."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from conftest import REPOSITORY
from pipeline.text.tokenizer import Tokenizer
from shards.errors import SummerError
from shards.format import TOKENIZER
from tools.errors import ToolError
from tools.evaluate import main
from tools.evaluation.perplexity import measure_perplexity
from tools.evaluation.protocols import Protocol
from tools.evaluation.wikitext import from_raw
from tools.generation.generation import Generation, Sampling, generate
from tools.models.hf_folder import read_vocabulary, write_folder
from tools.models.loading import ModelSpec, load, max_context, sha256_of_weights
from tools_samples import (
    SEQ_LEN,
    sample_loaded,
    sample_model,
    sample_text,
    sample_tokenizer,
    write_run,
)
from trainer.checkpoint.runs import RECORD


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate") / "runs" / "sample"
    write_run(folder)
    return folder


def test_a_run_is_loaded_at_its_newest_checkpoint_and_a_checkpoint_by_name(run: Path) -> None:
    newest = load(ModelSpec(run=run, device="cpu"))
    assert newest.name.endswith("sample, step 4")
    older = load(ModelSpec(checkpoint=run / "checkpoints" / "step-2", device="cpu"))
    assert older.name.endswith("sample, step 2")
    assert older.weights_sha256 != newest.weights_sha256
    assert newest.weights_sha256 == sha256_of_weights(dict(newest.model.named_parameters()))
    assert not newest.model.training
    assert newest.dtype == "fp32"


def test_without_a_name_the_newest_run_is_taken(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run.parents[1])
    assert load(ModelSpec(device="cpu")).name == "runs/sample, step 4"
    monkeypatch.chdir(run)
    with pytest.raises(SummerError, match="summer-train"):
        load(ModelSpec(device="cpu"))


def test_a_model_that_is_not_there_or_does_not_fit_is_named(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ToolError, match="name one of --run"):
        load(ModelSpec(run=run, checkpoint=run))
    with pytest.raises(SummerError, match=f"no {RECORD} there"):
        load(ModelSpec(checkpoint=run))
    with pytest.raises(SummerError, match="no run of summer-train"):
        load(ModelSpec(run=tmp_path))
    with pytest.raises(ToolError, match="torch sees no GPU here"):
        load(ModelSpec(run=run, device="cuda"))


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """By whatever loads a run; a checkpoint that is named itself is not replaced."""
    damaged = tmp_path / "damaged"
    shutil.copytree(run, damaged)
    path = next((damaged / "checkpoints" / "step-4").glob("*-model-00001-*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    loaded = load(ModelSpec(run=damaged, device="cpu"))
    assert loaded.name.endswith("damaged, step 2")
    assert loaded.checkpoint == damaged / "checkpoints" / "step-2"
    before = load(ModelSpec(checkpoint=run / "checkpoints" / "step-2", device="cpu"))
    assert loaded.weights_sha256 == before.weights_sha256
    (notice,) = (r.message for r in caplog.records if r.levelname == "WARNING")
    assert f"{path} is damaged" in notice and notice.endswith("USING step-2")
    with pytest.raises(SummerError, match=r"step-4.* is damaged"):
        load(ModelSpec(checkpoint=damaged / "checkpoints" / "step-4", device="cpu"))
    record = damaged / "checkpoints" / "step-2" / RECORD
    record.write_text(record.read_text()[:-9])
    with pytest.raises(SummerError, match=r"step-4.* is damaged"):
        load(ModelSpec(run=damaged, device="cpu"))


@pytest.mark.parametrize("command", ["evaluate", "generate", "convert"])
def test_each_command_says_which_checkpoint_it_uses_instead(
    run: Path, tmp_path: Path, command: str
) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(run, damaged)
    for path in (damaged / "checkpoints" / "step-4").glob("*-model-00001-*.safetensors"):
        path.write_bytes(b"")
    (tmp_path / "text.raw").write_text(sample_text()[:2000])
    arguments = {
        "evaluate": ["wikitext2", "--run", damaged, "--data", tmp_path / "text.raw"],
        "generate": ["--run", damaged, "--max-tokens", "1"],
        "convert": ["--from", damaged, "--to", tmp_path / "hf"],
    }[command]
    given = [sys.executable, "-m", f"tools.{command}", *map(str, arguments)]
    done = subprocess.run(given, capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert "is damaged or missing" in done.stderr and "USING step-2\n" in done.stderr
    shown = (tmp_path / "hf" / "README.md").read_text() if command == "convert" else ""
    assert "step 2" in done.stdout + done.stderr + shown


@pytest.fixture
def llama_folder(tmp_path: Path) -> Path:
    """A Llama as Hugging Face lays it out, of random weights."""
    model = sample_model(alibi=False, layer_scale=False, n_kv_heads=1)
    weights = {name: values.detach() for name, values in model.named_parameters()}
    folder = tmp_path / "llama"
    folder.mkdir()
    write_folder(folder, model.config, weights, sample_tokenizer())
    return folder


def test_a_llama_folder_is_scored_by_the_same_code(llama_folder: Path) -> None:
    loaded = load(ModelSpec(hf=llama_folder, device="cpu"))
    ours = sample_loaded(alibi=False, layer_scale=False, n_kv_heads=1)
    assert loaded.weights_sha256 == ours.weights_sha256
    assert max_context(loaded.model.config) is None
    text, protocol = from_raw(sample_text()[:3000]), Protocol(context=SEQ_LEN)
    assert (
        measure_perplexity(loaded, text, protocol)["nats"]
        == measure_perplexity(ours, text, protocol)["nats"]
    )


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_folders_own_chat_template_is_taken(llama_folder: Path) -> None:
    described = json.loads((llama_folder / "tokenizer.json").read_text())
    for number, content in ((500, "<|im_start|>"), (501, "<|im_end|>")):
        token = {"id": number, "content": content, "special": True, "single_word": False}
        described["added_tokens"].append(
            token | {"lstrip": False, "rstrip": False, "normalized": False}
        )
    (llama_folder / "tokenizer.json").write_text(json.dumps(described))
    config = json.loads((llama_folder / "tokenizer_config.json").read_text())
    config["chat_template"] = CHATML
    (llama_folder / "tokenizer_config.json").write_text(json.dumps(config))
    vocabulary = load(ModelSpec(hf=llama_folder, device="cpu")).vocabulary
    assert vocabulary.chat is not None
    ids = vocabulary.chat([{"role": "user", "content": "hello"}])
    assert ids[0] == 500 and ids.count(500) == 2 and ids.count(501) == 1
    assert "hello" in vocabulary.decode(ids)
    with pytest.raises(ToolError, match=r"a turn spells <\|im_end\|>, which would become"):
        vocabulary.chat([{"role": "user", "content": "a <|im_end|> b"}])
    config["chat_template"] = "{{ raise_exception('no such role') }}"
    (llama_folder / "tokenizer_config.json").write_text(json.dumps(config))
    vocabulary = load(ModelSpec(hf=llama_folder, device="cpu")).vocabulary
    assert vocabulary.chat is not None
    with pytest.raises(ToolError, match="chat template rejects the conversation: no such role"):
        vocabulary.chat([{"role": "user", "content": "hello"}])


def test_tokens_added_by_a_chat_fine_tune_and_all_ends_of_a_text_count(llama_folder: Path) -> None:
    """tokenizer.model does not have them: `<|im_end|>` was no token, and nothing ever ended."""
    plain = load(ModelSpec(hf=llama_folder, device="cpu")).vocabulary
    path = llama_folder / "tokenizer.json"
    described = json.loads(path.read_text())
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    for number, content, special in ((500, "<|im_end|>", True), (501, "<think>", False)):
        token = {"id": number, "content": content, "special": special, **flags}
        described["added_tokens"].append(token)
    path.write_text(json.dumps(described))
    (llama_folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 500]}))
    loaded = load(ModelSpec(hf=llama_folder, device="cpu"))
    vocabulary, text = loaded.vocabulary, sample_text()[:3000]
    assert list(vocabulary.encode(text)) == list(plain.encode(text))
    assert len(vocabulary) == 512 and vocabulary.pieces[500:503] == (b"", b"<think>", b"")
    assert 501 in vocabulary.encode("a <think> b") and 500 not in vocabulary.encode("<|im_end|>")
    assert [n for n in range(512) if vocabulary.ends(n)] == [2, 500]
    drawable = vocabulary.may_be_drawn(512)
    assert drawable[500] and drawable[501] and not drawable[502]
    weight = loaded.model.head_weight
    for end in (2, 500):  # a model that says nothing else
        with torch.no_grad():
            weight.zero_()
            loaded.model.norm.weight.fill_(0.0)
        prompt, drawn = list(vocabulary.encode("a")), list[int]()
        allowed = dataclasses.replace(vocabulary, pieces=tuple(b"" for _ in range(512)),
                                      eos_id=end, end_ids=frozenset({end}))  # fmt: skip
        model = dataclasses.replace(loaded, vocabulary=allowed)
        options = Generation(max_tokens=4, sampling=Sampling(temperature=0))
        assert generate(model, prompt, options, drawn.append) == [] and drawn == []
    for damage in ([1], [{"id": "x"}], None):  # nothing that could be an id
        path.write_text(json.dumps({**described, "added_tokens": damage}))
        assert read_vocabulary(llama_folder, 512).pieces == plain.pieces


def test_a_llama_folder_with_another_tokenizer_is_rejected(llama_folder: Path) -> None:
    (llama_folder / TOKENIZER).write_bytes(Tokenizer.default().model)
    with pytest.raises(ToolError, match="has 32,768 entries and the weights are made for 512"):
        load(ModelSpec(hf=llama_folder, device="cpu"))
    model = sample_model(alibi=False, layer_scale=False, vocab_size=2048)
    write_folder(llama_folder, model.config, model.state_dict(), sample_tokenizer())
    with pytest.raises(ToolError, match="has 500 entries and the weights are made for 2,048"):
        load(ModelSpec(hf=llama_folder, device="cpu"))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_damaged_llama_folder_gives_one_line(llama_folder: Path, name: str) -> None:
    path = llama_folder / name
    path.write_bytes(path.read_bytes()[:40])
    result = CliRunner().invoke(main, ["wikitext2", "--hf", str(llama_folder)])
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert llama_folder.name in result.stderr
