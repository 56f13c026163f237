"""Long texts: slices give the ids of the whole, and memory does not grow with a document."""

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipeline.text import slices
from pipeline.text.columnar import ColumnarEncoder
from pipeline.text.encode import PlainEncoder
from pipeline.text.slices import SlicedEncoder
from pipeline.text.tokenizer import Tokenizer
from pipeline_samples import TEXTS, tokenizer

DEFAULT = Tokenizer.default()
LONG = "".join(
    [
        *TEXTS[:20],
        "\n\n  def f(x):\n\treturn [x, 17]\n" * 20,
        "漢字かな交じり文。" * 60,
        "aGVsbG8gd29ybGQx" * 40,
        " " * 300,
        "▁ ▁▁ x" * 30,
        "</s><s>[INST]" * 20,
        "\U0001f600\u200d\u0301" * 40,
    ]
)


@pytest.fixture
def small_slices(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(slices, "SLICE_BYTES", 40)
    monkeypatch.setattr(slices, "_WINDOW", 16)
    yield


@pytest.mark.parametrize("vocabulary", [DEFAULT, tokenizer()], ids=["default", "small"])
def test_slices_give_the_ids_of_the_whole(vocabulary: Tokenizer, small_slices: None) -> None:
    rng = random.Random(3)
    sliced, whole = SlicedEncoder(vocabulary), ColumnarEncoder(vocabulary)
    for _ in range(200):
        texts = []
        for _ in range(rng.randint(1, 4)):
            first = rng.randrange(len(LONG))
            texts.append(LONG[first : first + rng.choice([0, 5, 50, 200, 900])])
        array = pa.array(["left out", *texts], pa.large_string())[1:]
        found, wanted = sliced.encode(array), whole.encode(array)
        assert found.tokens.tolist() == wanted.tokens.tolist(), texts
        assert found.starts.tolist() == wanted.starts.tolist()


def test_a_long_text_is_really_cut(small_slices: None) -> None:
    encoder = SlicedEncoder(DEFAULT)
    text = pa.scalar(LONG, pa.large_string())
    cuts = list(encoder._slices(np.frombuffer(text.as_buffer(), "u1")))
    assert len(cuts) > 50 and cuts[-1][1] == len(LONG.encode())
    assert {left_out for _, _, left_out in cuts} == {0, 1}  # both kinds of places


def test_the_plain_encoder_gives_the_same_stream() -> None:
    texts = pa.array([*TEXTS[:30], "", " ", LONG], pa.large_string())
    plain, fast = PlainEncoder(DEFAULT).encode(texts), SlicedEncoder(DEFAULT).encode(texts)
    assert plain.tokens.tolist() == fast.tokens.tolist()
    assert plain.starts.tolist() == fast.starts.tolist()
    assert plain.tokens.dtype == fast.tokens.dtype
    assert len(PlainEncoder(DEFAULT).encode(texts[:0]).tokens) == 0


PEAK = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""  # from a small process: a child's peak counts what its parent held when it was forked


@pytest.mark.slow
def test_a_line_of_a_hundred_megabytes_takes_less_than_a_gigabyte(tmp_path: Path) -> None:
    text = (" ".join(TEXTS) * 1500).replace("\n", " ")[:100_000_000]
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}) + "\n")
    command = [sys.executable, "-c", "from pipeline.cli import main; main()", "tokenize",
               "--source", "mine", "--data-files", str(tmp_path / "a.jsonl"),
               "--out", str(tmp_path), "--workers", "1", "--json"]  # fmt: skip
    peak = subprocess.run([sys.executable, "-c", PEAK, *command], stdout=subprocess.PIPE)
    assert peak.returncode == 0 and len(text) == 100_000_000
    assert int(peak.stdout.split()[-1]) < 1_000_000  # kB
