"""Runs into Hugging Face folders and back, checked by transformers; and what is rejected."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file
from torch import Tensor

from pipeline.text.exclude import Exclusion
from pipeline.text.json_tokenizer import load_tokenizer, piece_bytes
from pipeline.text.tokenizer import Tokenizer, base_model
from pipeline.text.tokenizer import train as train_tokenizer
from pipeline_samples import TEXTS, byte_level, prepared, request, write_jsonl
from shards.format import TOKENIZER
from shards.reader import ShardReader
from tools.conversion import conversion
from tools.conversion.conversion import ALONE
from tools.convert import main
from tools.errors import ConversionError
from tools.evaluation.heldout import evaluate_heldout
from tools.evaluation.tasks import TaskOptions
from tools.generation.generation import Generation, Sampling, generate
from tools.models import hf_folder as hugging_face
from tools.models.hf_folder import read_folder, read_vocabulary, write_folder
from tools.models.llama import (
    config_from_llama,
    config_to_llama,
    weights_from_llama,
    weights_to_llama,
)
from tools.models.loading import ModelSpec, has_conversed, load
from tools.models.tokenizers import tokenizer_config, tokenizer_json
from tools.tracing.run_trace import RunTrace
from tools_samples import (
    sample_config,
    sample_model,
    sample_text,
    sample_tokenizer,
    trained_run,
    write_shards,
)
from trainer.checkpoint.storage import save
from trainer.config.config import configure
from trainer.config.resolve import make_plan
from trainer.metrics.metrics import read_metrics
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


@pytest.mark.parametrize("tied", [True, False])
def test_a_folder_becomes_a_run_with_the_same_logits(tmp_path: Path, tied: bool) -> None:
    folder = llama_folder(tmp_path / "hf", tie_embeddings=tied)
    result = convert(folder, tmp_path / "runs" / "converted")
    assert result.exit_code == 0, result.output
    assert "logits differ from transformers' by" in result.output
    loaded = load(ModelSpec(run=tmp_path / "runs" / "converted", device="cpu", dtype="fp32"))
    llama = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        torch.testing.assert_close(
            loaded.model.logits(TOKENS), llama(TOKENS).logits, rtol=0, atol=1e-4
        )
    assert loaded.vocabulary.encode("def f(x):") == sample_tokenizer().encode("def f(x):")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "runs"]


def test_a_run_becomes_a_folder_that_transformers_loads(tmp_path: Path) -> None:
    run, target = trained_run(tmp_path / "run", **PLAIN), tmp_path / "hf"
    result = convert(run / "checkpoints" / "step-3", target, "--dtype", "fp32")
    assert result.exit_code == 0, result.output
    loaded = load(ModelSpec(run=run, device="cpu", dtype="fp32"))
    ours = loaded.model
    llama = transformers.AutoModelForCausalLM.from_pretrained(target)
    assert type(llama).__name__ == "LlamaForCausalLM"
    with torch.no_grad():
        torch.testing.assert_close(ours.logits(TOKENS), llama(TOKENS).logits, rtol=0, atol=1e-4)
    tokenizer = transformers.AutoTokenizer.from_pretrained(target)
    text = sample_text()[:2000]
    ids = tokenizer(text).input_ids
    assert ids == [1, *sample_tokenizer().encode(text)]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text

    prompt = tokenizer("import argparse", return_tensors="pt").input_ids
    greedy = Generation(max_tokens=24, sampling=Sampling(temperature=0))
    written = generate(loaded, prompt[0].tolist(), greedy)
    assert len(set(written)) > 5
    theirs = llama.generate(prompt, max_new_tokens=24, do_sample=False)
    assert theirs[0, prompt.shape[1] :].tolist() == written

    back = convert(target, tmp_path / "again")
    assert back.exit_code == 0, back.output
    again = load(ModelSpec(run=tmp_path / "again", device="cpu", dtype="fp32")).model
    with torch.no_grad():
        torch.testing.assert_close(ours.logits(TOKENS), again.logits(TOKENS), rtol=0, atol=1e-4)


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
    losses = [line["loss"] for line in read_metrics(tmp_path / "run") if "loss" in line]
    base = load(ModelSpec(run=tmp_path / "base", device="cpu", dtype="fp32")).model
    reader = ShardReader(tmp_path / "shards" / "s", "train")
    rows, _ = reader.rows(np.arange(reader.n_rows))
    tokens = torch.from_numpy(rows.astype(np.int64))
    targets = torch.cat([tokens[:, 1:], torch.full((len(tokens), 1), -100)], dim=1)
    with torch.no_grad():
        each = [float(base(t[None], u[None])) / 31 for t, u in zip(tokens, targets, strict=True)]
    assert min(each) <= losses[0] <= max(each)


def test_tokenizer_files_of_different_vocabularies_are_rejected(tmp_path: Path) -> None:
    folder = llama_folder(tmp_path / "hf")
    other = Tokenizer(train_tokenizer(sample_text().upper().splitlines(), 500), "other")
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json(other)))
    result = convert(folder, tmp_path / "run")
    assert result.exit_code == 1
    assert "transformers reads other tokens" in result.output and result.output.count("\n") == 1
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


@pytest.mark.parametrize("special", [("<|endoftext|>", "<|pad|>"), ("<s>", "</s>", "<unk>")])
def test_a_folder_with_a_tokenizer_json_is_trained_further(
    tmp_path: Path, special: tuple[str, ...]
) -> None:
    """Folder -> run -> shards -> training from it -> scores, text, trace, and a folder again."""
    model, folder = sample_model(**LLAMA), tmp_path / "hf"
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes(byte_level("llama3", special))
    tokenizer = load_tokenizer(folder)
    write_folder(folder, model.config, model.state_dict(), tokenizer)
    assert convert(folder, tmp_path / "base").exit_code == 0
    files = str(write_jsonl(tmp_path / "a.jsonl", TEXTS))
    listed = Exclusion.of({"arc_easy": [TEXTS[7], "short"]})
    wanted = {"tokenizer": tokenizer, "seq_len": 32, "exclude": listed}
    assert prepared(request(tmp_path / "shards", files, "s", **wanted)).rejected
    sets = (f"init_from={tmp_path / 'base'}", "max_steps=2", "global_batch_tokens=128",
            "micro_batch_size=4", "precision=fp32", "compile=false", "device=cpu",
            "tensorboard=false", "mixture.s=1", "validation.interval=1")  # fmt: skip
    config = configure(preset="tiny", sets=sets, shards=str(tmp_path / "shards"))
    train(make_plan(config, 1), tmp_path / "run")
    lines = list(read_metrics(tmp_path / "run"))
    assert any("bits" in key for line in lines for key in line), lines[-1]

    loaded = load(ModelSpec(run=tmp_path / "run", device="cpu", dtype="fp32"))
    assert loaded.vocabulary.encode(f"{special[0]} it") == tokenizer.encode(f"{special[0]} it")
    score = evaluate_heldout(loaded, TaskOptions(shards=tmp_path / "shards"))
    assert 0 < score["sources"][0]["model"] < 30  # bits per byte
    written = generate(loaded, [tokenizer.bos_id], Generation(max_tokens=8))
    assert not {tokenizer.bos_id, tokenizer.pad_id} & set(written[:-1])
    (row, *_) = RunTrace(tmp_path / "run").at_step(1)
    assert "a.jsonl" in row.origin and row.text

    result = convert(tmp_path / "run", tmp_path / "again", "--dtype", "fp32")
    assert result.exit_code == 0, result.output
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "again")
    card = (tmp_path / "again" / "README.md").read_text()
    left_out = f"arc_easy (list {listed.described['sha256']})"
    assert f"| left out of s | what shares 13 words with {left_out} |" in card
    how = {"add_special_tokens": False, "split_special_tokens": True}
    for text in (TEXTS[9], f"{special[0]} 1234\n\n it"):
        assert theirs(text, **how).input_ids == tokenizer.encode(text)
    assert (theirs.bos_token, theirs.eos_token) == (special[0], special[len(special) > 2])
    assert convert(tmp_path / "again", tmp_path / "once more").exit_code == 0


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
    intact = weights.read_bytes()
    weights.write_bytes(intact[:-1000])
    assert "damaged weights" in convert(folder, tmp_path / "x").output
    weights.rename(folder / "pytorch_model.bin")
    assert "only safetensors are read" in convert(folder, tmp_path / "x").output
    (folder / "model.safetensors").write_bytes(intact)
    (folder / TOKENIZER).write_bytes(b"no model")
    damaged = convert(folder, tmp_path / "x").output
    assert str(folder / TOKENIZER) in damaged and "no SentencePiece model" in damaged
    (folder / TOKENIZER).unlink()
    assert (
        "hf is no byte-level BPE, and shards are made with one"
        in convert(folder, tmp_path / "x").output
    )


def test_large_models_are_written_in_several_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hugging_face, "_FILE_BYTES", 40_000)
    folder = llama_folder(tmp_path / "hf")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    _, weights, vocabulary = read_folder(folder)
    assert len(vocabulary) == 512 and vocabulary.pieces[500:] == 12 * (b"",)  # filled up
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


def test_user_defined_symbols_become_control_pieces(tmp_path: Path) -> None:
    """Mistral's own file gives text special ids; what we read from it does not."""
    (tmp_path / TOKENIZER).write_bytes(base_model())
    tokenizer = hugging_face.read_tokenizer(tmp_path)
    assert tokenizer.vocab_size == 32_768
    assert tokenizer.decode(tokenizer.encode("[REFERENCE_DOC_0]")) == "[REFERENCE_DOC_0]"


@pytest.mark.parametrize(("dtype", "kept_bits"), [("bf16", 8), ("fp16", 11)])
def test_weights_are_written_rounded_and_checked_as_they_are(
    tmp_path: Path, dtype: str, kept_bits: int
) -> None:
    run, target = trained_run(tmp_path / "run", **PLAIN), tmp_path / "hf"
    result = convert(run, target, *(["--dtype", dtype] if dtype != "bf16" else []))
    assert result.exit_code == 0, result.output
    assert f"; {dtype} moves them by " in result.output
    wanted = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    described = json.loads((target / "config.json").read_text())
    assert described["dtype"] == str(wanted).removeprefix("torch.")
    ours = load(ModelSpec(run=run, device="cpu", dtype="fp32")).model
    exact = weights_to_llama(ours.config, ours.state_dict())
    for name, tensor in load_file(target / "model.safetensors").items():
        assert tensor.dtype == wanted
        torch.testing.assert_close(tensor.float(), exact[name], rtol=2**-kept_bits, atol=1e-7)


def test_weights_beyond_fp16_are_not_written_in_it(tmp_path: Path) -> None:
    run, target = trained_run(tmp_path / "run", **LLAMA), tmp_path / "hf"
    loaded = load(ModelSpec(run=run, device="cpu", dtype="fp32"))
    weights = {f"model.{n}": w * 1e8 if n == "norm.weight" else w
               for n, w in loaded.model.state_dict().items()}  # fmt: skip
    save(run, weights, {"step": 4, "next_index": 0}, ALONE)
    result = convert(run, target, "--dtype", "fp16")
    assert result.exit_code == 1 and "give --dtype bf16" in result.output
    assert result.output.count("\n") == 1 and not target.exists()


def test_rounding_that_changes_the_model_is_no_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(conversion._ROUNDING, "bf16", 1e-6)
    run = trained_run(tmp_path / "run", **PLAIN)
    result = convert(run, tmp_path / "hf")
    assert result.exit_code == 1 and "in bf16 the logits move by" in result.output
    assert not (tmp_path / "hf").exists()


def test_a_base_model_has_no_template_of_conversations(tmp_path: Path) -> None:
    """One that has read none; where it cannot be known, the tokenizer decides, as before."""
    facts = {"root": "00" * 32, "n_rows": 1, "n_val_rows": 0, "tokens_per_row": 8.0, "excluded": ""}
    cases: tuple[tuple[str, dict[str, str], bool], ...] = (
        ("documents", {}, False), ("chat", {}, True), ("", {}, True),
        ("documents", {"init_from": "base"}, True),
    )  # fmt: skip
    for number, (shape, config, knows) in enumerate(cases):
        data = {"a": {**facts, "shape": "documents"}, "b": {**facts, "shape": shape}}
        run = trained_run(tmp_path / str(number), {"data": data, "config": config})
        assert has_conversed(run / "checkpoints" / "step-3") is knows
    assert has_conversed(trained_run(tmp_path / "old") / "checkpoints" / "step-3")
    for chat in (False, True):
        described = tokenizer_config(Tokenizer.default(), 64, chat=chat)
        assert ("chat_template" in described) is chat


def test_options_that_do_nothing_are_rejected(tmp_path: Path) -> None:
    folder = llama_folder(tmp_path / "hf")
    for options, said in (
        (("--dtype", "bf16"), "leave --dtype out"), (("--gguf", "f16"), "leave --gguf out"),
        (("--public",), "--public goes with --push"),
    ):  # fmt: skip
        result = convert(folder, tmp_path / "run", *options)
        assert result.exit_code != 0 and said in result.output
    for options, said in ((("--dtype", "bf16"), "--dtype"), (("--format", "hf"), "--format")):
        idle = CliRunner().invoke(main, ["--from", str(folder), "--gguf", "f16", *options])
        assert idle.exit_code == 2 and f"{said} is for a folder that is made" in idle.output
    alone = CliRunner().invoke(main, ["--from", str(folder)])
    assert alone.exit_code == 2 and "give --to a new folder" in alone.output
    run = trained_run(tmp_path / "alibi")
    result = convert(run, tmp_path / "x", "--gguf", "f16")
    assert result.exit_code == 1 and "model.alibi=false" in result.output
    assert not (tmp_path / "x").exists()
