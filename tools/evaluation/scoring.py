"""Windows -> negative log-likelihoods (NLL) in nats: fp32 log-softmax, summed in float64.

The scorer knows nothing of texts, tokenizers or protocols. Instead of a Transformer it takes any
function from tokens to logits, so that models whose NLL is known in closed form check it.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, Self

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import linear
from torch.nn.utils.rnn import pad_sequence

from tools.errors import EvaluationError
from tools.evaluation.protocols import IGNORED, Ids, Window
from tools.models.loading import DTYPES, LoadedModel, max_context

Progress = Callable[[int, int], None]  # called with the windows done and all of them

_LOGITS_AT_ONCE: Final = 1 << 26  # 256 MiB in fp32, where one row of 16,448 would take 2 GiB


@dataclass(frozen=True)
class Scored:
    """Of each window: its summed NLL in nats, its number of targets, and `greedy`. All [n].

    `greedy` says whether every target is what greedy decoding would have written there.
    """

    nats: npt.NDArray[np.float64]
    n_targets: npt.NDArray[np.int64]
    greedy: npt.NDArray[np.bool_]

    @property
    def total_nats(self) -> float:
        """Nats of all windows together."""
        return float(self.nats.sum())

    @property
    def total_targets(self) -> int:
        """Scored targets of all windows together."""
        return int(self.n_targets.sum())

    @property
    def standard_error(self) -> float | None:
        """Of the nats a target, were other windows drawn; None for fewer than two windows.

        The targets of a window are not independent of each other, so windows are what is counted:
        the ratio estimator of cluster sampling (Cochran, Sampling Techniques, 1977, 6.3).
        """
        n, rate = len(self.nats), self.total_nats / max(1, self.total_targets)
        if n < 2 or not self.total_targets:
            return None
        squares = float(((self.nats - rate * self.n_targets) ** 2).sum())
        return math.sqrt(squares * n / (n - 1)) / self.total_targets


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
    def of_logits(cls, logits: Callable[[Tensor], Tensor]) -> Self:
        """A scorer of any function on the CPU from tokens [B, T] to logits [B, T, V]."""
        return cls(logits, lambda rows: rows, torch.device("cpu"))

    @classmethod
    def of(cls, loaded: LoadedModel) -> Self:
        """A scorer of a loaded model where it is; bf16 means autocast, as in training."""
        weight, dtype = loaded.model.head_weight, DTYPES[loaded.dtype]
        return cls(loaded.model.hidden, lambda rows: linear(rows, weight), weight.device, dtype)

    def nll(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """-log softmax(logits)[target] in fp32, 0 where the target is -100: [B, T] -> [B, T].

        Second, whether each target is the argmax of its logits (or -100): bool [B, T].
        """
        inputs, targets = inputs.to(self.device), targets.to(self.device)
        scored = targets != IGNORED
        wanted, features = targets[scored], self.features(inputs)[scored]  # [n], [n, D]
        nats = torch.zeros(targets.shape, device=self.device)
        greedy = torch.ones(targets.shape, dtype=torch.bool, device=self.device)
        parts = []
        begin, end = 0, 1  # one place shows how wide the vocabulary is
        while begin < len(wanted):
            logits = self.head(features[begin:end]).float()
            chosen = logits.gather(1, wanted[begin:end, None]).squeeze(1)
            parts.append((logits.logsumexp(dim=1) - chosen, logits.argmax(dim=1)))
            begin, end = end, end + max(1, _LOGITS_AT_ONCE // logits.shape[1])
        if parts:
            losses, best = map(torch.cat, zip(*parts, strict=True))
            nats[scored], greedy[scored] = losses, best == wanted
        return nats, greedy


@torch.inference_mode()
def score(
    scorer: Scorer,
    windows: Sequence[Window],
    *,
    batch_tokens: int | None = None,
    progress: Progress | None = None,
) -> Scored:
    """Each window's nats, in the windows' order, whatever the batches were.

    Windows of about one length go through the model together, at most `batch_tokens` tokens (or
    one window) at a time; None is 32,768 on a GPU and 8,192 elsewhere. Shorter windows are padded
    on the right, where causal attention never looks. The N processes of a group (torchrun) take
    every N-th batch each, and all get the result: the batches are the same for any N, so it is
    the same to the last bit. EvaluationError if the model gives NaN or infinity.
    """
    sums = np.zeros((3, len(windows)))  # nats, targets, greedy
    in_group = dist.is_available() and dist.is_initialized()
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if in_group else (0, 1)
    batch_tokens = batch_tokens or (32_768 if scorer.device.type == "cuda" else 8192)
    autocast = partial(torch.autocast, scorer.device.type, scorer.dtype)
    done = 0
    with autocast(enabled=scorer.dtype != torch.float32):
        lengths = [len(window.inputs) for window in windows]
        for number, places in enumerate(batches(lengths, batch_tokens)):
            done += len(places)
            if number % world_size != rank:
                continue
            chosen = [windows[place] for place in places]
            inputs = _padded([window.inputs for window in chosen], 0)
            targets = _padded([window.targets for window in chosen], IGNORED)
            try:
                nats, greedy = scorer.nll(inputs, targets)
            except torch.OutOfMemoryError as error:
                raise EvaluationError(
                    f"{inputs.numel():,} tokens at a time do not fit into the memory of "
                    f"{scorer.device}: choose a smaller --batch-tokens, or a smaller --context"
                ) from error
            sums[0, places] = nats.cpu().double().sum(dim=1)
            sums[1, places] = (targets != IGNORED).sum(dim=1).numpy()
            sums[2, places] = greedy.all(dim=1).cpu()
            if progress is not None:
                progress(done, len(windows))
    if world_size > 1:
        dist.all_reduce(torch.from_numpy(sums))  # elsewhere zeros: nothing is counted twice
    if len(bad := np.flatnonzero(~np.isfinite(sums[0]))):
        raise EvaluationError(
            f"window {bad[0]}: the model's log-likelihood is {-sums[0, bad[0]]}; its weights are "
            "damaged, or bf16 is too narrow for them (try --dtype fp32)"
        )
    return Scored(sums[0], sums[1].astype(np.int64), sums[2] > 0)


def batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Indices of windows that are scored together: longest first, so that memory fails at once."""
    order = sorted(range(len(lengths)), key=lambda place: -lengths[place])
    begin = 0
    while begin < len(order):
        together = max(1, batch_tokens // max(1, lengths[order[begin]]))
        yield order[begin : begin + together]
        begin += together


def _padded(rows: Sequence[Ids], filler: int) -> Tensor:
    """[B, T], filled up on the right."""
    return pad_sequence(list(map(torch.from_numpy, rows)), batch_first=True, padding_value=filler)


def check_context(loaded: LoadedModel, context: int) -> None:
    """EvaluationError beyond the context that the model computes exactly."""
    limit = max_context(loaded.model.config)
    if limit is not None and context > limit:
        raise EvaluationError(
            f"context {context:,}: with ALiBi this model is exact up to {limit:,} tokens; "
            f"choose --context {limit} or less"
        )
