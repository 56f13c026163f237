"""The format: what hashlib, NumPy and json compute from the files alone."""

import hashlib
import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import example, given
from hypothesis import strategies as st

from shards.errors import ShardError
from shards.format import Manifest, facts_of, row_digests, token_dtype, tokenizer_path
from shards.reader import read_manifest, read_unit_record
from shards_samples import make_source


def root_by_hand(folder: Path) -> str:
    """The root, a second time, from the files alone."""
    manifest = json.loads((folder / "manifest.json").read_text())
    tokenizer = manifest["tokenizer"]
    lines = "summerlm-shards/1\n"
    lines += f"{manifest['dtype']} {manifest['seq_len']} "
    lines += f"{manifest['packing']} {manifest['val_fraction']}\n"
    lines += f"{tokenizer['sha256']}\n"
    lines += f"{tokenizer['bos_id']} {tokenizer['eos_id']} {tokenizer['pad_id']}\n"
    for shard in manifest["shards"]:
        sidecar = (folder / shard["file"].replace(".npy", ".rows.npy")).read_bytes()
        lines += f"{shard['split']} {shard['n_rows']} {hashlib.sha256(sidecar).hexdigest()}\n"
    return hashlib.sha256(lines.encode()).hexdigest()


@pytest.mark.parametrize("masked", [False, True])
def test_root_from_the_files_alone(tmp_path: Path, masked: bool) -> None:
    manifest = make_source(tmp_path / "s", masked=masked)
    assert manifest.root == root_by_hand(tmp_path / "s")


def test_which_file_is_the_tokenizer(tmp_path: Path) -> None:
    """Where there are both, the model: some folders of a tokenizer.model have the other too."""
    assert tokenizer_path(tmp_path) == tmp_path / "tokenizer.model"
    (tmp_path / "tokenizer.json").touch()
    assert tokenizer_path(tmp_path) == tmp_path / "tokenizer.json"
    (tmp_path / "tokenizer.model").touch()
    assert tokenizer_path(tmp_path) == tmp_path / "tokenizer.model"


def test_facts_of_a_version_that_did_not_write_the_shape_are_the_same(tmp_path: Path) -> None:
    facts = make_source(tmp_path / "s").facts
    assert replace(facts, shape="chat") == facts != replace(facts, source="other")


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({"val_fraction": 1.0}, ""),
        ({"val_fraction": 1.01}, "val_fraction 1.01"),
        ({"seq_len": 1 << 20}, ""),
        ({"seq_len": (1 << 20) + 1}, "seq_len 1048577"),
        ({"seq_len": 2}, ""),
        ({"seq_len": 1}, "seq_len 1"),
        ({"dtype": "uint8"}, "dtype uint8"),
        ({"pad_id": 99, "vocab_size": 100}, ""),
        ({"pad_id": 100, "vocab_size": 100}, "special tokens up to 100"),
        ({"vocab_size": 1 << 24}, ""),
        ({"vocab_size": (1 << 24) + 1}, "special tokens up to"),
    ],
)
def test_facts_that_cannot_be(tmp_path: Path, changes: dict[str, object], wrong: str) -> None:
    spelled = make_source(tmp_path / "s").to_json()
    for key, value in changes.items():
        part = spelled if key in spelled else spelled["tokenizer"]
        part[key] = value  # type: ignore[index]
    with pytest.raises(ShardError, match=f"{wrong}.* cannot be") if wrong else nullcontext():
        facts_of(spelled)


def test_row_digest_is_xxh3_of_row_then_mask() -> None:
    rows = np.arange(32, dtype="<u2").reshape(2, 16)
    masks = np.array([[1, 2], [3, 4]], np.uint8)
    assert row_digests(rows)[1] == xxhash.xxh3_64(rows[1].tobytes()).intdigest()
    joined = rows[1].tobytes() + masks[1].tobytes()
    assert row_digests(rows, masks)[1] == xxhash.xxh3_64(joined).intdigest()


@example(65_536)
@example(65_537)
@example(131_072)
@given(st.integers(1, 1 << 20))
def test_dtype_is_the_smallest_that_holds_every_id(vocab_size: int) -> None:
    dtype = token_dtype(vocab_size)
    assert vocab_size - 1 <= np.iinfo(dtype).max
    assert (dtype.itemsize == 2) == (vocab_size <= 65_536)


def test_manifest_survives_json(tmp_path: Path) -> None:
    manifest = make_source(tmp_path / "s")
    assert Manifest.from_json(json.loads(json.dumps(manifest.to_json()))) == manifest
    assert read_manifest(tmp_path / "s") == manifest


UNFIT = "its counts or its dataset hash .* do not fit"


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        ({"format": None}, "the manifest is of format None"),
        ({"format": "summerlm-shards/2"}, "the manifest is of format 'summerlm-shards/2'"),
        ({"seq_len": 8}, UNFIT),
        ({"root": "0" * 64}, UNFIT),
        ({"shards": []}, UNFIT),
        ({"tokenizer": None}, "facts.tokenizer is None"),
        ({"shards": [3]}, "shards is 3"),
        ({"tokenizer": {"name": "t"}}, "facts.tokenizer.sha256 is missing"),
        ({"val_fraction": "many"}, "facts.val_fraction is 'many'"),
        ({"n_rows": True}, "n_rows is True"),
        ({"n_tokens": 7}, UNFIT),
    ],
)
def test_what_is_wrong_with_a_manifest_is_said(
    tmp_path: Path, edit: dict[str, object], words: str
) -> None:
    make_source(tmp_path / "s")
    path = tmp_path / "s" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **edit}))
    with pytest.raises(ShardError, match=rf"manifest\.json: .*{words}.*again"):
        read_manifest(tmp_path / "s")


def test_what_is_no_unit_record_is_rejected(tmp_path: Path) -> None:
    make_source(tmp_path / "s")
    path = tmp_path / "s" / "00000.json"
    assert read_unit_record(path).unit == "00000"
    for content, words in (("[]", "the unit record is no JSON object"), ("{", "it is no JSON")):
        path.write_text(content)
        with pytest.raises(ShardError, match=f"00000.json: .*{words}.*; delete it and prepare"):
            read_unit_record(path)


def test_nothing_published_names_hosts_times_or_places(tmp_path: Path) -> None:
    make_source(tmp_path / "a" / "s")
    make_source(tmp_path / "b" / "s")
    first, second = ({p.name: p.read_bytes() for p in (tmp_path / x / "s").iterdir()} for x in "ab")
    assert first == second
