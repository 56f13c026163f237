"""What was written comes back; what was damaged does not."""

import hashlib
import json
import os
import pickle
import resource
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards import reader
from shards import writer as writer_module
from shards.errors import ShardError
from shards.format import Part, ShardInfo
from shards.reader import RowFile, ShardReader, find_sources, read_manifest
from shards.writer import ShardWriter, write_manifest
from shards_samples import make_source, sample_facts


def all_rows(folder: Path, split: str = "train") -> np.ndarray:
    reader = ShardReader(folder, split)  # type: ignore[arg-type]
    return reader.rows(np.arange(reader.n_rows))[0]


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_rows_come_back_however_they_were_given(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Any cutting into `add` calls, any shard size: the same rows, masks, parts and records."""
    folder = tmp_path_factory.mktemp("s")
    masked = data.draw(st.booleans())
    vocab_size = data.draw(st.sampled_from([512, 70_000]))
    n = data.draw(st.integers(1, 30))
    facts = sample_facts("s", 8, vocab_size, masked)
    generator = np.random.default_rng(data.draw(st.integers(0, 99)))
    rows = generator.integers(0, vocab_size, (n, 8)).astype(facts.dtype)
    masks = generator.integers(0, 256, (n, 1), np.uint8) if masked else None
    records = generator.integers(0, 1 << 32, n, np.uint32)
    cuts = sorted(data.draw(st.lists(st.integers(0, n), max_size=5)))
    shard_bytes = data.draw(st.sampled_from([1, 64, 160, 1 << 20]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer_module, "SHARD_BYTES", shard_bytes)
        writer = ShardWriter(folder, "00000", facts)
        for a, b in zip([0, *cuts], [*cuts, n], strict=True):
            mask = None if masks is None else masks[a:b]
            writer.add("train", rows[a:b], np.zeros(b - a, np.uint32), records[a:b], mask)
        writer.finish([], "0" * 64)
    write_manifest(folder, facts, [], 1)
    reader = ShardReader(folder)
    order = generator.permutation(n)
    found, found_masks = reader.rows(order)
    np.testing.assert_array_equal(found, rows[order])
    assert (found_masks is None) == (masks is None)
    if masks is not None and found_masks is not None:
        np.testing.assert_array_equal(found_masks, masks[order])


def test_numpy_alone_opens_a_shard(tmp_path: Path) -> None:
    manifest = make_source(tmp_path / "s")
    mapped = [np.load(tmp_path / "s" / x.file, mmap_mode="r") for x in manifest.split("train")]
    np.testing.assert_array_equal(np.concatenate(mapped), all_rows(tmp_path / "s"))


def test_counts(tmp_path: Path) -> None:
    manifest = make_source(tmp_path / "s", n_rows=20, n_val_rows=4)
    assert (manifest.n_rows, manifest.n_val_rows) == (24, 4)
    assert manifest.n_documents == 24
    assert manifest.n_tokens == 24 * 16
    assert ShardReader(tmp_path / "s", "val").n_rows == 4


def test_origin_names_file_part_and_record(tmp_path: Path) -> None:
    make_source(tmp_path / "s", n_rows=20)
    assert ShardReader(tmp_path / "s").origin(13) == ("1.txt", 1, 3)


def test_reader_travels_to_other_processes(tmp_path: Path) -> None:
    make_source(tmp_path / "s")
    reader = ShardReader(tmp_path / "s")
    before = reader.rows(np.array([3, 11]))[0]
    np.testing.assert_array_equal(
        pickle.loads(pickle.dumps(reader)).rows(np.array([3, 11]))[0], before
    )


def test_no_more_files_are_held_open_than_stated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shards.reader.most_open_shards", lambda: 3)
    make_source(tmp_path / "s", n_rows=20, n_units=10)
    reader = ShardReader(tmp_path / "s")
    before = len(os.listdir("/proc/self/fd"))
    reader.rows(np.arange(20))
    assert len(os.listdir("/proc/self/fd")) <= before + 3


def test_the_shard_that_was_read_longest_ago_is_closed_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shards.reader.most_open_shards", lambda: 2)
    make_source(tmp_path / "s", n_rows=3, n_units=3)
    reader = ShardReader(tmp_path / "s")
    reader.rows(np.array([0, 1, 0, 2]))
    for path in (tmp_path / "s").glob("*-000.npy"):
        path.unlink()  # only what is open can still be read
    reader.rows(np.array([0, 2]))
    with pytest.raises(ShardError, match=r"00001-000\.npy is missing"):
        reader.rows(np.array([1]))


def test_a_shard_that_was_opened_again_stays_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shards.reader.most_open_shards", lambda: 1)
    make_source(tmp_path / "s", n_rows=2, n_units=2)
    reader = ShardReader(tmp_path / "s")
    reader.rows(np.array([0, 1, 0]))
    opened: list[object] = []
    monkeypatch.setattr("shards.reader.RowFile.open", opened.append)
    reader.rows(np.array([0, 0, 0]))
    assert opened == []


def test_a_row_that_is_none_is_an_index_error(tmp_path: Path) -> None:
    make_source(tmp_path / "s", n_rows=4, n_val_rows=0)
    reader = ShardReader(tmp_path / "s")
    for index in (-1, 4, 5):
        with pytest.raises(IndexError, match=f"row {index} of 4"):
            reader.origin(index)
    with pytest.raises(IndexError, match="row 0 of 0"):
        ShardReader(tmp_path / "s", "val").origin(0)


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("masked", [False, True])
def test_every_flipped_bit_of_the_data_is_found(tmp_path: Path, masked: bool) -> None:
    make_source(tmp_path / "s", n_rows=4, n_val_rows=0, n_units=1, masked=masked)
    names = ["00000-000.npy"] + ["00000-000.mask.npy"] * masked
    for name in names:
        path = tmp_path / "s" / name
        start = np.load(path, mmap_mode="r").offset
        for at in range(start, path.stat().st_size):
            flip(path, at)
            with pytest.raises(ShardError, match=r"s: .*00000-000\.npy row \d.*summer-prep repair"):
                all_rows(tmp_path / "s")
            flip(path, at)
    all_rows(tmp_path / "s")


@pytest.mark.parametrize("change", ["shape", "dtype", "order"])
def test_the_same_bytes_in_another_form_are_rejected(tmp_path: Path, change: str) -> None:
    make_source(tmp_path / "s", n_rows=16, n_units=1)
    path = tmp_path / "s" / "00000-000.npy"
    rows = np.load(path)
    changed = {"shape": rows.reshape(8, 32), "dtype": rows.view(np.int16), "order": rows.T}
    np.save(path, changed[change])
    with pytest.raises(ShardError, match=r"00000-000\.npy is damaged \(its header"):
        all_rows(tmp_path / "s")


@pytest.mark.parametrize("change", ["dtype", "length", "pickle"])
def test_a_sidecar_that_lists_other_rows_is_rejected(tmp_path: Path, change: str) -> None:
    """Its digest is right, as if it had been written so."""
    folder = tmp_path / "s"
    make_source(folder, n_rows=4, n_val_rows=0, n_units=1)
    path, unit_record = folder / "00000-000.rows.npy", folder / "00000.json"
    records = np.load(path)
    wider = [("xxh3", "<u8"), ("part", "<u8"), ("record", "<u8")]
    changed = {"length": records[:-1], "dtype": records.astype(wider)}
    np.save(path, changed.get(change, records.astype(object)), allow_pickle=True)
    written = json.loads(unit_record.read_text())
    written["shards"][0]["rows_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    unit_record.write_text(json.dumps(written))
    write_manifest(folder, sample_facts("s"), [Part(file="a", first=0, last=1)], 1)
    words = "Object arrays cannot be" if change == "pickle" else "does not list 4 rows"
    with pytest.raises((ShardError, ValueError), match=words):
        all_rows(folder)


@pytest.mark.parametrize("name", ["00000-000.npy", "00000-000.rows.npy"])
@pytest.mark.parametrize("damage", ["truncate", "extend", "empty", "remove", "swap"])
def test_damaged_files_are_rejected(tmp_path: Path, name: str, damage: str) -> None:
    make_source(tmp_path / "s")
    path = tmp_path / "s" / name
    data = path.read_bytes()
    if damage == "truncate":
        path.write_bytes(data[:-1])
    elif damage == "extend":
        path.write_bytes(data + b"\0")
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "remove":
        path.unlink()
    else:
        other = path.with_name(name.replace("00000-", "00001-"))
        path.write_bytes(other.read_bytes())
        other.write_bytes(data)
    with pytest.raises(ShardError, match=r"s: .*00000-000.*summer-prep repair"):
        all_rows(tmp_path / "s")


def test_shard_that_shrinks_while_open_is_an_error_not_a_signal(tmp_path: Path) -> None:
    make_source(tmp_path / "s", n_rows=8, n_units=1)
    reader = ShardReader(tmp_path / "s")
    reader.rows(np.array([0]))
    os.truncate(tmp_path / "s" / "00000-000.npy", 200)
    with pytest.raises(ShardError, match="row 7 is damaged"):
        reader.rows(np.array([7]))


@pytest.mark.parametrize("name", ["00000-000.npy", "00000-000.mask.npy"])
def test_a_row_that_ends_early_is_damaged_whatever_the_buffer_held(
    tmp_path: Path, name: str
) -> None:
    make_source(tmp_path / "s", n_rows=2, n_units=1, masked=True)
    reader = ShardReader(tmp_path / "s")
    tokens, mask = np.empty(16, np.uint16), np.empty(2, np.uint8)
    reader.read(1, tokens, mask)  # what is read again is there already
    os.truncate(tmp_path / "s" / name, (tmp_path / "s" / name).stat().st_size - 1)
    with pytest.raises(ShardError, match="row 1 is damaged"):
        reader.read(1, tokens, mask)


def test_some_rows_of_a_file_are_read_at_once(tmp_path: Path) -> None:
    rows = np.arange(20, dtype=np.uint16).reshape(5, 4)
    np.save(tmp_path / "rows.npy", rows)
    file = RowFile(tmp_path / "rows.npy", (5, 4), "uint16")
    np.testing.assert_array_equal(file.read(slice(2, 5)), rows[2:5])
    os.truncate(tmp_path / "rows.npy", file.n_bytes - 8)
    np.testing.assert_array_equal(file.read(slice(3, 5)), [rows[3], [0] * 4])


def test_sources_are_found_and_unfinished_ones_named(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="summer-prep tokenize"):
        find_sources(tmp_path / "absent")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "units.json").write_text("{}")
    with pytest.raises(ShardError, match="unfinished: half"):
        find_sources(tmp_path)
    with pytest.raises(ShardError, match="has not finished"):
        read_manifest(tmp_path / "half")
    make_source(tmp_path / "b")
    make_source(tmp_path / "a")
    assert list(find_sources(tmp_path)) == ["a", "b"]
    with pytest.raises(ShardError, match="name the folder that holds it"):
        find_sources(tmp_path / "a")


def test_manifest_waits_for_every_unit_record(tmp_path: Path) -> None:
    make_source(tmp_path / "s", n_units=2)
    (tmp_path / "s" / "manifest.json").unlink()
    shutil.move(tmp_path / "s" / "00001.json", tmp_path / "away")
    assert write_manifest(tmp_path / "s", sample_facts(), [], 2) is None
    assert not (tmp_path / "s" / "manifest.json").exists()
    (tmp_path / "s" / "00001.json").write_text("{")
    with pytest.raises(ShardError, match=r"00001\.json.*delete it"):
        write_manifest(tmp_path / "s", sample_facts(), [], 2)


def test_rejected_records_are_listed_and_counted(tmp_path: Path) -> None:
    facts = sample_facts()
    writer = ShardWriter(tmp_path, "00000", facts)
    rejected = [{"reason": "empty", "file": "a", "record": i} for i in (3, 5)]
    unit_record = writer.finish(rejected, "0" * 64)
    assert unit_record.rejected == {"empty": 2} and unit_record.shards == ()
    lines = (tmp_path / "00000.rejected.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == rejected
    manifest = write_manifest(tmp_path, facts, [], 1)
    assert manifest is not None and manifest.rejected == {"empty": 2}


def test_shards_are_cut_where_the_next_row_would_be_too_much(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert writer_module.SHARD_BYTES == 64 * 1024**2  # a word of the format
    for shard_bytes, wanted in ((3 * 32 + 31, [3, 3, 2]), (3 * 32, [3, 3, 2]), (1, [1] * 8)):
        monkeypatch.setattr(writer_module, "SHARD_BYTES", shard_bytes)
        manifest = make_source(tmp_path / f"{shard_bytes}", n_rows=8, n_val_rows=0, n_units=1)
        assert [shard.n_rows for shard in manifest.shards] == wanted


def test_masks_need_rows_that_fill_bytes_and_rows_that_have_them(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="seq_len 12: rows with a loss mask need a multiple of 8"):
        ShardWriter(tmp_path, "00000", sample_facts(seq_len=12, masked=True))
    rows, origins = np.ones((1, 16), np.uint16), np.zeros(1, np.uint32)
    for masked in (False, True):
        writer = ShardWriter(tmp_path, "00000", sample_facts(masked=masked))
        masks = None if masked else np.zeros((1, 2), np.uint8)
        with pytest.raises(ShardError, match="does not fit rows with masks"):
            writer.add("train", rows, origins, origins, masks)


def test_rejected_records_are_lines_of_utf_8(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "00000", sample_facts())
    unit_record = writer.finish([{"reason": "empty", "file": "ä.txt", "record": 3}], "0" * 64)
    data = (tmp_path / "00000.rejected.jsonl").read_bytes()
    assert data == '{"reason": "empty", "file": "ä.txt", "record": 3}\n'.encode()
    assert unit_record.rejected_sha256 == hashlib.sha256(data).hexdigest()


def test_a_sidecar_is_verified_once_however_often_its_shard_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 2,500 shards each row would hash a sidecar of a quarter of a megabyte."""
    make_source(tmp_path / "s", n_rows=40, n_units=8)
    monkeypatch.setattr("shards.reader.most_open_shards", lambda: 2)
    read, hashed = reader.read_sidecar, list[str]()

    def counted(path: Path, info: ShardInfo) -> Any:
        hashed.append(path.name)
        return read(path, info)

    monkeypatch.setattr(reader, "read_sidecar", counted)
    rows = ShardReader(tmp_path / "s")
    expected = ShardReader(tmp_path / "s").rows(np.arange(40))[0]
    hashed.clear()
    for index in np.random.default_rng(0).integers(0, 40, 300).tolist():
        assert (rows.rows(np.array([index]))[0] == expected[index]).all()
    assert sorted(hashed) == sorted(set(hashed)) and len(hashed) == 8


def test_as_many_shards_stay_open_as_the_process_may_open(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {"now": (1024, 1024)}
    monkeypatch.setattr(resource, "getrlimit", lambda which: limits["now"])
    monkeypatch.setattr(resource, "setrlimit", lambda which, both: limits.update(now=both))
    assert reader.most_open_shards() == 128
    limits["now"] = (1024, 20_000)
    assert reader.most_open_shards() == 2500 and limits["now"] == (20_000, 20_000)
    limits["now"] = (256, 256)
    assert reader.most_open_shards() == 64
    limits["now"] = (1024, resource.RLIM_INFINITY)
    assert reader.most_open_shards() == 8192
