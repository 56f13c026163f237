"""The trainer's steps are those of the plain formulas in fp64 (tests/reference_step.py).

Six steps, of which the fourth is refused: whole runs of the command's own code, from shards to the
saved weights and moments, alone, with micro-batches, on two ranks and on two shards.
"""

import contextlib
import functools
import math
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.optim import AdamW

import reference_step as reference
from model.config import CHUNK_ELEMENTS
from model.transformer import Transformer
from reference_step import Batch, Learner, Optim, Shape, Step
from shards.format import Part
from shards.reader import ShardReader
from shards.writer import ShardWriter, write_manifest
from shards_samples import TOKENIZER, sample_facts
from trainer.checkpoint.runs import newest_checkpoint
from trainer.config.train_plan import TrainPlan
from trainer.data.mixture import DataOrder, Phase
from trainer.metrics.metrics import read_metrics
from trainer.optimizer.optimizer import update
from trainer.session.network import reseed_attention_dropout
from trainer.train import train
from trainer_samples import become, free_ports, on_ranks, small_plan, tensors_in

N_STEPS, ROWS, SEED, REFUSED = 6, 8, 7, 4


class Layout(NamedTuple):
    """How a step's rows are dealt out."""

    ranks: int = 1
    micro_batch: int = ROWS
    shard_degree: int = 1


class Limits(NamedTuple):
    """Relative errors that rounding may make."""

    numbers: float  # of losses and norms
    tensors: float  # of a tensor's largest element


SOURCES = {"fineweb": False, "slimorca": True}  # and whether it has loss masks

SHAPES = {
    "everything": Shape(),
    "llama": Shape(alibi=False, layer_scale=False, tie_embeddings=False, z_loss=0.0),
    "alibi alone": Shape(rope=False, n_kv_heads=6, dropout=0.0),
}
LAYOUTS = {"replicated": Layout(2, 2), "sharded": Layout(2, 2, shard_degree=2)}

# Measured over all these runs: in fp64 1.1e-15 of a loss or norm and 3.1e-14 of a tensor, in fp32
# 6.9e-7 and 1.3e-5 (an update divides by sqrt(v) + eps, which enlarges what rounding does to small
# gradients). In fp64 two digits are left, since no change of a formula is that small; in fp32 a
# factor of three, for processors that sum in another order.
FP64, FP32 = Limits(1e-13, 1e-12), Limits(2e-6, 4e-5)


def make_data(folder: Path) -> None:
    """Two sources whose rows end in padding of various lengths; masks leave out half of one."""
    generator = np.random.default_rng(5)
    for name, masked in SOURCES.items():
        (folder / name).mkdir(parents=True)
        facts = sample_facts(name, Shape().seq_len, masked=masked)
        writer = ShardWriter(folder / name, "00000", facts)
        rows = generator.integers(3, 512, (30, facts.seq_len)).astype(np.uint16)
        rows[np.arange(facts.seq_len) >= generator.integers(40, 120, (30, 1))] = TOKENIZER.pad_id
        masks = generator.integers(0, 256, (30, facts.seq_len // 8), np.uint8) if masked else None
        numbers = np.arange(30, dtype=np.uint32)
        writer.add("train", rows, numbers * 0, numbers, masks)
        writer.finish([], plan_sha256="0" * 64)
        write_manifest(folder / name, facts, [Part(file="0.txt", first=0, last=1)], 1)


def batches_of(plan: TrainPlan) -> list[Batch]:
    """The samples of each step, in the data order, which has tests of its own."""
    rows = {name: facts.n_rows for name, facts in plan.sources.items()}
    order = DataOrder(seed=SEED, rows=rows, phases=[Phase(0, plan.weights)])
    readers = [ShardReader(plan.folders[name]) for name in order.sources]
    batches = []
    for first in range(0, N_STEPS * ROWS, ROWS):
        samples = np.arange(first, first + ROWS)
        located = order.locate(samples)
        tokens = np.zeros((ROWS, Shape().seq_len), np.uint16)
        masks = np.full((ROWS, Shape().seq_len // 8), 255, np.uint8)
        for place, (source, row) in enumerate(zip(located.source, located.row, strict=True)):
            masked = SOURCES[order.sources[source]]
            readers[source].read(int(row), tokens[place], masks[place] if masked else None)
        in_mask = np.unpackbits(masks, axis=1, bitorder="little").astype(bool)
        is_target = torch.from_numpy(in_mask & (tokens != TOKENIZER.pad_id))
        batches.append(Batch(samples.tolist(), torch.from_numpy(tokens).long(), is_target))
    return batches


def first_weights(shape: Shape) -> dict[str, Tensor]:
    """fp32, and no two alike: every norm and LayerScale differs in every channel."""
    generator = torch.Generator().manual_seed(3)
    weights = {}
    for name, size in reference.shapes(shape).items():
        noise = torch.randn(size, generator=generator, dtype=torch.float32)
        weights[name] = 0.25 * noise if len(size) == 2 else 0.8 + 0.3 * noise
    return weights


def plan_of(folder: Path, shape: Shape, layout: Layout) -> TrainPlan:
    """A run of this model."""
    sets = {f"model.{key}": value for key, value in asdict(shape).items()}
    sets |= {f"optim.{key}": value for key, value in asdict(Optim()).items()}
    texts = {key: str(v).lower() if isinstance(v, bool) else v for key, v in sets.items()}
    return small_plan(
        folder, layout.ranks, **texts, global_batch_tokens=ROWS * shape.seq_len, max_steps=N_STEPS,
        micro_batch_size=layout.micro_batch, shard_degree=layout.shard_degree, precision="fp32",
        seed=SEED, mixture__slimorca=40, mixture__fineweb=60,
    )  # fmt: skip


@contextlib.contextmanager
def in_fp64() -> Iterator[None]:
    """A block in which our code computes in fp64 all that it computes in fp32.

    But for AdamW's flag that says whether to skip, which torch wants in fp32.
    """

    def flagged(optimizer: AdamW, refused: Tensor, *, keep_gradients: bool) -> None:
        update(optimizer, refused.to(torch.float32), keep_gradients=keep_gradients)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "float", Tensor.double)
        patch.setattr("trainer.train.update", flagged)
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)


def train_ours(folder: Path, run: Path, shape: Shape, layout: Layout) -> None:
    """The run, from the first weights, with a gradient that is NaN on the last rank."""

    def fill(model: Transformer, _: int) -> None:
        weights = first_weights(shape)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(weights[name])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Transformer, "init_weights", fill)
        patch.setitem(CHUNK_ELEMENTS, "cpu", 100 * shape.vocab_size)  # the loss in several chunks
        patch.setenv("SUMMER_FAULT", f"nan:{layout.ranks - 1}:{REFUSED}")
        train(plan_of(folder, shape, layout), run)


@functools.cache
def expected(folder: Path, kind: str) -> tuple[list[Step], Learner]:
    """What the formulas come to."""
    shape = SHAPES[kind]
    learner = Learner(weights={name: w.double() for name, w in first_weights(shape).items()})
    batches = batches_of(plan_of(folder, shape, Layout()))
    return reference.train(learner, shape, Optim(), batches, SEED, REFUSED), learner


def check(run: Path, steps: list[Step], learner: Learner, limits: Limits = FP64) -> None:
    """The run's log and its last checkpoint are those of the reference."""
    lines = read_metrics(run)
    assert [line["n_targets"] for line in lines] == [step.n_targets for step in steps]
    assert [line["lr"] for line in lines] == pytest.approx([step.lr for step in steps], rel=1e-12)
    losses, norms = ([line[key] for line in lines] for key in ("loss", "grad_norm"))
    assert losses == pytest.approx([step.loss for step in steps], rel=limits.numbers)
    true_norms = [step.grad_norm for step in steps]
    assert norms.pop(REFUSED - 1) is None
    assert math.isnan(true_norms.pop(REFUSED - 1))
    assert norms == pytest.approx(true_norms, rel=limits.numbers)
    tensors = tensors_in(newest_checkpoint(run))
    assert tensors.pop("optim.updates").item() == learner.updates == N_STEPS - 1
    parts = {"model": learner.weights, "optim.exp_avg": learner.exp_avg}
    parts["optim.exp_avg_sq"] = learner.exp_avg_sq
    truth = {f"{part}.{name}": w for part, named in parts.items() for name, w in named.items()}
    assert tensors.keys() == truth.keys()
    errors = {
        name: float((tensors[name] - true).abs().max() / true.abs().max())
        for name, true in truth.items()
    }
    wrong = {name: error for name, error in errors.items() if not error < limits.tensors}
    assert not wrong


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    make_data(folder)
    return folder


@pytest.mark.usefixtures("one_thread")
def test_the_data_can_tell_what_goes_wrong(folder: Path) -> None:
    """Norms on both sides of the limit, targets left out, and not as many in every step."""
    for kind in SHAPES:
        norms = [step.grad_norm for step in expected(folder, kind)[0] if step.grad_norm > 0]
        assert min(norms) < 0.98 * Optim().grad_clip < 1.02 * Optim().grad_clip < max(norms)
    n_targets = [step.n_targets for step in expected(folder, "everything")[0]]
    assert len(set(n_targets)) == N_STEPS
    assert max(n_targets) < 0.8 * ROWS * Shape().seq_len


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("kind", SHAPES)
def test_one_rank_takes_the_steps_of_the_formulas(folder: Path, tmp_path: Path, kind: str) -> None:
    with in_fp64():
        train_ours(folder, tmp_path, SHAPES[kind], Layout())
    check(tmp_path, *expected(folder, kind))


@pytest.mark.usefixtures("one_thread")
def test_micro_batches_add_up_to_the_same_steps(folder: Path, tmp_path: Path) -> None:
    with in_fp64():
        train_ours(folder, tmp_path, Shape(), Layout(micro_batch=2))
    check(tmp_path, *expected(folder, "everything"))


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("kind", SHAPES)
def test_in_fp32_only_rounding_is_added(folder: Path, tmp_path: Path, kind: str) -> None:
    train_ours(folder, tmp_path, SHAPES[kind], Layout(micro_batch=4))
    check(tmp_path, *expected(folder, kind), FP32)


@pytest.mark.usefixtures("one_thread")
def test_each_micro_batch_has_its_own_attention_dropout(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel draws it from torch's generator, whose seed follows from the place in the run."""
    forward, seeds = Transformer.forward, list[int]()

    def note(self: Transformer, *batch: Tensor) -> Tensor:
        seeds.append(torch.initial_seed())
        return forward(self, *batch)

    monkeypatch.setattr(Transformer, "forward", note)
    plan = small_plan(
        folder, model__attention_dropout=0.1, seed=SEED, max_steps=2, micro_batch_size=4,
        global_batch_tokens=ROWS * Shape().seq_len,
    )  # fmt: skip
    train(plan, tmp_path)
    places = [(step, micro_step) for step in range(2) for micro_step in range(2)]
    assert seeds == [reference.attention_seed(SEED, *place, rank=0) for place in places]
    config = plan_of(folder, Shape(), Layout()).config
    dropping = replace(config, model=replace(config.model, attention_dropout=0.1))
    reseed_attention_dropout(dropping, 5, 6, 7)
    assert torch.initial_seed() == reference.attention_seed(SEED, 5, 6, 7)
    torch.manual_seed(1)
    reseed_attention_dropout(config, 5, 6, 7)
    assert torch.initial_seed() == 1


def train_as_rank(rank: int, folder: Path, runs: Path, ports: list[int]) -> None:
    for (name, layout), port in zip(LAYOUTS.items(), ports, strict=True):
        become(rank, layout.ranks, port)
        with in_fp64():
            train_ours(folder, runs / name, Shape(), layout)


def test_two_ranks_take_the_same_steps(folder: Path, tmp_path: Path) -> None:
    """Replicated by DDP and divided by FSDP2, with two micro-batches on each."""
    on_ranks(2, train_as_rank, folder, tmp_path, free_ports(len(LAYOUTS)))
    for name in LAYOUTS:
        check(tmp_path / name, *expected(folder, "everything"))
