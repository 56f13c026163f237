"""A model of SummerLM inside `transformers`: a thin wrapper, which travels with the weights.

    AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)

summer-convert copies it, and the files of model/ that it wraps, into each folder whose model no
architecture of the library computes (ALiBi). It needs torch and transformers alone, and keeps the
names of the weights. Dropout is left out. The cache holds keys and values as attention reads them.
"""

from dataclasses import asdict, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from model.attention import LayerCache
from model.config import ModelConfig
from model.layers import DerivedBuffers
from model.positions import Positions, PositionTables
from model.transformer import Transformer

OPTIONS = tuple(each.name for each in fields(ModelConfig))


class SummerLMConfig(PretrainedConfig):  # type: ignore[misc, no-untyped-call, unused-ignore]
    """Every option of ModelConfig, under its own name."""

    model_type = "summerlm"
    keys_to_ignore_at_inference = ("past_key_values",)
    attribute_map = {  # noqa: RUF012  # the library's own names, read by it as they are
        "hidden_size": "d_model",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
        "intermediate_size": "d_ff",
        "max_position_embeddings": "seq_len",
        "initializer_range": "init_std",
    }

    def __init__(self, **kwargs: Any) -> None:
        shape = ModelConfig(**{name: kwargs.pop(name) for name in OPTIONS if name in kwargs})
        vars(self).update(asdict(shape), n_kv_heads=shape.kv_heads)
        derived = {"head_dim": shape.head_dim, "tie_word_embeddings": shape.tie_embeddings}
        super().__init__(**(kwargs | derived))

    def shape(self) -> ModelConfig:
        """The configuration as model/ takes it."""
        return ModelConfig(**{name: getattr(self, name) for name in OPTIONS})


class HFLayerCache(LayerCache):
    """One layer of the library's cache."""

    def __init__(self, cache: DynamicCache, layer: int) -> None:
        self.cache, self.layer = cache, layer

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values of the next tokens; all of them so far."""
        both: tuple[Tensor, Tensor] = self.cache.update(k, v, self.layer)
        return both


class SummerLMModel(PreTrainedModel):  # type: ignore[misc, no-untyped-call, unused-ignore]
    """The parts of a Transformer under their own names, and what runs them up to the last norm."""

    config_class = SummerLMConfig
    config: SummerLMConfig
    embedding: nn.Module
    blocks: nn.ModuleList
    positions: PositionTables
    head: nn.Module
    _input_embed_layer = "embedding"
    _no_split_modules = ["Block"]  # noqa: RUF012  # the library wants a list
    _supports_sdpa = True
    supports_gradient_checkpointing = True
    gradient_checkpointing = False

    def __init__(self, config: SummerLMConfig) -> None:
        super().__init__(config)
        for name, part in Transformer(config.shape()).named_children():
            self.add_module(name, part)
        self.post_init()  # type: ignore[no-untyped-call, unused-ignore]

    def _init_weights(self, module: nn.Module) -> None:
        """Fill what no file holds: the tables too, which the library takes out of meta empty."""
        if isinstance(module, DerivedBuffers):
            if (buffer := next(module.buffers(), None)) is not None:
                module.make_buffers(buffer.device)
        else:
            super()._init_weights(module)  # type: ignore[no-untyped-call, unused-ignore]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """What the head reads, [B, T, d_model], for `input_ids` [B, T] or their vectors.

        `attention_mask` [B, S] marks what is padding, on either side. Of `position_ids` only the
        differences count. Hidden states are the input of each block, and what the head reads.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        recompute = self.gradient_checkpointing and self.training and past_key_values is None
        wants_cache = not self.training if use_cache is None else use_cache
        if past_key_values is None and wants_cache and not recompute:
            past_key_values = DynamicCache()
        x = (self.embedding(input_ids) if inputs_embeds is None else inputs_embeds).float()
        start = 0 if past_key_values is None else past_key_values.get_seq_length()
        if position_ids is None:
            position_ids = torch.arange(start, start + x.shape[1], device=x.device)[None]
        *tables, _ = self.positions(0, int(position_ids.max()) + 1)
        at = (None if table is None else table[position_ids] for table in tables)
        positions = Positions(*at)._replace(mask=padding_mask(start, x, attention_mask))

        states: list[Tensor] = []

        def call(block: nn.Module, x: Tensor, *rest: Any) -> Tensor:
            states.append(x)
            out: Tensor = (
                self._gradient_checkpointing_func(block.__call__, x, *rest)
                if recompute
                else block(x, *rest)
            )
            return out

        caches = None
        if past_key_values is not None:
            caches = [HFLayerCache(past_key_values, n) for n in range(len(self.blocks))]
        itself: Any = self  # which has all that a Transformer's body uses
        last = Transformer.body(itself, x, positions, caches=caches, call=call)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        return BaseModelOutputWithPast(
            last_hidden_state=last,
            past_key_values=past_key_values,
            hidden_states=(*states, last) if output_hidden_states else None,
        )


class SummerLMForCausalLM(SummerLMModel, GenerationMixin):  # type: ignore[misc, no-untyped-call, unused-ignore]
    """With the head, which has no weights of its own where it is tied to the embedding."""

    def get_output_embeddings(self) -> nn.Module | None:
        """The head, if it is one of its own."""
        return None if self.config.tie_embeddings else self.head

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Put another head in its place."""
        self.head = value

    def forward(  # type: ignore[override, unused-ignore]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B, T, V] fp32, with the mean loss where there are labels."""
        read = super().forward(input_ids, attention_mask, **kwargs)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = F.linear(read[0][:, kept], Transformer.head_weight.__get__(self)).float()
        loss = None
        if labels is not None:
            size = self.config.vocab_size
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=read.past_key_values,
            hidden_states=read.hidden_states,
        )


def padding_mask(start: int, x: Tensor, attention_mask: Tensor | None) -> Tensor | None:
    """[B, 1, T, S], True where a query of `x` [B, T, d_model] may look; None without padding.

    Padding looks at itself, so that it has a softmax: its NaN would reach the others' sums.
    """
    if attention_mask is None:
        return None
    if attention_mask.dim() != 2:
        raise ValueError("attention_mask: give [batch, length], 0 for padding, and no static cache")
    if attention_mask.all():
        return None
    S = start + x.shape[1]
    triangle = torch.ones(x.shape[1], S, dtype=torch.bool, device=x.device).tril(start)
    itself = triangle ^ triangle.tril(start - 1)
    return (triangle & attention_mask[:, None, None, :S].bool()) | itself
