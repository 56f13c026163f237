"""The keys and values of the tokens already read, as the attention kernel wants them."""

import torch
from torch import Tensor

from model.alibi import check_context
from model.config import ModelConfig, ModelError
from model.kernel import kernel_head_dim


class LayerCache:
    """One layer's part of the cache: [B, Hkv, max_len, D'] of padded keys and of padded values."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values

    def append(self, start: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v [B, Hkv, T, D'] from position `start`; all keys and values up to there."""
        end = start + k.shape[2]
        self.keys[:, :, start:end] = k
        self.values[:, :, start:end] = v
        return self.keys[:, :, :end], self.values[:, :, :end]


class KVCache:
    """Room for `max_len` tokens of `batch_size` rows; `length` of them are filled.

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
        self.length = 0

    def reserve(self, n_tokens: int) -> int:
        """The position at which the next `n_tokens` start; they count as read from now on."""
        start, end = self.length, self.length + n_tokens
        if end > self.max_len:
            raise ModelError(
                f"the KV cache has room for {self.max_len} tokens and {end} are needed:"
                " make it with a larger max_len, or generate less"
            )
        self.length = end
        return start
