"""Defaults < preset < --set, and every wrong key or value in one line."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from model.config import count_params
from trainer.config.config import (
    configure,
    differences,
    load_config,
    presets,
    save_config,
)
from trainer.config.shares import REFERENCE_SHARES
from trainer.errors import ConfigError


def test_without_a_preset_it_is_the_reference_run() -> None:
    config, explicit = configure()
    assert config == configure(preset="summer-4b").config
    assert explicit == frozenset()
    assert count_params(config.model) == 4_479_912_960


@pytest.mark.parametrize(
    ("preset", "millions", "tokens_a_step", "steps", "lr", "warmup"),
    [
        ("summer-4b", 4480, 1_048_576, 80_000, 3e-4, 2000),
        ("summer-1b", 1132, 1_048_576, 21_600, 4e-4, 2000),
        ("summer-125m", 127.8, 524_288, 5000, 6e-4, 700),
        ("tiny", 12.2, 8192, 60, 3e-3, 20),
    ],
)
def test_presets(
    preset: str, millions: float, tokens_a_step: int, steps: int, lr: float, warmup: int
) -> None:
    config = configure(preset=preset).config
    assert count_params(config.model) / 1e6 == pytest.approx(millions, rel=2e-3)
    assert (config.global_batch_tokens, config.max_steps) == (tokens_a_step, steps)
    assert (config.optim.lr, config.optim.warmup_steps) == (lr, warmup)
    assert config.model.d_ff == 3.5 * config.model.d_model
    assert config.model.head_dim == (64 if preset == "tiny" else 96)
    assert config.mixture == REFERENCE_SHARES
    optim = config.optim
    assert (optim.beta1, optim.beta2, optim.eps) == (0.9, 0.95, 1e-8)
    assert (optim.weight_decay, optim.grad_clip, optim.min_lr) == (0.1, 1.0, None)


def test_set_changes_single_keys() -> None:
    sets = ["max_steps=1e3", "optim.lr=1e-3", "model.n_kv_heads=2", "mixture.the-stack=30"]
    config, explicit = configure(preset="tiny", sets=[*sets, "compile=false", "optim.min_lr=0"])
    assert (config.max_steps, config.optim.lr, config.model.n_kv_heads) == (1000, 1e-3, 2)
    assert config.mixture == {**REFERENCE_SHARES, "the-stack": 30}
    assert not config.compile
    assert config.optim.min_lr == 0.0
    assert "mixture.the-stack" in explicit
    assert configure(preset="tiny", sets=["model.n_kv_heads=none"]).config.model.n_kv_heads is None


def test_a_file_of_your_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("max_steps = 7\n[mixture]\npg19 = 1\n[model]\nn_layers = 3\n")
    config = configure(file=path).config
    assert (config.preset, config.max_steps, config.model.n_layers) == ("mine", 7, 3)
    assert config.mixture == {"pg19": 1}  # a table of shares stands for the whole mixture
    assert config.model.d_model == 3072
    path.write_text("max_steps = = 7")
    with pytest.raises(ConfigError, match=r"mine\.toml: no valid TOML"):
        configure(file=path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_step=3", r"unknown key max_step; did you mean max_steps"),
        ("model.n_layer=3", r"unknown key model\.n_layer; did you mean model\.n_layers"),
        ("optim.learningrate=3", r"unknown key optim\.learningrate"),
        ("modle.n_layers=3", r"unknown key modle; did you mean model"),
        ("n_layers=3", r"unknown key n_layers; did you mean model\.n_layers"),
        ("max_steps=abc", r"max_steps='abc': must be a whole number"),
        ("max_steps=1.5", r"max_steps=1\.5: must be a whole number"),
        ("max_steps=true", r"max_steps=True: must be a whole number"),
        ("compile=1", r"compile=1: must be true or false"),
        ("optim.lr=fast", r"optim\.lr='fast': must be a number"),
        ("model=3", r"model=3: must be a table"),
        ("mixture=3", r"mixture=3: must be a table"),
        ("mixture.a=b", r"mixture\.a='b': must be a number"),
        ("precision=fp16", r"precision=fp16: must be one of bf16, fp32"),
        ("max_steps=0", r"max_steps=0: must be at least 1"),
        ("max_steps", r"--set max_steps: write it as section\.key=value"),
        ("max_steps.x=3", r"max_steps\.x: max_steps is a key, not a section"),
        ("model.d_model=100", r"model\.head_dim = 25 cannot be"),
        ("optim.lr=0", r"optim\.lr=0\.0: must be a number above 0"),
        ("optim.lr=nan", r"optim\.lr=nan: must be a number$"),
        ("checkpoint.keep_last=1", r"checkpoint\.keep_last=1: must be at least 2"),
        ("micro_batch_size=0", r"micro_batch_size=0: must be at least 1"),
    ],
)
def test_wrong_keys_and_values_are_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        configure(preset="tiny", sets=[text])
    assert "\n" not in str(caught.value)


def test_presets_and_files_that_are_not_there() -> None:
    with pytest.raises(ConfigError, match=r"no preset 'tinny'; did you mean tiny\? there are: "):
        configure(preset="tinny")
    assert {"summer-4b", "summer-1b", "summer-125m", "tiny", "chat"} == set(presets())


def test_a_run_explains_itself(tmp_path: Path) -> None:
    sets = ["mixture.pg19=5", "micro_batch_size=4"]
    config = configure(preset="tiny", sets=sets, shards=str(tmp_path / "s")).config
    save_config(tmp_path, config)
    assert load_config(tmp_path) == config
    other = replace(config, max_steps=9)
    assert differences(config, other) == {"max_steps": (60, 9)}
    with pytest.raises(ConfigError, match=r"no config\.json there"):
        load_config(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text('{"max_steps": "many"}')
    with pytest.raises(
        ConfigError, match=r"written by SummerLM 0\.1\.0: max_steps='many': must be"
    ):
        load_config(tmp_path)


def test_fine_tuning_takes_the_model_of_the_run_it_starts_from(tmp_path: Path) -> None:
    base = configure(preset="tiny", sets=["model.n_layers=3"]).config
    save_config(tmp_path, base)
    config = configure(preset="chat", sets=[f"init_from={tmp_path}", "model.dropout=0"]).config
    assert config.model == replace(base.model, dropout=0.0)
    assert (config.optim.lr, config.init_from) == (2e-5, str(tmp_path))
    assert config.mixture == {"slimorca": 100}


def test_fine_tuning_starts_from_the_newest_run_that_was_not_fine_tuned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="no run with a checkpoint"):
        configure(preset="chat")
    tiny = configure(preset="tiny").config
    for age, (name, start) in enumerate([("old", ""), ("base", ""), ("chat", "runs/base")]):
        mark = Path("runs", name, "checkpoints", "step-1", "checkpoint.json")
        mark.parent.mkdir(parents=True)
        mark.write_text("{}")
        os.utime(mark, (age, age))
        save_config(Path("runs", name), replace(tiny, init_from=start))
    assert configure(preset="chat").config.init_from == str(Path("runs", "base"))
