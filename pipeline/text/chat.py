"""Conversations -> turns -> ids, in the chat template of Mistral's v3 vocabulary.

    BOS ([INST] user [/INST] answer EOS)*

A system turn and a blank line are put before the first user's text, spaces at an answer's end are
dropped, and so is a last question without an answer. Each turn is encoded on its own; the markers
are inserted by id, so that no text can spell one. With one question, as in SlimOrca, the ids are
those of mistral-common (which with several puts the system turn before the last).

Turns are read in both of the field's spellings; one more is a row of SCHEMAS (inputs/records.py),
another name of a role a row of ROLES. Content may be a list of parts of type text, joined by a
blank line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from pipeline.inputs.records import SCHEMAS
from pipeline.text.tokenizer import CHAT_PIECES, Tokenizer
from shards.format import Flags, Tokens

NO_TURNS: Final = "not a conversation"
UNKNOWN_ROLE: Final = "unknown role"
OUT_OF_ORDER: Final = "turns out of order"
EMPTY_TURN: Final = "empty turn"
NO_ANSWER: Final = "no answer"
TOOL: Final = "tool turn"
NO_TEXT_PART: Final = "part that is not text"

ROLES: Final = {
    "system": "system", "developer": "system",
    "human": "user", "user": "user",
    "gpt": "assistant", "assistant": "assistant", "model": "assistant",
    "tool": "tool", "function": "tool", "function_call": "tool", "observation": "tool",
}  # fmt: skip
"""What data sets call the roles. The template has no place for a tool."""


class BadConversationError(ValueError):
    """A record that is no conversation; the message is the reason that is listed."""


def render(record: object) -> list[str]:
    """The texts of a conversation: user, answer, user, answer, ...

    `record` is a list of turns; BadConversationError says what is wrong with any other.
    """
    if not isinstance(record, list) or not all(isinstance(turn, dict) for turn in record):
        raise BadConversationError(NO_TURNS)
    turns = [_turn(turn) for turn in record]
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


def _turn(turn: Mapping[str, Any]) -> tuple[str, str]:
    """Role and text of a turn."""
    spelled = ((turn[role], turn.get(text)) for role, text in SCHEMAS if turn.get(role) is not None)
    role, content = next(spelled, (None, None))
    if not isinstance(role, str):
        raise BadConversationError(NO_TURNS)
    if ROLES.get(role) == "tool" or turn.get("tool_calls"):
        raise BadConversationError(TOOL)
    if role not in ROLES:
        raise BadConversationError(UNKNOWN_ROLE)
    return ROLES[role], _text_of(content)


def _text_of(content: object) -> str:
    """The text, of parts joined as mistral-common joins them."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise BadConversationError(NO_TURNS)
    texts = [part.get("text") for part in content if part.get("type") == "text"]
    if len(texts) < len(content) or not all(isinstance(text, str) for text in texts):
        raise BadConversationError(NO_TEXT_PART)
    return "\n\n".join(filter(None, texts))
