"""SummerLM: a decoder-only, pre-norm transformer, on one page.

    x = x + drop(scale1 * attention(norm(x)))
    x = x + drop(scale2 * swiglu(norm(x)))

The residual stream x stays fp32 under bf16 autocast; matrices run in bf16.
"""

from collections.abc import Callable, Sequence
from math import sqrt

import torch
from torch import Tensor, nn

from model.attention import Attention, KVCache, LayerCache
from model.config import ModelConfig
from model.dropout import CounterDropout, row_state
from model.layers import Embedding, Linear, RMSNorm, SwiGLU
from model.loss import linear_cross_entropy
from model.positions import Positions, PositionTables


class Block(nn.Module):
    """One layer. Every block runs the same code on tensors alone, so all share one compiled graph.

    That is why the layer's number is in its dropouts' buffers, and nowhere in Python.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention_dropout = config.attention_dropout
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = RMSNorm(config.d_model, config.norm_eps)
        self.ffn = SwiGLU(config.d_model, config.d_ff)
        self.attention_drop = CounterDropout(config.dropout, site=1 + 2 * layer)
        self.ffn_drop = CounterDropout(config.dropout, site=2 + 2 * layer)
        self.attention_scale = self.ffn_scale = None
        if config.layer_scale:
            self.attention_scale = nn.Parameter(torch.empty(config.d_model))
            self.ffn_scale = nn.Parameter(torch.empty(config.d_model))

    def forward(
        self,
        x: Tensor,
        positions: Positions,
        dropout_rows: Tensor | None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """`x` [B, T, d_model] fp32, to the same; nothing is dropped without `dropout_rows`."""
        dropout = 0.0 if dropout_rows is None else self.attention_dropout
        branch = self.attention(self.attention_norm(x), positions, cache, dropout)
        x = x + self.attention_drop(_scaled(branch, self.attention_scale), dropout_rows)
        branch = self.ffn(self.ffn_norm(x))
        out: Tensor = x + self.ffn_drop(_scaled(branch, self.ffn_scale), dropout_rows)
        return out


def _scaled(branch: Tensor, scale: Tensor | None) -> Tensor:
    """LayerScale (Touvron et al. 2021), in fp32."""
    branch = branch.float()
    return branch if scale is None else branch * scale


class Transformer(nn.Module):
    """The network, with `blocks` a ModuleList to compile, checkpoint or shard one by one.

    On `torch.device("meta")` it takes no memory: then `to_empty(device=...)`, and `init_weights`
    or a state dict. Made elsewhere, it is initialised with seed 0.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.compiled_loss = False
        self.embedding = Embedding(config.vocab_size, config.d_model)
        self.embedding_drop = CounterDropout(config.dropout, site=0)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        if not config.tie_embeddings:
            self.head = Linear(config.d_model, config.vocab_size)
        self.positions = PositionTables(config)
        if not self.embedding.weight.is_meta:
            self.init_weights(seed=0)

    @property
    def head_weight(self) -> Tensor:
        """[V, d_model]: the output matrix, which is the embedding where the two are tied."""
        return self.embedding.weight if self.config.tie_embeddings else self.head.weight

    def compile_parts(self) -> None:
        """Let torch compile a block, one graph for all of them, the first dropout, and the loss."""
        for part in (self.embedding_drop, *self.blocks):
            part.compile(dynamic=False)
        self.compiled_loss = True

    @torch.no_grad()
    def init_weights(self, seed: int = 0) -> None:
        """Fill every parameter in place, on its device, from `seed`.

        Matrices are normal with std init_std and no depth scaling; LayerScale starts at
        1/sqrt(2 n_layers), which keeps the sum of all branches as large as one of them. Smaller
        branches leave the token's own embedding in the stream, which a tied head then repeats:
        measured first losses at full width, where ln V is 10.4, are 11.0 with this, 22 with depth
        scaling on top and 60.6 with LayerScale at 1e-5. Without LayerScale the output matrices
        take over its factor.
        """
        config = self.config
        generator = torch.Generator(device=self.embedding.weight.device).manual_seed(seed)
        branch_scale = 1.0 / sqrt(2 * config.n_layers)
        for name, parameter in self.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
            elif name.endswith("_scale"):
                parameter.fill_(branch_scale)
            else:
                closes_branch = name.endswith((".out.weight", ".down.weight"))
                scale = branch_scale if closes_branch and not config.layer_scale else 1.0
                parameter.normal_(0.0, config.init_std * scale, generator=generator)

    def hidden(
        self, tokens: Tensor, dropout_key: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """What the head reads: [B, T, d_model], normalised, for tokens [B, T] int64.

        With a cache, the tokens follow those that it holds. Raises ModelError beyond its room, or
        beyond the context in which ALiBi is exact.
        """
        length = tokens.shape[1]
        positions = self.positions(0 if cache is None else cache.start_of(length), length)
        rows = None
        if dropout_key is not None and self.training:
            rows = row_state(dropout_key, length)
        x = self.embedding(tokens).float()
        if rows is not None:
            x = self.embedding_drop(x, rows)
        return self.body(x, positions, rows, None if cache is None else cache.layers)

    def body(
        self,
        x: Tensor,
        positions: Positions,
        dropout_rows: Tensor | None = None,
        caches: Sequence[LayerCache] | None = None,
        call: Callable[..., Tensor] = nn.Module.__call__,
    ) -> Tensor:
        """All blocks and the last norm, over embedded tokens `x` [B, T, d_model] fp32.

        `call(block, x, ...)` runs a block: another one may look at its input, or recompute it.
        """
        for layer, block in enumerate(self.blocks):
            cache = None if caches is None else caches[layer]
            x = call(block, x, positions, dropout_rows, cache)
        out: Tensor = self.norm(x)
        return out

    def forward(self, tokens: Tensor, targets: Tensor, dropout_key: Tensor | None = None) -> Tensor:
        """The loss summed over valid targets: fp32 [].

        `tokens` and `targets` are [B, T] int64, targets -100 where ignored. `dropout_key` [B, 2]
        int32 names each sample: without it, or in eval mode, nothing is dropped.
        """
        hidden = self.hidden(tokens, dropout_key).flatten(0, 1)
        weight, z_loss = self.head_weight, self.config.z_loss
        return linear_cross_entropy(
            hidden, weight, targets.flatten(), z_loss=z_loss, compiled=self.compiled_loss
        )

    def logits(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """Scores of the next token after each of tokens [B, T]: [B, T, V] fp32."""
        hidden = self.hidden(tokens, cache=cache)
        return nn.functional.linear(hidden, self.head_weight).float()
