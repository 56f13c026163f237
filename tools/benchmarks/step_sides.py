"""The sides of step.py: ours as `train` makes it, two variants of it, and two peers."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.profiler import record_function

from attention_sides import alibi_mask
from model.attention import Attention, LayerCache, fold
from model.config import ModelConfig
from model.positions import Positions
from model.transformer import Transformer
from trainer.optimizer.optimizer import OptimConfig, finish_gradients, make_optimizer, update

LR: Final = 3e-4


@dataclass(frozen=True)
class Work:
    """The work of a side: a model of this shape, `rows` rows of its context a step."""

    config: ModelConfig
    rows: int
    device: str
    compiled: bool


@dataclass(frozen=True)
class Side:
    """One trainer of the same model: `step` takes tokens and targets [B, T], and gives the loss."""

    model: nn.Module
    optimizer: Optimizer
    step: Callable[[Tensor, Tensor], Tensor]


def ours(work: Work) -> Side:
    """The model and the step of `summer-train`."""
    torch.manual_seed(0)
    with torch.device(work.device):
        model = Transformer(work.config)
    return _our_side(work, model)


def without_alibi(work: Work) -> Side:
    """The same without ALiBi: what the fold costs."""
    return ours(replace(work, config=replace(work.config, alibi=False)))


def with_a_mask(work: Work) -> Side:
    """The same with ALiBi as a bf16 mask [H, T, T], made once and shared by all layers."""
    torch.manual_seed(0)
    with torch.device(work.device):
        model = Transformer(replace(work.config, alibi=False))
    mask = alibi_mask(work.config, torch.device(work.device))
    for module in model.modules():
        if isinstance(module, Attention):
            module.__class__ = MaskedAttention
            module.register_buffer("mask", mask, persistent=False)
    return _our_side(work, model)


class MaskedAttention(Attention):
    """Attention with ALiBi and the causal triangle in one explicit mask."""

    mask: Tensor

    def forward(
        self, x: Tensor, positions: Positions, cache: LayerCache | None, dropout: float
    ) -> Tensor:
        """As Attention.forward, without a cache."""
        config = self.config
        B, T, _ = x.shape
        qkv = self.qkv(x).view(B, T, -1, config.head_dim)
        q, k, v = qkv.split([config.n_heads, config.kv_heads, config.kv_heads], dim=2)
        q, k, v = fold(q, k, v, positions, config)  # RoPE alone: alibi is off
        gqa = config.kv_heads != config.n_heads
        attended = F.scaled_dot_product_attention(q, k, v, self.mask, dropout, enable_gqa=gqa)
        out: Tensor = self.out(attended.transpose(1, 2).reshape(B, T, -1))
        return out


def _our_side(work: Work, model: Transformer) -> Side:
    if work.compiled:
        model.compile_parts()
    optim = OptimConfig(lr=LR)
    optimizer = make_optimizer(model, optim)
    key = torch.arange(2 * work.rows, dtype=torch.int32, device=work.device).view(work.rows, 2)
    not_rejected = torch.zeros((), device=work.device)

    def step(tokens: Tensor, targets: Tensor) -> Tensor:
        n_targets = torch.tensor(float(tokens.numel()), device=work.device)
        with torch.autocast(work.device, torch.bfloat16):
            loss: Tensor = model(tokens, targets, key) / tokens.numel()
        torch.autograd.backward(loss)
        with record_function("finish_gradients"):
            finish_gradients(optimizer, tokens.numel(), n_targets, optim)
        update(optimizer, not_rejected)
        return loss

    return Side(model, optimizer, step)


def hugging_face(work: Work) -> Side:
    """LlamaForCausalLM of transformers, attention through SDPA, its own loss, all compiled."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = work.config
    torch.manual_seed(0)
    with torch.device(work.device):
        model = LlamaForCausalLM(
            LlamaConfig(  # type: ignore[call-arg]  # of a dataclass with more behind it
                vocab_size=config.vocab_size,
                hidden_size=config.d_model,
                intermediate_size=config.d_ff,
                num_hidden_layers=config.n_layers,
                num_attention_heads=config.n_heads,
                num_key_value_heads=config.kv_heads,
                max_position_embeddings=config.seq_len,
                tie_word_embeddings=config.tie_embeddings,
                use_cache=False,
                attn_implementation="sdpa",
            )
        )

    def loss_of(called: Any, tokens: Tensor, targets: Tensor) -> Tensor:
        loss: Tensor = called(input_ids=tokens, labels=targets).loss
        return loss

    return _peer_side(work, model, loss_of)


def litgpt(work: Work) -> Side:
    """GPT of litgpt in Llama's shape, compiled, with the loss of its pretraining script."""
    from litgpt.config import Config
    from litgpt.model import GPT
    from litgpt.utils import chunked_cross_entropy

    config = work.config
    torch.manual_seed(0)
    with torch.device(work.device):
        model = GPT(
            Config(
                block_size=config.seq_len,
                n_layer=config.n_layers,
                n_head=config.n_heads,
                n_query_groups=config.kv_heads,
                n_embd=config.d_model,
                intermediate_size=config.d_ff,
                vocab_size=config.vocab_size,
                padded_vocab_size=config.vocab_size,
                norm_class_name="RMSNorm",
                mlp_class_name="LLaMAMLP",
                rotary_percentage=1.0,
                parallel_residual=False,
                bias=False,
            )
        )
    if config.tie_embeddings:
        model.transformer.wte.weight = model.lm_head.weight

    def loss_of(called: Any, tokens: Tensor, targets: Tensor) -> Tensor:
        loss: Tensor = chunked_cross_entropy(called(tokens), targets)
        return loss

    return _peer_side(work, model, loss_of)


def _peer_side(
    work: Work, model: nn.Module, loss_of: Callable[[Any, Tensor, Tensor], Tensor]
) -> Side:
    """Clipping and fused AdamW as torch has them: more than either peer's script does on a CPU."""
    called: Any = torch.compile(model, dynamic=False) if work.compiled else model
    optimizer = AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step(tokens: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(work.device, torch.bfloat16), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loss = loss_of(called, tokens, targets)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return Side(model, optimizer, step)


SIDES: Final[dict[str, Callable[[Work], Side]]] = {
    "ours": ours,
    "Hugging Face Llama": hugging_face,
    "litgpt": litgpt,
    "ours, ALiBi as a mask": with_a_mask,
    "ours, without ALiBi": without_alibi,
}
