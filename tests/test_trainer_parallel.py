"""Compiled and recomputed blocks share one graph, and give the gradients of neither."""

import pytest
import torch
from torch._dynamo.utils import counters

from trainer.config.config import configure
from trainer.session.network import build_network
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
