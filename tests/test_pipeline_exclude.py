"""Decontamination: which documents are left out, the list's file, and that nothing else changes."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.checks.repair import repair
from pipeline.checks.verify import find_damage
from pipeline.cli import main
from pipeline.errors import PrepareError
from pipeline.text.exclude import Exclusion, read_exclusion
from pipeline.text.ngrams import N_WORDS
from pipeline.units.executors import Executor
from pipeline_samples import contents, prepared, request, write_jsonl
from shards.errors import SummerError
from shards.format import EXCLUDED
from tools.evaluate import main as evaluate

ITEM = "It was the best of times, it was the worst of times, it was the age of wisdom"


def sequences(text: str) -> set[tuple[str, ...]]:
    """By definition: 13 runs of ASCII letters and digits, or bytes beyond ASCII, in a row."""
    spelled = text.encode().decode("latin-1")
    kept = "".join(c if c >= "\x80" or c.isalnum() else " " for c in spelled)
    words = "".join(c.lower() if c < "\x80" else c for c in kept).split(" ")
    words = [word for word in words if word]
    return {tuple(words[n : n + N_WORDS]) for n in range(len(words) - N_WORDS + 1)}


WORDS = st.lists(st.sampled_from(
    ["a", "A", "b", "longerthaneight", "longerthannine", "é", "7", ".", ", ", "x-y", " ", "漢字"]
), max_size=60).map(" ".join)  # fmt: skip


@settings(deadline=None, max_examples=300)
@given(st.data(), WORDS, WORDS, st.lists(WORDS, max_size=4))
def test_documents_that_share_a_sequence_are_found_and_no_others(
    data: Any, first: str, second: str, others: list[str]
) -> None:
    listed = Exclusion.of({"one": [first, "short"], "two": [second]})
    texts = list(others)
    for item in (first, second):  # a piece of an item inside a text, spelled in another way
        begin = data.draw(st.integers(0, len(item)))
        piece = item[begin : begin + data.draw(st.integers(0, len(item)))]
        texts.insert(data.draw(st.integers(0, len(texts))), f"a, {piece.upper()}; b")
    found = listed.screen(pa.array(texts, pa.large_string()))
    tasks = {"one": sequences(first), "two": sequences(second)}
    wanted = {}
    for place, text in enumerate(texts):
        for name in ("two", "one"):
            if sequences(text) & tasks[name]:
                wanted[place] = f"shares 13 words with {name}"
    assert found == wanted
    alone = [listed.screen(pa.array([text], pa.large_string())) for text in texts]
    assert [bool(each) for each in alone] == [place in wanted for place in range(len(texts))]


def test_real_items_in_real_text(shared: Path) -> None:
    """Each of 300 texts with a piece of a page of WikiText-2 is found, among 300 without."""
    pages = (shared / "wikitext-2" / "wiki.test.raw").read_text().split("\n = ")
    listed = Exclusion.of({"wikitext2": pages})
    rng = random.Random(0)
    book = (shared / "nasty" / "blns.txt").read_text().split("\n")
    texts, planted = [], {}
    for n in range(600):
        text = " ".join(rng.choices(book, k=9))
        if n % 2:
            words = rng.choice([page for page in pages if len(page) > 2000]).split(" ")
            begin = rng.randrange(len(words) - 60)
            text += "\n" + " ".join(words[begin : begin + 60]).lower() + text
            planted[n] = "shares 13 words with wikitext2"
        texts.append(text)
    assert listed.screen(pa.array(texts, pa.large_string())) == planted


def test_a_source_without_an_evaluation_text(tmp_path: Path) -> None:
    """By command: the list, the same bytes for any workers, what is listed, said and checked."""
    data = tmp_path / "wiki.raw"
    data.write_text(f" = Tale = \n \n {ITEM} , it was the age of foolishness \n")
    listed = tmp_path / "tests.ngrams"
    made = CliRunner().invoke(
        evaluate,
        ["contamination", "--task", "wikitext2", "--data", str(data), "--write", str(listed)],
    )
    assert made.exit_code == 0 and "sequences of 13 words of 1 items" in made.output, made.output
    texts = [f"text number {n} about nothing at all" for n in range(300)]
    texts[70] = texts[211] = f"They said: {ITEM.upper()}..."
    files = str(write_jsonl(tmp_path / "a.jsonl", texts))
    exclusion = read_exclusion(listed)
    wanted = [request(tmp_path / str(n), files, exclude=exclusion) for n in (1, 2)]
    manifests = [prepared(each, workers=n) for n, each in enumerate(wanted, start=1)]
    folders = [tmp_path / str(n) / "mine" for n in (1, 2)]
    assert contents(folders[0]) == contents(folders[1])
    assert manifests[0].facts.exclude == exclusion.described
    assert exclusion.described["tasks"] == ["wikitext2"]
    assert dict(manifests[0].rejected) == {"shares 13 words with wikitext2": 2}
    lines = "".join(path.read_text() for path in sorted(folders[0].glob("*.rejected.jsonl")))
    assert sorted(json.loads(line)["record"] for line in lines.splitlines()) == [70, 211]
    rest = [text for n, text in enumerate(texts) if n not in (70, 211)]
    without = str(write_jsonl(tmp_path / "b.jsonl", rest))
    assert prepared(request(tmp_path / "3", without)).n_tokens == manifests[0].n_tokens

    unit = next(folders[0].glob("*[0-9].npy"))
    before = unit.read_bytes()
    unit.unlink()
    repair(folders[0], (files,), Executor())
    assert unit.read_bytes() == before and not list(find_damage(folders[0]))
    (folders[0] / EXCLUDED).write_bytes(b"")
    assert [damage.file for damage in find_damage(folders[0])] == [EXCLUDED]
    prepared(wanted[0])
    assert not list(find_damage(folders[0]))
    with pytest.raises(PrepareError, match=r"begun with exclude \{.*not None"):
        prepared(request(tmp_path / "1", files))


def test_files_that_are_no_list_are_refused(tmp_path: Path) -> None:
    path, rng = tmp_path / "a.ngrams", random.Random(0)
    data = Exclusion.of({"t": [ITEM]}).data
    assert Exclusion.of({"t": [ITEM]}).data == data
    for _ in range(300):
        damaged = bytearray(data)
        place = rng.randrange(len(damaged))
        damaged[place : place + rng.randrange(3)] = rng.randbytes(rng.randrange(1, 3))
        if damaged == data:
            continue
        path.write_bytes(damaged)
        with pytest.raises(SummerError, match=r"no list of|upgrade") as caught:
            read_exclusion(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
        read_exclusion.cache_clear()
    path.write_text('{"text": "records, given by mistake"}\n')
    with pytest.raises(PrepareError, match=r"no list of .* \(it begins with no format\): make one"):
        read_exclusion(path)
    path.unlink()
    named = ["tokenize", "--source", "python-docs", "--out", str(tmp_path), "--exclude", str(path)]
    result = CliRunner().invoke(main, named)
    assert result.exit_code == 1 and "name a list with --exclude" in result.output
    short = ["contamination", "--task", "piqa", "--write", str(path)]
    assert "--write goes with" in CliRunner().invoke(evaluate, ["piqa", *short[1:]]).output
    assert len(np.unique(Exclusion.of({"t": ["too short"]}).grams.hashes)) == 0
