"""Compiled and recomputed blocks share one graph, and give the gradients of neither."""

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from model.config import ModelConfig
from model.self_test import KernelTest
from model.transformer import Transformer
from trainer.config.config import configure
from trainer.session.network import autocast, build_network, exposed_exchange_s
from trainer_samples import ALONE, set_texts

LAYERS = 9  # one more than torch.compile specialises before it gives up


def gradients(**changes: object) -> tuple[float, dict[str, torch.Tensor]]:
    sets = set_texts(
        model__n_layers=LAYERS,
        model__vocab_size=128,
        model__seq_len=32,
        precision="fp32",
        **changes,
    )
    network = build_network(configure(preset="tiny", sets=sets).config, ALONE)
    tokens = torch.arange(64).view(2, 32)
    loss = network.model(tokens, tokens + 1, torch.ones(2, 2, dtype=torch.int32))
    loss.backward()
    named = network.bare.named_parameters()
    return loss.item(), {name: p.grad for name, p in named if p.grad is not None}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # its own, compiling
@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_compiled_and_recomputed_blocks_give_the_same_gradients() -> None:
    loss, plain = gradients()
    torch._dynamo.reset()
    counters.clear()
    compiled_loss, compiled = gradients(compile="true", activation_checkpointing="full")
    assert (
        counters["stats"]["unique_graphs"] == 4
    )  # a block, the first dropout, two inside the loss
    # else CUDA's dropout can be corrupted (2.11 does not know it)
    assert getattr(torch._inductor.config, "align_random_eager", True)
    assert compiled_loss == pytest.approx(loss, rel=1e-6)
    assert compiled.keys() == plain.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(compiled[name], gradient, rtol=1e-4, atol=1e-5)


class Products(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts matrix products and all other operators."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = Counter[bool]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[str(func).startswith(("aten.mm", "aten.addmm"))] += 1
        return func(*args, **(kwargs or {}))


def test_what_is_recomputed_is_nothing_pointwise_work_or_everything() -> None:
    counted = {}
    for kind in ("none", "selective", "full"):
        with Products() as products:
            gradients(activation_checkpointing=kind)
        counted[kind] = products.count
    none, selective, full = counted.values()
    assert selective[True] == none[True] and full[True] > none[True]
    assert min(selective[False], full[False]) > none[False]


@pytest.fixture
def unset() -> Iterator[None]:
    """The two settings unset, and restored by torch's own means: monkeypatch would delete them."""
    with contextlib.ExitStack() as stack:
        for settings, name in ((torch._dynamo.config, "optimize_ddp"), *INDUCTOR):
            stack.enter_context(settings.patch({name: None}))
        yield


@pytest.mark.usefixtures("unset")
def test_compiling_needs_a_compiler_and_two_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = list[Transformer]()
    monkeypatch.setattr(Transformer, "compile_parts", lambda model: compiled.append(model))
    sets = set_texts(model__n_layers=1, model__vocab_size=128, compile="true")
    config = configure(preset="tiny", sets=sets).config
    monkeypatch.setattr("shutil.which", lambda name: None)
    notes = build_network(config, ALONE).notes
    assert not compiled and torch._dynamo.config.optimize_ddp is None
    assert notes[1:] == (
        "not compiled, which is slower: there is no C++ compiler (install g++, or --set"
        " compile=false)",
    )
    monkeypatch.setattr("shutil.which", lambda name: "/bin/c++" if name == "c++" else None)
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"include": "/nowhere"})
    assert "Python.h is missing" in build_network(config, ALONE).notes[1]
    monkeypatch.setattr("trainer.session.network._lack_of_a_compiler", lambda device: "")
    bare, _, notes, _ = build_network(config, ALONE)
    assert compiled == [bare] and len(notes) == 1
    assert torch._dynamo.config.optimize_ddp is False
    assert all(getattr(settings, name) is True for settings, name in INDUCTOR)


INDUCTOR = [
    (settings, name)
    for settings, name in ((torch._inductor.config, "align_random_eager"),)
    if hasattr(settings, name)  # 2.11 does not know it
]


class Measured(DistributedDataParallel):
    """What DDP says about a backward pass, without ranks."""

    def __init__(self, **seen: int) -> None:
        torch.nn.Module.__init__(self)
        self.seen = seen

    def _get_ddp_logging_data(self) -> dict[str, int]:
        return self.seen


def test_an_exchange_is_exposed_where_no_gradient_was_computed_meanwhile() -> None:
    both = {"backward_comm_time": 5 * 10**9, "backward_compute_comm_overlap_time": 2 * 10**9}
    assert exposed_exchange_s(Measured(**both)) == 3.0
    assert exposed_exchange_s(Measured(backward_comm_time=10**9)) == 1.0
    assert exposed_exchange_s(Measured(backward_compute_comm_overlap_time=10**9)) == 0.0
    assert exposed_exchange_s(Measured()) == exposed_exchange_s(torch.nn.Linear(1, 1)) == 0.0


@pytest.mark.parametrize(
    ("precision", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)]
)
def test_matrices_are_multiplied_in_the_run_s_precision(
    precision: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    tested = list[torch.dtype]()

    def noted(device: torch.device, dtype: torch.dtype, config: ModelConfig) -> KernelTest:
        tested.append(dtype)
        return KernelTest("FLASH_ATTENTION", 1.5e-5, 2e-3, None)

    monkeypatch.setattr("trainer.session.network.self_test", noted)
    sets = set_texts(model__n_layers=1, model__vocab_size=128, precision=precision)
    config = configure(preset="tiny", sets=sets).config
    notes = build_network(config, ALONE).notes
    assert notes == (
        "attention kernel: FLASH_ATTENTION, within 1.5e-05 nats of fp32 math (limit 0.001), "
        "gradients within 2.0e-03",
    )
    with autocast(config, torch.device("cpu")):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype
    assert tested == [dtype]
