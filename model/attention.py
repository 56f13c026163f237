"""Grouped-query attention, and the test that a device's kernel computes the model that is named."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.alibi import alibi_slopes
from model.config import ModelConfig, ModelError
from model.kernel import attend, fold
from model.kv_cache import LayerCache
from model.layers import Linear
from model.positions import Positions, PositionTables

LIMIT_NATS = 1e-3
GROUP_ROWS = 512
LEAST_PROBABILITY = 1e-6


class Attention(nn.Module):
    """Causal self-attention; queries, keys and values come from one matrix, in that order."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        heads = config.n_heads + 2 * config.kv_heads
        self.qkv = Linear(config.d_model, heads * config.head_dim)
        self.out = Linear(config.d_model, config.d_model)

    def forward(
        self, x: Tensor, positions: Positions, cache: LayerCache | None, start: int, dropout: float
    ) -> Tensor:
        """`x` [B, T, d_model] at positions start..start+T-1, to [B, T, d_model]."""
        config = self.config
        B, T, _ = x.shape
        qkv = self.qkv(x).view(B, T, -1, config.head_dim)
        q, k, v = qkv.split([config.n_heads, config.kv_heads, config.kv_heads], dim=2)
        q, k, v = fold(q, k, v, positions, config)  # [B, H, T, D'], [B, Hkv, T, D'] twice
        if cache is not None:
            k, v = cache.append(start, k, v)
        attended = attend(q, k, v, config, start, dropout)[..., : config.head_dim]
        out: Tensor = self.out(attended.transpose(1, 2).reshape(B, T, -1))
        return out


@torch.no_grad()
def self_test(device: torch.device | str, dtype: torch.dtype, config: ModelConfig) -> float:
    """The error of the device's attention scores against fp32 math, in nats.

    Raises ModelError above 1e-3: a kernel that is further off would train another model than the
    one that is named. Random queries and keys attend to one-hot values (key j has its one in
    channel j mod head_dim), so that each output is a probability, and the log of its ratio to the
    true one is an error in nats. A single bf16 output is rounded by 2e-3 at random; hence the
    ratio's mean over 512 rows with the same distance to the key, and of those the largest.
    """
    device = torch.device(device)
    T = max(GROUP_ROWS, min(config.seq_len, 4096) // GROUP_ROWS * GROUP_ROWS)
    generator = torch.Generator().manual_seed(0)
    q, k = (
        torch.randn(1, T, heads, config.head_dim, generator=generator).to(device, dtype)
        for heads in (config.n_heads, config.kv_heads)
    )
    channel = torch.arange(T, device=device) % config.head_dim
    one_hot = F.one_hot(channel, config.head_dim).to(dtype)
    v = one_hot[None, :, None].expand_as(k)
    positions = PositionTables(config).to(device)(0, T)._replace(cos=None, sin=None)
    out = attend(*fold(q, k, v, positions, config), config)[0]  # [H, T, D']

    slopes = alibi_slopes(config.n_heads, config.head_dim) * config.head_dim**-0.5
    errors = []
    for head in range(config.n_heads):
        key_head = head * config.kv_heads // config.n_heads
        slope = slopes[head].item() if config.alibi else 0.0
        true = _true_probabilities(q[0, :, head], k[0, :, key_head], slope)
        errors.append(_largest_mean_error(out[head, :, : config.head_dim].float(), true))
    worst = float(torch.stack(errors).max())
    if not worst <= LIMIT_NATS:  # so that NaN fails too
        raise ModelError(
            f"attention in {dtype} on {device} is off by {worst:.2g} nats from fp32 math, more than"
            f" {LIMIT_NATS}: use another build of torch, or model.alibi=false"
        )
    return worst


def _true_probabilities(q: Tensor, k: Tensor, slope: float) -> Tensor:
    """[T, head_dim] in fp32: the share of the keys with the same position modulo head_dim."""
    T, head_dim = q.shape
    position = torch.arange(T, device=q.device)
    distance = position[:, None] - position
    scores = q.float() @ k.float().T * head_dim**-0.5 - slope * distance
    probabilities = scores.masked_fill(distance < 0, -torch.inf).softmax(dim=-1)
    laps = -(-T // head_dim)
    padded = F.pad(probabilities, (0, laps * head_dim - T))
    return padded.view(T, laps, head_dim).sum(dim=1)


def _largest_mean_error(measured: Tensor, true: Tensor) -> Tensor:
    """Largest |mean of log(measured / true)| over 512 rows at one distance, modulo head_dim."""
    T, head_dim = true.shape
    counted = true > LEAST_PROBABILITY
    error = torch.where(counted, (measured / true).log(), 0.0)
    row = torch.arange(T, device=true.device)[:, None]
    channel_at_distance = (row - torch.arange(head_dim, device=true.device)) % head_dim
    groups = (T // GROUP_ROWS, GROUP_ROWS, head_dim)
    total = error.gather(1, channel_at_distance).view(groups).sum(dim=1)
    count = counted.gather(1, channel_at_distance).view(groups).sum(dim=1)
    means = torch.where(count >= GROUP_ROWS // 2, total / count.clamp(min=1), 0.0)
    return means.abs().max()
