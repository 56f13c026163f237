"""A small vocabulary, a small model and a small run, made by the project's own code."""

import functools
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import torch

from model.config import ModelConfig
from model.transformer import Transformer
from pipeline.text.tokenizer import Tokenizer, train
from shards.format import TOKENIZER, Facts, Manifest, Part, token_dtype
from shards.writer import ShardWriter, write_manifest
from tools.conversion.conversion import ALONE
from tools.models.loading import LoadedModel, sha256_of_weights
from tools.models.tokenizers import Vocabulary
from trainer.checkpoint.storage import save, tensors_of
from trainer.config.config import RunConfig, save_config

SEQ_LEN = 32


@functools.cache
def sample_text() -> str:
    """Some tens of kilobytes of real prose and code, the same on every call."""
    return Path(sysconfig.get_path("stdlib"), "argparse.py").read_text(encoding="utf-8")


@functools.cache
def sample_tokenizer() -> Tokenizer:
    return Tokenizer(train(sample_text().splitlines(), 500), "sample")


def sample_config(**changes: Any) -> ModelConfig:
    shape = {
        "vocab_size": 512, "seq_len": SEQ_LEN, "n_layers": 2, "d_model": 32, "n_heads": 2,
        "d_ff": 64, "dropout": 0.0, "attention_dropout": 0.0,
    }  # fmt: skip
    return ModelConfig(**{**shape, **changes})


def sample_model(seed: int = 0, **changes: Any) -> Transformer:
    """A random model, drawn so wide that it prefers some ids clearly."""
    model = Transformer(sample_config(**changes)).eval()
    model.init_weights(seed)
    with torch.no_grad():
        model.embedding.weight.mul_(4)
    return model


def sample_loaded(**changes: Any) -> LoadedModel:
    model = sample_model(**changes)
    return LoadedModel(
        name="sample",
        model=model,
        vocabulary=Vocabulary.of(sample_tokenizer()),
        weights_sha256=sha256_of_weights(dict(model.named_parameters())),
        dtype="fp32",
    )


def write_run(run: Path, steps: tuple[int, ...] = (2, 4)) -> dict[int, Transformer]:
    """A run with a checkpoint at each of `steps`, and the models that were saved."""
    run.mkdir(parents=True)
    save_config(run, RunConfig(model=sample_config(), mixture={"s": 1.0}))
    (run / TOKENIZER).write_bytes(sample_tokenizer().model)
    models = {}
    for step in steps:
        models[step] = model = sample_model(seed=step)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
        tokens = torch.arange(8)[None]
        model(tokens, tokens).backward()
        optimizer.step()
        save(run, tensors_of(model, optimizer), {"step": step, "next_index": 0}, ALONE)
    return models


def trained_run(run: Path, record: dict[str, Any] | None = None, **changes: Any) -> Path:
    """A run with one checkpoint of a random model of that shape, whose layers say more than its
    head.

    (Those of `sample_model` are so quiet that it repeats one id for ever.)
    """
    model = sample_model(**changes)
    with torch.no_grad():
        for parameter in model.blocks.parameters():
            parameter.mul_(10 if parameter.dim() > 1 else 1)
    run.mkdir(parents=True)
    save_config(run, RunConfig(model=model.config))
    (run / TOKENIZER).write_bytes(sample_tokenizer().model)
    tensors = {f"model.{name}": weight for name, weight in model.state_dict().items()}
    save(run, tensors, {"step": 3, "next_index": 0, **(record or {})}, ALONE)
    return run


def write_shards(
    folder: Path, *, train_texts: list[str], val_texts: list[str], seq_len: int = SEQ_LEN
) -> Manifest:
    """A prepared source of these documents, packed as shards are."""
    tokenizer = sample_tokenizer()
    folder.mkdir(parents=True)
    facts = Facts(
        source=folder.name, dataset="tests", revision="", licence="none", seq_len=seq_len,
        dtype=token_dtype(tokenizer.vocab_size).name, packing="concat", val_fraction=0.1,
        tokenizer=tokenizer.info,
    )  # fmt: skip
    writer = ShardWriter(folder, "00000", facts)
    for split, texts in (("train", train_texts), ("val", val_texts)):
        ids = [
            token
            for text in texts
            for token in (tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id)
        ]
        ids += [tokenizer.pad_id] * (-len(ids) % seq_len)
        rows = np.array(ids, facts.dtype).reshape(-1, seq_len)
        zeros = np.zeros(len(rows), np.uint32)
        writer.add(split, rows, zeros, zeros)  # type: ignore[arg-type]
    writer.finish([], plan_sha256="0" * 64)
    manifest = write_manifest(folder, facts, [Part(file="t", first=0, last=1)], 1)
    assert manifest is not None
    return manifest


def write_two_sources(root: Path) -> Path:
    """Sources `code` and `more`, of which some documents are held out."""
    pieces = [sample_text()[begin : begin + 300] for begin in range(0, 24_000, 300)]
    write_shards(root / "code", train_texts=pieces[:40], val_texts=[*pieces[40:46], "ü" * 9, "x"])
    write_shards(root / "more", train_texts=pieces[50:70], val_texts=pieces[70:73])
    return root
