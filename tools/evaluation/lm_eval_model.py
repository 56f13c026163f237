"""lm-evaluation-harness with our models under the name `summerlm` (needs the extra `eval`).

python -m tools.evaluation.lm_eval_model --model summerlm --model_args run=runs/tiny --tasks piqa
python -m tools.evaluation.lm_eval_model --model summerlm --model_args hf=SmolLM2-135M ...

This is the harness' own command line, with our model registered. Releases of the harness after
0.4.13 read the entry point `lm_eval.models`, and find it from `lm_eval --model summerlm` too. From
Python, `import tools.evaluation.lm_eval_model` registers it for `lm_eval.simple_evaluate(...)`. An
exported folder (summer-convert) needs none of this:

lm_eval --model hf --model_args pretrained=FOLDER,trust_remote_code=True,add_bos_token=False ...

Model arguments: run, checkpoint or hf; dtype, context, batch_tokens, add_bos_token.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

try:
    import lm_eval.models  # noqa: F401 - fills the registry before ours is added
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
except ModuleNotFoundError as error:
    if __name__ != "__main__":
        raise
    raise SystemExit(f"error: {error}: pip install 'summerlm[eval]'") from None

from model.config import ModelError
from shards.errors import one_line_failures
from tools.errors import EvaluationError
from tools.evaluation.multiple_choice import pair_window
from tools.evaluation.protocols import Protocol, plan_windows
from tools.evaluation.scoring import Scorer, check_context, score
from tools.generation.until import Asked, read_settings, write_until
from tools.models.loading import ModelSpec, Precision, load

Pair = tuple[tuple[str, str], list[int], list[int]]  # texts and ids of context and continuation
_AT_ONCE = 8  # texts, where the harness names no number of its own: 1 is its default
_ANSWERS = "\n\nassistant: "
DEFAULT_DEVICE = "cuda:0"  # what the harness passes where its user names none


@register_model("summerlm")
class SummerLM(TemplateLM):  # type: ignore[misc]
    """A model of ours behind the harness' interface: its requests, our scorer."""

    def __init__(
        self,
        *,
        run: str | None = None,
        checkpoint: str | None = None,
        hf: str | None = None,
        device: str | None = None,
        dtype: Precision = "auto",
        **options: Any,
    ) -> None:
        super().__init__()
        named = {"run": run, "checkpoint": checkpoint, "hf": hf}
        where = {name: Path(path) for name, path in named.items() if path is not None}
        if device == DEFAULT_DEVICE and not torch.cuda.is_available():
            device = None
        self.loaded = load(ModelSpec(**where, device=device or "auto", dtype=dtype))
        self.max_length = int(options.pop("context", None) or self.loaded.trained_context)
        check_context(self.loaded, self.max_length)
        self.batch_tokens = int(options.pop("batch_tokens", 8192))
        self.add_bos_token = str(options.pop("add_bos_token", False)).lower() == "true"
        size = str(options.pop("batch_size", _AT_ONCE))
        self.batch_size = int(size) if size.isdigit() and int(size) > 1 else _AT_ONCE
        self._conversations: dict[str, list[int]] = {}  # those that a template was applied to
        if left := options.keys() - {"max_batch_size"}:
            raise EvaluationError(
                f"model_args {', '.join(sorted(left))}: summerlm has no such argument"
            )

    @property
    def tokenizer_name(self) -> str:
        """What the harness' cache calls the tokenizer."""
        return self.loaded.vocabulary.sha256

    @property
    def eot_token_id(self) -> int | None:
        """The id that ends a text."""
        return self.loaded.vocabulary.eos_id

    @property
    def prefix_token_id(self) -> int | None:
        """The id in front of a text without a context: BOS, or EOS where there is none."""
        bos_id = self.loaded.vocabulary.bos_id
        return self.eot_token_id if bos_id is None else bos_id

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """The ids of a text; BOS in front where `add_bos_token` or the caller says so."""
        conversation, end, rest = string.rpartition(_ANSWERS)
        if end and (known := self._conversations.get(conversation)):
            return [*known, *(self.loaded.vocabulary.encode(rest) if rest else [])]
        ids = list(self.loaded.vocabulary.encode(string))
        with_bos = self.add_bos_token if add_special_tokens is None else add_special_tokens
        bos_id = self.loaded.vocabulary.bos_id
        return [bos_id, *ids] if with_bos and bos_id is not None else ids

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as a text that `tok_encode` knows again, whose markers no text can spell.

        Without a generation prompt the last turn is the beginning of the answer.
        """
        chat = self.loaded.vocabulary.chat
        if chat is None:
            raise EvaluationError(f"{self.loaded.name}: this model has no chat template")
        turns, begun = chat_history, ""
        if not add_generation_prompt:
            *turns, last = chat_history
            begun = last["content"]
        text = "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)
        self._conversations[text] = chat(turns)
        return text + _ANSWERS + begun

    def _loglikelihood_tokens(self, requests: Sequence[Pair], **_: Any) -> list[tuple[float, bool]]:
        windows = [
            pair_window(before + after, len(after), self.max_length)
            for _, before, after in requests
        ]
        scored = score(Scorer.of(self.loaded), windows, batch_tokens=self.batch_tokens)
        return list(zip((-scored.nats).tolist(), scored.greedy.tolist(), strict=True))

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """The log-likelihood of each text from its BOS, under the protocol `lm-eval`."""
        protocol = Protocol(name="lm-eval", context=self.max_length, bos_id=self.prefix_token_id)
        texts = [np.asarray(self.tok_encode(r.args[0], False), np.int64) for r in requests]
        plans = [plan_windows([ids], protocol) for ids in texts]
        windows = [window for plan in plans for window in plan]
        nats = score(Scorer.of(self.loaded), windows, batch_tokens=self.batch_tokens).nats
        ends = np.cumsum([len(plan) for plan in plans])[:-1]
        return [-float(part.sum()) for part in np.split(nats, ends)]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each context, up to a stop text; a seed for each request."""
        asked = [self._prompt(number, *each.args) for number, each in enumerate(requests)]
        return write_until(self.loaded, asked, self.batch_size)

    def _prompt(self, number: int, context: str, settings: Mapping[str, Any]) -> Asked:
        options, stops = read_settings(settings, number, self.max_length - 1)
        ids = self.tok_encode(context)[options.max_tokens - self.max_length :]
        if not ids:
            if self.prefix_token_id is None:
                raise EvaluationError("this tokenizer has no BOS to start an empty context with")
            ids = [self.prefix_token_id]
        return ids, options, stops


@one_line_failures(ModelError)
def main() -> None:
    """Run the harness' own command line."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
