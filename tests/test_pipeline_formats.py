"""The rarer formats give the same records as the common ones, and say what they are where not."""

import bz2
import gzip
import json
import lzma
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

import pipeline_samples
from pipeline.errors import SourceError
from pipeline.inputs import formats
from pipeline.inputs.formats import array_lines
from pipeline.inputs.listing import local_inputs
from pipeline.inputs.sources import Source
from pipeline.units.units import make_plan
from pipeline_samples import TEXT, contents, prepared, request, write_jsonl, write_parquet

TEXTS = ["one", 'zwei\nlines, "quoted"\tof it', "NA", "12", "漢", "null", "x" * 5000]


def read(path: Path, source: Source = TEXT) -> Any:
    texts, rejected = pipeline_samples.read(path, source)
    return texts, [(record, reason) for _, record, reason in rejected]


def columned(column: str, **changes: Any) -> Source:
    return Source(name="m", about="", licence="", text_column=column, **changes)


def lz4(data: bytes) -> bytes:
    return bytes(pa.Codec("lz4").compress(data, asbytes=True))


def long_window(data: bytes) -> bytes:
    parameters = zstandard.ZstdCompressionParameters(window_log=28, enable_ldm=True)
    return zstandard.ZstdCompressor(compression_params=parameters).compress(data)


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "lz4": lz4,
    "zst": zstandard.compress,
}  # fmt: skip


@pytest.mark.parametrize("ending", PACKERS)
def test_each_compression_is_read_and_one_cut_short_is_noticed(tmp_path: Path, ending: str) -> None:
    data = write_jsonl(tmp_path / "a.jsonl", TEXTS * 40).read_bytes()
    packed, path = PACKERS[ending](data), tmp_path / f"b.jsonl.{ending}"
    path.write_bytes(packed)
    assert read(path) == (TEXTS * 40, [])
    path.write_bytes(packed + PACKERS[ending](data))  # two streams, one after the other
    assert read(path) == (TEXTS * 80, [])
    for size in (len(packed) // 2, len(packed) - 3):
        path.write_bytes(packed[:size])
        with pytest.raises(SourceError, match=path.name):
            read(path)


def test_zstd_of_a_long_window_and_with_a_dictionary(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "a.jsonl", TEXTS).read_bytes()
    path = tmp_path / "b.jsonl.zst"
    path.write_bytes(long_window(data))
    assert read(path) == (TEXTS, [])
    learnt = zstandard.train_dictionary(2000, [str(n).encode() * 20 for n in range(400)])
    path.write_bytes(zstandard.ZstdCompressor(dict_data=learnt).compress(data))
    with pytest.raises(SourceError, match=r"compressed with a dictionary \(number \d+\), which"):
        read(path)


def write_csv(path: Path, separator: str) -> None:
    quoted = ['"' + text.replace('"', '""') + '"' for text in TEXTS]
    rows = [f"{number}{separator}{text}\n" for number, text in enumerate(quoted)]
    path.write_text(f"id{separator}text\n" + "".join(rows))


def write_arrow(path: Path) -> None:
    table = pa.table({"id": range(len(TEXTS)), "text": TEXTS})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.arrow", "a.json", "a.csv.gz", "a.json.xz"])
def test_each_format_of_datasets_gives_the_same_records(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if "csv" in name or "tsv" in name:
        write_csv(path, "," if "csv" in name else "\t")
    elif "arrow" in name:
        write_arrow(path)
    else:
        path.write_text(json.dumps([{"id": 1, "text": text} for text in TEXTS], indent=1))
    if path.suffix[1:] in PACKERS:
        path.write_bytes(PACKERS[path.suffix[1:]](path.read_bytes()))
    assert read(path) == (TEXTS, [])


@pytest.mark.parametrize("kind", ["arrow", "csv", "json"])
def test_a_folder_named_like_a_format_is_no_other_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """`save_to_disk("arrow")` leaves ./arrow/state.json, which load_dataset took for the answer."""
    folder = tmp_path / kind
    folder.mkdir()
    for name in ("state.json", "dataset_info.json", f"{kind}.py"):
        (folder / name).write_text("{}")
    write_arrow(folder / "data-00000-of-00001.arrow")
    monkeypatch.chdir(tmp_path)
    assert read(folder / "data-00000-of-00001.arrow") == (TEXTS, [])


def test_an_array_of_many_small_elements_takes_time_by_its_length() -> None:
    """The rest of the block was copied for each element: a minute for six megabytes."""
    data = json.dumps([{"text": "a"}] * 400_000).encode()
    began = time.process_time()
    lines = b"".join(array_lines(BytesIO(data), "a.json"))
    took_s = time.process_time() - began
    began = time.process_time()
    json.loads(data)
    assert lines == b'{"text": "a"}\n' * 400_000
    assert took_s < 60 * (time.process_time() - began)


def test_a_table_rejects_what_lines_of_json_reject(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('id,text\n1,one\n2,\n3,"three"\n')
    assert read(tmp_path / "a.csv") == (["one", "three"], [(1, "empty")])
    (tmp_path / "a.json").write_text('[{"text": "one"}, {"text": null}, {"text": 3}, 4, {"x": 1}]')
    reasons = ["field missing", "wrong type", "not a JSON object", "field missing"]
    assert read(tmp_path / "a.json") == (["one"], list(enumerate(reasons, start=1)))
    with pytest.raises(SourceError, match=r"a\.csv has no column 'body'; it has id, text"):
        read(tmp_path / "a.csv", columned("body"))
    (tmp_path / "b.csv").write_text("id,text\n1,one\n2,two,three,four\n")
    with pytest.raises(SourceError, match=r"b\.csv cannot be read as csv \(.*line 3.*fetch it"):
        read(tmp_path / "b.csv")


def test_xml_is_a_document_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.xml").write_text("<a>\n<b>text</b></a>")
    assert read(tmp_path / "a.xml", TEXT) == (["<a>\n<b>text</b></a>"], [])


@given(
    st.lists(
        st.recursive(
            st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.text(),
            lambda inner: (
                st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3)
            ),
            max_leaves=6,
        )
    ),
    st.integers(1, 40),
    st.sampled_from([None, 1]),
)
def test_an_array_is_its_elements_a_line_each(
    elements: list[Any], block: int, indent: int | None
) -> None:
    data = json.dumps(elements, indent=indent, ensure_ascii=block % 2 == 0).encode(
        "utf-8", "replace"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(formats, "BLOCK_BYTES", block)
        lines = b"".join(array_lines(BytesIO(data), "a.json")).splitlines()
        assert [json.loads(line) for line in lines] == json.loads(data)
        if elements:
            with pytest.raises(SourceError, match=r"a\.json: its JSON array is cut off or broken"):
                list(array_lines(BytesIO(data[:-1].rstrip(b"\n")), "a.json"))


@pytest.mark.parametrize(
    ("name", "data", "what"),
    [
        (
            "a.parquet",
            b"version https://git-lfs.github.com/spec/v1\noid x",
            "Git LFS pointer .*lfs pu",
        ),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid x", "Git LFS pointer"),
        ("a.jsonl.zst", b"version https://git-lfs.github.com/spec/v1\noid x", "Git LFS pointer"),
        ("a.jsonl", gzip.compress(b"{}", mtime=0), r"compressed by gzip: name it \.gz"),
        ("a.txt", b"PAR1 and more", r"a parquet file: name it \.parquet"),
        ("a.txt", b"PK\x03\x04....", "a zip archive: unzip it"),
        ("a.parquet", b"<!DOCTYPE html><html>", "a web page"),
        ("a.json", b'{\n "data": [{"text": "x"}]\n}\n', "one JSON object over many lines.*jq -c"),
    ],
)
def test_a_file_of_another_kind_is_called_what_it_is(
    tmp_path: Path, name: str, data: bytes, what: str
) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(SourceError, match=f"{name} is .*{what}"):
        make_plan({}, local_inputs((str(tmp_path / name),)), TEXT, 1 << 20)


NESTED = [{"meta": {"text": "in"}}, {"meta.text": "own", "meta": {"text": "in"}}, {"meta": 3},
          {"meta": {}}, {"meta.text": "alone"}, {"meta": None}, {"meta": {"text": 4}}]  # fmt: skip
FOUND = (["in", "own", "alone"], [(2, "field missing"), (3, "field missing"), (5, "field missing"),
                                  (6, "wrong type")])  # fmt: skip


def test_a_text_column_may_be_a_path(tmp_path: Path) -> None:
    path, source = tmp_path / "a.jsonl", columned("meta.text")
    path.write_text("".join(json.dumps(record) + "\n" for record in NESTED))
    assert read(path, source) == FOUND
    regular = [NESTED[n] for n in (0, 1, 4, 5)]
    path.write_text("".join(json.dumps(record) + "\n" for record in regular))
    assert read(path, source) == (["in", "own", "alone"], [(3, "field missing")])
    table = pa.table({"id": [1, 2, 3], "meta": [{"text": "a"}, {"text": None}, None]})
    pq.write_table(table, tmp_path / "a.parquet")
    missing = [(1, "field missing"), (2, "field missing")]
    assert read(tmp_path / "a.parquet", source) == (["a"], missing)
    pq.write_table(table.append_column("meta.text", [["x", "y", "z"]]), tmp_path / "b.parquet")
    assert read(tmp_path / "b.parquet", source) == (["x", "y", "z"], [])
    with pytest.raises(SourceError, match=r"has no column 'meta\.other'; it has id, meta"):
        read(tmp_path / "a.parquet", columned("meta.other"))


def test_a_column_of_nulls_is_a_file_of_rejected_records(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": pa.nulls(3)}), tmp_path / "a.parquet")
    write_jsonl(tmp_path / "b.jsonl", [None, None])
    write_parquet(tmp_path / "c.parquet", ["good"])
    texts, rejected = read(tmp_path)
    assert texts == ["good"] and [reason for _, reason in rejected] == ["field missing"] * 5


def test_the_same_text_in_any_format_gives_the_same_shards(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "lines" / "a.jsonl", TEXTS)
    (tmp_path / "array").mkdir()
    (tmp_path / "array" / "a.json").write_text(json.dumps([{"text": text} for text in TEXTS]))
    (tmp_path / "table").mkdir()
    write_csv(tmp_path / "table" / "a.csv", ",")
    made = {}
    for name in ("lines", "array", "table"):
        manifest = prepared(request(tmp_path / f"out-{name}", str(tmp_path / name)))
        shards = contents(tmp_path / f"out-{name}")
        made[name] = {k: v for k, v in shards.items() if k.endswith("-000.npy")}, manifest.n_tokens
    assert made["lines"] == made["array"] == made["table"]
