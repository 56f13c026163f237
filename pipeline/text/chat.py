"""Conversations -> turns -> ids, in the chat template of Mistral's v3 vocabulary.

    BOS ([INST] user [/INST] answer EOS)*

A system turn and a blank line are put before the first user's text, spaces at an answer's end are
dropped, and so is a last question without an answer. Each turn is encoded on its own; the markers
are inserted by id, so that no text can spell one. With one question, as in SlimOrca, the ids are
those of mistral-common (which with several puts the system turn before the last).

A data set that spells its turns in another way is one more row of SCHEMAS.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from pipeline.text.tokenizer import CHAT_PIECES, Tokenizer
from shards.format import Flags, Tokens

NO_TURNS: Final = "not a conversation"
UNKNOWN_ROLE: Final = "unknown role"
OUT_OF_ORDER: Final = "turns out of order"
EMPTY_TURN: Final = "empty turn"
NO_ANSWER: Final = "no answer"


@dataclass(frozen=True)
class ChatSchema:
    """How a data set spells a turn: the keys of its role and its text, the names of the roles."""

    role_key: str
    text_key: str
    roles: Mapping[str, Literal["system", "user", "assistant"]]


SCHEMAS: Final = {
    "sharegpt": ChatSchema("from", "value", {
        "system": "system", "human": "user", "user": "user", "gpt": "assistant",
        "assistant": "assistant",
    }),
    "messages": ChatSchema("role", "content", {
        "system": "system", "user": "user", "assistant": "assistant",
    }),
}  # fmt: skip
"""By the name that a source gives as its `chat_schema`."""


class BadConversationError(ValueError):
    """A record that is no conversation; the message is the reason that is listed."""


def render(record: object, schema: ChatSchema = SCHEMAS["sharegpt"]) -> list[str]:
    """The texts of a conversation: user, answer, user, answer, ...

    `record` is a list of turns; BadConversationError says what is wrong with any other.
    """
    if not isinstance(record, list) or not all(isinstance(turn, dict) for turn in record):
        raise BadConversationError(NO_TURNS)
    turns = [_turn(turn, schema) for turn in record]
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
class Encoded:
    """Documents as ids: the stream `BOS doc EOS BOS doc EOS ...`, where each one's BOS stands, and
    which ids are targets, if that matters."""

    tokens: Tokens
    starts: npt.NDArray[np.int64]
    targets: Flags | None = None

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Ids of each document, BOS and EOS included."""
        return np.diff(self.starts, append=len(self.tokens))

    def choose(self, chosen: Flags) -> Encoded:
        """The documents for which chosen [n] is true."""
        if chosen.all():
            return self
        lengths = self.lengths
        kept = np.repeat(chosen, lengths)
        starts = np.cumsum(lengths[chosen]) - lengths[chosen]
        targets = None if self.targets is None else self.targets[kept]
        return Encoded(self.tokens[kept], starts, targets)


@dataclass(frozen=True)
class ChatTemplate:
    """The ids that mark the turns."""

    bos_id: int
    eos_id: int
    inst_id: int
    end_inst_id: int

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> ChatTemplate:
        """The markers of a vocabulary; TokenizerError if it has none."""
        inst_id, end_inst_id = (tokenizer.id_of(piece) for piece in CHAT_PIECES)
        return cls(tokenizer.bos_id, tokenizer.eos_id, inst_id, end_inst_id)

    def join(
        self, turns: Tokens, starts: npt.NDArray[np.int64], counts: npt.NDArray[np.int64]
    ) -> Encoded:
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
        joined[starts[~is_answer]] = self.inst_id
        joined[ends[~is_answer] - 1] = self.end_inst_id
        target = np.repeat(is_answer, ends - starts)
        kept = np.ones(len(turns), np.bool_)
        kept[starts[is_answer]] = False
        # where each id stands once the answers' BOS are gone
        before: npt.NDArray[np.int64] = np.cumsum(kept) - kept
        places: npt.NDArray[np.int64] = before[starts[first]]
        stream = np.insert(joined[kept], places, self.bos_id)
        targets = np.insert(target[kept], places, False)
        return Encoded(stream, places + np.arange(len(places)), targets)


def _turn(turn: dict[str, Any], schema: ChatSchema) -> tuple[str, str]:
    role, text = turn.get(schema.role_key), turn.get(schema.text_key)
    if not isinstance(role, str) or not isinstance(text, str):
        raise BadConversationError(NO_TURNS)
    if role not in schema.roles:
        raise BadConversationError(UNKNOWN_ROLE)
    return schema.roles[role], text
