"""Windows -> negative log-likelihoods: fp32 log-softmax, summed in float64.

The scorer knows nothing of texts, tokenizers or protocols. Beside a Transformer it takes any
function from ids to logits, so that models whose answer is known in closed form check it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import linear

from model.transformer import Transformer
from tools.errors import EvaluationError
from tools.protocols import IGNORED, Window

Progress = Callable[[int, int], None]
"""Called with the windows done and all of them."""

_LOGITS_AT_ONCE: Final = 1 << 26
"""Logits alive at a time: 256 MiB in fp32, where one row of 16,448 would take 2 GiB."""


@dataclass(frozen=True)
class Scored:
    """Of each window: the summed negative log-likelihood in nats [n] and its targets [n]."""

    nats: npt.NDArray[np.float64]
    n_targets: npt.NDArray[np.int64]

    @property
    def total_nats(self) -> float:
        """Nats of all windows together."""
        return float(self.nats.sum())

    @property
    def total_targets(self) -> int:
        """Scored targets of all windows together."""
        return int(self.n_targets.sum())


@dataclass(frozen=True)
class Scorer:
    """A model as two functions: `features` [B, T] -> [B, T, D] and `head` [n, D] -> logits [n, V].

    They are apart so that only scored places go through the vocabulary, a chunk at a time.
    """

    features: Callable[[Tensor], Tensor]
    head: Callable[[Tensor], Tensor]
    device: torch.device
    dtype: torch.dtype = torch.float32

    @classmethod
    def of_logits(cls, logits: Callable[[Tensor], Tensor]) -> Scorer:
        """A scorer of any function on the CPU from ids [B, T] to logits [B, T, V]."""
        return cls(logits, lambda rows: rows, torch.device("cpu"))

    @classmethod
    def of_transformer(cls, model: Transformer, dtype: torch.dtype = torch.float32) -> Scorer:
        """A scorer of a Transformer where it is; bf16 means autocast, as in training."""
        weight = model.head_weight
        return cls(model.hidden, lambda rows: linear(rows, weight), weight.device, dtype)

    def nats(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """-log softmax(logits)[target] in fp32, 0 where the target is -100: [B, T] -> [B, T]."""
        inputs, targets = inputs.to(self.device), targets.to(self.device)
        scored = targets != IGNORED
        wanted, features = targets[scored], self.features(inputs)[scored]  # [n], [n, D]
        surprise = torch.zeros(len(wanted), device=self.device)
        begin, end = 0, 1  # one row shows how wide the vocabulary is
        while begin < len(wanted):
            logits = self.head(features[begin:end]).float()
            chosen = logits.gather(1, wanted[begin:end, None]).squeeze(1)
            surprise[begin:end] = logits.logsumexp(dim=1) - chosen
            begin, end = end, end + max(1, _LOGITS_AT_ONCE // logits.shape[1])
        nats = torch.zeros(targets.shape, device=self.device)
        nats[scored] = surprise
        return nats


@torch.inference_mode()
def score(
    scorer: Scorer,
    windows: Sequence[Window],
    *,
    batch_tokens: int = 8192,
    progress: Progress | None = None,
) -> Scored:
    """Each window's nats, in the windows' order, whatever the batches were.

    Windows of about one length go through the model together, at most `batch_tokens` ids (or one
    window) at a time. Shorter ones are filled up on the right, where causal attention never looks.
    EvaluationError if the model answers with something that is no number.
    """
    nats = np.zeros(len(windows))
    n_targets = np.zeros(len(windows), np.int64)
    autocast = partial(torch.autocast, scorer.device.type, scorer.dtype)
    done = 0
    with autocast(enabled=scorer.dtype != torch.float32):
        for places in batches([len(window.inputs) for window in windows], batch_tokens):
            inputs, targets = _stack([windows[place] for place in places])
            nats[places] = _within_memory(scorer, inputs, targets).cpu().double().sum(dim=1)
            n_targets[places] = (targets != IGNORED).sum(dim=1).numpy()
            _refuse_no_number(places, nats[places])
            done += len(places)
            if progress is not None:
                progress(done, len(windows))
    return Scored(nats, n_targets)


def batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Places of windows that are scored together: longest first, so that memory fails at once."""
    order = sorted(range(len(lengths)), key=lambda place: -lengths[place])
    begin = 0
    while begin < len(order):
        together = max(1, batch_tokens // max(1, lengths[order[begin]]))
        yield order[begin : begin + together]
        begin += together


def _within_memory(scorer: Scorer, inputs: Tensor, targets: Tensor) -> Tensor:
    try:
        return scorer.nats(inputs, targets)
    except torch.OutOfMemoryError as error:
        raise EvaluationError(
            f"{inputs.numel():,} ids at a time do not fit into the memory of {scorer.device}: "
            "choose a smaller --batch-tokens, or a smaller --context"
        ) from error


def _stack(windows: Sequence[Window]) -> tuple[Tensor, Tensor]:
    """Inputs and targets [B, T], filled up on the right with id 0 and -100."""
    shape = len(windows), max(len(window.inputs) for window in windows)
    inputs, targets = np.zeros(shape, np.int64), np.full(shape, IGNORED, np.int64)
    for row, window in enumerate(windows):
        inputs[row, : len(window.inputs)] = window.inputs
        targets[row, : len(window.targets)] = window.targets
    return torch.from_numpy(inputs), torch.from_numpy(targets)


def _refuse_no_number(places: Sequence[int], nats: npt.NDArray[np.float64]) -> None:
    if np.isfinite(nats).all():
        return
    worst = int(np.flatnonzero(~np.isfinite(nats))[0])
    raise EvaluationError(
        f"window {places[worst]}: the model's log-likelihood is {-nats[worst]}; its weights are "
        "damaged, or bf16 is too narrow for them (try --dtype fp32)"
    )
