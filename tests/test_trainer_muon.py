"""Muon against its papers in fp64, matrix by matrix; what is no block's matrix against AdamW."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from model.config import ModelConfig, count_params
from model.transformer import Transformer
from trainer.config.config import configure
from trainer.config.memory import memory_by_part
from trainer.optimizer import muon
from trainer.optimizer.muon import orthogonalize
from trainer.optimizer.optimizer import make_optimizer, set_lr, update
from trainer.optimizer.schedule import OptimConfig

CONFIG = ModelConfig(
    vocab_size=32, seq_len=8, n_layers=2, d_model=24, n_heads=4, n_kv_heads=2, d_ff=40,
    tie_embeddings=False,
)  # fmt: skip
PROJECTIONS = {"qkv": (24, 12, 12), "out": (24,), "gate_up": (40, 40), "down": (24,)}
GO, SKIP = torch.tensor(0.0), torch.tensor(1.0)


def reference(matrix: Tensor) -> Tensor:
    """Jordan's iteration as the paper writes it, in fp64."""
    x: Tensor = matrix.double() / (matrix.double().norm() + 1e-7)
    turned = x.shape[0] > x.shape[1]
    x = x.T if turned else x
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if turned else x


def with_gradients(model: Transformer, seed: int, scale: float = 1.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    grads = {}
    for name, parameter in model.named_parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator) * scale
        grads[name] = parameter.grad.clone()
    return grads


def state_of(model: Transformer, optimizer: Any) -> dict[str, Tensor]:
    moments = {
        f"{name} {key}": value.clone()
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }
    return moments | {name: p.detach().clone() for name, p in model.named_parameters()}


def test_each_projection_is_a_matrix_of_its_own() -> None:
    model, rate, decay = Transformer(CONFIG), 0.02, 0.1
    config = OptimConfig(name="muon", lr=rate, weight_decay=decay)
    optimizer = make_optimizer(model, config)
    matrices = {n: p for n, p in model.named_parameters() if n.startswith("blocks.") and p.ndim > 1}
    assert len(matrices) == 8
    expected = {name: matrix.detach().double() for name, matrix in matrices.items()}
    momentum = {name: torch.zeros_like(matrix) for name, matrix in expected.items()}
    plain = Transformer(CONFIG)
    adamw = make_optimizer(plain, OptimConfig(lr=rate, weight_decay=decay))
    for step in range(3):
        rate = set_lr(adamw, set_lr(optimizer, 0.02 / (1 + step)))
        grads = with_gradients(model, step)
        with_gradients(plain, step)
        update(optimizer, GO)
        update(adamw, GO)
        for name in matrices:
            momentum[name] = 0.95 * momentum[name] + grads[name].double()
            ahead = 0.95 * momentum[name] + grads[name].double()
            rows = PROJECTIONS[name.split(".")[-2]]
            parts = [
                0.2 * math.sqrt(max(p.shape)) * reference(p) for p in torch.split(ahead, list(rows))
            ]
            expected[name] = (1 - rate * decay) * expected[name] - rate * torch.cat(parts)
            torch.testing.assert_close(matrices[name].double(), expected[name], rtol=0, atol=2e-6)
    for name, parameter in plain.named_parameters():
        if name not in matrices:  # the embedding, the head and all vectors
            assert torch.equal(parameter, model.get_parameter(name)), name


@pytest.mark.parametrize("shape", [(24, 24), (12, 48), (48, 12), (1, 30)])
def test_singular_values_end_near_one_and_an_update_is_as_large_as_adamws(
    shape: tuple[int, int],
) -> None:
    for scale in (1e-6, 1.0, 1e6):
        matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * scale
        found = orthogonalize(matrix)
        values = torch.linalg.svdvals(found)
        assert values.min() > 0.6 and values.max() < 1.25
        torch.testing.assert_close(found.double(), reference(matrix), rtol=0, atol=1e-5)
        size = found.square().mean().sqrt() * math.sqrt(max(shape))
        assert 0.6 < size < 1.25  # times 0.2: Liu et al. (2025), AdamW's own root mean square
    assert not orthogonalize(torch.zeros(shape)).any()


def test_a_skipped_update_leaves_every_bit() -> None:
    model = Transformer(CONFIG)
    optimizer = make_optimizer(model, OptimConfig(name="muon", lr=0.1))
    assert not any(value.any() for state in optimizer.state.values() for value in state.values())
    with_gradients(model, 0)
    update(optimizer, GO)
    before = state_of(model, optimizer)
    for scale in (math.nan, math.inf, 1e20):
        with_gradients(model, 1, scale)
        update(optimizer, SKIP)
        after = state_of(model, optimizer)
        assert all(torch.equal(after[key], before[key]) for key in before)
    with_gradients(model, 1)
    update(optimizer, GO)
    assert not any(torch.equal(state_of(model, optimizer)[key], before[key]) for key in before)


def test_a_matrix_without_a_gradient_stays() -> None:
    model = Transformer(CONFIG)
    optimizer = make_optimizer(model, OptimConfig(name="muon", lr=0.1))
    with_gradients(model, 0)
    frozen = model.get_parameter("blocks.1.ffn.down.weight")
    before, frozen.grad = frozen.detach().clone(), None
    update(optimizer, GO)
    assert torch.equal(frozen, before)


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_share_the_matrices(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two ranks each works out its half, and takes the other when it has come."""
    worked_out: list[Tensor] = []
    of_projections = muon._of_projections

    def counted(direction: Tensor, rows: Any) -> Tensor:
        worked_out.append(of_projections(direction, rows))
        return worked_out[-1]

    alone, shared = Transformer(CONFIG), Transformer(CONFIG)
    one, other = (make_optimizer(m, OptimConfig(name="muon", lr=0.1)) for m in (alone, shared))
    with_gradients(alone, 0)
    with_gradients(shared, 0)
    monkeypatch.setattr(muon, "_of_projections", counted)
    update(one, GO)
    arriving, owners = iter(list(worked_out)), []
    worked_out.clear()

    def broadcast(tensor: Tensor, owner: int, async_op: bool = False) -> Any:
        owners.append(owner)
        value = next(arriving)
        return SimpleNamespace(wait=lambda: tensor.copy_(value)) if async_op else None

    group = {"is_initialized": lambda: True, "get_world_size": lambda: 2,
             "get_rank": lambda: rank, "broadcast": broadcast}  # fmt: skip
    monkeypatch.setattr(muon, "dist", SimpleNamespace(**group))
    update(other, GO)
    assert owners == [0, 1] * 4
    assert len(worked_out) == owners.count(rank)
    for name, parameter in alone.named_parameters():
        assert torch.equal(parameter, shared.get_parameter(name)), name


def test_a_plan_counts_one_moment_of_a_blocks_matrices() -> None:
    model = configure(preset="tiny").config.model
    ends = model.vocab_size * model.d_model
    for name, expected in (("adamw", 8), ("muon", 4)):
        config = configure(preset="tiny", sets=[f"optim.name={name}"]).config
        in_blocks = expected * (count_params(model) - ends)
        found = memory_by_part(config, 1, "cpu")["moments"]
        assert found == pytest.approx(in_blocks + 8 * ends, rel=1e-3)
