"""The complete stage: real sources, and the same bytes whoever makes them."""

import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pipeline.inputs.sources import find
from pipeline.text.tokenizer import Tokenizer, base_model, extend, processor
from pipeline.units.job import Limit
from pipeline.units.recipe import PrepareRequest
from pipeline_samples import (
    TEXTS,
    contents,
    corpus,
    documents,
    prepared,
    request,
    tokenizer,
    write_jsonl,
)
from shards.reader import ShardReader


def test_every_document_comes_back_once_with_its_origin(tmp_path: Path) -> None:
    texts = corpus(tmp_path / "in")
    wanted = request(tmp_path / "out", str(tmp_path / "in"))
    manifest = prepared(wanted)
    folder = tmp_path / "out" / "mine"
    vocabulary = tokenizer()
    found = [vocabulary.decode(ids) for ids in documents(folder)]
    assert sorted(found) == sorted(texts)
    assert manifest.n_documents == len(texts) and 0 < manifest.n_val_rows < manifest.n_rows
    assert len({shard.file.split("-")[0] for shard in manifest.shards}) > 5
    reader = ShardReader(folder)
    for index in range(0, reader.n_rows, 7):
        row = reader.rows(np.array([index]))[0][0]
        file, part, record = reader.origin(index)
        if row[0] == vocabulary.bos_id:
            number, _ = vocabulary.decode(row.tolist()).split("/", 1)
            assert file.startswith(number)
            at = int(vocabulary.decode(row.tolist()).split("/")[1].split(" ")[0])
            first = manifest.parts[part].first * 30 if file.endswith("parquet") else 0
            assert first + record == at


SHARED = {
    "fineweb": "fineweb/**/*.parquet",
    "the-stack": "the-stack-dedup/data/*/*.parquet",
    "books3": "books3/train-*.jsonl.zst",
    "pg19": "pg19/data/*.parquet",
    "arxiv": "arxiv/train/*.jsonl.zst",
    "slimorca": "slimorca/*.jsonl",
    "wikitext2": "wikitext-2/wiki.test.raw",
}


@pytest.mark.parametrize("name", SHARED)
def test_real_rows_of_each_source_are_tokenized_as_sentencepiece_does(
    shared: Path, tmp_path: Path, name: str
) -> None:
    wanted = PrepareRequest(
        source=find(name), tokenizer=Tokenizer.default(), out=tmp_path, seq_len=512,
        data_files=(str(shared / SHARED[name]),), val_fraction=0.02,
    )  # fmt: skip
    manifest = prepared(wanted)
    found = documents(tmp_path / name)
    assert len(found) == manifest.n_documents > 5 and not manifest.rejected
    assert manifest.facts.licence == find(name).licence
    if name == "slimorca":
        return  # its template is compared with mistral-common in test_pipeline_chat.py
    sentencepiece = processor(extend(base_model(), []))
    for ids in random.Random(1).sample(found, min(len(found), 60)):
        text = sentencepiece.decode(ids)
        assert ids == [1, *sentencepiece.encode(text[:20_000])[: len(ids)], 2][: len(ids)] or (
            len(text) > 20_000 and ids[:4000] == [1, *sentencepiece.encode(text[:20_000])][:4000]
        )


@pytest.mark.parametrize("name", ["python-code", "python-docs"])
def test_what_python_carries_needs_nothing_else(tmp_path: Path, name: str) -> None:
    wanted = PrepareRequest(source=find(name), tokenizer=tokenizer(), out=tmp_path, seq_len=256,
                     limit=Limit(documents=20))  # fmt: skip
    manifest = prepared(wanted)
    assert manifest.n_documents == 20
    assert manifest.facts.revision.startswith(sys.implementation.name)
    assert "def " in "".join(tokenizer().decode(ids) for ids in documents(tmp_path / name))


def test_a_vocabulary_above_65536_makes_uint32_rows(tmp_path: Path) -> None:
    large = Tokenizer(extend(base_model(), [f"[X{n}]" for n in range(33_600)]), "large")
    write_jsonl(tmp_path / "a.jsonl", TEXTS[:40])
    manifest = prepared(request(tmp_path, str(tmp_path / "a.jsonl"), tokenizer=large))
    assert manifest.facts.dtype == "uint32" and manifest.facts.tokenizer.vocab_size > 65_536
    found = sorted(large.decode(ids) for ids in documents(tmp_path / "mine"))
    assert found == sorted(TEXTS[:40])


def test_a_loss_mask_marks_the_answers(tmp_path: Path) -> None:
    rows = [[{"from": "human", "value": f"question {n}"}, {"from": "gpt", "value": f"answer {n}"}]
            for n in range(50)]  # fmt: skip
    write_jsonl(tmp_path / "a.jsonl", rows, column="conversations")
    wanted = request(tmp_path, str(tmp_path / "a.jsonl"), name="slimorca", loss_mask=True,
                     val_fraction=0.0)  # fmt: skip
    assert prepared(wanted).facts.packing == "concat+mask"
    reader = ShardReader(tmp_path / "slimorca")
    tokens, masks = reader.rows(np.arange(reader.n_rows))
    assert masks is not None
    bits = np.unpackbits(masks, axis=1, bitorder="little").reshape(-1).astype(bool)
    targets = tokens.reshape(-1)[bits]
    answers = [[*tokenizer().encode(f"answer {n}"), 2] for n in range(50)]
    assert targets.tolist() == [token for answer in answers for token in answer]


RUN_ON_RAY = """
import sys
from pathlib import Path
from pipeline.units.executors import Executor
from pipeline.estimate import PrepareListener
from pipeline.prepare import prepare
from pipeline_samples import request
prepare(request(Path(sys.argv[1]), sys.argv[2]), Executor("ray"), PrepareListener())
"""


def test_ray_gives_the_same_bytes(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    corpus(tmp_path / "in")
    prepared(request(tmp_path / "complete", str(tmp_path / "in")))
    path = os.pathsep.join([os.environ.get("PYTHONPATH", ""), "tests", "."])
    command = [sys.executable, "-c", RUN_ON_RAY, str(tmp_path / "ray"), str(tmp_path / "in")]
    subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, check=True)
    assert contents(tmp_path / "complete") == contents(tmp_path / "ray")


def test_a_finished_source_is_left_alone(tmp_path: Path) -> None:
    corpus(tmp_path / "in", 2)
    wanted = request(tmp_path, str(tmp_path / "in"))
    manifest = prepared(wanted)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "mine").iterdir()}
    assert prepared(wanted) == manifest
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "mine").iterdir()} == before
    (tmp_path / "mine" / "00001.json").unlink()
    assert prepared(wanted) == manifest
