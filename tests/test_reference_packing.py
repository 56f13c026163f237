"""Prepared folders against a second reading of the format: sentencepiece, NumPy and plain Python.

The reference takes the input's texts and the plan's cuts (`parts` and `units` of units.json) and
says what every byte of rows, masks, sidecars and unit records must be. It shares no code with what
made them.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import xxhash

from pipeline_samples import prepared, request, write_parquet

SEQ_LEN, GROUP = 16, 7
TEXTS = [
    *(f"Document {n}: {'naïve 日本語 🙂 ' * (n % 5)}ends here." for n in range(60)),
    "x" * 500,  # several rows
    "",  # rejected
    "é",
    " \n",
    "</s> is spelled, not ended",
]
CHATS = [
    [
        {"from": "system", "value": "Be brief." * (n % 2)},
        {"from": "human", "value": f"frage {n} ä"},
        {"from": "gpt", "value": f"antwort {n}" * (n % 4 + 1)},
        *[{"from": "human", "value": "and?"}, {"from": "gpt", "value": "no"}] * (n % 3),
    ][1 - n % 2 :]
    for n in range(40)
]

Document = tuple[
    list[int], list[bool], str
]  # ids, targets, the text that decides about holding out


def hashed(text: str) -> int:
    """XXH3-64 of the text modulo 2^16."""
    return xxhash.xxh3_64_intdigest(text.encode("utf-8")) & 0xFFFF


def document_of(value: Any, model: Any) -> Document | None:
    """A text or a conversation; None for an empty one."""
    if isinstance(value, str):
        ids = [model.bos_id(), *model.encode(value), model.eos_id()]
        return (ids, [True] * len(ids), value) if value else None
    turns, system = list(value), ""
    if turns[0]["from"] == "system":
        system = turns.pop(0)["value"]
    ids, targets, spelled = [model.bos_id()], [False], ""
    for number, turn in enumerate(turns):
        text = f"{system}\n\n{turn['value']}" if system and not number else turn["value"]
        asks = turn["from"] == "human"
        if asks:
            new = [model.piece_to_id("[INST]"), *model.encode(text), model.piece_to_id("[/INST]")]
        else:
            new = [*model.encode(text), model.eos_id()]
        ids, targets = ids + new, targets + [not asks] * len(new)
        spelled += f"[INST]{text}" if asks else f"[/INST]{text}"
    return ids, targets, spelled


class Stream:
    """The documents of one split of one unit, one behind the other."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.targets: list[bool] = []
        self.origins: list[tuple[int, int]] = []  # part and record of each id

    def add(self, document: Document, part: int, record: int) -> None:
        self.ids += document[0]
        self.targets += document[1]
        self.origins += [(part, record)] * len(document[0])

    def rows(self) -> Iterator[tuple[list[int], list[bool], tuple[int, int]]]:
        """Each row's ids, its targets, and where its first id is from."""
        for at in range(0, len(self.ids), SEQ_LEN):
            ids, targets = self.ids[at : at + SEQ_LEN], self.targets[at : at + SEQ_LEN]
            missing = SEQ_LEN - len(ids)
            yield ids + [0] * missing, targets + [False] * missing, self.origins[at]


def packed_bits(targets: list[bool]) -> bytes:
    """Eight targets a byte, the first in the lowest bit."""
    eights = [targets[at : at + 8] for at in range(0, len(targets), 8)]
    return bytes(sum(bit << place for place, bit in enumerate(eight)) for eight in eights)


def check_folder(folder: Path, values: list[Any], val_below: int, masked: bool) -> int:
    """Compare everything in the folder with the reference; the documents held out."""
    model = sentencepiece.SentencePieceProcessor(
        model_file=str(folder / "tokenizer.model")  # the folder's own copy
    )
    plan = json.loads((folder / "units.json").read_text())
    groups = [values[at : at + GROUP] for at in range(0, len(values), GROUP)]
    assert [(part["first"], part["last"]) for part in plan["parts"]] == [
        (number, number + 1) for number in range(len(groups))
    ]
    assert len(plan["units"]) > 2  # so that streams end within the input
    totals, n_held = np.zeros(4, int), 0
    for name, unit in enumerate(plan["units"]):
        streams, empty = {"train": Stream(), "val": Stream()}, []
        for part in range(unit["first"], unit["last"]):
            for record, value in enumerate(groups[part]):
                document = document_of(value, model)
                if document is None:
                    empty.append(record)
                    continue
                held = hashed(document[2]) < val_below
                n_held += held
                streams["val" if held else "train"].add(document, part, record)
        totals += check_unit(folder, f"{name:05d}", streams, len(empty), masked)
    manifest = json.loads((folder / "manifest.json").read_text())
    counts = ("n_rows", "n_tokens", "n_documents", "n_val_rows")
    assert [manifest[count] for count in counts] == totals.tolist()
    return n_held


def check_unit(
    folder: Path, name: str, streams: dict[str, Stream], n_empty: int, masked: bool
) -> list[int]:
    """Compare a unit's files; its rows, ids, documents and held-out rows."""
    unit_record = json.loads((folder / f"{name}.json").read_text())
    assert unit_record["rejected"] == ({"empty": n_empty} if n_empty else {})
    assert [shard["split"] for shard in unit_record["shards"]] == [
        split for split, stream in streams.items() if stream.ids
    ]
    totals = [0, 0, 0, 0]
    for shard in unit_record["shards"]:
        stream = streams[shard["split"]]
        expected = list(stream.rows())
        stem = name + ("-val" if shard["split"] == "val" else "") + "-000"
        rows = np.load(folder / f"{stem}.npy")
        assert rows.dtype == np.dtype("<u2")
        assert rows.tolist() == [row for row, _, _ in expected]
        masks = [packed_bits(targets) if masked else b"" for _, targets, _ in expected]
        assert (folder / f"{stem}.mask.npy").exists() == masked
        if masked:
            assert [m.tobytes() for m in np.load(folder / f"{stem}.mask.npy")] == masks
        sidecar = np.load(folder / f"{stem}.rows.npy")
        assert [(part, record) for _, part, record in sidecar.tolist()] == [
            origin for _, _, origin in expected
        ]
        assert sidecar["xxh3"].tolist() == [
            xxhash.xxh3_64_intdigest(np.array(row, "<u2").tobytes() + mask)
            for (row, _, _), mask in zip(expected, masks, strict=True)
        ]
        counts = [len(expected), len(stream.ids), stream.ids.count(1)]
        assert [shard[n] for n in ("n_rows", "n_tokens", "n_documents")] == counts
        assert shard["file"] == f"{stem}.npy"
        assert shard["bytes"] == (folder / shard["file"]).stat().st_size
        assert (
            shard["rows_sha256"]
            == hashlib.sha256((folder / f"{stem}.rows.npy").read_bytes()).hexdigest()
        )
        totals = [t + c for t, c in zip(totals, [*counts, 0], strict=True)]
        totals[3] += counts[0] * (shard["split"] == "val")
    return totals


def prepare_texts(folder: Path, **changes: Any) -> Path:
    write_parquet(folder / "in" / "a.parquet", TEXTS, group=GROUP)
    settings = {"seq_len": SEQ_LEN, "unit_bytes": 1500, **changes}
    prepared(request(folder / "out", str(folder / "in"), **settings))
    return folder / "out" / "mine"


@pytest.mark.parametrize("beyond", [0, 0.4, 0.6, 1])
def test_a_document_on_the_boundary_is_trained_on(tmp_path: Path, beyond: float) -> None:
    """Held out is what hashes below val_fraction * 2^16, rounded: what equals it is not."""
    boundary = sorted(hashed(text) for text in TEXTS if text)[20]
    folder = prepare_texts(tmp_path, val_fraction=(boundary + beyond) / 65536)
    below = boundary + (beyond > 0.5)
    assert check_folder(folder, TEXTS, below, masked=False) == 20 + (beyond > 0.5)


@pytest.mark.parametrize("fraction", [0, 1])
def test_all_or_nothing_is_held_out(tmp_path: Path, fraction: int) -> None:
    folder = prepare_texts(tmp_path, val_fraction=float(fraction))
    assert check_folder(folder, TEXTS, fraction * 65536, masked=False) == fraction * 64


@pytest.mark.parametrize("masked", [False, True])
def test_conversations_are_packed_with_the_targets_of_their_answers(
    tmp_path: Path, masked: bool
) -> None:
    write_parquet(tmp_path / "in" / "a.parquet", CHATS, column="conversations", group=GROUP)
    wanted = request(tmp_path / "out", str(tmp_path / "in"), name="slimorca", loss_mask=masked,
                     seq_len=SEQ_LEN, unit_bytes=900, val_fraction=0.25)  # fmt: skip
    prepared(wanted)
    assert 0 < check_folder(tmp_path / "out" / "slimorca", CHATS, 16384, masked) < len(CHATS)
