"""Configuration, data and machine brought together, or refused with the arithmetic."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from model.transformer import Transformer
from shards.errors import ShardError
from shards.format import Manifest
from shards.reader import find_sources
from shards_samples import make_source
from trainer.config import resolve as plan_module
from trainer.config.accelerators import find_accelerator
from trainer.config.config import RunConfig, configure
from trainer.config.memory import fits, largest_micro_batch, memory_by_part
from trainer.config.resolve import make_plan
from trainer.config.train_plan import TrainPlan, describe_plan
from trainer.data.mixture import BatchShape
from trainer.errors import ConfigError
from trainer_samples import make_shards, small_plan


def test_facts_of_the_data_enter_the_model(tmp_path: Path) -> None:
    plan = small_plan(make_shards(tmp_path))
    assert plan.config.model.seq_len == 32
    assert plan.config.model.vocab_size == 512
    assert plan.weights == {"fineweb": 6, "pg19": 1}
    assert plan.config.mixture == {"fineweb": 6.0, "pg19": 1.0}
    assert plan.shape == BatchShape(8, 8, 1)
    assert (plan.sources["pg19"].n_rows, plan.sources["pg19"].n_val_rows) == (12, 4)
    assert plan.pad_id == 0


def test_a_vocabulary_is_rounded_up_to_128(tmp_path: Path) -> None:
    make_source(tmp_path / "fineweb", seq_len=32, vocab_size=513)
    assert small_plan(tmp_path).config.model.vocab_size == 640


@pytest.mark.parametrize("seq_len", [256, 4096])
def test_tiny_takes_the_row_length_that_it_finds(tmp_path: Path, seq_len: int) -> None:
    make_source(tmp_path / "fineweb", n_rows=4, n_val_rows=0, seq_len=seq_len)
    plan = make_plan(configure(preset="tiny", shards=str(tmp_path)))
    assert plan.step_tokens == 8192
    assert plan.shape.global_batch_size == 8192 // seq_len


@pytest.mark.parametrize(
    ("changes", "ranks", "message"),
    [
        ({"model__seq_len": 64}, 1, r"model\.seq_len=64: the shards' rows have 32 tokens"),
        (
            {"model__vocab_size": 256},
            1,
            r"model\.vocab_size=256: .* has 512 entries, which do not",
        ),
        ({"mixture__books": 1}, 1, r"mixture\.books=1\.0: that source is not prepared"),
        ({"micro_batch_size": 3}, 1, r"micro_batch_size=3 .* does not divide the 8 rows"),
        ({}, 3, r"is 8 rows of 32, which 3 ranks cannot share evenly: make it a multiple of 96"),
    ],
)
def test_what_does_not_fit_is_refused(
    tmp_path: Path, changes: dict[str, Any], ranks: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        small_plan(make_shards(tmp_path), ranks, **changes)


def test_sources_that_do_not_fit_each_other(tmp_path: Path) -> None:
    make_source(tmp_path / "fineweb", seq_len=32)
    make_source(tmp_path / "pg19", seq_len=16)
    with pytest.raises(ConfigError, match="fineweb has rows of 32 tokens and pg19 of 16"):
        small_plan(tmp_path)
    assert small_plan(tmp_path, mixture__pg19=0).weights == {"fineweb": 1}


def test_sources_of_another_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def with_another(root: Path) -> dict[str, Manifest]:
        found = find_sources(root)
        facts = found["pg19"].facts
        other = replace(facts.tokenizer, sha256="1" * 64, name="other")
        found["pg19"] = replace(found["pg19"], facts=replace(facts, tokenizer=other))
        return found

    monkeypatch.setattr(plan_module, "find_sources", with_another)
    with pytest.raises(ConfigError, match=r"different tokenizers \(sample, other\)"):
        small_plan(make_shards(tmp_path))


def test_no_shards(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="no prepared source"):
        small_plan(tmp_path)


def test_the_reference_run_is_refused_with_the_arithmetic(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_module, "device_memory_bytes", lambda kind, sharers: 16 * 10**9)
    make_source(tmp_path / "fineweb", n_rows=4, seq_len=256, vocab_size=32_768)
    with pytest.raises(ConfigError) as caught:
        make_plan(configure(shards=str(tmp_path), sets=["device=cpu", "precision=bf16"]))
    message = str(caught.value)
    assert message.startswith("summer-4b does not fit cpu with 16.0 GB (92% of it usable)")
    assert (
        "weights 17.9 + gradients 17.9 + moments 35.8 + bf16 copies 8.96 + activations" in message
    )
    assert "presets that fit: summer-125m (2." in message
    assert "tiny (0." in message
    assert "summer-1b" not in message


def test_a_cpu_is_not_filled_to_the_brim() -> None:
    config = configure(preset="tiny", sets=["model.seq_len=256"]).config
    assert largest_micro_batch(config, 128, "cpu", 10**12) == 32
    assert largest_micro_batch(config, 128, "cuda", 10**12) == 128
    assert largest_micro_batch(config, 12, "cuda", 10**12) == 4


def test_a_device_of_192_gb_takes_the_reference_run_whole() -> None:
    config = configure().config
    assert largest_micro_batch(config, 32, "cuda", 192 * 10**9) == 4
    assert largest_micro_batch(config, 32, "cuda", 80 * 10**9) is None
    full = replace(config, activation_checkpointing="full")
    parts = memory_by_part(full, 4, "cuda")
    assert fits(parts, 141 * 10**9)
    assert parts["activations"] < memory_by_part(config, 1, "cuda")["activations"]


def kept_for_backward(network: Transformer, tokens: torch.Tensor, precision: str) -> int:
    """Bytes of activations that autograd saves: what is not a weight, nor a weight's copy."""
    shapes = {parameter.shape for parameter in network.parameters()}
    shapes |= {torch.Size(reversed(shape)) for shape in shapes}
    storages: dict[int, tuple[int, torch.Tensor]] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.shape not in shapes:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"),
    ):
        network.hidden(tokens, torch.zeros(len(tokens), 2, dtype=torch.int32))
    return sum(size for size, _ in storages.values())


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_activations_are_what_autograd_keeps(precision: str) -> None:
    """Uncompiled; the compiled formula was compared in the same way once, compiling is slow."""
    shape = {"n_heads": 2, "d_model": 64, "d_ff": 224, "seq_len": 96, "attention_dropout": 0.0}
    sets = [f"model.{key}={value}" for key, value in shape.items()]
    sets += [f"precision={precision}", "compile=false", "model.vocab_size=512"]
    sizes = []
    for n_layers in (1, 3):
        config = configure(preset="tiny", sets=[*sets, f"model.n_layers={n_layers}"]).config
        kept = kept_for_backward(
            Transformer(config.model), torch.randint(0, 512, (4, 96)), precision
        )
        sizes.append((kept, memory_by_part(config, 4, "cpu")["activations"]))
    (few, few_predicted), (many, many_predicted) = sizes
    assert (many - few) / (many_predicted - few_predicted) == pytest.approx(1, abs=0.05)


def test_the_description_says_what_will_happen(tmp_path: Path) -> None:
    shards = make_shards(tmp_path, fineweb=60, slimorca=3, python_code=9)
    plan = small_plan(shards, max_steps=40, micro_batch_size=2)
    lines = "\n".join(describe_plan(plan, tokens_per_s=1000.0))
    assert "max_steps=40" in lines
    assert "! not prepared: the-stack, books3, arxiv; the others are renormalised" in lines
    assert "! prepared but not drawn: python-code" in lines
    assert "source slimorca: 7.7% of samples, 3 rows (96 tokens), 4 held out" in lines
    assert "step: 256 tokens = 8 rows of 32 = 4 accumulations x 1 ranks x 2 rows" in lines
    assert "run: 40 steps, 10,240 tokens" in lines
    assert "time: 0:00:10 at the 1,000 tokens/s" in lines
    assert "parameters" in lines
    assert "memory on cpu" in lines


@pytest.mark.parametrize(
    ("driver", "name"),
    [
        ("AMD Instinct MI300X", "MI300X"),
        ("AMD Instinct MI300X VF", "MI300X"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA GH200 480GB", "GH200"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L4", "L4"),
        ("mi300x", "MI300X"),
    ],
)
def test_devices_are_known_by_their_drivers_names(driver: str, name: str) -> None:
    found = find_accelerator(driver)
    assert found is not None
    assert found.name == name


def test_an_unknown_device_has_no_peak() -> None:
    assert find_accelerator("NVIDIA L40") is None
    assert find_accelerator("cpu") is None


def test_a_cpu_without_bf16_trains_in_fp32_unless_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There a product in bf16 takes 72 times as long: a demo of minutes would take hours."""
    make_source(tmp_path / "fineweb", n_rows=60, seq_len=32)

    def plan(*sets: str, earlier: RunConfig | None = None, file: Path | None = None) -> TrainPlan:
        preset = None if file else "tiny"
        configured = configure(
            preset=preset, file=file, sets=["device=cpu", *sets], shards=str(tmp_path)
        )
        return make_plan(configured, earlier=earlier)

    monkeypatch.setattr(plan_module, "emulates_bf16", lambda: True)
    chosen = plan()
    assert chosen.config.precision == "fp32"
    assert "this CPU has no bf16 arithmetic: precision is fp32" in chosen.notes[-1]
    asked = plan("precision=bf16")
    assert asked.config.precision == "bf16" and not any("bf16" in note for note in asked.notes)
    file = tmp_path / "own.toml"
    shape = "n_layers = 2\nd_model = 32\nn_heads = 2\nd_ff = 64\n"
    file.write_text(f'precision = "bf16"\n[model]\n{shape}')
    assert plan(file=file).config.precision == "bf16"
    # a run that goes on stays what it is, wherever it goes on
    assert plan(earlier=asked.config).config.precision == "bf16"
    monkeypatch.setattr(plan_module, "emulates_bf16", lambda: False)
    assert plan().config.precision == "bf16"
    assert plan(earlier=chosen.config).config.precision == "fp32"
