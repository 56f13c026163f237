"""Perplexity protocols: which tokens are scored, each after which context. No model is needed.

A plan turns the tokens (ids) of a text into **windows**. A window holds the tokens that the model
is fed and, for each, the token to predict there, or -100 where nothing is scored:

    ids    a b c d e f g h i j        context 4, BOS `never`

    disjoint     feed  a b c | e f g            floor(10 / 4) = 2 windows, the tail i j is dropped
                 score   b c d |   f g h        3 = L - 1 a window

    stride 2     feed  a b c | c d e | e f g | g h i
                 score   b c d |     e f |     g h |     i j      each id once, never the first

    lm-eval      feed  B a b c | d e f g | f g h i               B is BOS, in front of each page
                 score a b c d | e f g h |     i j               each id once, the last window is
                                                                 full, by ids that were scored
    llama.cpp    feed  B a b | B e f                             the stream is B a b ... j; windows
                 score     c |     g                             side by side, d and h turned into
                                                                 B; scored is the second half
**BOS**: `never` feeds the text's ids alone; `start` puts BOS in front of the text, where it counts
as the stream's first id; `window` puts it in front of every window, which then holds one id of
text less. `lm-eval` knows `start` alone; `llama.cpp` puts it in place of each window's first id
(`window`), or leaves that id where it is (`never`: tokenizers without BOS). Whatever the policy,
BOS is never scored and no window feeds more ids than the context.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal, NamedTuple, Self, overload

import numpy as np
import numpy.typing as npt

from tools.errors import EvaluationError

IGNORED: Final = -100
"""Stands where no target is scored; torch's own convention."""

Ids = npt.NDArray[np.int64]
BosPolicy = Literal["never", "start", "window"]
ProtocolName = Literal["disjoint", "stride", "lm-eval", "llama.cpp"]

BOS_POLICIES: Final[dict[str, tuple[BosPolicy, ...]]] = {
    "disjoint": ("never", "start", "window"),
    "stride": ("never", "start", "window"),
    "lm-eval": ("start",),
    "llama.cpp": ("window", "never"),
}
"""What each protocol allows, its default first."""


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How a text is cut into windows. `context` bounds the ids of a window, BOS included.

    `bos` None is the protocol's default: `llama.cpp` does without where there is no `bos_id`.
    """

    name: ProtocolName = "disjoint"
    context: int
    stride: int | None = None
    bos: BosPolicy | None = None
    bos_id: int | None = None

    def __post_init__(self) -> None:
        if self.name not in PLANS:
            raise EvaluationError(f"protocol {self.name!r}: choose one of {', '.join(PLANS)}")
        allowed, least = BOS_POLICIES[self.name], 3 if self.name == "llama.cpp" else 2
        if self.bos is not None and self.bos not in allowed:
            raise EvaluationError(
                f"bos {self.bos!r}: choose one of {', '.join(allowed)} for the protocol {self.name}"
            )
        if self.context < least:
            raise EvaluationError(f"context {self.context}: a window needs at least {least} tokens")
        if self.resolved_bos != "never" and self.bos_id is None:
            fix = "choose never" if "never" in allowed else "choose disjoint"
            raise EvaluationError(f"bos {self.resolved_bos!r}: this tokenizer has no BOS; {fix}")
        if self.name != "stride" and self.stride is not None:
            raise EvaluationError(
                f"stride {self.stride}: {self.name} windows have none; leave it out or choose "
                "the protocol stride"
            )
        if self.name == "stride" and not 1 <= self.resolved_stride < self.context:
            raise EvaluationError(
                f"stride {self.resolved_stride}: choose 1 to {self.context - 1} for a context of "
                f"{self.context}; from there on the first token of a window would never be scored"
            )

    @property
    def resolved_bos(self) -> BosPolicy:
        """The BOS policy that is followed."""
        if self.bos is None and self.name == "llama.cpp" and self.bos_id is None:
            return "never"
        return self.bos or BOS_POLICIES[self.name][0]

    @property
    def resolved_stride(self) -> int:
        """Ids from one window's begin to the next one's (`stride`: half the context by default)."""
        if self.name != "stride":
            return self.room
        return self.context // 2 if self.stride is None else self.stride

    @property
    def replaces_by_bos(self) -> bool:
        """Whether a window's first id gives way to BOS."""
        return self.name == "llama.cpp" and self.resolved_bos == "window"

    @property
    def room(self) -> int:
        """Ids of the stream that fit into a window."""
        return self.context - (self.resolved_bos == "window" and not self.replaces_by_bos)

    @property
    def starts_with_bos(self) -> bool:
        """Whether a BOS is in front of each text's ids."""
        return self.resolved_bos == "start" or self.replaces_by_bos


class Window(NamedTuple):
    """Tokens fed [n] and, at each place, the token to predict there or -100 [n]."""

    inputs: Ids
    targets: Ids


@dataclass(frozen=True, kw_only=True)
class WindowPlan(Sequence[Window]):
    """Windows over one text or several, each made when it is indexed.

    `stream` [n] holds the texts' ids, a BOS in front of each where the protocol wants one; `own`
    [n] says which of them are the texts'. `spans` [w, 3] are places in the stream: a window's
    begin, its end, and its first scored id.
    """

    protocol: Protocol
    stream: Ids
    own: npt.NDArray[np.bool_]
    spans: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.spans)

    @overload
    def __getitem__(self, place: int) -> Window: ...
    @overload
    def __getitem__(self, place: slice) -> Self: ...
    def __getitem__(self, place: int | slice) -> Window | Self:
        """One window, or a plan of some of them."""
        if isinstance(place, slice):
            return replace(self, spans=self.spans[place])
        begin, end, first_scored = self.spans[place]
        content = self.stream[begin:end]
        if self.protocol.replaces_by_bos:
            content = np.concatenate([[self.protocol.bos_id], content[1:]])
        elif self.protocol.resolved_bos == "window":
            content = np.concatenate([[self.protocol.bos_id], content])
        targets = content[1:].copy()
        targets[: len(targets) - (end - first_scored)] = IGNORED
        return Window(content[:-1], targets)

    @property
    def ids(self) -> Ids:
        """The texts' own ids. [T]"""
        return self.stream[self.own]

    @property
    def tail_dropped(self) -> int:
        """Ids behind the last window, which no window holds."""
        return len(self.stream) - int(self.spans[:, 1].max(initial=0))

    def scored_places(self) -> npt.NDArray[np.int64]:
        """Places in `ids` that are scored, in the windows' order. [n_scored]"""
        number = np.cumsum(self.own) - 1
        ranges = [number[first:end] for _, end, first in self.spans]
        return np.concatenate(ranges) if ranges else np.empty(0, np.int64)


def plan_windows(texts: Sequence[Ids], protocol: Protocol) -> WindowPlan:
    """The windows of several texts, none of which reaches from one into the next."""
    bos = np.full(int(protocol.starts_with_bos), protocol.bos_id or 0, np.int64)
    streams, own, spans, begin = [], [], [], 0
    for ids in texts:
        stream = np.concatenate([bos, ids])
        streams.append(stream)
        own.append(np.arange(len(stream)) >= len(bos))
        spans.append(begin + PLANS[protocol.name](len(stream), protocol))
        begin += len(stream)
    if not sum(map(len, spans)):
        raise EvaluationError(
            f"the text has {sum(map(len, texts))} tokens, too few for one {protocol.name} window "
            f"of {protocol.context}: choose a smaller --context"
        )
    return WindowPlan(
        protocol=protocol,
        stream=np.concatenate(streams),
        own=np.concatenate(own),
        spans=np.concatenate(spans),
    )


def full_spans(length: int, protocol: Protocol) -> npt.NDArray[np.int64]:
    """Full windows side by side; what is left over at the end belongs to none. [n, 3]

    Of llama.cpp's (those of its perplexity tool without its own stride) the second half is scored.
    """
    begins = np.arange(length // protocol.room, dtype=np.int64) * protocol.room
    skipped = int(protocol.resolved_bos != "window")
    if protocol.name == "llama.cpp":
        skipped = protocol.context // 2 + 1
    return np.stack([begins, begins + protocol.room, begins + skipped], axis=1)


def stride_spans(length: int, protocol: Protocol) -> npt.NDArray[np.int64]:
    """Overlapping windows; each scores what no window before it did. The last may be short. [n, 3]

    The windows of Hugging Face's guide to the perplexity of fixed-length models. Its average over
    windows is not taken over: sums are divided by the exact number of scored ids.
    """
    room, stride = protocol.room, protocol.resolved_stride
    n_windows = 1 + max(0, -(-(length - room) // stride)) if length > 1 else 0
    begins = np.arange(n_windows, dtype=np.int64) * stride
    ends = np.minimum(begins + room, length)
    return np.stack([begins, ends, np.concatenate([[1], ends])[:n_windows]], axis=1)


def lm_eval_spans(length: int, protocol: Protocol) -> npt.NDArray[np.int64]:
    """EleutherAI's rolling windows over a page behind its BOS: every id of the page once. [n, 3]

    `context` ids are fed for as many targets, so a span is one longer. The last window begins as
    much earlier as it takes to be full.
    """
    first_scored = np.arange(1, length, protocol.context, dtype=np.int64)
    ends = np.minimum(first_scored + protocol.context, length)
    return np.stack([np.maximum(0, ends - protocol.context - 1), ends, first_scored], axis=1)


PLANS: Final[dict[str, Callable[[int, Protocol], npt.NDArray[np.int64]]]] = {
    "disjoint": full_spans,
    "stride": stride_spans,
    "lm-eval": lm_eval_spans,
    "llama.cpp": full_spans,
}


def document_windows(ids: npt.ArrayLike, context: int) -> list[Window]:
    """A document that begins with BOS, in windows of `context` inputs: every later id scored once.

    Each window's first input is the last id that the window before it scored.
    """
    stream = np.asarray(ids, dtype=np.int64)
    ends = range(0, len(stream) - 1, context)
    return [Window(stream[at:-1][:context], stream[at + 1 :][:context]) for at in ends]
