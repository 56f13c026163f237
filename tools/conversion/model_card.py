"""The model card of exported weights: what they are, what made them, what they scored."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from huggingface_hub import ModelCard, ModelCardData

from model.config import count_params
from shards.versions import VERSION
from tools.models.llama import is_llama
from tools.models.loading import LoadedModel
from trainer.checkpoint.runs import EVALUATIONS
from trainer.checkpoint.storage import read_record

_TEMPLATE: Final = """\
---
{{ card_data }}
---
# {{ name }}

A decoder-only transformer of {{ "{:,}".format(parameters) }} parameters, made with SummerLM.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(FOLDER{{ code }})
model = AutoModelForCausalLM.from_pretrained(FOLDER{{ code }})
written = model.generate(**tokenizer("Once", return_tensors="pt"), max_new_tokens=50)
print(tokenizer.decode(written[0], skip_special_tokens=True))
```
{% if code %}
No class of transformers computes this model, so its code (`modeling_summerlm.py` and the
files that it imports; torch and transformers are all they need) comes with its weights.
{% endif %}{% if chats %}
Conversations: `tokenizer.apply_chat_template(messages, add_generation_prompt=True)`.
{% endif %}
## Where it comes from

| what | value |
| --- | --- |
{% for what, value in facts %}| {{ what }} | {{ value }} |
{% endfor %}{% for row in data %}{% if loop.first %}
## Data

| source | sequences | tokens | epochs | dataset hash |
| --- | --- | --- | --- | --- |
{% endif %}| {{ row | join(" | ") }} |
{% endfor %}
## Evaluation

{% for result in results %}{{ result }}

{% else %}No evaluation card of this checkpoint was kept in the run (summer-eval TASK --follow).
{% endfor %}"""


def model_card(checkpoint: Path, loaded: LoadedModel) -> str:
    """The README.md of a folder with the checkpoint's weights."""
    config, record = loaded.model.config, read_record(checkpoint)
    run = checkpoint.resolve().parents[1]
    head = ModelCardData(
        library_name="transformers", pipeline_tag="text-generation", tags=["summerlm"]
    )
    card = ModelCard.from_template(
        head,
        template_str=_TEMPLATE,
        name=run.name,
        parameters=count_params(config),
        code="" if is_llama(config) else ", trust_remote_code=True",
        chats=loaded.vocabulary.chat is not None,
        facts=list(_facts(run, record, loaded)),
        data=list(_data(record)),
        results=_evaluations(run, checkpoint),
    )
    return str(card)


def _facts(run: Path, record: Mapping[str, Any], loaded: LoadedModel) -> Iterator[tuple[str, str]]:
    config = loaded.model.config
    yield "run", f"{run.name}, step {record['step']:,}"
    yield "shape", ", ".join(f"{name} {value}" for name, value in asdict(config).items())
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


def _data(record: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """What the run read until then: each source by the hash that names its contents."""
    for name, seen in record["ledger"].items() if {"data", "ledger"} <= record.keys() else ():
        read = f"{seen['rows']:,}", f"{seen['tokens']:,}", f"{seen['epochs']:.3g}"
        yield name, *read, f"`{record['data'][name]['root']}`"


def _evaluations(run: Path, checkpoint: Path) -> list[str]:
    """The cards that are kept in the run: those of this checkpoint, and those in its own folder."""
    found = [*sorted((run / EVALUATIONS / checkpoint.name).glob("*.md")), *sorted(run.glob("*.md"))]
    cards = [path.read_text(encoding="utf-8").strip() for path in found]
    return [card.replace("## ", "### ", 1) for card in cards]


def code_version() -> str:
    """This code's version, with the revision of the checkout that it runs from, if any."""
    checkout = Path(__file__).resolve().parents[2]
    if not (checkout / ".git").exists():
        return f"summerlm {VERSION}"
    described = subprocess.run(
        ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=12"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return f"summerlm {VERSION} ({described.stdout.strip() or 'unknown revision'})"
