"""The whole stage: real sources, exactly once, limits, and requests that cannot be met."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.errors import PrepareError, SourceError, TokenizerError
from pipeline.estimate import refuse_without_room
from pipeline.executors import Executor
from pipeline.inputs import local_inputs
from pipeline.prepare import Watch, prepare
from pipeline.recipe import Request, recipe_of
from pipeline.sources import find
from pipeline.tokenizer import Tokenizer, base_model, extend, processor
from pipeline.work import Limit
from pipeline_samples import (
    TEXTS,
    contents,
    documents,
    prepared,
    request,
    tokenizer,
    write_jsonl,
    write_parquet,
)
from shards.reader import ShardReader, read_manifest

# ------------------------------------------------------------------ what comes out


def corpus(folder: Path, n_files: int = 6, per_file: int = 80) -> Any:
    """Files of several kinds with documents that are told apart by their numbers."""
    rng = random.Random(0)
    texts = []
    for number in range(n_files):
        rows = [f"{number}/{n} {rng.choice(TEXTS) * rng.randrange(4)}" for n in range(per_file)]
        texts += rows
        if number % 2:
            write_parquet(folder / f"{number}.parquet", rows, group=30)
        else:
            write_jsonl(folder / f"{number}.jsonl", rows)
    return texts


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
    wanted = Request(
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
    wanted = Request(source=find(name), tokenizer=tokenizer(), out=tmp_path, seq_len=256,
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


# ------------------------------------------------------------------ exactly once


def test_the_bytes_are_the_same_for_any_number_of_workers(tmp_path: Path) -> None:
    corpus(tmp_path / "in")
    for workers in (1, 3):
        prepared(request(tmp_path / f"{workers}", str(tmp_path / "in")), workers)
    assert contents(tmp_path / "1") == contents(tmp_path / "3")


def test_parts_of_an_array_give_the_same_bytes(tmp_path: Path) -> None:
    corpus(tmp_path / "in")
    prepared(request(tmp_path / "whole", str(tmp_path / "in")))
    for number in (3, 1, 2):
        wanted = request(tmp_path / "parts", str(tmp_path / "in"), part=(number, 3))
        manifest = prepare(wanted, Executor(), Watch())
        assert (manifest is None) == (number != 2)
    assert contents(tmp_path / "whole") == contents(tmp_path / "parts")


RUN = """
import sys
from pathlib import Path
from pipeline_samples import prepared, request
if __name__ == "__main__":
    prepared(request(Path(sys.argv[1]), sys.argv[2]), workers=int(sys.argv[3]))
"""


def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    corpus(tmp_path / "in", n_files=10, per_file=150)
    prepared(request(tmp_path / "whole", str(tmp_path / "in")))
    (tmp_path / "run.py").write_text(RUN)
    folder = tmp_path / "killed" / "mine"
    command = [sys.executable, str(tmp_path / "run.py"), str(tmp_path / "killed"),
               str(tmp_path / "in")]  # fmt: skip
    path = os.pathsep.join(["tests", "."])
    for kills, workers in ((3, "1"), (24, "2")):
        process = subprocess.Popen([*command, workers], env={**os.environ, "PYTHONPATH": path},
                                   start_new_session=True)  # fmt: skip
        while len(list(folder.glob("*.rows.npy"))) < kills and process.poll() is None:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (folder / "manifest.json").exists()
    _wait_until_quiet(folder)
    prepared(request(tmp_path / "killed", str(tmp_path / "in")), workers=2)
    assert contents(tmp_path / "whole") == contents(tmp_path / "killed")


def _wait_until_quiet(folder: Path) -> None:
    """Workers end when their parent is gone; a moment later nobody writes any more."""
    before = None
    while before != (now := sorted((p.name, p.stat().st_mtime_ns) for p in folder.iterdir())):
        before = now
        time.sleep(0.3)


RUN_ON_RAY = """
import sys
from pathlib import Path
from pipeline.executors import Executor
from pipeline.prepare import Watch, prepare
from pipeline_samples import request
prepare(request(Path(sys.argv[1]), sys.argv[2]), Executor("ray"), Watch())
"""


def test_ray_gives_the_same_bytes(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    corpus(tmp_path / "in")
    prepared(request(tmp_path / "whole", str(tmp_path / "in")))
    path = os.pathsep.join([os.environ.get("PYTHONPATH", ""), "tests", "."])
    command = [sys.executable, "-c", RUN_ON_RAY, str(tmp_path / "ray"), str(tmp_path / "in")]
    subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, check=True)
    assert contents(tmp_path / "whole") == contents(tmp_path / "ray")


def test_two_runs_at_once_end_well_with_the_same_bytes(tmp_path: Path) -> None:
    corpus(tmp_path / "in")
    prepared(request(tmp_path / "whole", str(tmp_path / "in")))
    (tmp_path / "run.py").write_text(RUN)
    path = os.pathsep.join(["tests", "."])
    both = [
        subprocess.Popen(
            [sys.executable, str(tmp_path / "run.py"), str(tmp_path / "both"),
             str(tmp_path / "in"), "1"], env={**os.environ, "PYTHONPATH": path},
        ) for _ in range(2)
    ]  # fmt: skip
    assert [process.wait() for process in both] == [0, 0]
    assert contents(tmp_path / "whole") == contents(tmp_path / "both")


def test_a_finished_source_is_left_alone(tmp_path: Path) -> None:
    corpus(tmp_path / "in", 2)
    wanted = request(tmp_path, str(tmp_path / "in"))
    manifest = prepared(wanted)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "mine").iterdir()}
    assert prepared(wanted) == manifest
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "mine").iterdir()} == before
    (tmp_path / "mine" / "00001.json").unlink()
    assert prepared(wanted) == manifest


# ------------------------------------------------------------------ limits


@pytest.mark.parametrize("limit", [Limit(documents=120), Limit(tokens=9000), Limit(150, 30_000)])
def test_a_limit_takes_the_same_prefix_for_any_number_of_workers(
    tmp_path: Path, limit: Limit
) -> None:
    corpus(tmp_path / "in")
    small: dict[str, Any] = {"unit_bytes": 1 << 12, "limit": limit}
    for workers in (1, 3):
        prepared(request(tmp_path / f"{workers}", str(tmp_path / "in"), **small), workers)
    assert contents(tmp_path / "1") == contents(tmp_path / "3")
    manifest = read_manifest(tmp_path / "1" / "mine")
    longest = max(len(ids) for ids in documents(tmp_path / "1" / "mine"))
    if limit.documents is not None:
        assert manifest.n_documents <= limit.documents
    if limit.tokens is not None:
        assert manifest.n_tokens < limit.tokens + longest
    reached = (
        (limit.documents or 10**9) - manifest.n_documents,
        (limit.tokens or 10**9) - manifest.n_tokens,
    )
    assert min(reached) <= 0
    files = {manifest.parts[ShardReader(tmp_path / "1" / "mine").origin(i)[1]].file
             for i in range(manifest.n_rows - manifest.n_val_rows)}  # fmt: skip
    assert len(files) > 2  # not the alphabet's first


@pytest.mark.parametrize(
    ("limit", "unit_bytes"),
    [
        (Limit(), 256 << 20),
        (Limit(tokens=1), 8 << 20),
        (Limit(tokens=1 << 30), 64 << 20),
        (Limit(tokens=1 << 40), 256 << 20),
        (Limit(documents=1 << 20, tokens=1 << 40), 2500 << 14),
    ],
)
def test_a_limit_makes_smaller_units(limit: Limit, unit_bytes: int, tmp_path: Path) -> None:
    wanted = request(tmp_path, "unused", limit=limit, unit_bytes=None)
    assert recipe_of(wanted, local_inputs((__file__,)))["unit_bytes"] == unit_bytes


def test_a_limit_beyond_the_source_takes_all(tmp_path: Path) -> None:
    texts = corpus(tmp_path / "in", 2)
    wanted = request(tmp_path, str(tmp_path / "in"), limit=Limit(tokens=10**9))
    assert prepared(wanted).n_documents == len(texts)
    assert prepared(wanted).n_documents == len(texts)


# ------------------------------------------------------------------ what cannot be


def refused(wanted: Any, kind: Any = PrepareError) -> Any:
    with pytest.raises(kind) as caught:
        prepare(wanted, Executor(), Watch())
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder_begun_otherwise_is_not_touched(tmp_path: Path) -> None:
    corpus(tmp_path / "in", 2)
    files = str(tmp_path / "in")
    prepared(request(tmp_path, files))
    before = contents(tmp_path / "mine")
    told = refused(request(tmp_path, files, seq_len=128))
    assert "begun with seq_len 64, not 128" in told and "--out" in told
    assert "another tokenizer than mistral-v3-extended" in refused(
        request(tmp_path, files, tokenizer=Tokenizer.default())
    )
    assert "max_tokens None, not 5" in refused(request(tmp_path, files, limit=Limit(tokens=5)))
    write_jsonl(tmp_path / "in" / "0.jsonl", ["changed"])
    assert "0.jsonl was" in refused(request(tmp_path, files))
    (tmp_path / "in" / "0.jsonl").unlink()
    assert "0.jsonl was" in refused(request(tmp_path, files)) and "absent" in refused(
        request(tmp_path, files)
    )
    assert contents(tmp_path / "mine") == before


def test_without_one_document_there_is_no_source(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", ["", 7, None])
    told = refused(request(tmp_path, str(tmp_path / "a.jsonl")))
    assert "not one document" in told and "1 empty" in told and "1 wrong type" in told
    assert not (tmp_path / "mine" / "manifest.json").exists()


def test_refused_records_are_listed_with_file_and_number(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", ["good", 7, "", "good too"])
    manifest = prepared(request(tmp_path, str(tmp_path / "a.jsonl")))
    assert dict(manifest.rejected) == {"empty": 1, "wrong type": 1}
    lines = (tmp_path / "mine" / "00000.rejected.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"reason": "wrong type", "file": "a.jsonl", "record": 1},
        {"reason": "empty", "file": "a.jsonl", "record": 2},
    ]


def test_a_missing_field_is_noticed_before_anything_is_done(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", ["x"] * 50, column="content")
    told = refused(request(tmp_path, str(tmp_path / "a.jsonl")), SourceError)
    assert "no field 'text'" in told and "--text-column" in told
    assert not list((tmp_path / "mine").glob("*.npy"))


def test_a_damaged_file_stops_the_run_and_nothing_done_is_lost(tmp_path: Path) -> None:
    corpus(tmp_path / "in")
    files = tmp_path / "in"
    whole = (files / "3.parquet").read_bytes()
    spoilt = bytearray(whole)
    spoilt[200:4000] = bytes(3800)
    (files / "3.parquet").write_bytes(spoilt)
    with pytest.raises(SourceError, match=r"3\.parquet is damaged"):
        prepared(request(tmp_path / "out", str(files)), workers=2)
    assert not [p for p in (tmp_path / "out" / "mine").iterdir() if p.name.startswith(".")]
    (files / "3.parquet").write_bytes(whole)
    prepared(request(tmp_path / "out", str(files)))
    prepared(request(tmp_path / "undisturbed", str(files)))
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")


def test_without_room_on_the_disk_nothing_begins(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", TEXTS * 60)
    with (tmp_path / "b.jsonl").open("wb") as file:
        file.truncate(4 << 40)  # a hole: it takes no room itself
    told = refused(request(tmp_path, str(tmp_path / "*.jsonl"), unit_bytes=1 << 42))
    assert "MB are needed" in told and "--max-tokens" in told
    assert not list((tmp_path / "mine").glob("*.npy"))
    refuse_without_room(tmp_path, 1)


RUN_SHORT_OF_ROOM = """
import resource, sys
from pathlib import Path
from pipeline.errors import PrepareError
from pipeline_samples import prepared, request
resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, 12_000))  # as far as a full disk lets one write
try:
    prepared(request(Path(sys.argv[1]), sys.argv[2], unit_bytes=1 << 16))
except PrepareError as error:
    print(error)
"""


def test_a_disk_that_fills_up_loses_nothing(tmp_path: Path) -> None:
    corpus(tmp_path / "in")
    small: dict[str, Any] = {"unit_bytes": 1 << 16}
    prepared(request(tmp_path / "whole", str(tmp_path / "in"), **small))
    (tmp_path / "out" / "mine").mkdir(parents=True)
    for name in ("tokenizer.model", "units.json"):  # the plan was made while there was room
        shutil.copy(tmp_path / "whole" / "mine" / name, tmp_path / "out" / "mine")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(["tests", "."])}
    command = [sys.executable, "-c", RUN_SHORT_OF_ROOM, str(tmp_path / "out"), str(tmp_path / "in")]
    told = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert ": make room and start the same command again" in told.stdout
    assert not [path for path in (tmp_path / "out" / "mine").iterdir() if path.name[0] == "."]
    prepared(request(tmp_path / "out", str(tmp_path / "in"), **small))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"part": (0, 4)}, "parts are numbered 1/4 to 4/4"),
        ({"part": (5, 4)}, "--part 5/4"),
        ({"part": (1, 2), "limit": Limit(tokens=9)}, "--part does not go with --max-tokens"),
        ({"loss_mask": True}, "mine has none"),
    ],
)
def test_contradictions_are_refused(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    assert told in refused(request(tmp_path, str(tmp_path / "a.jsonl"), **changes))


def test_a_vocabulary_without_chat_markers_cannot_prepare_chat(tmp_path: Path) -> None:
    proto = Tokenizer.default().proto.__class__()
    proto.CopyFrom(tokenizer().proto)
    proto.pieces[3].piece = "[OTHER]"
    strange = Tokenizer(proto.SerializeToString(), "strange")
    write_jsonl(tmp_path / "a.jsonl", [[]], column="conversations")
    wanted = request(tmp_path, str(tmp_path / "a.jsonl"), name="slimorca", tokenizer=strange)
    assert "strange has no control piece [INST]" in refused(wanted, TokenizerError)
