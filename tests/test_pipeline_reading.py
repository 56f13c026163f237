"""Files -> records: every format, ranges of lines, and input that is not what it should be."""

import contextlib
import functools
import gzip
import io
import itertools
import json
import os
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import example, given, settings
from hypothesis import strategies as st

import pipeline_samples
from pipeline.errors import SourceError
from pipeline.inputs import lines as text_lines
from pipeline.inputs import reading
from pipeline.inputs.lines import line_blocks
from pipeline.inputs.listing import local_inputs
from pipeline.inputs.sources import Source, SourceOverrides, find
from pipeline_samples import TEXT, is_unicode, write_jsonl, write_parquet
from shards.format import Part


def read(pattern: Any, source: Source = TEXT) -> Any:
    """(texts, [(record, reason)]) of everything that the pattern matches."""
    texts, rejected = pipeline_samples.read(pattern, source)
    return texts, [(record, reason) for _, record, reason in rejected]


TEXTS = ["one", "zwei\nlines\r\nof it", "three \u2028 \x85 \u2029 apart", "\ufeffbom", "\x00", "漢"]


@pytest.mark.parametrize(
    "name", ["a.parquet", "a.jsonl", "a.jsonl.zst", "a.jsonl.gz", "a.ndjson", "many.parquet"]
)
def test_every_format_gives_the_same_texts(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name.endswith("parquet"):
        write_parquet(path, TEXTS, group=2 if name == "many.parquet" else 1000)
    else:
        write_jsonl(path, TEXTS)
        data = path.read_bytes()
        if name.endswith(".zst"):
            half = len(data) // 2
            frames = [zstandard.compress(data[:half]), zstandard.compress(data[half:])]
            path.write_bytes(b"".join(frames))
        elif name.endswith(".gz"):
            path.write_bytes(gzip.compress(data))
    assert read(path) == (TEXTS, [])


def test_a_text_file_is_a_document(tmp_path: Path) -> None:
    for number, text in enumerate(TEXTS):
        (tmp_path / f"{number}.txt").write_bytes(text.encode())
    (tmp_path / "9.txt.gz").write_bytes(gzip.compress(b"packed"))
    assert read(tmp_path) == ([*TEXTS, "packed"], [])


@settings(deadline=None)
@given(st.lists(st.sampled_from([b"", b"a", b"bc", b"\r", b"def" * 9])), st.booleans(), st.data())
def test_ranges_of_lines_share_none_and_lose_none(
    lines: list[bytes], ended: bool, data: Any
) -> None:
    text = b"\n".join(lines) + (b"\n" if ended else b"")
    cuts = data.draw(st.lists(st.integers(0, len(text))))
    edges = sorted({0, len(text), *cuts})
    found = []
    for first, last in itertools.pairwise(edges):
        blocks = list(line_blocks(io.BytesIO(text), first, last))
        assert None not in blocks
        found.append(b"".join(block for block in blocks if block))
    assert b"".join(found) == text
    position = 0
    for (first, last), block in zip(itertools.pairwise(edges), found, strict=True):
        if block:
            assert first <= position < last  # it begins with a line that begins in the range
            assert position == 0 or text[position - 1 : position] == b"\n"
        position += len(block)


def test_lines_longer_than_a_block_and_than_a_record(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_lines, "BLOCK_BYTES", 16)
    monkeypatch.setattr(text_lines, "MAX_RECORD_BYTES", 100)
    text = b"a\n" + b"b" * 60 + b"\n" + b"c" * 500 + b"\nd\n" + b"e" * 300
    blocks = list(line_blocks(io.BytesIO(text), 0, None))
    assert blocks.count(None) == 2
    lines = b"".join(block for block in blocks if block).split(b"\n")
    assert lines == [b"a", b"b" * 60, b"d", b""]


ODD_LINES = [
    ('{"text": "good"}', "good"),
    ("null", "not a JSON object"),
    ("[1]", "not a JSON object"),
    ('"text"', "not a JSON object"),
    ('{"text": 7}', "wrong type"),
    ('{"text": ["a"]}', "wrong type"),
    ('{"text": null}', "field missing"),
    ('{"content": "x"}', "field missing"),
    ('{"text": ""}', "empty"),
    ('{"text": "half a pair \\ud800"}', "invalid UTF-8"),
    ('{"text": "cut', "not JSON"),
    ('{"text": "a"}{"text": "b"}', "not JSON"),
    ('{"text": "twice", "text": "last"}', "last"),
    ('{"text": "number too large", "n": 1e999}', "number too large"),
    ("[" * 5000, "not JSON"),
    ('  {"text": "spaces around"}  ', "spaces around"),
    ('{"text": "windows"}\r', "windows"),
    ('{"text": "\\u0000 and \\ud83d\\ude00"}', "\0 and \U0001f600"),
]


@pytest.mark.parametrize("seed", range(4))
def test_odd_records_are_rejected_by_number_and_never_disturb_others(
    tmp_path: Path, seed: int
) -> None:
    lines = ODD_LINES * 3
    random.Random(seed).shuffle(lines)
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(line for line, _ in lines) + "\n\n  \n")
    bad = {reason for _, reason in ODD_LINES} & {
        "not a JSON object", "wrong type", "field missing", "empty", "invalid UTF-8", "not JSON",
    }  # fmt: skip
    texts, rejected = read(path)
    assert texts == [wanted for _, wanted in lines if wanted not in bad]
    wanted = [(n, reason) for n, (_, reason) in enumerate(lines) if reason in bad]
    assert sorted(rejected) == wanted


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=6,
)


@settings(deadline=None)
@given(st.lists(st.dictionaries(st.sampled_from(["text", "x"]), JSON) | JSON, max_size=8))
@example([{"text": "a"}, None])
def test_records_of_any_json_are_read_as_json_does(values: list[Any]) -> None:
    block = "".join(json.dumps(value) + "\n" for value in values).encode()
    records = text_lines.parse_lines(block, 0, TEXT)
    assert len(records.values) == len(values)
    for place, value in enumerate(values):
        found = records.values[place].as_py()
        found = found.decode() if isinstance(found, bytes) else found
        text = value.get("text") if isinstance(value, dict) else None
        expected = text if isinstance(text, str) and is_unicode(text) else None
        assert found == expected


def test_invalid_utf8_in_lines_and_files_is_rejected_by_record(tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_bytes(b'{"text": "a"}\n{"text": "b\xff"}\n{"text": "c"}\n')
    assert read(tmp_path / "c.jsonl") == (["a", "c"], [(1, "invalid UTF-8")])
    (tmp_path / "d.txt").write_bytes(b"caf\xe9")
    assert read(tmp_path / "d.txt") == ([], [(0, "invalid UTF-8")])


def test_files_that_cannot_be_read_are_named_with_the_fix(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", ["x"], column="content")
    with pytest.raises(SourceError, match=r"a\.parquet has no column 'text'; it has id, content"):
        read(tmp_path / "a.parquet")
    with pytest.raises(SourceError, match="'id' is int64, not text"):
        read(tmp_path / "a.parquet", Source(name="m", about="", licence="", text_column="id"))
    chat = Source(name="m", about="", licence="", shape="chat", text_column="content")
    with pytest.raises(SourceError, match="not a list of turns"):
        read(tmp_path / "a.parquet", chat)
    complete = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "b.parquet").write_bytes(complete[: len(complete) // 2])
    with pytest.raises(SourceError, match=r"b\.parquet is damaged"):
        read(tmp_path / "b.parquet")
    for name in ("c.parquet", "c.jsonl.zst"):
        (tmp_path / name).touch()
        with pytest.raises(SourceError, match=r"is empty \(0 bytes\)"):
            read(tmp_path / name)
    (tmp_path / "d.avro").write_text("text\nx\n")
    with pytest.raises(SourceError, match=r"d\.avro: no reader for this kind"):
        read(tmp_path / "d.avro")
    with pytest.raises(SourceError, match="no file matches"):
        read(tmp_path / "nothing-*")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_named(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["x"])
    path.chmod(0)
    with pytest.raises(SourceError, match="Permission denied"):
        read(path)


class Dripping(io.BytesIO):
    """A stream that gives a few bytes at a time."""

    def read(self, size: int | None = -1, /) -> bytes:
        return super().read(min(7, size) if size and size > 0 else 7)


SEPARATORS = [b"\n", b"<|endoftext|>", b"ab", b"\n\n", b"aba"]


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_texts_between_separators_are_those_of_split(data: Any) -> None:
    """Whatever is read at once and wherever the file is cut into parts."""
    ending = data.draw(st.sampled_from(SEPARATORS))
    pieces = st.sampled_from([ending, ending[:-1], ending[1:], b"a", b"b", b"text", b" ", b"\n"])
    content = b"".join(data.draw(st.lists(pieces, max_size=40)))
    cuts = {0, len(content)}
    if not text_lines.overlaps_itself(ending):
        places = st.integers(len(ending), max(len(ending), len(content)))
        cuts |= {place for place in data.draw(st.sets(places, max_size=3)) if place < len(content)}
    found = []
    parse = functools.partial(text_lines.split_texts, ending=ending)
    for first, last in itertools.pairwise(sorted(cuts)):
        for records in text_lines.read_lines(Dripping(content), first, last, parse, ending):
            found += [value.as_py() for value in records.values]
    assert found == [text for text in content.split(ending) if text.strip()]


def test_a_text_file_above_the_largest_record_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only a document above the limit is rejected; lines end with or without a carriage return."""
    monkeypatch.setattr(text_lines, "MAX_RECORD_BYTES", 1 << 10)
    monkeypatch.setattr(text_lines, "BLOCK_BYTES", 1 << 8)
    texts = [f"document {n}\nof two lines" for n in range(200)]
    texts[77] = "x" * 5000
    path = tmp_path / "a.txt"
    path.write_text("<|end|>\n".join(texts))
    cut = Source(name="m", about="", licence="", separator="<|end|>\n")
    assert read(path, cut) == (texts[:77] + texts[78:], [(77, "above 128 MiB")])
    said = "above 128 MiB: --separator or --shape lines makes documents of it"
    assert read(path) == ([], [(0, said)])
    path.write_bytes(b"one\r\ntwo\n\n \nthree")
    lines = find("m", SourceOverrides(data_files=(str(path),), shape="lines"))
    assert read(path, lines) == (["one", "two", "three"], [])


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"shape": "lines"}, "no text file that --separator or --shape lines could cut"),
        ({"shape": "chat", "separator": "x"}, "--separator 'x' cuts text files"),
    ],
)
def test_a_separator_that_would_do_nothing_is_refused(
    tmp_path: Path, choice: Any, message: str
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["x"])
    with pytest.raises(SourceError, match=message):
        read(path, find("m", SourceOverrides(data_files=(str(path),), **choice)))


@pytest.mark.parametrize("kind", ["dictionary", "stored", "delta", "chat"])
def test_rows_are_read_by_what_they_decode_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """A file of 2,000 times the same long text is small, whatever encoding makes it so."""
    text, n, limit = "lorem ipsum " * 1000, 2000, 1 << 17
    monkeypatch.setattr(reading, "MAX_RECORD_BYTES", limit)
    column: Any = pa.array([text] * n).dictionary_encode()
    if kind == "chat":
        turns = pa.array([{"role": "user", "content": "q"}, {"role": "assistant", "content": text}])
        roles, said = (
            turns.field(k).dictionary_encode().take(pa.array([0, 1] * n)) for k in (0, 1)
        )
        turns = pa.StructArray.from_arrays([roles, said], ["role", "content"])
        column = pa.ListArray.from_arrays(pa.array(range(0, 2 * n + 1, 2), pa.int32()), turns)
    elif kind == "delta":
        column = column.dictionary_decode()
    how: Any = {"use_dictionary": False, "column_encoding": {"text": "DELTA_BYTE_ARRAY"}}
    pq.write_table(
        pa.table({"text": column}), tmp_path / "a.parquet", compression="zstd",
        store_schema=kind == "stored", **how if kind == "delta" else {},
    )  # fmt: skip
    assert (tmp_path / "a.parquet").stat().st_size < 50_000
    source = Source(name="m", about="", licence="", shape="chat" if kind == "chat" else "documents")
    inputs, found = local_inputs((str(tmp_path),)), 0
    with contextlib.closing(reading.PartReader(inputs, source)) as reader:
        for records in reader.read(Part(file="a.parquet", first=0, last=1)):
            values = records.values.to_pylist()
            assert len(values) * len(text) <= limit
            found += len(values)
            said = [{"role": "user", "content": "q"}, {"role": "assistant", "content": text}]
            assert values[-1] == (said if kind == "chat" else text)
    assert found == n
