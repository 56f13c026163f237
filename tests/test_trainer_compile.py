"""A compiled run: compiled once, with the curve and the masks of the uncompiled one.

Masks are read where they act: an element that dropout zeroed is zero in what a block returns, and
the gradient of its own scale is zero.
"""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters

import trainer.train
from model.attention import attend
from model.dropout import CounterDropout, keep_mask, row_state
from trainer.config.config import configure
from trainer.session import network as parallel
from trainer.session.network import build_network
from trainer_samples import ALONE, log_of, set_texts, small_plan

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),  # its own, compiling
    pytest.mark.filterwarnings("ignore:The .grad attribute"),
]

STEPS, MICRO_STEPS = 6, 2
RUN: dict[str, Any] = {
    "model__n_layers": 9,  # one more than torch.compile specialises before it gives up
    "max_steps": STEPS,
    "micro_batch_size": 8 // MICRO_STEPS,
    "precision": "fp32",
    "validation__interval": 2,
    "validation__rows": 3,  # less than a batch
    "optim__lr": 1e-2,
}


def losses(shards: Path, run: Path, **changes: Any) -> list[float]:
    trainer.train.train(small_plan(shards, **{**RUN, **changes}), run)
    return [line[1] for line in log_of(run)]


class Compiled(NamedTuple):
    losses: list[float]
    seen: list[tuple[int, int, int, int]]  # step, then graphs, frames and kernels compiled so far


@pytest.fixture(scope="module")
def compiled(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Compiled]:
    """A whole compiled run, and what the compiler had done when each micro-step began."""
    seen = []
    reseed = parallel.reseed_attention_dropout

    def note(config: Any, step: int, *place: int) -> None:
        seen.append((step, *compiler_s_work()))
        reseed(config, step, *place)

    torch._dynamo.reset()
    counters.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trainer.session.network.reseed_attention_dropout", note)
        curve = losses(shards, tmp_path_factory.mktemp("run"), compile="true")
    seen.append((STEPS, *compiler_s_work()))
    yield Compiled(curve, seen)
    torch._dynamo.reset()


def compiler_s_work() -> tuple[int, int, int]:
    cache = sum(n for name, n in counters["inductor"].items() if name.startswith("fxgraph_cache"))
    return counters["stats"]["unique_graphs"], counters["frames"]["total"], cache


@pytest.mark.slow
def test_nothing_is_compiled_after_the_second_step(compiled: Compiled) -> None:
    """Whatever changes: gradients accumulate, the learning rate moves, held-out rows are scored."""
    assert len(compiled.seen) == STEPS * MICRO_STEPS + 1
    assert compiled.seen[0] == (0, 0, 0, 0)
    graphs, frames, kernels = compiled.seen[-1][1:]
    # one for all nine blocks, held-out rows included, the first dropout, two inside the loss
    assert (graphs, frames) == (4, 4)
    assert kernels == 6  # the first two have a backward pass
    assert {seen[1:] for seen in compiled.seen if seen[0] >= 2} == {(graphs, frames, kernels)}


def same_curve(one: list[float], other: list[float]) -> bool:
    """Within rounding: 2^-23 a number, and what six updates at a high rate make of it."""
    return other == pytest.approx(one, rel=2e-6)


@pytest.mark.slow
def test_the_loss_curve_is_that_of_eager_mode_with_dropout(
    compiled: Compiled, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(compiled.losses) == STEPS
    assert same_curve(compiled.losses, losses(shards, tmp_path / "eager"))

    def other_masks(rows: Tensor, site: Tensor, channels: int, rate: float) -> Tensor:
        return keep_mask(rows, site + 1, channels, rate)

    monkeypatch.setattr("model.dropout.keep_mask", other_masks)
    assert not same_curve(compiled.losses, losses(shards, tmp_path / "other"))


B, T, C = 2, 32, 64
LAYERS = 2


def masks(**changes: Any) -> list[tuple[Tensor, Tensor]]:
    """What was kept in the forward and in the backward pass, at each place of each layer.

    A scale of [B, T, C] in place of [C] gives each element a gradient of its own.
    """
    sets = set_texts(
        model__n_layers=LAYERS, model__d_model=C, model__vocab_size=128, model__seq_len=T,
        model__dropout=0.3, precision="fp32", **changes,
    )  # fmt: skip
    bare = build_network(configure(preset="tiny", sets=sets).config, ALONE).bare
    positions = bare.positions(0, T)
    rows = row_state(torch.tensor([[1, 2], [3, 4]], dtype=torch.int32), T)
    x, d_out = torch.randn(2, B, T, C, generator=torch.Generator().manual_seed(0))
    x.requires_grad_()
    pairs = []
    for block, dropped in itertools.product(bare.blocks, ("attention_scale", "ffn_scale")):
        for name in ("attention_scale", "ffn_scale"):  # the other branch is silent
            value = torch.full((B, T, C), float(name == dropped))
            setattr(block, name, nn.Parameter(value))
        out = block(x, positions, rows)
        torch.autograd.backward(out, d_out)
        scale: Tensor = getattr(block, dropped)
        assert scale.grad is not None
        pairs.append((out != x, scale.grad != 0))
    return pairs


WAYS = [
    pytest.param({"activation_checkpointing": kind, "compile": compiled}, marks=marks)
    for compiled, marks in (("false", ()), ("true", pytest.mark.slow))
    for kind in ("none", "selective", "full")
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: " ".join(way.values()))
def test_the_backward_pass_drops_what_the_forward_pass_dropped(way: dict[str, str]) -> None:
    torch._dynamo.reset()
    pairs = masks(**way)
    for forward, backward in pairs:
        assert torch.equal(forward, backward)
        assert forward.float().mean().item() == pytest.approx(0.7, abs=0.03)
    plain = [forward for forward, _ in masks(activation_checkpointing="none")]
    assert all(torch.equal(*both) for both in zip((f for f, _ in pairs), plain, strict=True))
    assert not any(torch.equal(*both) for both in itertools.combinations(plain, 2))


def test_a_mask_that_is_drawn_anew_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def drawn(self: CounterDropout, x: Tensor, rows: Tensor | None) -> Tensor:
        return F.dropout(x, self.rate)

    monkeypatch.setattr(CounterDropout, "forward", drawn)
    assert all(torch.equal(*pair) for pair in masks(activation_checkpointing="none"))
    assert not any(torch.equal(*pair) for pair in masks(activation_checkpointing="full"))


@pytest.mark.parametrize("compile_it", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("preserve_rng_state", [True, None])
def test_attention_drops_the_same_probabilities_in_both_passes(
    compile_it: bool, preserve_rng_state: bool | None
) -> None:
    """Values are one-hot, so that the output is the dropped probabilities and d_v is too."""
    config = configure(preset="tiny").config.model
    n = config.head_dim

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, config, dropout=0.3)

    torch._dynamo.reset()
    run: Callable[..., Tensor] = torch.compile(attention) if compile_it else attention
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, config.n_heads, n, n)
    v = torch.eye(n).expand_as(k).clone().requires_grad_()
    if preserve_rng_state:
        out = torch.utils.checkpoint.checkpoint(run, q, k, v, use_reentrant=False)
    else:
        out = run(q, k, v)
    assert isinstance(out, Tensor)
    (d_v,) = torch.autograd.grad(out, v, torch.eye(n).expand_as(out))
    assert torch.equal(d_v.mT != 0, out != 0)
    kept = (out != 0).sum() / (config.n_heads * n * (n + 1) / 2)
    assert kept.item() == pytest.approx(0.7, abs=0.03)
