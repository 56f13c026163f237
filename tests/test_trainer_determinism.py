"""Strict where every kernel can be; where one cannot, the run says which, or does not start."""

import os
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from model.layers import SwiGLU
from model.self_test import KernelTest
from trainer.config.config import RunConfig, configure, from_stored
from trainer.distributed.world import join_world
from trainer.errors import ConfigError, TrainingError
from trainer.optimizer.optimizer import make_optimizer, update
from trainer.session import network
from trainer.session.network import (
    _be_deterministic,
    _unrepeatable,
    autocast,
    build_network,
    gradients_in_buckets,
    no_sync_unless_last,
)
from trainer_samples import ALONE, become, free_ports, on_ranks, set_texts

GPU = replace(ALONE, device=torch.device("cuda:0"))
COMPILED = (
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),  # its own, compiling
    pytest.mark.filterwarnings("ignore:The .grad attribute"),
)
TEST = KernelTest("FLASH_ATTENTION", 1e-5, 1e-3, 0.9)


def small(**changes: object) -> RunConfig:
    sets = set_texts(model__vocab_size=128, model__seq_len=32, micro_batch_size=2, **changes)
    return configure(preset="tiny", sets=sets).config


@pytest.fixture
def torch_as_before() -> Iterator[None]:
    """Torch's settings are afterwards as they were."""
    yield
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=COMPILED)])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_this_machine_repeats_a_step_bit_for_bit(precision: str, compiled: bool) -> None:
    config = small(precision=precision, model__attention_dropout=0.1)
    assert _unrepeatable(config, torch.device("cpu"), compiled=compiled) == ""


@pytest.mark.parametrize("backward", [False, True])
def test_what_differs_is_named(monkeypatch: pytest.MonkeyPatch, backward: bool) -> None:
    """A kernel whose result, or whose gradient alone, is another one each time."""
    forward, calls = SwiGLU.forward, [0.0]

    def noisy(self: SwiGLU, x: Tensor) -> Tensor:
        calls[0] += 1e-3
        out = forward(self, x)
        return out + (out - out.detach() if backward else 1.0) * calls[0]

    monkeypatch.setattr(SwiGLU, "forward", noisy)
    found = _unrepeatable(small(precision="fp32"), torch.device("cpu"), compiled=False)
    what = "the gradient of embedding.weight" if backward else "the loss"
    assert found == f"{what} differs between two passes over the same tokens"


def test_an_operator_without_a_strict_kernel_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking(self: SwiGLU, x: Tensor) -> Tensor:
        raise RuntimeError("foo_cuda does not have a deterministic implementation, but. You can")

    monkeypatch.setattr(SwiGLU, "forward", lacking)
    found = _unrepeatable(small(), torch.device("cpu"), compiled=False)
    assert found == "foo_cuda does not have a deterministic implementation, but"
    monkeypatch.setattr(SwiGLU, "forward", lambda self, x: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # anything else is no finding
        _unrepeatable(small(), torch.device("cpu"), compiled=False)


@pytest.mark.usefixtures("torch_as_before")
@pytest.mark.parametrize("wanted", ["auto", "true"])
def test_a_device_that_can_is_strict(monkeypatch: pytest.MonkeyPatch, wanted: str) -> None:
    monkeypatch.setattr(network, "_unrepeatable", lambda *of, **how: "")
    assert _be_deterministic(small(deterministic=wanted), GPU, compiled=False) == ""
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()  # flash looks at this
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


@pytest.mark.usefixtures("torch_as_before")
def test_a_device_that_cannot_says_so_or_does_not_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(network, "_unrepeatable", lambda *of, **how: "foo has no kernel")
    assert _be_deterministic(small(), GPU, compiled=False) == "foo has no kernel"
    assert not torch.are_deterministic_algorithms_enabled()
    with pytest.raises(TrainingError, match="deterministic=true: foo has no kernel; --set det"):
        _be_deterministic(small(deterministic="true"), GPU, compiled=False)
    monkeypatch.setattr(network, "_unrepeatable", lambda *of, **how: 1 / 0)  # not even tried
    found = _be_deterministic(small(deterministic="false"), GPU, compiled=False)
    assert found == "deterministic=false asks for speed"
    assert not torch.are_deterministic_algorithms_enabled()


def test_the_run_says_that_it_is_not_bit_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "self_test", lambda *of: TEST)
    assert build_network(small(), ALONE).repeatable
    monkeypatch.setattr(network, "_be_deterministic", lambda *of, **how: "foo has no kernel")
    built = build_network(small(), ALONE)
    assert not built.repeatable
    assert built.notes[1] == "! resuming will not be bit-exact here: foo has no kernel"


@pytest.mark.parametrize(
    ("text", "value"), [("true", "true"), ("false", "false"), ("auto", "auto")]
)
def test_three_values_are_taken(text: str, value: str) -> None:
    assert configure(preset="tiny", sets=[f"deterministic={text}"]).config.deterministic == value
    with pytest.raises(ConfigError, match="must be one of auto, true, false"):
        configure(preset="tiny", sets=["deterministic=yes"])


@pytest.mark.parametrize(("stored", "means"), [(True, "auto"), (False, "false"), ("true", "true")])
def test_a_run_of_an_earlier_version_means_what_it_meant(stored: object, means: str) -> None:
    """There true was the default, and as far as the device could."""
    assert from_stored(RunConfig, {"deterministic": stored}, "x", "0.2.0").deterministic == means


def buckets(built: network.Network) -> dict[int, int]:
    """Address and bytes of each piece of memory that holds gradients."""
    gradients = [p.grad for p in built.bare.parameters() if p.grad is not None]
    assert len(gradients) == len(list(built.bare.parameters()))  # none will be made anew
    storages = [gradient.untyped_storage() for gradient in gradients]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


def check_buckets(rank: int, port: int) -> None:
    """One of two ranks: gradients stay where DDP put them, in accumulation and over updates."""
    become(rank, 2, port)
    config = small(model__n_layers=3, model__d_model=256, model__d_ff=768)
    with join_world("cpu") as world:
        built = build_network(config, world)
        optimizer, parameters = (
            make_optimizer(built.bare, config.optim),
            list(built.bare.parameters()),
        )
        before = buckets(built)
        assert len(before) > 1  # a bucket a block, from the first exchange on
        assert sum(before.values()) == 4 * sum(p.numel() for p in parameters)
        for number in range(6):
            last = number % 3 == 2
            with no_sync_unless_last(built.model, number % 3, 3), autocast(config, world.device):
                tokens = torch.full((2, 32), number + world.rank)
                loss = built.model(tokens, tokens, torch.zeros(2, 2, dtype=torch.int32))
            loss.backward()
            assert buckets(built) == before
            assert all(p.grad is not None and bool(p.grad.any()) for p in parameters)
            if last:
                update(
                    optimizer, torch.tensor(0.0), keep_gradients=gradients_in_buckets(built.model)
                )
                assert buckets(built) == before
                assert not any(p.grad is None or bool(p.grad.any()) for p in parameters)


def test_gradients_exist_once() -> None:
    """Made beside DDP's buckets they would take 17.9 GB more at full size."""
    on_ranks(2, check_buckets, *free_ports(1))
    assert not gradients_in_buckets(build_network(small(), ALONE).model)
