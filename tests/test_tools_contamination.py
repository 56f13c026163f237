"""Sequences of 13 words are found wherever they are, and nothing else is; checked by hand."""

import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from pipeline.text.ngrams import BARRIER, N_WORDS, Wanted, grams_of, normalised
from shards.reader import ShardReader, read_manifest
from tools.evaluate import main
from tools.evaluation.contamination import contamination
from tools.evaluation.tasks import TaskOptions
from tools_samples import (
    SEQ_LEN,
    sample_config,
    sample_model,
    sample_text,
    sample_tokenizer,
    write_shards,
)
from trainer.checkpoint.storage import save, tensors_of
from trainer.config.config import RunConfig, save_config
from trainer.data.mixture import DataOrder, Phase
from trainer.distributed.world import World

pytestmark = pytest.mark.usefixtures("one_thread")
texts = st.text("abcXY1 .,-é\n", max_size=300)


def words_of(text: str) -> list[str]:
    lowered = "".join(c.lower() if c.isascii() else c for c in text)
    return re.findall(r"[0-9a-z\x80-\U0010ffff]+", lowered)


def sequences(text: str) -> list[tuple[str, ...]]:
    words = words_of(text)
    return [tuple(words[at : at + N_WORDS]) for at in range(len(words) - N_WORDS + 1)]


@given(texts, texts)
def test_hashes_are_equal_where_the_words_are(one: str, other: str) -> None:
    """Two texts' sequences, hashed in different places of different texts, agree as tuples do."""
    theirs = sequences(one) + sequences(f"{one} {other}")
    hashes = [
        *grams_of(normalised(one.encode())).hashes,
        *grams_of(normalised(f"{one} {other}".encode())).hashes,
    ]
    assert len(theirs) == len(hashes)
    assert len(set(theirs)) == len(set(hashes))
    for a in range(0, len(theirs), 7):
        for b in range(len(theirs)):
            assert (theirs[a] == theirs[b]) == (hashes[a] == hashes[b])


def test_places_are_those_of_the_words() -> None:
    text = normalised(sample_text()[:4000].encode())
    grams = grams_of(text)
    spelled = [
        tuple(text[begin:end].decode().split())
        for begin, end in zip(grams.begins, grams.ends, strict=True)
    ]
    assert spelled == sequences(sample_text()[:4000])


def test_spacing_case_and_punctuation_do_not_count() -> None:
    written = "He said: \"it's 1,000 miles (or so) from A to B, isn't it?\""
    tokenized = "he said : \" it 's 1 @,@ 000 MILES ( or so ) from a to b , isn 't it ? \""
    assert normalised(written.encode()).split() == normalised(tokenized.encode()).split()
    joined = normalised(b"one two") + BARRIER + normalised("drei vier \N{SNOWMAN}".encode())
    assert len(joined.split()) == 6


def test_wanted_sequences_are_found_and_only_they() -> None:
    generator = random.Random(0)
    items = [" ".join(generator.choices("abcdefgh", k=n)) for n in (12, 13, 14, 40)]
    wanted = Wanted([*items, items[1]])
    assert wanted.measurable.tolist() == [False, True, True, True, True]
    haystack = normalised(f"x {items[1]} y {items[3][10:]}".encode())
    places, numbers = wanted.find(grams_of(haystack).hashes)
    found = np.zeros(len(wanted.hashes), np.bool_)
    found[numbers] = True
    assert wanted.per_item(found).tolist() == pytest.approx([0, 1, 0, 23 / 28, 1])
    assert wanted.items_of(int(numbers[0])).tolist() == [1, 4]
    assert len(places) == 1 + 23
    assert len(Wanted([]).find(grams_of(haystack).hashes)[0]) == 0


def write_root(root: Path, seq_len: int) -> Path:
    pieces = [sample_text()[begin : begin + 900] for begin in range(0, 27_000, 900)]
    source = root / "code"
    write_shards(source, train_texts=pieces[:20], val_texts=pieces[20:], seq_len=seq_len)
    (source / "tokenizer.model").write_bytes(sample_tokenizer().model)
    return root


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_root(tmp_path_factory.mktemp("contamination") / "shards", SEQ_LEN)


@pytest.fixture(scope="module")
def task_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LAMBADA's layout: six passages of training text, one held out, one across two documents."""
    text = sample_text()
    starts = [40, 1300, 3000, 5555, 9100, 16_000]
    passages = [" ".join(text[start : start + 500].split()) for start in starts]
    passages += [" ".join(text[19_000:19_500].split()), "too short"]
    across = (text[900 - 60 : 900].split(), text[900 : 900 + 60].split())
    passages.append(" ".join([*across[0][-8:], *across[1][:8]]))
    path = tmp_path_factory.mktemp("task") / "lambada.jsonl"
    path.write_text("".join(json.dumps({"text": passage}) + "\n" for passage in passages))
    return path


def expected_items(shards: Path, task_file: Path, rows: list[int] | None) -> list[int]:
    """Items with a sequence in the documents of the shards, or inside single rows of them."""
    manifest = read_manifest(shards / "code")
    ids = ShardReader(shards / "code").rows(np.arange(manifest.split("train")[0].n_rows))[0]
    chosen = [ids.ravel()] if rows is None else [ids[row] for row in rows]
    there: set[tuple[str, ...]] = set()
    for stream in chosen:
        for document in np.split(stream, np.flatnonzero(stream == 1)):
            text = sample_tokenizer().decode(document[document > 2].tolist())
            there |= set(sequences(text))
    items = [json.loads(line)["text"] for line in task_file.read_text().splitlines()]
    return [number for number, item in enumerate(items) if there & set(sequences(item))]


@pytest.mark.parametrize("rows_at_once", [1, 7, 1000])
def test_items_are_found_across_rows_and_blocks_but_not_across_documents(
    shards: Path, task_file: Path, rows_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tools.evaluation.contamination._ROWS_AT_ONCE", rows_at_once)
    result = contamination("lambada", TaskOptions(shards=shards, data=task_file))
    found = result["in_shards"]
    assert expected_items(shards, task_file, None) == [0, 1, 2, 3, 4, 5]
    assert (found["items"], result["items"], result["too_short"]) == (6, 9, 1)
    assert found["share"] == 6 / 8
    assert len(found["examples"]) == 3
    reader = ShardReader(shards / "code")
    for example in found["examples"]:
        rows = np.arange(max(0, example["row"] - 3), min(reader.n_rows, example["row"] + 1))
        near = sample_tokenizer().decode(reader.rows(rows)[0].ravel().tolist())
        last = " ".join(words_of(near))
        words = example["words"].split()
        assert words[-1] in last and len(words) == N_WORDS


def write_run_on(shards: Path, run: Path, next_index: int) -> None:
    """A checkpoint of a run that has drawn some rows of the shards."""
    run.mkdir()
    n_rows = ShardReader(shards / "code").n_rows
    root = read_manifest(shards / "code").root
    config = RunConfig(model=sample_config(), mixture={"code": 1.0}, shards=str(shards))
    save_config(run, config)
    model = sample_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    model(torch.arange(8)[None], torch.arange(8)[None]).backward()
    optimizer.step()
    facts = {"root": root, "n_rows": n_rows, "n_val_rows": 0, "tokens_per_row": 32.0}
    record = {
        "step": 1, "next_index": next_index, "phases": [[0, {"code": 1}]],
        "data": {"code": facts}, "world_size": 1,
    }  # fmt: skip
    alone = World(
        rank=0, local_rank=0, world_size=1, local_world_size=1, device=torch.device("cpu")
    )
    save(run, tensors_of(model, optimizer), record, alone)


def test_what_a_run_has_seen_comes_from_its_data_order(task_file: Path, tmp_path: Path) -> None:
    shards = write_root(tmp_path / "shards", 8 * SEQ_LEN)  # rows that hold sequences of words
    n_rows = ShardReader(shards / "code").n_rows
    found = []
    for next_index in (1, n_rows // 4, 2 * n_rows):
        run = tmp_path / f"run-{next_index}"
        write_run_on(shards, run, next_index)
        checkpoint = run / "checkpoints/step-1"
        options = TaskOptions(shards=shards, data=task_file, seen_by=checkpoint)
        result = contamination("lambada", options)
        order = DataOrder(seed=0, rows={"code": n_rows}, phases=[Phase(0, {"code": 1})])
        rows = np.unique(order.locate(np.arange(next_index)).row).tolist()
        assert result["next_index"] == next_index
        assert result["seen"]["items"] == len(expected_items(shards, task_file, rows))
        found.append(result["seen"]["items"])
    assert (
        found[0] < found[2] and sorted(found) == found and found[2] <= result["in_shards"]["items"]
    )


def test_the_command_shows_the_overlap_and_cards_carry_it(
    shards: Path, task_file: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    write_run_on(shards, run, 30)
    (run / "tokenizer.model").write_bytes(sample_tokenizer().model)
    arguments = ["--shards", str(shards), "--data", str(task_file), "--run", str(run)]
    result = CliRunner().invoke(main, ["contamination", "--task", "lambada", *arguments])
    assert result.exit_code == 0, result.output
    assert "of 8 (1 more are shorter)" in result.stdout and "75.00%" in result.stdout
    assert "e.g. item" in result.stdout and ", 30 samples" in result.stdout
    result = CliRunner().invoke(main, ["lambada", "--contamination", "--json", *arguments])
    carried = json.loads(result.stdout)["contamination"]
    assert set(carried) == {
        "task", "of", "items", "too_short", "shards", "roots", "in_shards", "checkpoint",
        "next_index", "seen",
    }  # fmt: skip
    assert (carried["task"], carried["in_shards"]["share"]) == ("lambada", 0.75)
    result = CliRunner().invoke(main, ["lambada", "--contamination", *arguments])
    assert "overlap   75.00% of items share 13 words with" in result.stdout
    assert CliRunner().invoke(main, ["contamination", *arguments]).exit_code == 2
    assert CliRunner().invoke(main, ["contamination", "lambada"]).exit_code == 2
    result = CliRunner().invoke(main, ["contamination", "--task", "heldout", *arguments])
    assert result.exit_code == 1 and "contamination of heldout: it has no items" in result.stderr
