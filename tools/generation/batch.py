"""Several texts written at once: one pass of the model draws the next token of each.

A text that ends makes room for the next one. Each is read by itself, has its own random numbers,
and sees nothing of the others: what it becomes differs from `generate` by rounding alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import linear

from model.attention import LayerCache, kernel_head_dim
from model.positions import Positions
from tools.generation.generation import Generation, draw, room_for
from tools.models.loading import DTYPES, LoadedModel

_BLOCK = 256  # tokens by which the cache grows


@dataclass(eq=False)
class Text:
    """A prompt's tokens and what follows them, to be drawn as `options` say.

    `on_token` is called with each token that stands for text, as it is drawn; True ends the text.
    With `top`, `logprobs` has the log-probability of each token and of the `top` likeliest ones
    in its place, whatever the temperature.
    """

    prompt: Sequence[int]
    options: Generation
    on_token: Callable[[int], bool]
    top: int | None = None
    logprobs: list[tuple[float, dict[int, float]]] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    left: int = field(init=False)  # tokens that may still be drawn
    generator: torch.Generator = field(init=False)


class Batch:
    """Up to `size` texts and their keys and values; those of row i are of `texts[i]`."""

    def __init__(self, loaded: LoadedModel, size: int) -> None:
        self.loaded, self.size = loaded, size
        self.texts: list[Text] = []
        self._rows = [_Rows() for _ in loaded.model.blocks]
        self._room = 0
        drawable = loaded.vocabulary.may_be_drawn(loaded.model.config.vocab_size)
        self._never = ~torch.tensor(drawable, device=loaded.device)

    @torch.inference_mode()
    def add(self, text: Text) -> None:
        """Read a prompt and draw its first token; ToolError if the prompt fills the context."""
        row, n = len(self.texts), len(text.prompt)
        text.left = room_for(self.loaded, n, text.options.max_tokens)
        text.generator = text.options.sampling.generator()
        self._make_room(n)
        self.texts.append(text)
        positions = self.loaded.model.positions(0, n)
        read = torch.tensor([list(text.prompt)], device=self.loaded.device)
        for rows in self._rows:
            rows.place = slice(row, row + 1), slice(0, n)
            rows.seen = slice(row, row + 1), slice(0, n)
        try:
            self._draw(read, positions, [row])
        except BaseException:  # the others must not suffer for it
            self.remove(row)
            raise

    @torch.inference_mode()
    def step(self) -> None:
        """Draw one more token of every text."""
        n, device = len(self.texts), self.loaded.device
        lengths = [len(text.prompt) + len(text.ids) - 1 for text in self.texts]  # read so far
        at, end = torch.tensor(lengths, device=device), max(lengths) + 1
        self._make_room(end)
        tables = self.loaded.model.positions(0, end)
        entries = (None if table is None else table[at[:, None]] for table in tables)
        mask = torch.arange(end, device=device) <= at[:, None, None, None]
        for rows in self._rows:
            rows.place = torch.arange(n, device=device), at
            rows.seen = slice(0, n), slice(0, end)
        last = torch.tensor([text.ids[-1:] for text in self.texts], device=device)
        self._draw(last, Positions(*entries)._replace(mask=mask), range(n))

    def remove(self, row: int) -> None:
        """Forget a text; the last one takes its row."""
        for rows in self._rows:
            rows.move(len(self.texts) - 1, row)
        self.texts[row] = self.texts[-1]
        self.texts.pop()

    def _draw(self, tokens: Tensor, positions: Positions, rows: Sequence[int]) -> None:
        """Read tokens [rows, T], and draw what follows; texts that end are removed."""
        model, vocabulary = self.loaded.model, self.loaded.vocabulary
        with self.loaded.autocast():
            x = model.embedding(tokens).float()
            hidden = model.body(x, positions, caches=self._rows)
            logits = linear(hidden[:, -1], model.head_weight).float()
        logits = logits.masked_fill(self._never, -torch.inf).cpu()
        ended = []
        for row, scores in zip(rows, logits, strict=True):
            text = self.texts[row]
            drawn = draw(scores, text.options.sampling, text.generator)
            if vocabulary.ends(drawn):
                ended.append(row)
                continue
            text.ids.append(drawn)
            text.left -= 1
            if text.top is not None:
                nats = scores.double().log_softmax(dim=0)
                best = nats.topk(text.top)
                likeliest = dict(zip(best.indices.tolist(), best.values.tolist(), strict=True))
                text.logprobs.append((float(nats[drawn]), likeliest))
            if text.on_token(drawn) or not text.left:
                ended.append(row)
        for row in reversed(ended):
            self.remove(row)

    def _make_room(self, length: int) -> None:
        if length <= self._room:
            return
        self._room = -(-length // _BLOCK) * _BLOCK
        config, device = self.loaded.model.config, self.loaded.device
        shape = (self.size, config.kv_heads, self._room, kernel_head_dim(config, device))
        for rows in self._rows:
            rows.grow(torch.zeros((2, *shape), device=device, dtype=DTYPES[self.loaded.dtype]))


Index = slice | Tensor


class _Rows(LayerCache):
    """One layer's keys and values of all rows [rows, Hkv, room, D'], each filled to its own length.

    What is appended goes to `place`, and `seen` is what comes back: rows and positions of each.
    """

    place: tuple[Index, Index]
    seen: tuple[slice, slice]

    def __init__(self) -> None:
        super().__init__(torch.empty(0), torch.empty(0))

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v [rows, Hkv, T, D']; keys and values of these rows so far."""
        (rows, positions), (seen, until) = self.place, self.seen
        for stored, new in ((self.keys, k), (self.values, v)):
            stored[rows, :, positions] = new[:, :, 0] if isinstance(positions, Tensor) else new
        return self.keys[seen, :, until], self.values[seen, :, until]

    def move(self, source: int, target: int) -> None:
        """Put a row in another's place."""
        for stored in (self.keys, self.values):
            stored[target] = stored[source]

    def grow(self, larger: Tensor) -> None:
        """Go on in a larger pair [2, rows, Hkv, room, D']."""
        for old, new in zip((self.keys, self.values), larger, strict=True):
            if old.ndim == new.ndim:  # not the first
                new[:, :, : old.shape[2]] = old
        self.keys, self.values = larger


def write_all(loaded: LoadedModel, texts: Iterable[Text], size: int) -> None:
    """Write all texts, `size` at once, the next as soon as one has ended."""
    batch, waiting = Batch(loaded, size), iter(texts)
    while True:
        while len(batch.texts) < size and (text := next(waiting, None)) is not None:
            batch.add(text)
        if not batch.texts:
            return
        batch.step()
