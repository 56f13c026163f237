"""The page that travels with exported weights: what they are, what made them, what they scored."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from model.config import ModelConfig, count_params
from shards.versions import VERSION
from tools.models.llama import is_llama
from tools.models.loading import LoadedModel
from trainer.checkpoint.runs import EVALUATIONS
from trainer.checkpoint.storage import read_record

_HEAD: Final = """---
library_name: transformers
pipeline_tag: text-generation
tags: [summerlm]
---
"""


def model_card(checkpoint: Path, loaded: LoadedModel) -> str:
    """The README.md of a folder with the checkpoint's weights."""
    config, record = loaded.model.config, read_record(checkpoint)
    run = checkpoint.resolve().parents[1]
    lines = [
        f"# {run.name}",
        "",
        f"A decoder-only transformer of {count_params(config):,} parameters, made with SummerLM.",
        "",
        *_usage(config, loaded.vocabulary.chat is not None),
        "## Where it comes from",
        "",
        *_table(("what", "value"), _facts(run, record, loaded)),
        *_data(record),
        *_evaluations(run, checkpoint),
    ]
    return _HEAD + "\n".join(lines)


def _usage(config: ModelConfig, chats: bool) -> list[str]:
    code = "" if is_llama(config) else ", trust_remote_code=True"
    why = [
        "LlamaForCausalLM computes no ALiBi, so the model's code (`modeling_summerlm.py`, which",
        "needs torch and transformers alone) lies beside its weights.",
        "",
    ]
    chat = ["Conversations: `tokenizer.apply_chat_template(messages, add_generation_prompt=True)`."]
    return [
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"tokenizer = AutoTokenizer.from_pretrained(FOLDER{code})",
        f"model = AutoModelForCausalLM.from_pretrained(FOLDER{code})",
        'written = model.generate(**tokenizer("Once", return_tensors="pt"), max_new_tokens=50)',
        "print(tokenizer.decode(written[0], skip_special_tokens=True))",
        "```",
        "",
        *([] if is_llama(config) else why),
        *([*chat, ""] if chats else []),
    ]


def _facts(run: Path, record: Mapping[str, Any], loaded: LoadedModel) -> Iterator[tuple[str, str]]:
    config = loaded.model.config
    yield "run", f"{run.name}, step {record['step']:,}"
    yield (
        "shape",
        f"{config.n_layers} layers, d_model {config.d_model}, {config.n_heads} heads"
        f" ({config.kv_heads} of keys), d_ff {config.d_ff}, vocabulary {config.vocab_size:,},"
        f" context {config.seq_len:,}, RoPE {_switch(config.rope)}, ALiBi {_switch(config.alibi)},"
        f" LayerScale {_switch(config.layer_scale)}",
    )
    if "converted_from" in record:
        yield "converted from", str(record["converted_from"])
    if start := record.get("config", {}).get("init_from"):
        yield "started from", str(start)
    if "ledger" in record:
        seen = sum(source["tokens"] for source in record["ledger"].values())
        yield "tokens seen", f"{seen:,}"
    if "time_s" in record:
        devices = record.get("world_size", 1)
        yield "training time", f"{record['time_s'] / 3600:,.2f} h of {devices} devices"
        rate = record.get("config", {}).get("dollars_per_hour", 0.0)
        cost = f"${record['time_s'] / 3600 * rate:,.2f} at ${rate:g} an hour"
        yield "cost", cost if rate else "not recorded (dollars_per_hour was 0)"
    yield "weights sha256", loaded.weights_sha256
    yield "tokenizer", f"{loaded.vocabulary.name}, sha256 {loaded.vocabulary.sha256}"
    made = record.get("versions", {})
    yield "trained with", ", ".join(f"{name} {value}" for name, value in made.items() if value)
    yield "exported by", code_version()


def _data(record: Mapping[str, Any]) -> list[str]:
    """What the run read until then: each source by the root that names its contents."""
    if "data" not in record or "ledger" not in record:
        return []
    rows = (
        (
            name,
            f"{seen['rows']:,}",
            f"{seen['tokens']:,}",
            f"{seen['epochs']:.3g}",
            f"`{record['data'][name]['root']}`",
        )
        for name, seen in record["ledger"].items()
    )
    return ["## Data", "", *_table(("source", "rows", "tokens", "epochs", "root"), rows)]


def _evaluations(run: Path, checkpoint: Path) -> list[str]:
    """The cards that are kept in the run: those of this checkpoint, and those in its own folder."""
    found = [*sorted((run / EVALUATIONS / checkpoint.name).glob("*.md")), *sorted(run.glob("*.md"))]
    cards = [path.read_text(encoding="utf-8").strip() + "\n" for path in found]
    none = [
        "No evaluation card of this checkpoint was kept in the run (summer-eval TASK --follow).\n"
    ]
    return ["## Evaluation", "", *(card.replace("## ", "### ", 1) for card in cards or none)]


def _table(head: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> list[str]:
    lines = [f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *rows)]
    return [*lines, ""]


def code_version() -> str:
    """This code's version, with the revision of the checkout that it runs from, if any."""
    house = Path(__file__).resolve().parents[2]
    if not (house / ".git").exists():
        return f"summerlm {VERSION}"
    told = subprocess.run(
        ["git", "-C", str(house), "describe", "--always", "--dirty", "--abbrev=12"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return f"summerlm {VERSION} ({told.stdout.strip() or 'unknown revision'})"


def _switch(on: bool) -> str:
    return "on" if on else "off"
