"""What a harness asks of a generated answer, read into our own options; and stopping at a text."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from tools.errors import ToolError
from tools.generation.generation import Generation, Sampling, write
from tools.models.loading import LoadedModel

_LENGTHS: Final = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_NEUTRAL: Final = {"repetition_penalty": 1.0, "num_beams": 1, "use_cache": True}
"""What is computed as if it were not there, if it has this value."""


class _StopFoundError(Exception):
    """The text has all that is wanted of it."""


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


def write_until(
    loaded: LoadedModel, prompt: Sequence[int], options: Generation, stops: Sequence[str]
) -> str:
    """What the model writes after the prompt, up to the first stop text, which ends the drawing."""
    text = ""

    def look(more: str) -> None:
        nonlocal text
        text += more
        if any(stop in text for stop in stops):
            raise _StopFoundError

    try:
        write(loaded, prompt, options, look, opens_text=False)
    except _StopFoundError:
        text = text[: min(text.find(stop) for stop in stops if stop in text)]
    return text
