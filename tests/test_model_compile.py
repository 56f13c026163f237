"""Blocks compiled one by one: one graph for all of them, and the same model as before."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from model.config import ModelConfig
from model.dropout import keep_mask, row_state
from model.transformer import Transformer

CONFIG = ModelConfig(
    vocab_size=97, seq_len=32, n_layers=10, d_model=64, n_heads=2, n_kv_heads=1, d_ff=96,
    attention_dropout=0.0,
)  # fmt: skip
TOKENS = torch.randint(0, 97, (2, 32), generator=torch.Generator().manual_seed(1))
KEY = torch.tensor([[1, 2], [3, 4]], dtype=torch.int32)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),  # its own, compiling
    pytest.mark.filterwarnings("ignore:The .grad attribute"),
]


@pytest.fixture(scope="module")
def compiled() -> Iterator[Transformer]:
    """A model with compiled blocks, ten of them: more than the compiler's limit of recompiles."""
    torch._dynamo.reset()
    counters.clear()
    model = Transformer(CONFIG)
    for block in model.blocks:
        block.compile(fullgraph=True)
    yield model
    torch._dynamo.reset()


def step(model: Transformer, key: Tensor | None) -> tuple[float, Tensor]:
    """Loss and all gradients, in bf16 autocast."""
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(TOKENS, TOKENS.roll(-1, dims=1), key)
    torch.autograd.backward(loss)
    grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return loss.item(), torch.cat(grads)


def test_all_blocks_share_one_graph_and_agree_with_eager(compiled: Transformer) -> None:
    eager_loss, eager_grads = step(Transformer(CONFIG), KEY)
    loss, grads = step(compiled, KEY)
    assert counters["stats"]["unique_graphs"] == 1
    assert loss == pytest.approx(eager_loss, rel=1e-4)
    assert (grads - eager_grads).norm() < 0.02 * eager_grads.norm()

    other_key_loss, _ = step(compiled, KEY + 1)
    assert other_key_loss != loss
    assert other_key_loss == pytest.approx(step(Transformer(CONFIG), KEY + 1)[0], rel=1e-4)
    assert counters["stats"]["unique_graphs"] == 1


def test_masks_are_those_of_eager_mode() -> None:
    rows = row_state(torch.arange(-8, 8, dtype=torch.int32).view(8, 2) * 2**27, 64)
    compiled_mask = torch.compile(keep_mask, fullgraph=True)
    for number in (0, 5):
        site = torch.tensor(number, dtype=torch.int32)
        assert torch.equal(compiled_mask(rows, site, 200, 0.1), keep_mask(rows, site, 200, 0.1))


def test_the_whole_model_compiles_into_one_graph() -> None:
    """With a backend that traces and does not generate code: the loss must not break the graph."""
    torch._dynamo.reset()
    counters.clear()
    config = replace(CONFIG, n_layers=2)
    model = Transformer(config)
    model.compile(backend="aot_eager", fullgraph=True)
    loss, grads = step(model, KEY)
    assert counters["stats"]["unique_graphs"] == 1
    expected_loss, expected_grads = step(Transformer(config), KEY)
    assert loss == pytest.approx(expected_loss, rel=1e-4)
    assert (grads - expected_grads).norm() < 0.02 * expected_grads.norm()
