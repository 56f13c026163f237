"""Runs into Hugging Face folders and back, checked by transformers; and what is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from jinja2.exceptions import TemplateError
from torch import Tensor

from conftest import REPOSITORY
from pipeline.chat import ROLES, Template, render
from pipeline.tokenizer import Tokenizer, base_model
from pipeline.tokenizer import train as train_tokenizer
from shards.format import TOKENIZER
from shards.reader import ShardReader
from test_house import imports
from tools import hugging_face
from tools.conversion import ALONE
from tools.convert import main
from tools.errors import ConversionError
from tools.follow import EVALUATIONS
from tools.generation import Generation, generate
from tools.hugging_face import read_folder, read_vocabulary, write_folder
from tools.llama import (
    config_from_llama,
    config_to_llama,
    weights_from_llama,
    weights_to_llama,
)
from tools.loading import Choice, load
from tools.model_card import model_card
from tools.sampling import Sampling
from tools.tokenizer_json import piece_bytes, tokenizer_json
from tools_samples import (
    sample_config,
    sample_model,
    sample_text,
    sample_tokenizer,
    write_shards,
)
from trainer.checkpoint import save
from trainer.config import RunConfig, configure, load_config, save_config
from trainer.metrics import read_lines
from trainer.plan import make_plan
from trainer.runs import METRICS
from trainer.train import train

transformers = pytest.importorskip("transformers")

PLAIN: dict[str, Any] = {"alibi": False, "n_kv_heads": 1}
LLAMA = PLAIN | {"layer_scale": False}
TOKENS = torch.arange(40).view(2, 20) * 7 % 500


def convert(source: Path, target: Path, *options: str) -> Result:
    return CliRunner().invoke(main, ["--from", str(source), "--to", str(target), *options])


def llama_folder(folder: Path, **changes: Any) -> Path:
    """A Hugging Face folder with a random Llama of ours."""
    model = sample_model(**(LLAMA | changes))
    folder.mkdir()
    write_folder(folder, model.config, model.state_dict(), sample_tokenizer())
    return folder


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def trained_run(run: Path, record: dict[str, Any] | None = None, **changes: Any) -> Path:
    """A run with one commit of a random model of that shape."""
    model = sample_model(**changes)
    run.mkdir(parents=True)
    save_config(run, RunConfig(model=model.config))
    (run / TOKENIZER).write_bytes(sample_tokenizer().model)
    tensors = {f"model.{name}": weight for name, weight in model.state_dict().items()}
    save(run, tensors, {"step": 3, "next_index": 0, **(record or {})}, ALONE)
    return run


def plain_run(run: Path) -> Path:
    """A run whose model has no ALiBi, but LayerScale and grouped-query heads."""
    return trained_run(run, **PLAIN)


@pytest.mark.parametrize("tied", [True, False])
def test_a_folder_becomes_a_run_with_the_same_logits(tmp_path: Path, tied: bool) -> None:
    folder = llama_folder(tmp_path / "hf", tie_embeddings=tied)
    result = convert(folder, tmp_path / "runs" / "converted")
    assert result.exit_code == 0, result.output
    assert "logits differ from transformers' by" in result.output
    loaded = load(Choice(run=tmp_path / "runs" / "converted", device="cpu", dtype="fp32"))
    llama = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        torch.testing.assert_close(
            loaded.model.logits(TOKENS), llama(TOKENS).logits, rtol=0, atol=1e-4
        )
    assert loaded.vocabulary.encode("def f(x):") == sample_tokenizer().encode("def f(x):")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "runs"]


def test_a_run_becomes_a_folder_that_transformers_loads(tmp_path: Path) -> None:
    run, target = plain_run(tmp_path / "run"), tmp_path / "hf"
    result = convert(run, target)
    assert result.exit_code == 0, result.output
    ours = load(Choice(run=run, device="cpu", dtype="fp32")).model
    llama = transformers.AutoModelForCausalLM.from_pretrained(target)
    assert type(llama).__name__ == "LlamaForCausalLM"
    with torch.no_grad():
        torch.testing.assert_close(ours.logits(TOKENS), llama(TOKENS).logits, rtol=0, atol=1e-4)
    tokenizer = transformers.AutoTokenizer.from_pretrained(target)
    text = sample_text()[:2000]
    ids = tokenizer(text).input_ids
    assert ids == [1, *sample_tokenizer().encode(text)]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text

    back = convert(target, tmp_path / "again")
    assert back.exit_code == 0, back.output
    again = load(Choice(run=tmp_path / "again", device="cpu", dtype="fp32")).model
    with torch.no_grad():
        torch.testing.assert_close(ours.logits(TOKENS), again.logits(TOKENS), rtol=0, atol=1e-4)


def test_one_commit_can_be_named(tmp_path: Path) -> None:
    run = plain_run(tmp_path / "run")
    assert convert(run / "checkpoints" / "step-3", tmp_path / "hf").exit_code == 0
    assert (tmp_path / "hf" / "model.safetensors").is_file()


IN_PLAIN_TRANSFORMERS = """
import sys
sys.path = [place for place in sys.path if place != sys.argv[1]]
import importlib.util
assert importlib.util.find_spec("trainer") is None
import torch
torch.set_num_threads(1)
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

folder, ours = sys.argv[2], torch.load(sys.argv[3])
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
near = dict(rtol=0, atol=1e-4)
tokens = ours["tokens"]
greedy = dict(max_new_tokens=24, do_sample=False)
with torch.inference_mode():
    logits = model(tokens).logits
    torch.testing.assert_close(logits, ours["logits"], **near)
    cache = DynamicCache()
    cuts = zip((0, 150, 151), (150, 151, 400), strict=True)
    parts = [model(tokens[:, a:b], past_key_values=cache).logits for a, b in cuts]
    torch.testing.assert_close(torch.cat(parts, dim=1), logits, **near)
    padded = torch.cat([torch.zeros(2, 50, dtype=torch.int64), tokens], dim=1)
    seen = (torch.arange(450) >= 50).long().expand(2, 450)
    found = model(padded, attention_mask=seen).logits[:, 50:]
    torch.testing.assert_close(found, logits, **near)
    alone = []
    for prompt, written in zip(ours["prompts"], ours["written"], strict=True):
        ids = tokenizer(prompt, return_tensors="pt")
        made = model.generate(**ids, **greedy)
        assert torch.equal(made, model.generate(**ids, **greedy, use_cache=False))
        alone.append(made[0, ids.input_ids.shape[1]:].tolist())
        assert alone[-1] == written, (alone[-1], written)
    batch = tokenizer(ours["prompts"], return_tensors="pt", padding=True)
    made = model.generate(**batch, **greedy)[:, batch.input_ids.shape[1]:].tolist()
    assert made == alone
loss = model.train()(tokens, labels=tokens).loss
loss.backward()
expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
assert all(each.grad is not None for each in model.parameters())
try:
    model(torch.zeros(1, 16_449, dtype=torch.int64))
except ValueError as error:
    assert "16448" in str(error)
else:
    assert not model.config.alibi
"""


@pytest.mark.parametrize(
    "shape",
    [{"n_heads": 3, "d_model": 48, "n_kv_heads": 1, "tie_embeddings": False},
     {"rope": False, "alibi": False, "layer_scale": False}],
)  # fmt: skip
def test_with_alibi_its_own_code_goes_along(tmp_path: Path, shape: dict[str, Any]) -> None:
    """It needs nothing of ours: logits far beyond training, cache, padding, generation."""
    run, target = trained_run(tmp_path / "run", **shape), tmp_path / "hf"
    result = convert(run, target)
    assert result.exit_code == 0, result.output
    ours = load(Choice(run=run, device="cpu", dtype="fp32"))
    tokens = torch.randint(3, 500, (2, 400), generator=torch.Generator().manual_seed(1))
    prompts = ["def f(x):", "import argparse\n\nclass", "a"]
    greedy = Generation(max_tokens=24, sampling=Sampling(temperature=0))
    encode = ours.vocabulary.encode
    with torch.inference_mode():
        written = [generate(ours, [1, *encode(prompt)], greedy) for prompt in prompts]
        logits = ours.model.logits(tokens)
    told = {"tokens": tokens, "logits": logits, "prompts": prompts, "written": written}
    torch.save(told, tmp_path / "ours.pt")
    plain = subprocess.run(
        [sys.executable, "-I", "-c", IN_PLAIN_TRANSFORMERS, REPOSITORY, target,
         tmp_path / "ours.pt"],
        env=os.environ | {"HF_HOME": str(tmp_path / "cache")}, capture_output=True, text=True,
    )  # fmt: skip
    assert plain.returncode == 0, plain.stderr

    never = json.loads((target / "generation_config.json").read_text())["suppress_tokens"]
    assert never == [0, 1, *range(3, 5), *range(500, 512)]  # not 2, which ends a text
    again = load(Choice(hf=target, device="cpu", dtype="fp32"))
    assert again.weights_sha256 == ours.weights_sha256
    back = convert(target, tmp_path / "back")
    assert back.exit_code == 0, back.output
    assert load_config(tmp_path / "back").model == ours.model.config


def test_the_code_that_goes_along_needs_torch_and_transformers_alone() -> None:
    assert {name for name, _ in imports(REPOSITORY / "tools" / hugging_face.MODELING)} == {
        "__future__", "math", "typing", "torch", "transformers",
    }  # fmt: skip


def test_a_folder_s_own_code_is_never_run(tmp_path: Path) -> None:
    run, target = trained_run(tmp_path / "run"), tmp_path / "hf"
    assert convert(run, target).exit_code == 0
    (target / hugging_face.MODELING).write_text("raise SystemExit('foreign code')")
    assert convert(target, tmp_path / "back").exit_code == 0
    edit(target / "config.json", n_layers="two")
    assert "describes no model of summer-convert" in convert(target, tmp_path / "x").output


def test_the_card_says_where_the_weights_come_from(tmp_path: Path) -> None:
    ledger = {"web": {"rows": 40, "tokens": 1_270, "epochs": 0.25}}
    record = {
        "time_s": 7200.0, "world_size": 8, "ledger": ledger, "data": {"web": {"root": "5f" * 32}},
        "config": {"dollars_per_hour": 18.5, "init_from": "base"},
    }  # fmt: skip
    run = trained_run(tmp_path / "run", record)
    cards = run / EVALUATIONS / "step-3"
    cards.mkdir(parents=True)
    (cards / "lambada.md").write_text("## lambada\n\n```\nacc 0.25\n```\n")
    assert convert(run, tmp_path / "hf").exit_code == 0
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "| web | 40 | 1,270 | 0.25 | `" + "5f" * 32 + "` |" in card
    for said in ("| tokens seen | 1,270 |", "$37.00 at $18.5 an hour", "2.00 h of 8 devices",
                 "| started from | base |", "### lambada\n\n```\nacc 0.25", "run, step 3",
                 load(Choice(run=run, device="cpu")).weights_sha256, sample_tokenizer().info.sha256,
                 "summerlm 0.1.0", "trust_remote_code=True"):  # fmt: skip
        assert said in card
    plain = plain_run(tmp_path / "plain") / "checkpoints" / "step-3"
    assert "trust_remote_code" not in model_card(plain, load(Choice(checkpoint=plain)))


@pytest.fixture(scope="module")
def chatting(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """transformers' tokenizer of the default vocabulary."""
    folder = tmp_path_factory.mktemp("chat")
    model = sample_model(**LLAMA, vocab_size=32_768)
    write_folder(folder, model.config, model.state_dict(), Tokenizer.default())
    return transformers.AutoTokenizer.from_pretrained(folder, model_max_length=10**9)


def test_conversations_have_the_pipeline_s_ids(chatting: Any, shared: Path) -> None:
    [path] = (shared / "slimorca").glob("*.jsonl")
    tokenizer = Tokenizer.default()
    template = Template.of(tokenizer)
    for line in path.read_text().split("\n")[:-1:8]:
        record = json.loads(line)["conversations"]
        turns = [
            np.array([tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id], np.uint16)
            for text in render(record)
        ]
        starts = np.cumsum([0] + [len(turn) for turn in turns[:-1]])
        ours, _, _ = template.join(np.concatenate(turns), starts, np.array([len(turns)]))
        messages = [{"role": ROLES[t["from"]], "content": t["value"]} for t in record]
        assert chatting.apply_chat_template(messages, return_dict=False) == ours.tolist()


def test_the_chat_template_keeps_the_pipeline_s_rules(chatting: Any) -> None:
    def say(*turns: str, **how: Any) -> str:
        roles = ("user", "assistant") if turns[0] != "S" else ("system", "user", "assistant")
        messages = [{"role": roles[n] if n < len(roles) else roles[n % 2 + len(roles) - 2],
                     "content": text} for n, text in enumerate(turns)]  # fmt: skip
        return str(chatting.apply_chat_template(messages, tokenize=False, **how))

    assert say("S", "q", "a  ") == "<s>[INST]S\n\nq[/INST]a</s>"
    assert say("q", "a", "r") == "<s>[INST]q[/INST]a</s>"
    assert say("q", "a", "r", add_generation_prompt=True).endswith("a</s>[INST]r[/INST]")
    for turns, complaint in (
        (("q",), "add_generation_prompt"), (("", "a"), "empty turn"), (("q", "  "), "empty turn"),
        (("q </s>", "a"), "spells </s>"), (("q", "[INST]"), r"spells \[INST\]"),
    ):  # fmt: skip
        with pytest.raises(TemplateError, match=complaint):
            say(*turns)
    with pytest.raises(TemplateError, match="out of order"):
        chatting.apply_chat_template([{"role": "assistant", "content": "a"}], tokenize=False)


def test_training_goes_on_from_a_converted_model(tmp_path: Path) -> None:
    """Continued pretraining: the first step's loss is that of the converted weights."""
    folder = llama_folder(tmp_path / "hf")
    assert convert(folder, tmp_path / "base").exit_code == 0
    lines = sample_text().splitlines(keepends=True)
    texts = ["".join(lines[n : n + 20]) for n in range(0, 400, 20)]
    write_shards(tmp_path / "shards" / "s", train_texts=texts, val_texts=[])
    sets = (f"init_from={tmp_path / 'base'}", "max_steps=2", "global_batch_tokens=128",
            "micro_batch_size=4", "precision=fp32", "compile=false", "device=cpu",
            "tensorboard=false", "mixture.s=1")  # fmt: skip
    config = configure(preset="tiny", sets=sets, shards=str(tmp_path / "shards"))
    train(make_plan(config, 1), tmp_path / "run")
    losses = [line["loss"] for line in read_lines(tmp_path / "run" / METRICS) if "loss" in line]
    base = load(Choice(run=tmp_path / "base", device="cpu", dtype="fp32")).model
    reader = ShardReader(tmp_path / "shards" / "s", "train")
    rows, _ = reader.rows(np.arange(reader.n_rows))
    tokens = torch.from_numpy(rows.astype(np.int64))
    targets = torch.cat([tokens[:, 1:], torch.full((len(tokens), 1), -100)], dim=1)
    with torch.no_grad():
        each = [float(base(t[None], u[None])) / 31 for t, u in zip(tokens, targets, strict=True)]
    assert min(each) <= losses[0] <= max(each)


def test_tokenizer_files_of_different_vocabularies_are_refused(tmp_path: Path) -> None:
    folder = llama_folder(tmp_path / "hf")
    other = Tokenizer(train_tokenizer(sample_text().upper().splitlines(), 500), "other")
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json(other)))
    result = convert(folder, tmp_path / "run")
    assert result.exit_code == 1
    assert "transformers reads other ids" in result.output and result.output.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_logits_that_differ_are_no_success(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = llama_folder(tmp_path / "hf")

    def swapped(*args: Any) -> dict[str, Tensor]:
        weights = weights_from_llama(*args)
        weights["blocks.1.ffn.gate_up.weight"] = weights["blocks.1.ffn.gate_up.weight"].flip(0)
        return weights

    monkeypatch.setattr(hugging_face, "weights_from_llama", swapped)
    result = convert(folder, tmp_path / "run")
    assert result.exit_code == 1
    assert "logits differ by" in result.output and "nothing was kept" in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "RoPE scaling of type 'yarn'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": None},
         "RoPE scaling of type 'linear'"),
        ({"model_type": "gpt2"}, "model_type = 'gpt2'"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"head_dim": 48}, "head_dim = 48"),
        ({"sliding_window": 16}, "sliding_window = 16"),
        ({"num_hidden_layers": 3}, "the weights have no model.layers.2."),
        ({"num_hidden_layers": 1}, "which a Llama does not have"),
        ({"num_key_value_heads": 3}, "n_kv_heads = 3"),
    ],
)  # fmt: skip
def test_what_cannot_be_computed_is_named(
    tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    folder = llama_folder(tmp_path / "hf")
    edit(folder / "config.json", **change)
    result = convert(folder, tmp_path / "run")
    assert result.exit_code == 1
    assert says in result.output
    assert result.output.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_damage_and_wrong_folders_are_named(tmp_path: Path) -> None:
    folder = llama_folder(tmp_path / "hf")
    assert "format 'hf' already" in convert(folder, tmp_path / "x", "--format", "hf").output
    assert "exists: give --to a new folder" in convert(folder, tmp_path / "hf").output
    assert "no such folder" in convert(tmp_path / "nowhere", tmp_path / "x").output
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1000])
    assert "damaged weights" in convert(folder, tmp_path / "x").output
    weights.rename(folder / "pytorch_model.bin")
    assert "only safetensors are read" in convert(folder, tmp_path / "x").output
    (folder / "model.safetensors").write_bytes(whole)
    (folder / TOKENIZER).write_bytes(b"no model")
    damaged = convert(folder, tmp_path / "x").output
    assert str(folder / TOKENIZER) in damaged and "no SentencePiece model" in damaged
    (folder / TOKENIZER).unlink()
    assert "no run could train on from it" in convert(folder, tmp_path / "x").output


def test_large_models_are_written_in_several_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hugging_face, "_FILE_BYTES", 40_000)
    folder = llama_folder(tmp_path / "hf")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    _, weights, _ = read_folder(folder)
    expected = sample_model(**LLAMA).state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in weights)
    llama = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(llama.model.norm.weight, expected["norm.weight"])
    next(folder.glob("model-00002*")).unlink()
    with pytest.raises(ConversionError, match=r"model-00002-of-.* is missing"):
        read_folder(folder)


def test_names_survive_a_round_trip() -> None:
    config = sample_config(**LLAMA, tie_embeddings=False)
    weights = sample_model(**LLAMA, tie_embeddings=False).state_dict()
    theirs = weights_to_llama(config, weights)
    again = weights_from_llama(config, theirs)
    assert again.keys() == weights.keys()
    assert all(torch.equal(again[name], weights[name]) for name in weights)
    assert config_from_llama(config_to_llama(config)) == config


def test_ids_of_the_base_vocabulary_are_sentencepiece_s(tmp_path: Path) -> None:
    """32,768 pieces, spaces in front and in rows, characters outside the vocabulary."""
    tokenizer = Tokenizer.default()
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer_json(tokenizer)))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast"}'
    )
    vocabulary = read_vocabulary(tmp_path, tokenizer.vocab_size)
    texts = (
        sample_text(),
        " a",
        "  a  b\n\n\n   c\t\td",
        "ß 東京都 😀\x00\u2028",
        "</s> [INST]",
        "",
    )
    for text in texts:
        assert vocabulary.encode(text) == tokenizer.encode(text)
        assert vocabulary.decode(vocabulary.encode(text)) == text
    assert vocabulary.pieces == tokenizer.token_bytes
    assert vocabulary.space_first
    assert (vocabulary.bos_id, vocabulary.eos_id) == (None, None)


def test_byte_level_pieces_are_spelled_out() -> None:
    description = {
        "decoder": {"type": "ByteLevel"},
        "model": {"vocab": {"Ġthe": 0, "Ċ": 1, "Ã©": 2, "!": 3}},
        "added_tokens": [
            {"id": 4, "content": "<|end|>", "special": True},
            {"id": 5, "content": "é!", "special": False},
        ],
    }
    assert piece_bytes(description) == {
        0: b" the", 1: b"\n", 2: "é".encode(), 3: b"!", 4: b"", 5: "é!".encode(),
    }  # fmt: skip


def test_a_vocabulary_smaller_than_the_model_is_filled_up(tmp_path: Path) -> None:
    folder = llama_folder(tmp_path / "hf")
    _, _, vocabulary = read_folder(folder)
    assert len(vocabulary) == 512
    assert vocabulary.pieces[500:] == 12 * (b"",)


def test_user_defined_symbols_become_control_pieces(tmp_path: Path) -> None:
    """Mistral's own file gives text special ids; what we read from it does not."""
    (tmp_path / TOKENIZER).write_bytes(base_model())
    tokenizer = hugging_face.read_sentencepiece(tmp_path)
    assert tokenizer.vocab_size == 32_768
    assert tokenizer.decode(tokenizer.encode("[REFERENCE_DOC_0]")) == "[REFERENCE_DOC_0]"
