"""`make golden VERSION=v0.2`: a folder of everything that this version writes, for later ones.

    python tests/make_golden.py tests/data/v0.2

See tests/golden.py for what it holds and tests/test_golden.py for what is asked of it. A folder is
made once, by the version that it is named after, and never again: it stands for files that people
have.
"""

import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import golden
from pipeline.cli import main as prepare
from tools.models.loading import ModelSpec, load

REPOSITORY = Path(__file__).resolve().parents[1]
SEQ_LEN, VOCAB_SIZE, VAL_FRACTION = 64, 512, 0.2

RUN_TOML = """max_steps = {max_steps}
global_batch_tokens = 256    # four rows
micro_batch_size = 2
precision = "fp32"
device = "cpu"
compile = false
log_interval = 1
tensorboard = false
checkpoint.interval_steps = 2
checkpoint.asynchronous = false
validation.interval = 2
loader.num_workers = 0

[mixture]
prose = 3
slimorca = 1

[optim]
lr = 1e-2
warmup_steps = 2

[model]
n_layers = 2
d_model = 16
n_heads = 2
d_ff = 32
dropout = 0.1
attention_dropout = 0.1
{model}
"""
MODELS = {"alibi": "n_kv_heads = 1", "plain": "alibi = false\ntie_embeddings = false"}

README = """# {name}: what SummerLM wrote, kept for every later version

Made by `make golden VERSION={name}`; tests/golden.py says what is here, and no file of it is ever
changed. All text is the project's own: its README files, and conversations that the script makes
up (prepared as `slimorca`, the source with conversations; none of them is of that data set).
"""


def main(folder: Path) -> None:
    if folder.exists():
        raise SystemExit(f"{folder} exists: a golden folder is made once; give another VERSION")
    folder.mkdir(parents=True)
    os.chdir(folder)
    torch.set_num_threads(1)
    Path("README.md").write_text(README.format(name=folder.name))
    write_texts(Path("text"))
    make_shards()
    expected: dict[str, Any] = {"made_with": golden.arithmetic()}
    make_runs()
    expected["traced"] = golden.traced()
    expected["scored"] = {name: golden.scored("--run", f"runs/{name}") for name in golden.RUNS}
    make_exports()
    expected["logged"] = resume()
    Path(golden.EXPECTED).write_text(json.dumps(expected, indent=1) + "\n")


def write_texts(folder: Path) -> None:
    """Paragraphs of our README files, sums as conversations, and a page for a perplexity."""
    folder.mkdir()
    pages = [REPOSITORY / "README.md", REPOSITORY / "shards" / "README.md"]
    prose = [part for page in pages for part in re.split(r"\n\n+", page.read_text()) if part]
    write_jsonl(folder / "prose.jsonl", [{"text": text} for text in prose])
    write_jsonl(folder / "chat.jsonl", [{"conversations": sums(n)} for n in range(80)])
    unseen = (REPOSITORY / "tools" / "README.md").read_text()
    (folder / "unseen.txt").write_text(unseen[:3000].rpartition("\n")[0] + "\n")


def sums(n: int) -> list[dict[str, str]]:
    """A conversation of one or two questions, every third with a system turn."""
    said = [("system", "Answer in one sentence.")] if n % 3 == 0 else []
    for a, b in [(n, n * n % 17), (n % 7, 3 * n)][: 1 + n % 2]:
        said.append(("human", f"How much is {a} and {b}?"))
        said.append(("gpt", f"{a} and {b} is {a + b}."))
    return [{"from": role, "value": text} for role, text in said]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows))


def make_shards() -> None:
    """Two sources, by a vocabulary learnt from the first."""
    golden.run(prepare, "tokenizer", "--train", "--data-files", "text/prose.jsonl",
               "--vocab-size", str(VOCAB_SIZE), "--out", "tokenizer.model")  # fmt: skip
    for source, file, *flags in (("prose", "prose"), ("slimorca", "chat", "--loss-mask")):
        golden.run(
            prepare, "tokenize", "--source", source, "--data-files", f"text/{file}.jsonl",
            "--out", "shards", "--tokenizer", "tokenizer.model", "--seq-len", str(SEQ_LEN),
            "--val-fraction", str(VAL_FRACTION), "--workers", "1", *flags,
        )  # fmt: skip
    Path("tokenizer.model").unlink()  # each source has its own


def make_runs() -> None:
    """One run that is asked to stop before its end, and one that reaches it."""
    for name, model in MODELS.items():
        stops = name == "alibi"
        text = RUN_TOML.format(max_steps=golden.MAX_STEPS if stops else 2, model=model)
        Path(f"{name}.toml").write_text(text)
        if stops:
            os.environ["SUMMER_FAULT"] = f"sigterm:0:{golden.LAST_STEP}"
        golden.train_on(name, exit_code=75 if stops else 0)
        os.environ.pop("SUMMER_FAULT", None)
        tidy(Path("runs", name))


def tidy(run: Path) -> None:
    """Take away what is of the process that trained, not of the run."""
    (run / ".lock").unlink()
    for folder in ("ranks", "stacks", "faults"):
        shutil.rmtree(run / folder, ignore_errors=True)


def make_exports() -> None:
    """Both runs for transformers, and the logits of our own model for the same weights."""
    tensors = {"tokens": torch.randint(3, VOCAB_SIZE, (2, 24),
                                       generator=torch.Generator().manual_seed(1))}  # fmt: skip
    for name in golden.RUNS:
        golden.export(name, Path("exports", name))
        loaded = load(ModelSpec(run=Path("runs", name), device="cpu", dtype="fp32"))
        with torch.inference_mode():
            tensors[name] = loaded.model.logits(tensors["tokens"])
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, golden.LOGITS)


def resume() -> list[dict[str, Any]]:
    """Go on with a copy of the run to its end, and keep its last checkpoint and its figures."""
    kept = Path("kept")
    shutil.copytree("runs/alibi", kept)
    run = golden.train_on("alibi")
    golden.RESUMED.parent.mkdir()
    (run / "checkpoints" / golden.RESUMED.name).rename(golden.RESUMED)
    figures = golden.logged(run)
    shutil.rmtree(run)
    kept.rename(run)
    return figures


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
