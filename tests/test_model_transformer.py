"""The network: what it promises about its input, its start and its precision."""

from dataclasses import replace
from math import log, sqrt

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from model.config import ModelConfig
from model.transformer import Transformer

CONFIG = ModelConfig(
    vocab_size=97, seq_len=32, n_layers=2, d_model=64, n_heads=4, n_kv_heads=2, d_ff=96,
    attention_dropout=0.0,
)  # fmt: skip
TOKENS = torch.randint(0, 97, (3, 32), generator=torch.Generator().manual_seed(1))
TARGETS = TOKENS.roll(-1, dims=1)
KEY = torch.tensor([[1, 2], [3, 4], [-5, 6]], dtype=torch.int32)


def test_the_loss_is_the_cross_entropy_of_the_logits() -> None:
    model = Transformer(CONFIG)
    targets = TARGETS.clone()
    targets[:, -1] = -100
    expected = torch.nn.functional.cross_entropy(
        model.logits(TOKENS).flatten(0, 1), targets.flatten(), reduction="sum"
    )
    loss = model(TOKENS, targets)
    assert loss.dtype == torch.float32 and loss.shape == ()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("alibi", [True, False])
def test_no_token_sees_a_later_one(alibi: bool) -> None:
    model = Transformer(replace(CONFIG, alibi=alibi))
    changed = TOKENS.clone()
    changed[:, 20:] = (changed[:, 20:] + 1) % 97
    before, after = model.logits(TOKENS), model.logits(changed)
    assert torch.equal(before[:, :20], after[:, :20])
    assert not torch.allclose(before[:, 20:], after[:, 20:])


def test_names_and_shapes_of_the_weights() -> None:
    with torch.device("meta"):
        model = Transformer(replace(CONFIG, n_layers=1, tie_embeddings=False))
    assert {name: tuple(p.shape) for name, p in model.state_dict().items()} == {
        "embedding.weight": (97, 64),
        "blocks.0.attention_norm.weight": (64,),
        "blocks.0.attention.qkv.weight": (64 + 2 * 32, 64),
        "blocks.0.attention.out.weight": (64, 64),
        "blocks.0.attention_scale": (64,),
        "blocks.0.ffn_norm.weight": (64,),
        "blocks.0.ffn.gate_up.weight": (192, 64),
        "blocks.0.ffn.down.weight": (64, 96),
        "blocks.0.ffn_scale": (64,),
        "norm.weight": (64,),
        "head.weight": (97, 64),
    }


def test_initialisation() -> None:
    config = replace(CONFIG, vocab_size=512, d_model=128, d_ff=512)
    for layer_scale, out_std in ((True, 0.02), (False, 0.02 / sqrt(4))):
        model = Transformer(replace(config, layer_scale=layer_scale))
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                value = 1.0 if name.endswith("norm.weight") else 1 / sqrt(4)
                assert torch.equal(parameter, torch.full_like(parameter, value)), name
            else:
                closing = name.endswith(("out.weight", "down.weight"))
                std = out_std if closing else 0.02
                assert parameter.std().item() == pytest.approx(std, rel=0.03), name
                assert abs(parameter.mean().item()) < 5 * std / sqrt(parameter.numel())


def test_a_seed_names_the_weights() -> None:
    first, second, third = Transformer(CONFIG), Transformer(CONFIG), Transformer(CONFIG)
    first.init_weights(7)
    second.init_weights(7)
    third.init_weights(8)
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, second.get_parameter(name))
        assert parameter.ndim == 1 or not torch.equal(parameter, third.get_parameter(name))


def test_a_model_from_the_meta_device_is_the_same_model() -> None:
    expected = Transformer(CONFIG)
    with torch.device("meta"):
        model = Transformer(CONFIG)
    model.to_empty(device="cpu")
    model.init_weights(0)
    assert torch.equal(model(TOKENS, TARGETS, KEY), expected(TOKENS, TARGETS, KEY))
    loaded = Transformer(CONFIG)
    loaded.init_weights(3)
    loaded.load_state_dict(model.state_dict())
    assert torch.equal(loaded.logits(TOKENS), expected.logits(TOKENS))


def test_first_loss_at_full_width() -> None:
    """Random targets: the loss of a model that knows nothing is near ln V."""
    with torch.device("meta"):
        model = Transformer(ModelConfig(n_layers=2, seq_len=16))
    model.to_empty(device="cpu")
    model.init_weights(0)
    generator = torch.Generator().manual_seed(0)
    tokens, targets = torch.randint(0, 32_768, (2, 1, 16), generator=generator)
    with torch.no_grad():
        loss = model(tokens, targets).item() / 16
    assert abs(loss - log(32_768)) < 1.0


def test_dropout_needs_a_key_and_training_mode() -> None:
    model = Transformer(CONFIG)
    plain = model(TOKENS, TARGETS)
    dropped = model(TOKENS, TARGETS, KEY)
    assert not torch.equal(dropped, plain)
    assert torch.equal(model(TOKENS, TARGETS, KEY), dropped)
    assert not torch.equal(model(TOKENS, TARGETS, KEY + 1), dropped)
    model.eval()
    assert torch.equal(model(TOKENS, TARGETS, KEY), plain)


def test_a_sample_s_loss_does_not_depend_on_its_batch() -> None:
    model = Transformer(CONFIG)
    together = model(TOKENS, TARGETS, KEY)
    apart = sum(
        model(*(part[row : row + 1] for part in (TOKENS, TARGETS, KEY))) for row in range(3)
    )
    assert together.item() == pytest.approx(apart.item(), rel=1e-6)


def test_dropout_is_the_same_when_activations_are_recomputed() -> None:
    model = Transformer(CONFIG)
    grads = []
    for recompute in (False, True):
        model.zero_grad()
        if recompute:
            for block in model.blocks:
                forward = block.forward
                block.forward = lambda *args, forward=forward: checkpoint(
                    forward, *args, use_reentrant=False, preserve_rng_state=False
                )
        torch.autograd.backward(model(TOKENS, TARGETS, KEY))
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(grads[0]) == len(list(model.parameters()))
    assert all(map(torch.equal, *grads))


def test_the_residual_stream_stays_fp32_under_autocast() -> None:
    model = Transformer(CONFIG)
    seen = set()

    def note(module: torch.nn.Module, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        seen.update({args[0].dtype, out.dtype})

    for block in model.blocks:
        block.register_forward_hook(note)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(TOKENS, TARGETS, KEY)
    assert seen == {torch.float32}
    assert loss.item() == pytest.approx(model(TOKENS, TARGETS, KEY).item(), rel=1e-2)


def test_bf16_weights_give_logits_too() -> None:
    model = Transformer(CONFIG)
    expected = model.logits(TOKENS)
    logits = model.to(torch.bfloat16).logits(TOKENS)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected, rtol=0, atol=0.05)


def test_attention_dropout_is_the_kernel_s_own() -> None:
    model = Transformer(replace(CONFIG, dropout=0.0, attention_dropout=0.3))
    plain = model(TOKENS, TARGETS)
    torch.manual_seed(1)
    first = model(TOKENS, TARGETS, KEY)
    second = model(TOKENS, TARGETS, KEY)
    torch.manual_seed(1)
    assert torch.equal(model(TOKENS, TARGETS, KEY), first)
    assert not torch.equal(first, second)
    assert not torch.equal(first, plain)
    assert torch.equal(model(TOKENS, TARGETS), plain)


def test_every_tensor_is_made_on_the_device_of_its_inputs() -> None:
    """With another default device, a tensor made without `device=` would meet those of the CPU."""
    model = Transformer(CONFIG)
    expected = model(TOKENS, TARGETS, KEY)
    with torch.device("meta"):
        loss = model(TOKENS, TARGETS, KEY)
        torch.autograd.backward(loss)
    assert torch.equal(loss, expected)
