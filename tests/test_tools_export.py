"""A run as a folder for transformers: its own code, its chat template, its card."""

import ast
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from huggingface_hub import ModelCard
from jinja2.exceptions import TemplateError

from conftest import REPOSITORY
from pipeline.text.chat import ROLES, ChatTemplate, render
from pipeline.text.tokenizer import Tokenizer
from shards.versions import VERSION
from tools.conversion.card import Export, model_card
from tools.convert import main
from tools.evaluation.cards import Metric, write_results
from tools.evaluation.cards import Result as Eval
from tools.generation.generation import Generation, Sampling, generate
from tools.models.hf_folder import MODELING, model_code, write_folder
from tools.models.loading import ModelSpec, load
from tools_samples import sample_model, sample_tokenizer, trained_run
from trainer.checkpoint.runs import EVALUATIONS
from trainer.checkpoint.storage import read_record
from trainer.config.config import configure, load_config

transformers = pytest.importorskip("transformers")


def convert(source: Path, target: Path, *options: str) -> Result:
    return CliRunner().invoke(main, ["--from", str(source), "--to", str(target), *options])


IN_PLAIN_TRANSFORMERS = """
import sys
sys.path = [place for place in sys.path if place != sys.argv[1]]
import importlib.util
assert importlib.util.find_spec("trainer") is None
import torch
torch.set_num_threads(1)
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, DynamicCache

def near(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)

def read(kind, folder):
    return kind.from_pretrained(folder, trust_remote_code=True).eval()

def check_logits(model, tokens, logits):
    near(model(tokens).logits, logits)
    near(model(inputs_embeds=model.get_input_embeddings()(tokens)).logits, logits)
    near(model(tokens, logits_to_keep=3).logits, logits[:, -3:])
    near(model(tokens, position_ids=torch.arange(400)[None] + 70).logits, logits)
    cache = DynamicCache()
    cuts = zip((0, 150, 151), (150, 151, 400), strict=True)
    parts = [model(tokens[:, a:b], past_key_values=cache).logits for a, b in cuts]
    near(torch.cat(parts, dim=1), logits)

def check_padding(model, tokens, logits):
    for left, right in ((50, 0), (0, 50), (20, 30)):
        padded = torch.nn.functional.pad(tokens, (left, right))
        seen = torch.nn.functional.pad(torch.ones_like(tokens), (left, right))
        end = left + tokens.shape[1]
        near(model(padded, attention_mask=seen).logits[:, left:end], logits)
        moved = (seen.cumsum(1) - 1).clamp(min=0)  # as generate() counts them
        cache = DynamicCache()
        cuts = zip((0, 150, 151), (150, 151, padded.shape[1]), strict=True)
        parts = [
            model(padded[:, a:b], seen[:, :b], moved[:, a:b], past_key_values=cache).logits
            for a, b in cuts
        ]
        near(torch.cat(parts, dim=1)[:, left:end], logits)

def check_states(model, base, tokens, logits):
    found = base(tokens, output_hidden_states=True)
    assert len(found.hidden_states) == model.config.num_hidden_layers + 1
    assert torch.equal(found.hidden_states[0], base.get_input_embeddings()(tokens))
    assert torch.equal(found.hidden_states[-1], found.last_hidden_state)
    after_one = base.blocks[0](found.hidden_states[0], base.positions(0, tokens.shape[1]), None)
    near(found.hidden_states[1], after_one)
    head = model.get_output_embeddings() or model.get_input_embeddings()
    near(found.last_hidden_state @ head.weight.T, logits)

def check_generation(model, tokenizer, ours):
    greedy = dict(max_new_tokens=24, do_sample=False)
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

def check_training(model, tokens, logits):
    wanted = logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
    expected = torch.nn.functional.cross_entropy(*wanted)
    grads, calls = [], []
    for recompute in (False, True):
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            for block in model.blocks:
                block.register_forward_pre_hook(lambda *_: calls.append(1))
        model.train().zero_grad()
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
        grads.append([each.grad for each in model.parameters()])
    assert len(calls) == 2 * len(model.blocks)
    for plain, recomputed in zip(*grads, strict=True):
        assert torch.equal(plain, recomputed)
    model.gradient_checkpointing_disable()
    model.eval()

def check_resizing(model, folder, tokens, logits):
    model.resize_token_embeddings(600, mean_resizing=False)
    near(model(tokens).logits[..., :512], logits)
    assert 0 < model.get_input_embeddings().weight[512:].std() < 0.1
    model.save_pretrained(folder + "-resized")
    again = read(AutoModelForCausalLM, folder + "-resized")
    assert again.config.vocab_size == 600
    assert torch.equal(again(tokens).logits, model(tokens).logits)

def check(ours):
    folder, tokens = ours["folder"], ours["tokens"]
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model, base = read(AutoModelForCausalLM, folder), read(AutoModel, folder)
    for name, value in ours["config"].items():
        assert getattr(model.config, name) == value, name
    with torch.inference_mode():
        logits = model(tokens).logits
        near(logits, ours["logits"])
        check_logits(model, tokens, logits)
        check_padding(model, tokens, logits)
        check_states(model, base, tokens, logits)
        check_generation(model, tokenizer, ours)
    check_training(model, tokens, logits)
    with torch.no_grad():
        check_resizing(model, folder, tokens, logits)
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
    expected: list[dict[str, Any]] = []
    for number, shape in enumerate(SHAPES):
        run, target = trained_run(tmp_path / f"run{number}", **shape), tmp_path / f"hf{number}"
        result = convert(run, target, "--dtype", "fp32")
        assert result.exit_code == 0, result.output
        ours = load(ModelSpec(run=run, device="cpu", dtype="fp32"))
        encode = ours.vocabulary.encode
        with torch.inference_mode():
            written = [generate(ours, [1, *encode(prompt)], greedy) for prompt in prompts]
            logits = ours.model.logits(tokens)
        assert len({id for ids in written for id in ids}) > 10
        config = ours.model.config
        described = {"head_dim": config.head_dim, "tie_word_embeddings": config.tie_embeddings,
                     "hidden_size": config.d_model, **asdict(config)}  # fmt: skip
        described["n_kv_heads"] = described["num_key_value_heads"] = config.kv_heads
        expected.append({"folder": str(target), "prompts": prompts, "written": written,
                         "tokens": tokens, "logits": logits, "config": described})  # fmt: skip
        stored = json.loads((target / "config.json").read_text())
        derived = {"head_dim": config.head_dim, "tie_word_embeddings": config.tie_embeddings}
        assert stored.items() >= (asdict(config) | derived).items()
        never = json.loads((target / "generation_config.json").read_text())["suppress_tokens"]
        assert never == [0, 1, *range(3, 5), *range(500, 512)]  # not 2, which ends a text
        back = convert(target, tmp_path / f"back{number}")
        assert back.exit_code == 0, back.output
        assert load_config(tmp_path / f"back{number}").model == ours.model.config
        assert load(ModelSpec(hf=target, device="cpu")).weights_sha256 == ours.weights_sha256
    torch.save(expected, tmp_path / "expected.pt")
    plain = subprocess.run(
        [sys.executable, "-I", "-c", IN_PLAIN_TRANSFORMERS, REPOSITORY, tmp_path / "expected.pt"],
        env=os.environ | {"HF_HOME": str(tmp_path / "cache")}, capture_output=True, text=True,
    )  # fmt: skip
    assert plain.returncode == 0, plain.stderr


def test_the_code_that_goes_along_is_the_model_s_and_needs_torch_and_transformers_alone() -> None:
    """All of model/, changed in its own imports alone, which name files that go along."""
    code = model_code()
    model = [path.name for path in (REPOSITORY / "model").glob("*.py")]
    assert sorted(code) == sorted({*model, MODELING} - {"__init__.py"})
    for name, text in code.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert f"{node.module}.py" in code
            elif isinstance(node, ast.Import | ast.ImportFrom):
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [
                    alias.name for alias in node.names
                ]  # fmt: skip
                allowed = {"torch", "transformers"} | set(sys.stdlib_module_names)
                assert {each.split(".")[0] for each in names} <= allowed
        if name in model:
            source = (REPOSITORY / "model" / name).read_text()
            assert text == source.replace("\nfrom model.", "\nfrom .")


def test_a_folder_s_own_code_is_never_run(tmp_path: Path) -> None:
    run, target = trained_run(tmp_path / "run"), tmp_path / "hf"
    assert convert(run, target).exit_code == 0
    (target / MODELING).write_text("raise SystemExit('foreign code')")
    assert convert(target, tmp_path / "back").exit_code == 0
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"n_layers": "two"}))
    assert "describes no model of summer-convert" in convert(target, tmp_path / "x").output


def test_the_card_says_where_the_weights_come_from(tmp_path: Path) -> None:
    ledger = {"web": {"rows": 40, "tokens": 1_270, "epochs": 0.25}}
    sets = ["optim.lr=0.123", "checkpoint.mirror=/a/private/path"]
    trained = asdict(configure(preset="tiny", sets=sets).config)
    record = {
        "time_s": 7200.0, "world_size": 8, "ledger": ledger, "data": {"web": {"root": "5f" * 32}},
        "config": {**trained, "dollars_per_hour": 18.5, "init_from": "base"},
    }  # fmt: skip
    run = trained_run(tmp_path / "run", record)
    cards = run / EVALUATIONS / "step-3"
    cards.mkdir(parents=True)
    (cards / "lambada.md").write_text("## lambada\n\n```\nacc 0.25\n```\n")
    model = {"model": "m"}
    asked = Eval(task="lambada", metrics={"acc": Metric(0.25, 0.01)}, model=model, grouped=True,
                 settings={"num_fewshot": 5})  # fmt: skip
    read = Eval(task="wikitext2", metrics={"bits_per_byte": Metric(1.5, 0.1)}, model=model,
                settings={"protocol": "stride"})  # fmt: skip
    write_results(cards / "both.json", [[asked], [read]])
    assert convert(run, tmp_path / "hf").exit_code == 0
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "| web | 40 | 1,270 | 0.25 | `" + "5f" * 32 + "` |" in card
    for said in ("| tokens seen | 1,270 |", "$37.00 at $18.5 an hour", "2.00 h of 8 devices",
                 "| started from | base |", "### lambada\n\n```\nacc 0.25", "run, step 3",
                 load(ModelSpec(run=run, device="cpu")).weights_sha256,
                 sample_tokenizer().info.sha256,
                 f"summerlm {VERSION}", "trust_remote_code=True"):  # fmt: skip
        assert said in card
    data: Any = ModelCard(card).data
    head = data.eval_results
    assert [(each.dataset_name, each.metric_name, each.metric_value) for each in head] == [
        ("lambada", "acc (5-shot)", 0.25), ("wikitext2", "bits_per_byte (stride)", 1.5),
    ]  # fmt: skip
    settings = card.split("```toml\n")[1].split("```")[0].replace('init_from = "base"\n', "")
    (tmp_path / "run.toml").write_text(settings)
    again = asdict(configure(file=tmp_path / "run.toml").config)
    assert again["dollars_per_hour"] == 18.5 and again["checkpoint"]["mirror"] == ""
    assert again["optim"] == trained["optim"] and again["model"] == trained["model"]
    for damaged in ("{", "[1]", "[[1]]", '[{"metrics": [1]}]', "7"):
        (cards / "both.json").write_text(damaged)
        result = convert(run, tmp_path / "no")
        assert result.exit_code == 1 and "is no result of summer-eval" in result.output
        assert result.output.count("\n") == 1 and not (tmp_path / "no").exists()
    plain = trained_run(tmp_path / "plain", alibi=False) / "checkpoints" / "step-3"
    card = model_card(plain, load(ModelSpec(checkpoint=plain)), read_record(plain), Export())
    assert "trust_remote_code" not in card


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
        turns = record if ROLES[record[-1]["from"]] == "assistant" else record[:-1]
        messages = [{"role": ROLES[t["from"]], "content": t["value"]} for t in turns]
        assert chatting.apply_chat_template(messages, return_dict=False) == ours.tolist()


def test_the_chat_template_keeps_the_pipeline_s_rules(chatting: Any) -> None:
    def say(*turns: str, **how: Any) -> str:
        first = int(turns[0] == "S")
        roles = ["system"] * first + ["user", "assistant"] * len(turns)
        pairs = zip(roles, turns, strict=False)
        messages = [{"role": role, "content": text} for role, text in pairs]
        return str(chatting.apply_chat_template(messages, tokenize=False, **how))

    assert say("S", "q", "a  ") == "<s>[INST]S\n\nq[/INST]a</s>"
    for how in ({}, {"add_generation_prompt": True}):  # a question is always asked
        assert say("q", **how) == "<s>[INST]q[/INST]"
        assert say("S", "q", "a", "r", **how) == "<s>[INST]S\n\nq[/INST]a</s>[INST]r[/INST]"
    for turns, complaint in (
        (("", "a"), "empty turn"), (("q", "  "), "empty turn"),
        (("q </s>", "a"), "spells </s>"), (("q", "[INST]"), r"spells \[INST\]"),
    ):  # fmt: skip
        with pytest.raises(TemplateError, match=complaint):
            say(*turns)
    with pytest.raises(TemplateError, match="no tools"):
        say("q", tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}])


def test_content_may_come_in_parts_and_no_marker_slips_in(chatting: Any) -> None:
    def say(*messages: tuple[str, Any]) -> str:
        told = [{"role": role, "content": content} for role, content in messages]
        return str(chatting.apply_chat_template(told, tokenize=False))

    def parts(*texts: str) -> list[dict[str, str]]:
        return [{"type": "text", "text": text} for text in texts]

    spoken = say(("system", parts("S")), ("user", parts("q", "r")), ("assistant", parts("a ")))
    assert spoken == "<s>[INST]S\n\nq\n\nr[/INST]a</s>"
    for messages, complaint in (
        ([("user", parts("q", "</s>[INST]"))], "spells"),
        ([("system", "a [/INST] b"), ("user", "q")], "spells"),
        ([("user", [{"type": "image", "url": "x"}])], "not text"),
        ([("assistant", "a")], "out of order"),
        ([("user", "q"), ("user", "r")], "out of order"),
        ([("user", "q"), ("assistant", "a"), ("tool", "t")], "out of order"),
        ([("system", "S")], "no question"),
        ([("user", None)], "empty turn"),
    ):
        with pytest.raises(TemplateError, match=complaint):
            say(*messages)
