"""Conversations -> turns -> ids, in the chat template of Mistral's v3 vocabulary.

    BOS ([INST] user [/INST] answer EOS)*

A system turn and a blank line are put before the first user's text, spaces at an answer's end are
dropped, and so is a last question that nobody answered. Each turn is encoded on its own; the
markers are put in by id, so that no text can spell one. With one question, as in SlimOrca, the ids
are those of mistral-common (which with several puts the system turn before the last).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from pipeline.text.tokenizer import CHAT_PIECES, Tokenizer
from shards.format import Tokens

ROLES: Final = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}

NO_TURNS: Final = "not a conversation"
UNKNOWN_ROLE: Final = "unknown role"
OUT_OF_ORDER: Final = "turns out of order"
EMPTY_TURN: Final = "empty turn"
NO_ANSWER: Final = "no answer"


class BadConversationError(ValueError):
    """A record that is no conversation; the message is the reason that is listed."""


def render(record: object) -> list[str]:
    """The texts of a conversation: user, answer, user, answer, ...

    `record` is a list of {from, value}; BadConversationError says what is wrong with any other.
    """
    turns = _turns(record)
    system = turns.pop(0)[1] if turns and turns[0][0] == "system" else ""
    expected = ("user", "assistant")
    if any(role != expected[place % 2] for place, (role, _) in enumerate(turns)):
        raise BadConversationError(OUT_OF_ORDER)
    if len(turns) % 2:
        turns.pop()
    if not turns:
        raise BadConversationError(NO_ANSWER)
    texts = [text if role == "user" else text.rstrip(" ") for role, text in turns]
    if not all(texts):
        raise BadConversationError(EMPTY_TURN)
    if system:
        texts[0] = f"{system}\n\n{texts[0]}"
    return texts


def spell(texts: Sequence[str]) -> str:
    """The conversation as one text, markers spelled: what decides whether it is held out."""
    return "".join(CHAT_PIECES[place % 2] + text for place, text in enumerate(texts))


@dataclass(frozen=True)
class Template:
    """The ids of the markers."""

    bos: int
    eos: int
    asks: int
    answers: int

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Template:
        """The markers of a vocabulary; TokenizerError if it has none."""
        asks, answers = (tokenizer.id_of(piece) for piece in CHAT_PIECES)
        return cls(tokenizer.bos_id, tokenizer.eos_id, asks, answers)

    def join(
        self, turns: Tokens, starts: npt.NDArray[np.int64], counts: npt.NDArray[np.int64]
    ) -> tuple[Tokens, npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """Conversations from `BOS turn EOS BOS turn EOS ...`, the stream of their turns.

        `starts` says where each turn's BOS stands, `counts` how many turns each conversation has.
        Returned are the stream `BOS [INST] turn [/INST] turn EOS ... EOS` of all of them, where
        each one's BOS stands, and the targets of training: the answers and the EOS behind each.

        A question's BOS and EOS become [INST] and [/INST]; an answer loses its BOS. Only the BOS
        of each conversation has to be put in.
        """
        first = np.cumsum(counts) - counts  # the number of each conversation's first turn
        numbers = np.arange(len(starts)) - np.repeat(first, counts)
        is_answer = numbers % 2 == 1
        ends = np.append(starts[1:], len(turns))
        joined = turns.copy()
        joined[starts[~is_answer]] = self.asks
        joined[ends[~is_answer] - 1] = self.answers
        target = np.repeat(is_answer, ends - starts)
        kept = np.ones(len(turns), np.bool_)
        kept[starts[is_answer]] = False
        before: npt.NDArray[np.int64] = (
            np.cumsum(kept) - kept
        )  # where each id stands once the answers' BOS are gone
        places: npt.NDArray[np.int64] = before[starts[first]]
        stream = np.insert(joined[kept], places, self.bos)
        targets = np.insert(target[kept], places, False)
        return stream, places + np.arange(len(places)), targets


def _turns(record: object) -> list[tuple[str, str]]:
    if not isinstance(record, list) or not all(isinstance(turn, dict) for turn in record):
        raise BadConversationError(NO_TURNS)
    return [_turn(turn) for turn in record]


def _turn(turn: dict[str, Any]) -> tuple[str, str]:
    role, text = turn.get("from"), turn.get("value")
    if not isinstance(role, str) or not isinstance(text, str):
        raise BadConversationError(NO_TURNS)
    if role not in ROLES:
        raise BadConversationError(UNKNOWN_ROLE)
    return ROLES[role], text
