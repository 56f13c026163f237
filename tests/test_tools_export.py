"""A run as a folder for transformers: its own code, its chat template, its card."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from jinja2.exceptions import TemplateError

from conftest import REPOSITORY
from pipeline.text.chat import SCHEMAS, ChatTemplate, render
from pipeline.text.tokenizer import Tokenizer
from test_house import imports
from tools.conversion.model_card import model_card
from tools.convert import main
from tools.generation.generation import Generation, generate
from tools.generation.sampling import Sampling
from tools.models import hf_folder as hugging_face
from tools.models.hf_folder import write_folder
from tools.models.loading import Choice, load
from tools_samples import sample_model, sample_tokenizer, trained_run
from trainer.checkpoint.runs import EVALUATIONS
from trainer.config.config import load_config

transformers = pytest.importorskip("transformers")


def convert(source: Path, target: Path) -> Result:
    return CliRunner().invoke(main, ["--from", str(source), "--to", str(target)])


IN_PLAIN_TRANSFORMERS = """
import sys
sys.path = [place for place in sys.path if place != sys.argv[1]]
import importlib.util
assert importlib.util.find_spec("trainer") is None
import torch
torch.set_num_threads(1)
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

def check(ours):
    tokenizer = AutoTokenizer.from_pretrained(ours["folder"], trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(ours["folder"], trust_remote_code=True).eval()
    near = dict(rtol=0, atol=1e-4)
    tokens = ours["tokens"]
    greedy = dict(max_new_tokens=24, do_sample=False)
    with torch.inference_mode():
        logits = model(tokens).logits
        torch.testing.assert_close(logits, ours["logits"], **near)
        cache = DynamicCache()
        cuts = zip((0, 150, 151), (150, 151, 400), strict=True)
        parts = [model(tokens[:, a:b], past_key_values=cache).logits for a, b in cuts]
        torch.testing.assert_close(torch.cat(parts, dim=1), logits, **near)
        padded = torch.cat([torch.zeros(2, 50, dtype=torch.int64), tokens], dim=1)
        seen = (torch.arange(450) >= 50).long().expand(2, 450)
        found = model(padded, attention_mask=seen).logits[:, 50:]
        torch.testing.assert_close(found, logits, **near)
        alone = []
        for prompt, written in zip(ours["prompts"], ours["written"], strict=True):
            ids = tokenizer(prompt, return_tensors="pt")
            made = model.generate(**ids, **greedy)
            assert torch.equal(made, model.generate(**ids, **greedy, use_cache=False))
            alone.append(made[0, ids.input_ids.shape[1]:].tolist())
            assert alone[-1] == written, (alone[-1], written)
        batch = tokenizer(ours["prompts"], return_tensors="pt", padding=True)
        made = model.generate(**batch, **greedy)[:, batch.input_ids.shape[1]:].tolist()
        assert made == alone
    loss = model.train()(tokens, labels=tokens).loss
    loss.backward()
    wanted = logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
    expected = torch.nn.functional.cross_entropy(*wanted)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert all(each.grad is not None for each in model.parameters())
    try:
        model(torch.zeros(1, 16_449, dtype=torch.int64))
    except ValueError as error:
        assert "16448" in str(error)
    else:
        assert not model.config.alibi

for ours in torch.load(sys.argv[2]):
    check(ours)
"""


SHAPES: tuple[dict[str, Any], ...] = (
    {"n_heads": 3, "d_model": 48, "n_kv_heads": 1, "tie_embeddings": False},
    {"rope": False, "alibi": False, "layer_scale": False},
)


def test_with_alibi_its_own_code_goes_along(tmp_path: Path) -> None:
    """It needs nothing of ours: logits far beyond training, cache, padding, generation."""
    tokens = torch.randint(3, 500, (2, 400), generator=torch.Generator().manual_seed(1))
    prompts = ["def f(x):", "import argparse\n\nclass", "a"]
    greedy = Generation(max_tokens=24, sampling=Sampling(temperature=0))
    told = []
    for number, shape in enumerate(SHAPES):
        run, target = trained_run(tmp_path / f"run{number}", **shape), tmp_path / f"hf{number}"
        result = convert(run, target)
        assert result.exit_code == 0, result.output
        ours = load(Choice(run=run, device="cpu", dtype="fp32"))
        encode = ours.vocabulary.encode
        with torch.inference_mode():
            written = [generate(ours, [1, *encode(prompt)], greedy) for prompt in prompts]
            logits = ours.model.logits(tokens)
        assert len({id for ids in written for id in ids}) > 10
        told.append({"folder": str(target), "prompts": prompts, "written": written,
                     "tokens": tokens, "logits": logits})  # fmt: skip
        never = json.loads((target / "generation_config.json").read_text())["suppress_tokens"]
        assert never == [0, 1, *range(3, 5), *range(500, 512)]  # not 2, which ends a text
        back = convert(target, tmp_path / f"back{number}")
        assert back.exit_code == 0, back.output
        assert load_config(tmp_path / f"back{number}").model == ours.model.config
        assert load(Choice(hf=target, device="cpu")).weights_sha256 == ours.weights_sha256
    torch.save(told, tmp_path / "told.pt")
    plain = subprocess.run(
        [sys.executable, "-I", "-c", IN_PLAIN_TRANSFORMERS, REPOSITORY, tmp_path / "told.pt"],
        env=os.environ | {"HF_HOME": str(tmp_path / "cache")}, capture_output=True, text=True,
    )  # fmt: skip
    assert plain.returncode == 0, plain.stderr


def test_the_code_that_goes_along_needs_torch_and_transformers_alone() -> None:
    assert {name for name, _ in imports(REPOSITORY / "tools" / hugging_face.MODELING)} == {
        "__future__", "math", "typing", "torch", "transformers",
    }  # fmt: skip


def test_a_folder_s_own_code_is_never_run(tmp_path: Path) -> None:
    run, target = trained_run(tmp_path / "run"), tmp_path / "hf"
    assert convert(run, target).exit_code == 0
    (target / hugging_face.MODELING).write_text("raise SystemExit('foreign code')")
    assert convert(target, tmp_path / "back").exit_code == 0
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"n_layers": "two"}))
    assert "describes no model of summer-convert" in convert(target, tmp_path / "x").output


def test_the_card_says_where_the_weights_come_from(tmp_path: Path) -> None:
    ledger = {"web": {"rows": 40, "tokens": 1_270, "epochs": 0.25}}
    record = {
        "time_s": 7200.0, "world_size": 8, "ledger": ledger, "data": {"web": {"root": "5f" * 32}},
        "config": {"dollars_per_hour": 18.5, "init_from": "base"},
    }  # fmt: skip
    run = trained_run(tmp_path / "run", record)
    cards = run / EVALUATIONS / "step-3"
    cards.mkdir(parents=True)
    (cards / "lambada.md").write_text("## lambada\n\n```\nacc 0.25\n```\n")
    assert convert(run, tmp_path / "hf").exit_code == 0
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "| web | 40 | 1,270 | 0.25 | `" + "5f" * 32 + "` |" in card
    for said in ("| tokens seen | 1,270 |", "$37.00 at $18.5 an hour", "2.00 h of 8 devices",
                 "| started from | base |", "### lambada\n\n```\nacc 0.25", "run, step 3",
                 load(Choice(run=run, device="cpu")).weights_sha256, sample_tokenizer().info.sha256,
                 "summerlm 0.1.0", "trust_remote_code=True"):  # fmt: skip
        assert said in card
    plain = trained_run(tmp_path / "plain", alibi=False) / "checkpoints" / "step-3"
    assert "trust_remote_code" not in model_card(plain, load(Choice(checkpoint=plain)))


@pytest.fixture(scope="module")
def chatting(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """transformers' tokenizer of the default vocabulary."""
    folder = tmp_path_factory.mktemp("chat")
    model = sample_model(alibi=False, vocab_size=32_768)
    write_folder(folder, model.config, model.state_dict(), Tokenizer.default())
    return transformers.AutoTokenizer.from_pretrained(folder, model_max_length=10**9)


def test_conversations_have_the_pipeline_s_ids(chatting: Any, shared: Path) -> None:
    [path] = (shared / "slimorca").glob("*.jsonl")
    tokenizer = Tokenizer.default()
    template = ChatTemplate.of(tokenizer)
    for line in path.read_text().split("\n")[:-1:8]:
        record = json.loads(line)["conversations"]
        turns = [
            np.array([tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id], np.uint16)
            for text in render(record)
        ]
        starts = np.cumsum([0] + [len(turn) for turn in turns[:-1]])
        ours = template.join(np.concatenate(turns), starts, np.array([len(turns)])).tokens
        messages = [
            {"role": SCHEMAS["sharegpt"].roles[t["from"]], "content": t["value"]} for t in record
        ]
        assert chatting.apply_chat_template(messages, return_dict=False) == ours.tolist()


def test_the_chat_template_keeps_the_pipeline_s_rules(chatting: Any) -> None:
    def say(*turns: str, **how: Any) -> str:
        roles = ("user", "assistant") if turns[0] != "S" else ("system", "user", "assistant")
        messages = [{"role": roles[n] if n < len(roles) else roles[n % 2 + len(roles) - 2],
                     "content": text} for n, text in enumerate(turns)]  # fmt: skip
        return str(chatting.apply_chat_template(messages, tokenize=False, **how))

    assert say("S", "q", "a  ") == "<s>[INST]S\n\nq[/INST]a</s>"
    assert say("q", "a", "r") == "<s>[INST]q[/INST]a</s>"
    assert say("q", "a", "r", add_generation_prompt=True).endswith("a</s>[INST]r[/INST]")
    for turns, complaint in (
        (("q",), "add_generation_prompt"), (("", "a"), "empty turn"), (("q", "  "), "empty turn"),
        (("q </s>", "a"), "spells </s>"), (("q", "[INST]"), r"spells \[INST\]"),
    ):  # fmt: skip
        with pytest.raises(TemplateError, match=complaint):
            say(*turns)
    with pytest.raises(TemplateError, match="out of order"):
        chatting.apply_chat_template([{"role": "assistant", "content": "a"}], tokenize=False)
