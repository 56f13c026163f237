"""Drawing tokens, and writing with a small model: seeded, stopped, cut at characters, cached."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from pipeline.text.tokenizer import CHAT_PIECES
from tools.errors import ToolError
from tools.generate import main
from tools.generation import batch, until
from tools.generation.batch import Batch, Text
from tools.generation.generation import (
    Conversation,
    Generation,
    Sampling,
    TextStream,
    complete,
    draw,
    generate,
    write,
)
from tools.generation.until import read_settings, write_until
from tools.models.loading import LoadedModel
from tools.models.tokenizers import Vocabulary
from tools_samples import SEQ_LEN, sample_loaded, sample_tokenizer, write_run

VOCABULARY = Vocabulary.of(sample_tokenizer())
EVERYTHING = Sampling(temperature=1.0)
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return sample_loaded()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generate") / "runs" / "sample"
    write_run(folder)
    return folder


def command(*arguments: object, typed: str | None = None) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], input=typed)


# ---- drawing an id

LOGITS = torch.tensor([0.2, 2.0, -1.0, 1.0, 0.5, -3.0])


def drawn(sampling: Sampling, n: int = 4000) -> torch.Tensor:
    """How often each id comes, as a share."""
    generator = sampling.generator()
    ids = torch.tensor([draw(LOGITS, sampling, generator) for _ in range(n)])
    return torch.bincount(ids, minlength=len(LOGITS)) / n


def test_temperature_zero_is_greedy() -> None:
    assert drawn(Sampling(temperature=0.0), 20)[1] == 1


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_ids_come_as_often_as_their_probability(temperature: float) -> None:
    expected = (LOGITS / temperature).softmax(dim=0)
    assert torch.allclose(drawn(Sampling(temperature=temperature)), expected, atol=0.03)


def test_top_k_leaves_the_k_most_probable() -> None:
    expected = torch.full_like(LOGITS, -torch.inf)
    expected[[1, 3, 4]] = LOGITS[[1, 3, 4]]
    shares = drawn(Sampling(temperature=1.0, top_k=3))
    assert torch.allclose(shares, expected.softmax(dim=0), atol=0.03)
    assert drawn(Sampling(temperature=1.0, top_k=1), 50)[1] == 1
    assert drawn(Sampling(temperature=1.0, top_k=99), 200).count_nonzero() >= 5


def test_top_p_leaves_the_most_probable_that_add_up_to_p() -> None:
    probabilities = LOGITS.softmax(dim=0)  # ranked: 1, 3, 4, 0, 2, 5
    just_two = float(probabilities[[1, 3]].sum())
    for top_p, left in ((just_two - 1e-4, [1, 3]), (just_two + 1e-4, [1, 3, 4]), (1e-9, [1])):
        shares = drawn(Sampling(temperature=1.0, top_p=top_p), 1000)
        assert shares.nonzero().flatten().tolist() == sorted(left)


def test_the_seed_decides_everything() -> None:
    first, again, other = (drawn(Sampling(temperature=1.0, seed=s), 100) for s in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_an_impossible_id_is_never_drawn() -> None:
    logits = torch.tensor([0.0, -torch.inf, 0.0, -torch.inf])
    generator = EVERYTHING.generator()
    assert {draw(logits, EVERYTHING, generator) for _ in range(200)} == {0, 2}


def test_damaged_logits_are_named() -> None:
    with pytest.raises(ToolError, match="NaN"):
        draw(torch.tensor([0.0, torch.nan]), EVERYTHING, EVERYTHING.generator())


@pytest.mark.parametrize(
    "wrong",
    [
        *({"temperature": value} for value in (-1.0, 1e-320, float("inf"), float("nan"))),
        *({"seed": value} for value in (-1, 1 << 63)),
        {"top_k": -1},
        *({"top_p": value} for value in (-0.1, 0.0, 1.01)),
    ],
)
def test_invalid_sampling_is_rejected(wrong: dict[str, Any]) -> None:
    with pytest.raises(ToolError, match=next(iter(wrong))):
        Sampling(**wrong)


# ---- writing


@pytest.mark.parametrize(
    "shape", [{}, {"n_kv_heads": 1}, {"alibi": False}, {"rope": False, "tie_embeddings": False}]
)
def test_the_cache_changes_nothing(shape: dict[str, Any]) -> None:
    endless = dataclasses.replace(VOCABULARY, eos_id=None)
    loaded = dataclasses.replace(sample_loaded(**shape), vocabulary=endless)
    prompt = [1, *VOCABULARY.encode("def add_argument(self")]
    texts = [
        generate(
            loaded, prompt, Generation(max_tokens=60, sampling=EVERYTHING, use_cache=use_cache)
        )
        for use_cache in (True, False)
    ]
    assert texts[0] == texts[1]
    assert len(texts[0]) == 60 > SEQ_LEN  # beyond the training context


def test_bf16_writes_too(loaded: LoadedModel) -> None:
    narrow = dataclasses.replace(loaded, dtype="bf16")
    assert len(generate(narrow, [1], Generation(max_tokens=8, sampling=EVERYTHING))) == 8


def test_the_same_seed_writes_the_same_text(loaded: LoadedModel) -> None:
    first, again, other = (
        complete(loaded, "def ", Generation(max_tokens=20, sampling=Sampling(seed=seed)))
        for seed in (1, 1, 2)
    )
    assert first == again != other


def test_only_text_and_eos_are_drawn(loaded: LoadedModel) -> None:
    """Of 512 ids 3 are control pieces and 12 are no pieces at all: a flat model would draw them."""
    options = Generation(max_tokens=400, sampling=Sampling(temperature=1e9))
    ids = [i for seed in range(3) for i in generate(loaded, [1], _seeded(options, seed))]
    assert len(ids) > 400
    assert all(VOCABULARY.pieces[i] for i in ids)


def _seeded(options: Generation, seed: int) -> Generation:
    sampling = dataclasses.replace(options.sampling, seed=seed)
    return dataclasses.replace(options, sampling=sampling)


def test_eos_ends_the_text(loaded: LoadedModel) -> None:
    prompt = [1, *VOCABULARY.encode("x")]
    greedy = Generation(max_tokens=5, sampling=Sampling(temperature=0.0))
    first = generate(loaded, prompt, greedy)[0]
    ends = dataclasses.replace(
        loaded, vocabulary=dataclasses.replace(loaded.vocabulary, eos_id=first)
    )
    assert generate(ends, prompt, greedy) == []


def test_the_context_limit_ends_the_text_or_rejects_the_prompt(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tools.generation.generation.max_context", lambda _: 40)
    options = Generation(max_tokens=100, sampling=EVERYTHING)
    assert len(generate(loaded, [1] * 30, options)) == 10
    with pytest.raises(ToolError, match="40 tokens and this model is exact up to 40"):
        generate(loaded, [1] * 40, options)
    with pytest.raises(ToolError, match="max_tokens 0"):
        Generation(max_tokens=0)


@given(st.text(min_size=1, max_size=30), st.booleans())
def test_streamed_text_is_the_tokenizers_own_decoding(text: str, opens: bool) -> None:
    ids = VOCABULARY.encode(text)
    stream = TextStream(VOCABULARY, opens_text=opens)
    parts = [stream.feed(i) for i in ids]
    joined = "".join(parts) + stream.finish()
    assert joined == ("" if opens else " ") + text.replace("▁", " ")


# what has text; not the byte 0x20, which no encoder emits: as a first id it would lose its space
TEXT_IDS = [number for number, piece in enumerate(VOCABULARY.pieces) if piece not in (b"", b" ")]


@given(st.lists(st.sampled_from(TEXT_IDS), max_size=20))
def test_ids_that_spell_no_character_come_out_as_the_tokenizer_shows_them(ids: list[int]) -> None:
    stream = TextStream(VOCABULARY, opens_text=True)
    streamed = "".join(map(stream.feed, ids)) + stream.finish()
    assert streamed.replace("\ufffd", "") == VOCABULARY.decode(ids).replace("\ufffd", "")


def test_no_character_is_shown_in_halves() -> None:
    ids = VOCABULARY.encode("a🙂b")
    stream = TextStream(VOCABULARY, opens_text=True)
    parts = [stream.feed(i) for i in ids]
    assert "\ufffd" not in "".join(parts)
    assert [part for part in parts if part] == ["a", "🙂", "b"]
    unfinished = TextStream(VOCABULARY, opens_text=True)
    shown = "".join(unfinished.feed(i) for i in ids[:-2])
    assert shown + unfinished.finish() == "a\ufffd"


def test_what_is_streamed_is_what_is_returned(loaded: LoadedModel) -> None:
    parts: list[str] = []
    options = Generation(max_tokens=40, sampling=EVERYTHING)
    text = complete(loaded, "import", options, parts.append)
    assert "".join(parts) == text
    assert all(parts)
    assert complete(loaded, "", options) == complete(loaded, "", options, parts.append)


# ---- conversation


def test_a_conversation_is_the_chat_template(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts: list[list[int]] = []
    reply = [int(i) for i in VOCABULARY.encode("Yes.")]

    def recorded(_: LoadedModel, prompt: list[int], options: Generation, on_id: Any) -> list[int]:
        prompts.append(list(prompt))
        for i in reply:
            on_id(i)
        return reply

    monkeypatch.setattr("tools.generation.generation.generate", recorded)
    talk = Conversation(loaded, Generation(), system="Be brief.")
    assert talk.ask("Is it?") == "Yes."
    assert talk.ask("[INST] really?") == "Yes."
    begin, end = map(sample_tokenizer().id_of, CHAT_PIECES)
    first = [begin, *VOCABULARY.encode("Be brief.\n\nIs it?"), end]
    second = [begin, *VOCABULARY.encode("[INST] really?"), end]
    assert prompts == [[1, *first], [1, *first, *reply, 2, *second]]


def test_without_markers_there_is_no_conversation(loaded: LoadedModel) -> None:
    plain = dataclasses.replace(loaded.vocabulary, chat=None)
    with pytest.raises(ToolError, match="no chat template"):
        Conversation(dataclasses.replace(loaded, vocabulary=plain), Generation())


# ---- the command


def test_the_command_goes_on_from_the_prompt(run: Path) -> None:
    arguments = ("--run", run, "--prompt", "def f", "--max-tokens", 12, "--device", "cpu")
    result = command(*arguments)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith("def f") and len(result.stdout) > 6
    assert "sample, step 4" in result.stderr
    assert command(*arguments).stdout == result.stdout
    assert command(*arguments, "--no-cache").stdout == result.stdout
    assert command(*arguments, "--seed", 1).stdout != result.stdout


def test_the_prompt_may_be_a_file_or_stdin_and_the_answer_json(run: Path, tmp_path: Path) -> None:
    named = ("--run", run, "--max-tokens", 12, "--device", "cpu")
    plain = command(*named, "--prompt", "def f").stdout
    (tmp_path / "prompt.txt").write_text("def f")
    assert command(*named, "--prompt-file", tmp_path / "prompt.txt").stdout == plain
    found = json.loads(command(*named, "--prompt-file", "-", "--json", typed="def f").stdout)
    assert found["prompt"] + found["text"] + "\n" == plain
    assert "step 4" in found["model"]
    (tmp_path / "prompt.txt").write_bytes(b"\xff")
    result = command(*named, "--prompt-file", tmp_path / "prompt.txt")
    assert result.exit_code == 1 and "the prompt is no UTF-8" in result.stderr


def test_an_older_checkpoint_can_be_named(run: Path) -> None:
    older = run / "checkpoints" / "step-2"
    result = command("--checkpoint", older, "--prompt", "a", "--max-tokens", 4)
    assert result.exit_code == 0 and "step 2" in result.stderr


def test_the_command_answers_what_is_typed(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = command("--run", run, "--chat", "--prompt", "Why?", "--max-tokens", 5)
    assert one.exit_code == 0 and one.stdout.endswith("\n")
    typed = command("--run", run, "--chat", "--max-tokens", 5, typed="Why?\n\nHow?\n")
    assert typed.exit_code == 0
    assert typed.stdout.startswith(one.stdout)
    assert "has read no conversations" not in one.stderr + typed.stderr
    monkeypatch.setattr("tools.models.loading.has_conversed", lambda checkpoint: False)
    asked = command("--run", run, "--chat", "--prompt", "Why?", "--max-tokens", 5)
    assert "! its run has read no conversations" in asked.stderr and asked.stdout == one.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--temperature", "-1"), 1, "temperature -1.0"),
        (("--max-tokens", "0"), 1, "max_tokens 0"),
        (("--seed", str(1 << 63)), 1, "seed 9223372036854775808: choose 0 or more, below 2^63"),
        (("--prompt", "\udcff"), 1, "the prompt is no UTF-8"),
        (("--prompt-file", "nowhere"), 2, "nowhere"),
        (("--chat", "--json"), 2, "give it with --prompt"),
        (("--checkpoint", "nowhere"), 1, "nowhere"),
        (("--max-tokens", "many"), 2, "--max-tokens"),
    ],
)
def test_wrong_input_is_one_clear_line(
    run: Path, arguments: tuple[str, ...], code: int, words: str
) -> None:
    named = () if "--checkpoint" in arguments else ("--run", run)
    result = command(*arguments, *named, "--device", "cpu")
    assert result.exit_code == code and words in result.stderr
    if code == 1:
        assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


# ---- what a harness asks for


def test_repeats_of_a_question_are_drawn_with_other_seeds(loaded: LoadedModel) -> None:
    """Four sampled repeats were the same text, so that pass@k was pass@1."""
    settings = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 12, "until": ["\n\n"]}

    def written(number: int) -> str:
        return write_until(loaded, [([1, 40, 50], *read_settings(settings, number, 100))], 1)[0]

    assert len({written(number) for number in range(4)}) == 4
    assert written(2) == written(2)


@pytest.mark.parametrize("name", ["max_gen_toks", "max_new_tokens", "max_tokens"])
def test_settings_of_a_harness_are_read(name: str) -> None:
    asked = {"temperature": 0.7, "top_p": 0.9, "top_k": 40, "seed": 5, name: 30, "until": "\n"}
    options, stops = read_settings(asked, 3, 100)
    wanted = Sampling(temperature=0.7, top_k=40, top_p=0.9, seed=8)
    assert options == Generation(max_tokens=30, sampling=wanted)
    assert stops == ("\n",)
    assert read_settings({}, 0, 100)[0].sampling.temperature == 0  # greedy
    assert read_settings({**asked, "do_sample": False}, 0, 100)[0].sampling.temperature == 0
    assert read_settings({name: 300}, 0, 100)[0].max_tokens == 100
    neutral = {"repetition_penalty": 1.0, "num_beams": 1, "min_p": 0.0, "schema": None}
    assert read_settings(neutral, 0, 9)[0].max_tokens == 9
    for unknown in ({"repetition_penalty": 1.2}, {"num_beams": 4}, {"min_p": 0.1}):
        with pytest.raises(ToolError, match=f"{next(iter(unknown))}=.* is not computed here"):
            read_settings(unknown, 0, 100)


def asked_of(loaded: LoadedModel) -> list[until.Asked]:
    """Eleven prompts of many lengths, greedy and drawn, most of which end early."""
    greedy, stop = Generation(max_tokens=20, sampling=Sampling(temperature=0)), ["e"]
    drawn = [Generation(max_tokens=12, sampling=Sampling(seed=n)) for n in range(5)]
    prompts = [list(range(3, 4 + 7 * n)) for n in range(6)]
    return [
        *((prompt, greedy, stop if n % 2 else []) for n, prompt in enumerate(prompts)),
        *((prompt, each, stop) for prompt, each in zip(prompts, drawn, strict=False)),
    ]


def test_texts_written_at_once_are_those_written_one_by_one(loaded: LoadedModel) -> None:
    asked = asked_of(loaded)
    alone = []
    for prompt, options, stops in asked:
        text = write(loaded, prompt, options, opens_text=False).text
        ends = [text.find(stop) for stop in stops if stop in text]
        alone.append(text[: min(ends, default=None)])
    assert len(set(alone)) > 6
    for size in (1, 3, 16):
        assert write_until(loaded, asked, size) == alone


def test_a_text_that_ends_makes_room_and_the_others_go_on(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "_BLOCK", 8)  # the cache grows again and again
    sizes, draw_all = [], Batch._draw

    def counted(self: Batch, tokens: Any, positions: Any, rows: Any) -> None:
        sizes.append(len(rows))
        draw_all(self, tokens, positions, rows)

    monkeypatch.setattr(Batch, "_draw", counted)
    asked = asked_of(loaded)
    texts = [Text(prompt, options, lambda drawn: False) for prompt, options, _ in asked]
    batch.write_all(loaded, texts, 3)
    for text, (prompt, options, _) in zip(texts, asked, strict=True):
        assert text.ids == generate(loaded, prompt, options)
    assert max(sizes) == 3 and sum(sizes) < sum(len(text.ids) + 1 for text in texts) + 1


def test_a_prompt_that_fills_the_context_leaves_the_others_alone(loaded: LoadedModel) -> None:
    full = [5] * 20_000
    writing = Batch(loaded, 2)
    text = Text([3, 4], Generation(max_tokens=3), lambda drawn: False)
    writing.add(text)
    with pytest.raises(ToolError, match="the prompt has 20,000 tokens and this model is exact up"):
        writing.add(Text(full, Generation(), lambda drawn: False))
    assert writing.texts == [text]


def test_drawing_ends_where_a_stop_text_is_complete(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces = ["one t", "wo STO", "P three", " four"]
    stream = SimpleNamespace(feed=lambda drawn: pieces[drawn], finish=lambda: "")
    monkeypatch.setattr(until, "TextStream", lambda *_, **__: stream)
    answer = until.StoppedText(loaded, ["END", "STOP"], opens_text=False)
    assert [answer.feed(drawn) for drawn in range(3)] == ["one t", "wo ", ""]
    assert answer.stopped and answer.finish() == ""
    answer = until.StoppedText(loaded, ["STOPS"], opens_text=False)
    assert [answer.feed(drawn) for drawn in range(4)] == ["one t", "wo ", "STOP three", " four"]
    assert not answer.stopped and answer.finish() == ""
    answer = until.StoppedText(loaded, ["OX"], opens_text=False)
    assert [answer.feed(drawn) for drawn in range(2)] == ["one t", "wo ST"]
    assert answer.finish() == "O"
