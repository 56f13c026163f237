"""Input that is broken, odd or made to do harm: rejected by name, and never a crash."""

import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline.errors import SourceError
from pipeline.inputs import lines as text_lines
from pipeline.inputs import records
from pipeline.inputs.inputs import ENDINGS
from pipeline.inputs.sources import find
from pipeline.text.chat import spell
from pipeline.text.documents import DocumentMaker
from pipeline.units import units
from pipeline_samples import is_unicode, read, write_jsonl, write_parquet
from shards.format import Part

CHAT = find("slimorca")
PART = Part(file="a", first=0, last=1)
GOOD = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]


# ------------------------------------------------------------------ records of every wrong type

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner)
)
ROLES: Any = st.sampled_from(["human", "gpt", "system", "tool", "", None, 7, ["human"], {}])
TURNS = st.fixed_dictionaries({}, optional={"from": ROLES | JSON, "value": st.text() | JSON})
CONVERSATIONS = st.just(GOOD) | st.lists(TURNS | JSON, max_size=4) | JSON


def is_conversation(value: Any) -> bool:
    """By the definition, and by nothing of the code's."""
    roles = {"human": "user", "user": "user", "gpt": "gpt", "assistant": "gpt", "system": "system"}
    if not isinstance(value, list) or not value:
        return False
    said = []
    for turn in value:
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            return False
        if not isinstance(turn.get("from"), str) or turn["from"] not in roles:
            return False
        said.append((roles[turn["from"]], turn["value"]))
    said = said[1:] if said[0][0] == "system" else said
    said = said[:-1] if said and said[-1][0] == "user" else said
    if not said or [role for role, _ in said] != ["user", "gpt"] * (len(said) // 2):
        return False
    return all(text if role == "user" else text.rstrip(" ") for role, text in said) and is_unicode(
        "".join(turn["value"] for turn in value)
    )


def chosen(records: Any, n: int) -> Any:
    """{record: its texts} of the good ones and {record: reason} of the others, of a batch."""
    maker = DocumentMaker(CHAT, 0.0)
    (found,) = maker.documents(0, PART, [records])
    assert found.turns is not None
    texts = iter(found.texts.to_pylist())
    good = {int(record): [next(texts) for _ in range(int(turns))]
            for record, turns in zip(found.records, found.turns, strict=True)}  # fmt: skip
    rejected = {entry["record"]: entry["reason"] for entry in maker.rejected}
    assert sorted([*good, *rejected]) == list(range(n))
    return good, rejected


@settings(deadline=None, max_examples=100)
@given(st.lists(CONVERSATIONS, min_size=1, max_size=4))
@example([[{"from": ["human"], "value": "q"}]])
@example([[GOOD[0], GOOD[0]]])
@example([[{"from": "human", "value": "\ud800"}, {"from": "gpt", "value": "a"}]])
def test_conversations_of_every_wrong_type_are_rejected(values: list[Any]) -> None:
    lines = "".join(json.dumps({"conversations": value}) + "\n" for value in values).encode()
    good, rejected = chosen(text_lines.parse_lines(lines, 0, CHAT), len(values))
    assert sorted(good) == [n for n, value in enumerate(values) if is_conversation(value)]
    slowly = text_lines._parse_slowly(lines, 0, CHAT)
    assert chosen(slowly, len(values)) == (good, rejected)  # pyarrow's way and the other
    assert all(spell(texts) for texts in good.values())


@settings(deadline=None, max_examples=100)
@given(st.lists(st.none() | st.lists(st.none() | st.fixed_dictionaries(
    {"from": st.none() | st.sampled_from(["human", "gpt", "tool"]),
     "value": st.none() | st.text(max_size=2)}), max_size=4), min_size=1, max_size=4))  # fmt: skip
def test_conversations_in_columns_are_rejected_alike(values: list[Any]) -> None:
    column = pa.array(values, pa.list_(records.turn_type()))
    good, _ = chosen(records.Records(0, column), len(values))
    assert sorted(good) == [n for n, value in enumerate(values) if is_conversation(value)]


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.binary(), pa.large_binary(), pa.string_view()]
)
@pytest.mark.parametrize("dictionary", [False, True])
def test_invalid_utf8_in_any_kind_of_column(tmp_path: Path, kind: Any, dictionary: bool) -> None:
    rows = [b"good", b"\xff", None, "schön".encode(), b"", b"\xf4\x90\x80\x80", b"good"]
    column = pa.array(rows, pa.large_binary() if kind in LARGE else pa.binary())
    if kind == pa.string_view():
        column = column.view(pa.string())
    elif kind not in (pa.binary(), pa.large_binary()):
        column = column.view(kind)
    if dictionary:
        column = column.dictionary_encode()
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet", store_schema=True)
    texts, rejected = read(tmp_path / "a.parquet")
    assert texts == ["good", "schön", "good"]
    assert [(record, reason) for _, record, reason in rejected] == [
        (1, "invalid UTF-8"), (2, "field missing"), (4, "empty"), (5, "invalid UTF-8"),
    ]  # fmt: skip


LARGE = (pa.large_string(), pa.large_binary())

# ------------------------------------------------------------------ lines


@pytest.mark.parametrize("odd", ['{"text": 7}', "null", '{"text": "\udcff"}', "{", '{"text": []}'])
def test_a_late_odd_value_costs_itself_alone(
    tmp_path: Path, odd: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_lines, "BLOCK_BYTES", 4096)
    monkeypatch.setattr(units, "LEAST_UNIT_BYTES", 1 << 14)
    lines = [json.dumps({"text": f"line {n}", "n": n}) for n in range(3000)]
    text = "\n".join([*lines[:-1], odd, lines[-1]])  # and no line end at the end
    (tmp_path / "a.jsonl").write_bytes(text.encode("utf-8", "surrogateescape"))
    texts, rejected = read(tmp_path / "a.jsonl")
    assert texts == [f"line {n}" for n in range(3000)]
    assert len(rejected) == 1


LINES = ["one", "two \u2028 \u2029 \x85 \x0b \x0c \x1c \x1e", "\ufeff three", "four\r\nfive\r"]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n", "\n \r\n"])
@pytest.mark.parametrize("begin", ["", "\ufeff", "\n"])
def test_lines_end_at_line_feeds_alone(tmp_path: Path, begin: str, end: str) -> None:
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in LINES]
    (tmp_path / "a.jsonl").write_text(begin + end.join(lines) + end, newline="")
    assert read(tmp_path / "a.jsonl") == (LINES, [])


# ------------------------------------------------------------------ files

PACKED = [".zst", ".gz"]


@pytest.mark.parametrize("ending", [*ENDINGS, ".jsonl.zst", ".jsonl.gz", ".txt.zst", ".txt.gz"])
def test_files_of_no_byte_and_of_one(tmp_path: Path, ending: str) -> None:
    """Each is an error with the file's name, or some documents and rejections; nothing else."""
    write_jsonl(tmp_path / "a.jsonl", ["good"])
    for number, data in enumerate([b"", *(bytes([n]) for n in b'\n{}["a1 \0\xff\xef\r')]):
        path = tmp_path / f"b{number}{ending}"
        path.write_bytes(data)
        try:
            texts, rejected = read(tmp_path / "*")
        except SourceError as error:
            assert path.name in str(error) and "fetch" in str(error)
            assert not ending.startswith((".jsonl", ".txt")) or ending.endswith((".zst", ".gz"))
        else:
            assert texts[0] == "good" and {name for name, _, _ in rejected} <= {path.name}
            is_text = ENDINGS[ending] == "text"
            assert texts[1:] == ([data.decode()] if is_text and data not in (b"", *BAD) else [])
        path.unlink()


BAD = (b"\xff", b"\xef")


def pack(ending: str, data: bytes) -> bytes:
    return zstandard.compress(data) if ending == ".zst" else gzip.compress(data, mtime=0)


@pytest.mark.parametrize("ending", PACKED)
def test_a_compressed_file_cut_anywhere_is_noticed(tmp_path: Path, ending: str) -> None:
    blocks = [b'{"text": "%x"}\n' % random.Random(n).getrandbits(400) for n in range(3)]
    frames = [pack(ending, block) for block in blocks]
    full, edges = b"".join(frames), [0, len(frames[0]), len(frames[0] + frames[1])]
    path = tmp_path / f"a.jsonl{ending}"
    large = b"".join(b'{"text": "%d"}\n' % random.Random(n).getrandbits(200) for n in range(5000))
    path.write_bytes(pack(ending, large)[:70_000])
    with pytest.raises(SourceError, match=r"is damaged .*fetch the file again"):
        read(path)
    for cut in range(1, len(full)):
        path.write_bytes(full[:cut])
        if cut in edges:  # nothing in the format tells that there was more
            assert len(read(path)[0]) == edges.index(cut)
            continue
        with pytest.raises(SourceError, match=r"a\.jsonl\.\w+ is damaged .*fetch the file again"):
            read(path)
    path.write_bytes(full)
    assert len(read(path)[0]) == 3


SKIPPABLE = b"\x50\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"notes"


@pytest.mark.parametrize(
    ("ending", "data"),
    [
        (".zst", SKIPPABLE + pack(".zst", b'{"text": "a"}\n{"te') + pack(".zst", b'xt": "b"}\n')),
        (".zst", pack(".zst", b'{"text": "a"}\n') + SKIPPABLE + pack(".zst", b'{"text": "b"}')),
        (".zst", pack(".zst", b"") + pack(".zst", b'{"text": "a"}\n{"text": "b"}\n')),
        (".gz", pack(".gz", b'{"text": "a"}\n{"te') + pack(".gz", b'xt": "b"}\n')),
        (".gz", pack(".gz", b"") + pack(".gz", b'{"text": "a"}\n{"text": "b"}\n')),
    ],
)
def test_frames_are_read_to_the_last(tmp_path: Path, ending: str, data: bytes) -> None:
    (tmp_path / f"a.jsonl{ending}").write_bytes(data)
    assert read(tmp_path / f"a.jsonl{ending}") == (["a", "b"], [])


@pytest.mark.parametrize("ending", PACKED)
def test_what_stands_behind_the_last_frame_is_noticed(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(pack(ending, b'{"text": "a"}\n') + b"garbage behind")
    with pytest.raises(SourceError, match="is damaged"):
        read(path)


def cut_somewhere(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def flip_somewhere(data: bytes, rng: random.Random) -> bytes:
    spoilt = bytearray(data)
    for _ in range(rng.randrange(1, 4)):
        spoilt[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(spoilt)


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        *((name, cut_somewhere) for name in ("a.jsonl", "a.parquet")),
        *((f"a.jsonl{ending}", flip_somewhere) for ending in ("", *PACKED)),
    ],
)
def test_spoilt_files_are_errors_or_rejections(
    tmp_path: Path, name: str, spoil: Callable[[bytes, random.Random], bytes]
) -> None:
    if name == "a.parquet":
        full = write_parquet(tmp_path / name, [f"text {n}" for n in range(40)]).read_bytes()
    else:
        full = write_jsonl(tmp_path / "x", [f"text {n}" for n in range(40)]).read_bytes()
        (tmp_path / "x").unlink()
        full = pack(name[-4:].lstrip("l"), full) if name.endswith(("zst", "gz")) else full
    rng = random.Random(3)
    for _ in range(60):
        (tmp_path / name).write_bytes(spoil(full, rng))
        try:
            texts, _ = read(tmp_path / name)
        except SourceError as error:
            assert name in str(error) and "\n" not in str(error)
        else:
            assert len(texts) <= 41
