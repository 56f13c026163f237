"""Dropout whose mask is a pure function of (key, site, position, channel).

There is no generator state: a recomputed forward, a resumed run and any number of processes draw
the same mask, and the compiler folds the arithmetic into the kernel that adds the branch.
"""

import torch
from torch import Tensor

from model.layers import DerivedBuffers

GOLDEN = 0x9E3779B9 - 2**32  # 2^32 / golden ratio, as the signed int32 of the same bits
MULTIPLY_1 = 0x7FEB352D
MULTIPLY_2 = 0x846CA68B - 2**32


class CounterDropout(DerivedBuffers):
    """Dropout at one numbered place of the model.

    The number is a tensor: as a Python int it makes torch.compile specialise every layer, and fall
    back to eager after the eighth.
    """

    site: Tensor

    def __init__(self, rate: float, site: int) -> None:
        super().__init__()
        self.rate = rate
        self.number = site
        self.make_buffers(torch.get_default_device())

    def make_buffers(self, device: torch.device) -> None:
        """Register `site`."""
        site = torch.tensor(self.number, dtype=torch.int32, device=device)
        self.register_buffer("site", site, persistent=False)

    def forward(self, x: Tensor, rows: Tensor | None) -> Tensor:
        """`x` [B, T, C] with elements zeroed at `rate` and the rest scaled; `x` if rows is None."""
        if rows is None or self.rate == 0.0:
            return x
        keep = keep_mask(rows, self.site, x.shape[-1], self.rate)
        return torch.where(keep, x * (1.0 / (1.0 - self.rate)), 0.0)


def row_state(key: Tensor, length: int) -> Tensor:
    """[2, B, T] int32: what a sample's key [B, 2] int32 and a position contribute to the mask.

    Made once a forward pass and shared by all sites: hashed again for every element it took
    three times as long to compile.
    """
    position = torch.arange(length, dtype=torch.int32, device=key.device)
    first = _mix(_mix(key[:, 0])[:, None] + position * GOLDEN)  # [B, T]
    second = _mix(_mix(key[:, 1])[:, None] ^ first)
    return torch.stack([first, second])


def keep_mask(rows: Tensor, site: Tensor, channels: int, rate: float) -> Tensor:
    """[B, T, C] bool, True with probability 1 - rate, for rows [2, B, T] and site [], both int32.

    Site and channel count the row's elements (65,536 channels a site), and the row's 64 bits enter
    before and in the middle of one finaliser, "lowbias32" (Wellons, hash-prospector, 2018). int32
    arithmetic wraps, as on every device.
    """
    channel = torch.arange(channels, dtype=torch.int32, device=rows.device)
    counter = (channel + (site << 16)) * GOLDEN  # [C]
    bits = _mix(rows[0, :, :, None] ^ counter, rows[1, :, :, None])
    keep: Tensor = bits >= round(rate * 2**32) - 2**31
    return keep


def _mix(x: Tensor, between: Tensor | int = 0) -> Tensor:
    x = (x ^ _shift_right(x, 16)) * MULTIPLY_1 + between
    x = (x ^ _shift_right(x, 15)) * MULTIPLY_2
    return x ^ _shift_right(x, 16)


def _shift_right(x: Tensor, by: int) -> Tensor:
    """Logical, where `>>` on int32 copies the sign."""
    return (x >> by) & ((1 << (32 - by)) - 1)
