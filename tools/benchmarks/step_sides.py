"""The sides of step.py and gpu.py: ours as `summer-train` makes it, two variants, two peers."""

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

from attention import alibi_mask
from model.attention import Attention, LayerCache, fold
from model.positions import Positions
from tools.models.llama import config_to_llama
from trainer.config.config import RunConfig
from trainer.distributed.world import World
from trainer.optimizer.optimizer import finish_gradients, make_optimizer, update
from trainer.session.network import Network, autocast, build_network


@dataclass(frozen=True)
class Work:
    """The work of a side: steps of the run's model, in micro-batches of `rows` of its context."""

    config: RunConfig
    world: World
    rows: int
    accumulated: int = 1  # micro-batches an update, for ours alone

    @property
    def device(self) -> torch.device:
        """Where it is done."""
        return self.world.device


@dataclass(frozen=True)
class Side:
    """One trainer of the same model: `step` takes tokens and targets [B, T], and gives the loss."""

    model: nn.Module
    optimizer: Optimizer
    step: Callable[[Tensor, Tensor], Tensor]


def ours(work: Work) -> Side:
    """The network and the step of `summer-train`."""
    return _our_side(work, build_network(work.config, work.world))


def without_alibi(work: Work) -> Side:
    """The same without ALiBi: what the fold costs."""
    return ours(replace(work, config=rope_alone(work.config)))


def rope_alone(config: RunConfig) -> RunConfig:
    """The same run without ALiBi."""
    return replace(config, model=replace(config.model, alibi=False))


def with_a_mask(work: Work) -> Side:
    """The same with ALiBi as a bf16 mask [H, T, T], made once and shared by all layers."""
    network = build_network(rope_alone(work.config), work.world)
    mask = alibi_mask(work.config.model, work.device)
    for module in network.bare.modules():
        if isinstance(module, Attention):
            module.__class__ = MaskedAttention  # before the first call, which compiles it
            module.register_buffer("mask", mask, persistent=False)
    return _our_side(work, network)


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


class TrialStep:
    """The two parts of an optimizer step of one micro-batch of `n_rows`, as in training."""

    def __init__(self, config: RunConfig, network: Network, device: torch.device, n_rows: int):
        self._config, self._network, self._device = config, network, device
        self.optimizer = make_optimizer(network.bare, config.optim)
        self._key = torch.zeros(n_rows, 2, dtype=torch.int32, device=device)
        self._rejected = torch.zeros((), device=device)
        self._n = n_rows * config.model.seq_len
        self._n_targets = torch.tensor(float(self._n), device=device)

    def micro_batch(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """The loss of tokens and targets [B, T], its gradients left in the parameters."""
        with autocast(self._config, self._device):
            loss: Tensor = self._network.model(tokens, targets, self._key) / self._n
        torch.autograd.backward(loss)
        return loss

    def update(self) -> None:
        """Clip, and move the weights."""
        with record_function("finish_gradients"):
            finish_gradients(self.optimizer, self._n, self._n_targets, self._config.optim)
        update(self.optimizer, self._rejected)


def _our_side(work: Work, network: Network) -> Side:
    parts = TrialStep(work.config, network, work.device, work.rows)

    def step(tokens: Tensor, targets: Tensor) -> Tensor:
        for _ in range(work.accumulated):
            loss = parts.micro_batch(tokens, targets)
        parts.update()
        return loss

    return Side(network.bare, parts.optimizer, step)


def hugging_face(work: Work) -> Side:
    """LlamaForCausalLM of transformers, attention through SDPA, its own loss, all compiled."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = config_to_llama(work.config.model)
    with torch.device(work.device):
        model = LlamaForCausalLM(
            LlamaConfig(**shape, use_cache=False, attn_implementation="sdpa")  # type: ignore[call-arg]
        )
    return _peer_side(work, model, lambda llama, ids, labels: llama(ids, labels=labels).loss)


def litgpt(work: Work) -> Side:
    """GPT of litgpt in Llama's shape, compiled, with the loss of its pretraining script."""
    from litgpt.config import Config
    from litgpt.model import GPT
    from litgpt.utils import chunked_cross_entropy

    config = work.config.model
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
    return _peer_side(work, model, lambda gpt, ids, labels: chunked_cross_entropy(gpt(ids), labels))


def _peer_side(work: Work, model: nn.Module, loss_of: Callable[[Any, Tensor, Tensor], Any]) -> Side:
    """Clipping and fused AdamW as torch has them: more than either peer's script does on a CPU."""
    called: Any = torch.compile(model, dynamic=False) if work.config.compile else model
    optimizer = AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step(tokens: Tensor, targets: Tensor) -> Tensor:
        with autocast(work.config, work.device), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loss: Tensor = loss_of(called, tokens, targets)
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
