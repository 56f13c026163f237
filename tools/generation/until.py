"""What a harness asks of a generated answer, read into our own options; and stopping at a text."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Final

from tools.errors import ToolError
from tools.generation.batch import Text, write_all
from tools.generation.generation import Generation, Sampling, TextStream
from tools.models.loading import LoadedModel

_LENGTHS: Final = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_NEUTRAL: Final = {"repetition_penalty": 1.0, "num_beams": 1, "use_cache": True}
"""What is computed as if it were not there, if it has this value."""


def read_settings(
    settings: Mapping[str, Any], number: int, room: int
) -> tuple[Generation, tuple[str, ...]]:
    """Options for one request, and the texts that end its answer; ToolError for what we cannot.

    `number` is the request's among all: repeats of one question are drawn with other seeds, as
    pass@k needs. `room` is the most tokens that there is place for.
    """
    given = {key: value for key, value in settings.items() if value is not None}
    until = given.pop("until", ())
    length = next((int(given[name]) for name in _LENGTHS if name in given), 256)
    temperature = float(given.pop("temperature", 0.0))
    sampled = given.pop("do_sample", temperature > 0)
    sampling = Sampling(
        temperature=temperature if sampled else 0.0,
        top_k=int(given.pop("top_k", 0)),
        top_p=float(given.pop("top_p", 1.0)),
        seed=int(given.pop("seed", 0)) + number,
    )
    for key, value in given.items():
        if key not in _LENGTHS and value and value != _NEUTRAL.get(key):
            raise ToolError(f"generation: {key}={value!r} is not computed here: leave it out")
    stops = (until,) if isinstance(until, str) else tuple(until)
    options = Generation(max_tokens=min(length, room), sampling=sampling)
    return options, tuple(filter(None, stops))


Asked = tuple[Sequence[int], Generation, Sequence[str]]
"""A prompt's tokens, how to go on, and the texts that end it."""


def write_until(loaded: LoadedModel, asked: Sequence[Asked], size: int) -> list[str]:
    """What the model writes after each prompt, up to the first stop text, `size` of them at once.

    The longest prompts first: then the cache need not grow.
    """
    answers = ["" for _ in asked]
    streams = [StoppedText(loaded, stops, opens_text=False) for _, _, stops in asked]

    def feed(number: int, drawn: int) -> bool:
        answers[number] += streams[number].feed(drawn)
        return streams[number].stopped

    texts = [
        Text(prompt, options, partial(feed, number))
        for number, (prompt, options, _) in enumerate(asked)
    ]
    write_all(loaded, sorted(texts, key=lambda text: -len(text.prompt)), size)
    return [text + stream.finish() for text, stream in zip(answers, streams, strict=True)]


class StoppedText:
    """Tokens in, text out, up to a stop text: what may be the beginning of one is held back."""

    def __init__(self, loaded: LoadedModel, stops: Sequence[str], *, opens_text: bool) -> None:
        self.stopped = False
        self._stream = TextStream(loaded.vocabulary, opens_text=opens_text)
        self._stops, self._held = stops, ""

    def feed(self, drawn: int) -> str:
        """The text that this token completes; empty once it is `stopped`."""
        self._look(self._stream.feed(drawn))
        ends = [
            n for stop in self._stops for n in range(1, len(stop)) if self._held.endswith(stop[:n])
        ]
        return self._release(len(self._held) - max(ends, default=0))

    def finish(self) -> str:
        """What is left, when no token follows."""
        self._look(self._stream.finish())
        return self._release(len(self._held))

    def _look(self, more: str) -> None:
        if self.stopped:
            return
        self._held += more
        found = [self._held.find(stop) for stop in self._stops if stop in self._held]
        if found:
            self.stopped, self._held = True, self._held[: min(found)]

    def _release(self, end: int) -> str:
        if self.stopped:
            end = len(self._held)
        text, self._held = self._held[:end], self._held[end:]
        return text
