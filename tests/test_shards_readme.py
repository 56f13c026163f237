"""The specification's worked example runs as it stands, and says what is true."""

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np

from conftest import REPOSITORY
from shards.format import summarise
from shards.reader import read_manifest
from shards.versions import SHARDS
from shards_samples import make_source


def run_example(folder: Path, tmp_path: Path) -> list[str]:
    text = (REPOSITORY / "shards" / "README.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    script = tmp_path / "example.py"
    script.write_text(example)
    done = subprocess.run(
        [sys.executable, script, folder], capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


def test_worked_example(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    manifest = make_source(folder, n_rows=20, n_val_rows=4)
    (folder / "tokenizer.model").write_bytes(b"a model")
    # the sample's tokenizer hash is not this file's: the example must notice
    wrong, *rest = run_example(folder, tmp_path)
    assert wrong == "NOT the data the manifest names"
    facts = manifest.facts
    sha256 = hashlib.sha256(b"a model").hexdigest()
    tokenizer = type(facts.tokenizer)(**{**facts.tokenizer.__dict__, "sha256": sha256})
    facts = type(facts)(**{**facts.__dict__, "tokenizer": tokenizer})
    fitting = summarise(facts, manifest.parts, manifest.shards, manifest.rejected)
    (folder / "manifest.json").write_text(json.dumps(fitting.to_json()))
    assert read_manifest(folder).root == fitting.root
    assert run_example(folder, tmp_path) == ["dataset hash fits", *rest]
    assert rest == [
        f"{manifest.n_documents} documents, {manifest.n_tokens} tokens",
        "the first row begins in 0.txt, record 0 of [0, 1)",
    ]


def test_specification_lists_every_key_of_the_manifest(tmp_path: Path) -> None:
    text = (REPOSITORY / "shards" / "README.md").read_text()
    manifest = make_source(tmp_path / "s").to_json()
    for key in manifest:
        assert f"`{key}`" in text, key
    assert SHARDS in text
    sidecar = np.load(tmp_path / "s" / "00000-000.rows.npy")
    for name in sidecar.dtype.names or ():
        assert f"`{name}`" in text
