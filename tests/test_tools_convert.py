"""Runs into Hugging Face folders and back, checked by transformers; and what is refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor

from pipeline.tokenizer import Tokenizer, base_model
from shards.format import TOKENIZER
from tools import hugging_face
from tools.conversion import ALONE
from tools.convert import main
from tools.hugging_face import read_folder, read_vocabulary, write_folder
from tools.llama import (
    ConversionError,
    config_from_llama,
    config_to_llama,
    weights_from_llama,
    weights_to_llama,
)
from tools.loading import Choice, load
from tools.tokenizer_json import piece_bytes, tokenizer_json
from tools_samples import sample_config, sample_model, sample_text, sample_tokenizer, write_run
from trainer.checkpoint import save
from trainer.config import load_config, save_config

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


def plain_run(run: Path) -> Path:
    """A run whose model is trained without ALiBi, with LayerScale and grouped-query heads."""
    write_run(run, steps=(3,))
    commit = run / "checkpoints" / "step-3"
    model = sample_model(**PLAIN)
    for path in commit.iterdir():
        path.unlink()
    commit.rmdir()
    save_config(run, replace(load_config(run), model=model.config))
    tensors = {f"model.{name}": weight for name, weight in model.state_dict().items()}
    save(run, tensors, {"step": 3, "next_index": 0}, ALONE)
    return run


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


def test_alibi_is_refused_with_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    write_run(tmp_path / "run", steps=(2,))
    result = convert(tmp_path / "run", tmp_path / "hf")
    assert result.exit_code == 1
    assert result.output.startswith("error: model.alibi=true: LlamaForCausalLM adds no ALiBi")
    assert result.output.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


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
    assert "a run keeps no other kind of tokenizer" in convert(folder, tmp_path / "x").output


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
    assert config_from_llama(config_to_llama(config, bos_id=1, eos_id=2)) == config


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
