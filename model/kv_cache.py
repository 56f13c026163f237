"""The keys and values of the tokens already read, as the attention kernel wants them."""

import torch

from model.attention import LayerCache, kernel_head_dim
from model.config import ModelConfig, ModelError
from model.positions import check_context


class KVCache:
    """Room for `max_len` tokens of `batch_size` sequences; `length` of them are filled.

    Keys are stored turned by RoPE, with ALiBi's dims in front and the kernel's padding behind.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        max_len: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if config.alibi:
            check_context(max_len)
        device = torch.device(device)
        shape = (batch_size, config.kv_heads, max_len, kernel_head_dim(config, device))
        self.layers = [
            LayerCache(
                torch.zeros(shape, device=device, dtype=dtype),
                torch.zeros(shape, device=device, dtype=dtype),
            )
            for _ in range(config.n_layers)
        ]
        self.max_len = max_len

    @property
    def length(self) -> int:
        """Tokens read so far."""
        return self.layers[0].length

    def start_of(self, n_tokens: int) -> int:
        """The position at which the next `n_tokens` start; ModelError without room for them."""
        start, end = self.length, self.length + n_tokens
        if end > self.max_len:
            raise ModelError(
                f"the KV cache has room for {self.max_len} tokens and {end} are needed:"
                " make it with a larger max_len, or generate less"
            )
        return start
