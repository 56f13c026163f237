"""Records -> documents: pages joined from lines, what is held out, what is rejected."""

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.inputs.listing import local_inputs
from pipeline.inputs.reading import PartReader
from pipeline.inputs.records import Records
from pipeline.inputs.sources import find
from pipeline.text import documents
from pipeline.text.documents import DocumentMaker, held_out, in_batches
from pipeline.units.units import cut_into_parts
from pipeline_samples import TEXT
from shards.format import Part

PART = Part(file="a", first=0, last=1)


def pages_of(path: Path) -> Any:
    source, inputs = find("wikitext2"), local_inputs((str(path),))
    (weighed,) = cut_into_parts(inputs, source)
    maker = DocumentMaker(source, 1.0)
    with contextlib.closing(PartReader(inputs, source)) as reader:
        found = list(maker.documents(7, weighed.part, reader.read(weighed.part)))
    assert all(batch.held.all() and (batch.parts == 7).all() for batch in found)
    return [
        page
        for batch in found
        for page in zip(batch.texts.to_pylist(), batch.records.tolist(), strict=True)
    ]


PAGES = [
    " \n = First = \n \n Some text . \n \n = = Section = = \n \n x = 1 \n \n",
    " = Second ( 2 ) = \n \n More . \n",
]


def test_lines_become_pages_from_raw_text_and_from_rows(tmp_path: Path) -> None:
    raw = "".join(PAGES)
    (tmp_path / "wiki.raw").write_text(raw)
    rows = ["" if line == " " else f"{line}\n" for line in raw.split("\n")[:-1]]
    pq.write_table(pa.table({"text": rows}), tmp_path / "a.parquet", row_group_size=3)
    wanted = [(PAGES[0], 0), (PAGES[1], 9)]
    assert pages_of(tmp_path / "wiki.raw") == wanted
    assert pages_of(tmp_path / "a.parquet") == wanted


def test_wikitext_is_cut_at_its_titles_and_nothing_is_lost(shared: Path) -> None:
    pages = pages_of(shared / "wikitext-2" / "wiki.test.raw")
    raw = (shared / "wikitext-2" / "wiki.test.raw").read_text()
    assert "".join(text for text, _ in pages) == raw
    assert len(pages) == 62  # as the field counts them: two formulas look like titles
    assert pages[1][0].startswith(" = Du Fu = \n")
    rows = shared / "wikitext-2" / "wikitext-2-raw-v1" / "test-00000-of-00001.parquet"
    assert pages_of(rows) == pages


@settings(deadline=None)
@given(st.lists(st.text()), st.integers(0, 1 << 16))
def test_held_out_depends_on_the_text_alone(texts: list[str], below: int) -> None:
    array = pa.array(["skipped", *texts, "x"], pa.large_string())[1:-1]
    wanted = [xxhash.xxh3_64_intdigest(text.encode()) % (1 << 16) < below for text in texts]
    assert held_out(array, below).tolist() == wanted


def test_the_share_held_out_is_what_was_asked_for() -> None:
    texts = pa.array([f"document {n}" for n in range(20_000)], pa.large_string())
    assert abs(held_out(texts, round(0.1 * 65536)).mean() - 0.1) < 0.01
    assert not held_out(texts, 0).any()


def test_batches_hold_the_same_documents() -> None:
    maker = DocumentMaker(TEXT, 0.5)
    several = [
        next(maker.documents(n, PART, [Records(n, pa.array([f"{n}", f"text {n}"]))]))
        for n in range(10)
    ]
    (full,) = in_batches(several, 1 << 20)
    single = list(in_batches(several, 1))
    assert [batch.texts.to_pylist() for batch in single] == [
        [f"{n}", f"text {n}"] for n in range(10)
    ]
    assert full.texts.to_pylist() == [text for batch in single for text in batch.texts.to_pylist()]
    assert full.parts.tolist() == np.repeat(np.arange(10), 2).tolist()
    assert full.records.tolist() == [r for n in range(10) for r in (n, n + 1)]
    first = full.first(3)
    assert first.texts.to_pylist() == ["0", "text 0", "1"] and len(first) == 3


def test_a_batch_is_full_once_it_has_its_size() -> None:
    maker = DocumentMaker(TEXT, 0.0)
    several = [
        next(maker.documents(n, PART, [Records(0, pa.array([f"text {n}"]))])) for n in range(8)
    ]
    size = several[0].texts.nbytes
    for batch_bytes, wanted in ((2 * size, [2, 2, 2, 2]), (2 * size + 1, [3, 3, 2])):
        assert [len(batch) for batch in in_batches(several, batch_bytes)] == wanted


def test_the_first_conversations_keep_their_turns() -> None:
    pairs = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    maker = DocumentMaker(find("slimorca"), 0.0)
    (found,) = maker.documents(0, PART, [Records(5, [pairs * 2, pairs, pairs * 3])])
    first = found.first(2)
    assert first.turns is not None and first.turns.tolist() == [4, 2]
    assert (len(first.texts), first.records.tolist()) == (6, [5, 6])


def test_a_bad_line_is_listed_by_its_record() -> None:
    maker = DocumentMaker(find("wikitext2"), 0.0)
    list(maker.documents(0, PART, [Records(5, pa.array([" = A = \n", None, "text\n"]))]))
    assert [each["record"] for each in maker.rejected] == [6]


def test_lines_become_pages_once_however_they_are_given() -> None:
    maker = DocumentMaker(find("wikitext2"), 0.0)
    (pages,) = maker.documents(0, PART, [Records(0, pa.array([" = A = \n", "text\n"]))])
    assert pages.texts.to_pylist() == [" = A = \ntext\n"]


def test_a_bound_of_one_holds_out_what_hashes_to_zero() -> None:
    texts = pa.array(["a", "b"], pa.large_string())
    assert held_out(texts, 1).tolist() == [False, False]
    assert held_out(texts, 1 << 16).tolist() == [True, True]
    assert held_out(texts[:0], 1).tolist() == []


def test_how_much_of_a_part_has_been_read(tmp_path: Path) -> None:
    """From almost nothing to all of it, and never more."""
    pq.write_table(pa.table({"text": ["text"] * 40_000}), tmp_path / "a.parquet")
    inputs, source = local_inputs((str(tmp_path / "a.parquet"),)), TEXT
    maker = DocumentMaker(source, 0.0)
    parts = enumerate(weighed.part for weighed in cut_into_parts(inputs, source))
    shares = [maker.shares[0] for _ in maker.read(inputs, parts)]
    assert 0 < shares[0] < 0.9 and shares == sorted(shares) and shares[-1] == 1.0


def test_what_is_above_the_largest_record_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "MAX_RECORD_BYTES", 5)
    maker = DocumentMaker(find("slimorca"), 0.0)
    chats = [
        [{"from": "human", "value": "é"}, {"from": "gpt", "value": answer}]
        for answer in ("abc", "abcd")
    ]
    (found,) = maker.documents(0, PART, [Records(3, chats)])
    assert found.records.tolist() == [3]
    assert [(each["record"], each["reason"]) for each in maker.rejected] == [(4, "above 128 MiB")]
    maker = DocumentMaker(TEXT, 0.0)
    records = Records(40, pa.array(["12345", "123456", None, "é é"]))
    (found,) = maker.documents(0, PART, [records])
    assert found.texts.to_pylist() == ["12345", "é é"]
    assert found.records.tolist() == [40, 43]
    assert [(r["record"], r["reason"]) for r in maker.rejected] == [
        (41, "above 128 MiB"),
        (42, "field missing"),
    ]
