"""Golden folders: what a version wrote, and the figures that it and every later one must reach.

tests/data/v0.1/
  text/            what was prepared: our own prose, conversations made by tests/make_golden.py
  shards/          two sources, one of them with a loss mask, both with held-out documents
  alibi.toml ...   the configuration of each run
  runs/alibi       checkpoints at step 2 and, asked to stop there, at step 4
  runs/plain       without ALiBi, so that its export is a LlamaForCausalLM
  resumed/         the weights and moments of runs/alibi two steps later
  exports/         both runs for transformers, and logits.safetensors: what the version computed
  expected.json    every figure, and what it was computed with

The commands are called as a user would, in the folder itself, so that no path in it is absolute.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
import torch.nn.functional as F
from click.testing import CliRunner
from torch import Tensor

from tools.convert import main as convert
from tools.evaluate import main as evaluate
from tools.trace import main as trace
from trainer.cli import main as train

RUNS: Final = ("alibi", "plain")
LAST_STEP: Final = 4  # of runs/alibi; `resumed` is two steps later
MAX_STEPS: Final = 6
EXPECTED: Final = "expected.json"
RESUMED: Final = Path("resumed", f"step-{MAX_STEPS}")
LOGITS: Final = Path("exports", "logits.safetensors")
UNSEEN: Final = "text/unseen.txt"
DOCUMENT: Final = "prose.jsonl:3"

LOGGED: Final = ("step", "loss", "lr", "grad_norm", "n_targets", "next_index")
SOURCE_FIGURES: Final = ("source", "documents", "tokens", "bytes", "model", "token_perplexity")
TEXT_FIGURES: Final = ("scored_tokens", "token_perplexity", "bits_per_byte")


def run(command: Any, *arguments: str, exit_code: int = 0) -> str:
    """What a command prints; it must end with that exit code."""
    result = CliRunner().invoke(command, list(arguments))
    assert result.exit_code == exit_code, result.output + repr(result.exception)
    return result.stdout


def refused(command: Any, *arguments: str) -> str:
    """The one line of a command that refuses its work."""
    result = CliRunner().invoke(command, list(arguments))
    assert result.exit_code == 1, result.output + repr(result.exception)
    [line] = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line


def train_on(name: str, exit_code: int = 0) -> Path:
    """The folder of a golden run, gone on with as its configuration says."""
    out = Path("runs", name)
    run(train, "--shards", "shards", "--config", f"{name}.toml", "--out", str(out),
        exit_code=exit_code)  # fmt: skip
    return out


def export(name: str, folder: Path) -> Path:
    """The folder for transformers that a golden run's newest checkpoint becomes."""
    run(convert, "--from", f"runs/{name}", "--to", str(folder), "--dtype", "fp32")
    return folder


def json_lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def traced() -> dict[str, Any]:
    """What the run saw at a step, will see at a later one, and when it sees one document."""
    found = {
        f"step {step}": json_lines(run(trace, "runs/alibi", "--step", str(step), "--json"))
        for step in (1, LAST_STEP, MAX_STEPS)
    }
    found[DOCUMENT] = json_lines(run(trace, "runs/alibi", "--document", DOCUMENT, "--json"))
    return found


def scored(*model: str) -> dict[str, Any]:
    """The figures of held-out documents and of a text that no run has seen."""
    how = (*model, "--device", "cpu", "--dtype", "fp32", "--json")
    [held_out] = json_lines(run(evaluate, "heldout", "--shards", "shards", *how))
    [text] = json_lines(run(evaluate, "wikitext2", "--data", UNSEEN, *how))
    rows = [*held_out["sources"], held_out["total"]]
    return {
        "heldout": [{key: row[key] for key in SOURCE_FIGURES} for row in rows],
        "text": {key: text[key] for key in TEXT_FIGURES},
    }


def logged(out: Path) -> list[dict[str, Any]]:
    """The figures of each step that a run has logged."""
    lines = json_lines((out / "metrics.jsonl").read_text())
    return [{key: line[key] for key in LOGGED} for line in lines]


def arithmetic() -> dict[str, str]:
    """What decides the bits of a result: torch, the instructions it uses, and what these give.

    The digest is of products, attention and functions of the shapes that the golden runs have:
    libraries under torch choose kernels by the processor's maker too. Where all three are equal,
    training must give equal bits.
    """
    generator = torch.Generator().manual_seed(0)
    digest = hashlib.sha256()

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, requires_grad=True)

    steps: list[tuple[Callable[..., Tensor], list[Tensor]]] = [
        *((F.linear, [drawn(2, 64, n), drawn(m, n)]) for n, m in SHAPES),
        (attend, [drawn(2, 2, 64, 16) for _ in "qkv"]),
        (lambda x: F.rms_norm(x, (16,)), [drawn(2, 64, 16)]),
        (lambda x: F.silu(x).exp().sum(-1).log(), [drawn(2, 64, 32)]),
        (lambda x: torch.logsumexp(x, -1), [drawn(128, 512)]),
    ]
    for function, inputs in steps:
        made = function(*inputs)
        torch.autograd.backward(made.square().sum())
        for tensor in (made, *(each.grad for each in inputs)):
            assert tensor is not None
            digest.update(tensor.detach().contiguous().numpy().tobytes())
    capability = torch.backends.cpu.get_cpu_capability()
    return {"torch": torch.__version__, "cpu": capability, "kernels": digest.hexdigest()}


SHAPES: Final = ((16, 32), (16, 16), (16, 64), (32, 16), (16, 512))


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.25)
