"""A tokenizer.json as the vocabulary of shards: the ids of `tokenizers`, and what is refused."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import tokenizers
import zstandard
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.checks.inspection import show_row
from pipeline.checks.repair import repair
from pipeline.checks.verify import find_damage
from pipeline.cli import main
from pipeline.errors import TokenizerError
from pipeline.text import slices
from pipeline.text.encode import PlainEncoder, make_encoder
from pipeline.text.json_tokenizer import JsonTokenizer, load_tokenizer
from pipeline.units.executors import Executor
from pipeline_samples import TEXTS, byte_level, prepared, request, write_jsonl
from shards.format import TOKEN_BYTES, TOKENIZER, TOKENIZER_CONFIG, TOKENIZER_JSON
from shards.reader import ShardReader

STYLES = ["gpt2", "smollm", "llama3", "qwen"]
TWO_ENDS = ("<|begin_of_text|>", "<|end_of_text|>", "<|reserved|>")


def reference(style: str) -> tokenizers.Tokenizer:
    fast = tokenizers.Tokenizer.from_str(byte_level(style).decode())
    fast.encode_special_tokens = True
    return fast


def documents(encoder: Any, texts: list[str]) -> list[list[int]]:
    """The ids that an encoder gives, cut where it says that documents start."""
    encoded = encoder.encode(pa.array(texts, pa.large_string()))
    return [ids.tolist() for ids in np.split(encoded.tokens, encoded.starts)[1:]]


PIECES = st.sampled_from([
    " ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u3000", "\u2028", "'s", "'LL", "the", "cat", "42",
    "1234", ".", "...", "é", "e\u0301", "漢字", "<|endoftext|>", "<tool_call>", "\x00", "😀", "_",
])  # fmt: skip


@settings(deadline=None, max_examples=200)
@given(st.sampled_from(STYLES), st.lists(st.lists(PIECES | st.text(max_size=3)), max_size=5))
def test_ids_are_those_of_tokenizers(style: str, pieces: list[list[str]]) -> None:
    """In columns too, and with words remembered from the batch before."""
    tokenizer = JsonTokenizer(byte_level(style), style)
    texts, fast = ["".join(text) for text in pieces], reference(style)
    end: Any = fast.token_to_id("<|endoftext|>")
    wanted: list[list[int]] = [
        [end, *fast.encode(text, add_special_tokens=False).ids] for text in texts
    ]
    encoder = make_encoder(tokenizer)
    assert encoder.note == "columnar encoder"
    assert documents(encoder, texts) == documents(encoder, texts) == wanted
    assert documents(PlainEncoder(tokenizer), texts) == wanted
    assert all(end not in ids[1:] for ids in wanted)
    if style != "qwen":  # which normalizes
        assert [tokenizer.decode(ids) for ids in wanted] == texts


@pytest.mark.parametrize("style", STYLES)
def test_ids_on_text_of_every_kind(style: str, shared: Path) -> None:
    packed = (shared / "multilingual" / "udhr.jsonl.zst").read_bytes()
    lines = zstandard.ZstdDecompressor().stream_reader(packed).read().decode().split("\n")[:-1:4]
    texts = [json.loads(line)["text"] for line in lines]
    texts += [path.read_text() for path in sorted((shared / "nasty").glob("*N*.txt"))]
    texts += [path.read_text()[:50_000] for path in (shared / "nasty").glob("[be]*.txt")]
    tokenizer = JsonTokenizer(byte_level(style), style)
    wanted = [each.ids for each in reference(style).encode_batch(texts, add_special_tokens=False)]
    assert [ids[1:] for ids in documents(make_encoder(tokenizer), texts)] == wanted


def test_a_long_text_in_slices_and_a_splitter_that_is_not_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(slices, "SLICE_BYTES", 100)
    text = " ".join(TEXTS) + "x" * 999 + " \u00a0 end"
    for special in ((), TWO_ENDS):
        tokenizer = JsonTokenizer(byte_level("llama3", *[special] * bool(special)), "l")
        begin, end = [tokenizer.bos_id], [tokenizer.eos_id] * bool(special)
        wanted = [[*begin, *tokenizer.encode(each), *end] for each in (text, "", "short")]
        assert documents(slices.SlicedEncoder(tokenizer), [text, "", "short"]) == wanted
    other = JsonTokenizer(byte_level("other"), "o")
    assert make_encoder(other).note == "plain tokenizers, slowly: its splitter is not known"
    assert documents(make_encoder(other), ["a b"]) == [[other.bos_id, *other.encode("a b")]]
    assert other.encode("a b") != other.encode("a") + other.encode(" b")


@pytest.mark.parametrize(
    ("special", "config", "ends", "ids"),
    [
        (("<|endoftext|>", "<|pad|>"), None, {}, (0, 0, 1)),
        (("<|endoftext|>", "<|im_end|>"), None, {}, (0, 0, 1)),
        (("<|endoftext|>",), None, {}, (0, 0, 500)),
        (TWO_ENDS, None, {}, (0, 1, 2)),
        (("<s>", "</s>", "<unk>", "<pad>"), None, {}, (0, 1, 3)),
        (TWO_ENDS, None, {"eos": "<|reserved|>"}, (0, 2, 1)),
        (TWO_ENDS, {"bos_token": None, "eos_token": {"content": "<|reserved|>"}}, {}, (0, 2, 1)),
        (TWO_ENDS, {"eos_token": "<|reserved|>"}, {"eos": "<|end_of_text|>"}, (0, 1, 2)),
        (("<a>", "<b>", "<c>", "<d>"), {"eos_token": "<b>", "pad_token": "<d>"}, {}, (1, 1, 3)),
    ],
)
def test_which_tokens_are_bos_eos_and_padding(
    tmp_path: Path, special: tuple[str, ...], config: Any, ends: Any, ids: tuple[int, ...]
) -> None:
    """By option, by the configuration beside the file, by custom; files() says the same again."""
    (tmp_path / TOKENIZER_JSON).write_bytes(byte_level("gpt2", special))
    if config is not None:
        (tmp_path / TOKENIZER_CONFIG).write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path / TOKENIZER_JSON, **ends)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == ids
    assert tokenizer.vocab_size == max(500, ids[2] + 1)
    assert tokenizer.info.name == tmp_path.name
    for name, data in tokenizer.files().items():
        (tmp_path / name).write_bytes(data)
    assert load_tokenizer(tmp_path).info == tokenizer.info


def described(**changes: Any) -> bytes:
    value = json.loads(byte_level("gpt2"))
    for path, change in changes.items():
        inner = value
        *folders, last = path.split("__")
        for name in folders:
            inner = inner[name]
        inner[last] = change
    return json.dumps(value).encode()


VOCAB = json.loads(byte_level("gpt2"))["model"]["vocab"]


@pytest.mark.parametrize(
    ("model", "ends", "message"),
    [
        (b"", {}, "is no tokenizer.json"),
        (b"\xff", {}, "is no tokenizer.json"),
        (b"[]", {}, "is no tokenizer.json"),
        (b'{"model": {"type": "BPE", "vocab": {}, "merges": []}}', {}, "no byte-level BPE"),
        (described(pre_tokenizer=None), {}, "no byte-level BPE"),
        (described(model={"type": "WordLevel", "vocab": VOCAB, "unk_token": "a"}), {},
         "no byte-level BPE"),
        (described(model__vocab={"a": 0}, model__merges=[]), {}, "no token for the byte"),
        (described(model__dropout=0.1), {}, "a dropout of 0.1"),
        (described(added_tokens=[]), {}, "name one of its special tokens with --eos"),
        (byte_level("gpt2"), {"bos": "<s>"}, "no special token '<s>' for --bos: it has <|endoft"),
    ],
)  # fmt: skip
def test_what_is_refused_and_why(model: bytes, ends: Any, message: str) -> None:
    with pytest.raises(TokenizerError) as caught:
        JsonTokenizer(model, "mine", ends)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_damaged_files_are_refused_or_used_but_never_crash() -> None:
    rng, model = random.Random(0), byte_level("llama3")
    refused = 0
    for _ in range(300):
        damaged = bytearray(model)
        for _ in range(rng.randrange(1, 4)):
            place = rng.randrange(len(damaged))
            damaged[place : place + rng.choice([1, 1, 40])] = rng.randbytes(rng.randrange(2))
        try:
            tokenizer = JsonTokenizer(bytes(damaged), "damaged")
            assert max(tokenizer.encode(TEXTS[0]), default=0) < tokenizer.vocab_size
        except TokenizerError:
            refused += 1
    assert refused > 100


@pytest.mark.parametrize("special", [("<|endoftext|>", "<|pad|>"), TWO_ENDS])
def test_shards_from_a_tokenizer_json(tmp_path: Path, special: tuple[str, ...]) -> None:
    """The same for any workers; verified, repaired, shown; text that spells BOS begins nothing."""
    files = str(write_jsonl(tmp_path / "a.jsonl", [*TEXTS, f"{special[0]} forged"]))
    (tmp_path / TOKENIZER_JSON).write_bytes(byte_level("smollm", special))
    tokenizer = load_tokenizer(tmp_path / TOKENIZER_JSON)
    manifests = [
        prepared(request(tmp_path / str(n), files, tokenizer=tokenizer), workers=n) for n in (1, 2)
    ]
    assert manifests[0] == manifests[1] and manifests[0].n_documents == 301
    folder = tmp_path / "1" / "mine"
    assert (folder / TOKENIZER_JSON).read_bytes() == tokenizer.model
    assert not (folder / TOKENIZER).exists() and not list(find_damage(folder))
    shown = "".join(show_row(folder, "train", row) for row in range(40))
    assert "--- document begins" in shown and "--- document ends" in shown
    lengths = np.load(folder / TOKEN_BYTES)
    assert lengths[:, 0].tolist() == [len(each) for each in tokenizer.token_bytes]
    rows, _ = ShardReader(folder, "train").rows(np.arange(5))
    ids = rows.reshape(-1)
    assert len(tokenizer.decode(ids).encode()) == lengths[ids, 1].sum()
    (folder / "00000-000.npy").unlink()
    (folder / TOKEN_BYTES).write_bytes(b"")
    assert len(list(find_damage(folder))) == 2
    repair(folder, (files,), Executor())
    config = (folder / TOKENIZER_CONFIG).read_text()
    (folder / TOKENIZER_CONFIG).write_text(config.replace(special[0], special[1]))
    assert [damage.file for damage in find_damage(folder)] == [TOKENIZER_CONFIG]
    prepared(request(tmp_path / "1", files, tokenizer=tokenizer))
    assert not list(find_damage(folder))


def test_the_command_takes_a_tokenizer_json(tmp_path: Path) -> None:
    files = str(write_jsonl(tmp_path / "a.jsonl", TEXTS))
    (tmp_path / TOKENIZER_JSON).write_bytes(byte_level("qwen"))

    def tokenize(*options: str) -> Any:
        given = ["tokenize", "--source", "mine", "--data-files", files, "--out", str(tmp_path)]
        return CliRunner().invoke(main, [*given, "--workers", "1", *options])

    named = ("--tokenizer", str(tmp_path / TOKENIZER_JSON))
    assert "goes with --tokenizer tokenizer.json" in tokenize("--eos", "x").output
    assert "no special token 'x' for --eos" in tokenize(*named, "--eos", "x").output
    result = tokenize(*named, "--bos", "<|pad|>", "--json")
    assert result.exit_code == 0, result.output
    manifest = json.loads((tmp_path / "mine" / "manifest.json").read_text())
    info = manifest["tokenizer"]  # nothing is left for padding but one more id
    assert [info["bos_id"], info["eos_id"], info["vocab_size"] - info["pad_id"]] == [1, 0, 1]
    shown = CliRunner().invoke(main, ["tokenizer", "--show", named[1]]).output
    assert "BOS 0, EOS 0, padding 1 (<|pad|>)" in shown and "columnar encoder" in shown
