"""Logits -> the next id: temperature, top-k, top-p. The same seed draws the same ids anywhere.

The draw is made in float64 on the CPU with one uniform number a token, so a GPU and a laptop that
compute the same logits also say the same thing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tools.errors import GenerationError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How an id is drawn. Temperature 0 takes the likeliest; `top_k` 0 and `top_p` 1 leave all in.

    The order is that of Hugging Face's generation: temperature, then top-k, then top-p (nucleus
    sampling, Holtzman et al. 2020: the likeliest ids whose probabilities reach `top_p`).
    """

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise GenerationError(f"temperature {self.temperature}: choose 0 (greedy) or more")
        if self.top_k < 0:
            raise GenerationError(f"top_k {self.top_k}: choose 0 (all ids) or more")
        if not 0 < self.top_p <= 1:
            raise GenerationError(f"top_p {self.top_p}: choose above 0, up to 1 (all ids)")

    def generator(self) -> torch.Generator:
        """A fresh source of uniform numbers for one text."""
        return torch.Generator("cpu").manual_seed(self.seed)


def draw(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """The next id, given the logits [V] of all."""
    logits = logits.detach().cpu().double()
    if logits.isnan().any():
        raise GenerationError("the model gives NaN logits: its weights are damaged")
    if sampling.temperature == 0:
        return int(logits.argmax())
    ranked, ids = (logits / sampling.temperature).sort(descending=True, stable=True)
    if sampling.top_k:
        ranked = ranked[: sampling.top_k]
    cumulative = ranked.softmax(dim=0).cumsum(dim=0)
    kept = 1 + int((cumulative < sampling.top_p).sum())  # up to the first that reaches top_p
    cumulative = cumulative[:kept]
    uniform = torch.rand((), dtype=torch.float64, generator=generator) * cumulative[-1]
    place = torch.searchsorted(cumulative, uniform, right=True)
    return int(ids[place.clamp_max(len(cumulative) - 1)])
