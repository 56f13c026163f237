"""summer-serve, asked by OpenAI's own client, by many at once, and by those who mean it harm."""

import asyncio
import http.client
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from conftest import REPOSITORY
from tools.generation.generation import Generation, Sampling, generate
from tools.models.loading import LoadedModel
from tools.serve import main
from tools_samples import SEQ_LEN, sample_loaded, write_run

uvicorn = pytest.importorskip("uvicorn")
openai = pytest.importorskip("openai")

from tools.serving.api import make_app  # noqa: E402
from tools.serving.engine import BusyError, Engine, Reply  # noqa: E402
from tools.serving.requests import BadRequestError, read_request  # noqa: E402

TOKEN = "open sesame"
CHROMIUM = shutil.which("chromium")


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    torch.set_num_threads(1)
    return sample_loaded()


@pytest.fixture(scope="module")
def port(loaded: LoadedModel) -> Iterator[int]:
    yield from serve(loaded, "")


@pytest.fixture(scope="module")
def guarded(loaded: LoadedModel) -> Iterator[int]:
    yield from serve(loaded, TOKEN)


def serve(loaded: LoadedModel, token: str) -> Iterator[int]:
    engine = Engine(loaded, 4, 64)
    app = make_app(engine, hosts=["127.0.0.1"], token=token)
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield listener.getsockname()[1]
    server.should_exit = True
    thread.join()
    engine.stop()


def client(port: int, token: str = "none") -> Any:
    return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=token, max_retries=0)


def greedy(loaded: LoadedModel, ids: list[int], n: int) -> list[int]:
    return generate(loaded, ids, Generation(max_tokens=n, sampling=Sampling(temperature=0)))


def test_the_clients_completions_are_the_models(port: int, loaded: LoadedModel) -> None:
    api, vocabulary = client(port), loaded.vocabulary
    (model,) = api.models.list().data
    assert model.id == "sample"
    prompt = [1, *vocabulary.encode("The meaning of")]
    expected = greedy(loaded, prompt, 12)
    made = api.completions.create(
        model="sample", prompt="The meaning of", max_tokens=12, temperature=0, logprobs=3
    )
    (choice,) = made.choices
    assert choice.text == b"".join(vocabulary.pieces[i] for i in expected).decode(
        "utf-8", "replace"
    )
    assert choice.finish_reason == ("length" if len(expected) == 12 else "stop")
    assert made.usage.prompt_tokens == len(prompt)
    assert made.usage.completion_tokens == len(expected)
    scores = loaded.model.logits(torch.tensor([prompt]))[0, -1].detach().double()
    scores[~torch.tensor(vocabulary.may_be_drawn(len(scores)))] = -torch.inf
    assert choice.logprobs.token_logprobs[0] == pytest.approx(
        float(scores.log_softmax(0)[expected[0]]), abs=1e-4
    )
    assert len(choice.logprobs.top_logprobs[0]) == 3
    ids = api.completions.create(model="sample", prompt=prompt, max_tokens=12, temperature=0)
    assert ids.choices[0].text == choice.text


def test_a_stream_is_the_same_text_and_a_seed_repeats_it(port: int) -> None:
    api = client(port)
    asked: dict[str, Any] = {"model": "x", "prompt": "Once", "max_tokens": 30, "seed": 5}
    whole = api.completions.create(**asked)
    events = list(
        api.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    assert "".join(e.choices[0].text for e in events if e.choices) == whole.choices[0].text
    assert events[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert events[-1].usage.completion_tokens == whole.usage.completion_tokens
    other = api.completions.create(**{**asked, "seed": 6})
    assert other.choices[0].text != whole.choices[0].text
    stop = whole.choices[0].text[10:12]
    ended = api.completions.create(**asked, stop=[stop])
    assert ended.choices[0].text == whole.choices[0].text.partition(stop)[0]
    assert ended.choices[0].finish_reason == "stop"


def test_a_chat_is_in_the_template_of_training(port: int, loaded: LoadedModel) -> None:
    assert loaded.vocabulary.chat is not None
    turns: list[Any] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Is [INST] a marker?"}]},
        {"role": "assistant", "content": "No."},
        {"role": "user", "content": "Sure?"},
    ]
    expected = greedy(loaded, loaded.vocabulary.chat(turns), 8)
    api = client(port)
    asked: dict[str, Any] = {"model": "x", "messages": turns, "max_tokens": 8, "temperature": 0}
    made = api.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
    content = made.choices[0].logprobs.content
    assert [bytes(entry.bytes) for entry in content] == [
        loaded.vocabulary.pieces[i] for i in expected
    ]
    assert len(content[0].top_logprobs) == 2
    streamed = api.chat.completions.create(**asked, stream=True)
    parts = [event.choices[0].delta.content or "" for event in streamed]
    assert "".join(parts) == made.choices[0].message.content
    for wrong, words in (
        (turns[:1], "turns out of order"),
        (turns[2:], "turns out of order"),
        ([{"role": "tool", "content": "x"}], "tool turn"),
        ([{"role": "user", "content": ""}], "empty turn"),
    ):
        with pytest.raises(openai.BadRequestError, match=words):
            api.chat.completions.create(model="x", messages=wrong)


def test_twenty_at_once_get_what_each_would_alone(port: int) -> None:
    def ask(number: int) -> str:
        made = client(port).completions.create(
            model="x", prompt=f"Number {number}", max_tokens=16, temperature=0
        )
        return str(made.choices[0].text)

    with ThreadPoolExecutor(20) as pool:
        together = list(pool.map(ask, range(20)))
    assert together == [ask(number) for number in range(20)]


def send(port: int, body: Any, path: str = "/v1/completions", **headers: str) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    data = body if isinstance(body, bytes | str) else json.dumps(body)
    headers = {"Content-Type": "application/json"} | {
        k.replace("_", "-"): v for k, v in headers.items()
    }
    connection.request("POST", path, data, headers)
    answer = connection.getresponse()
    text = answer.read()
    connection.close()
    return answer.status, json.loads(text) if text.startswith(b"{") else text


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"{", "the body is no JSON"),
        (b"\xff\xfe", "the body is no JSON"),
        (b"[" * 100_000, "the body is no JSON"),
        (b"[]", "the body is no JSON object"),
        ({"prompt": 3}, "prompt must be one text, or a list of ids"),
        ({"prompt": ["a", "b"]}, "prompt must "),
        ({"prompt": [-1]}, "ids from 0 to 511"),
        ({"prompt": [10**9]}, "ids from 0 to 511"),
        ({"prompt": [True]}, "ids from 0 to 511"),
        (b'{"prompt": "\\ud800"}', "half a character"),
        ({"prompt": "a", "stream": "yes"}, "stream must be true or false"),
        ({"prompt": "a", "stream_options": 5}, "stream_options an object"),
        ({"prompt": "a", "max_tokens": -1}, "max_tokens -1: choose 1 or more"),
        ({"prompt": "a", "max_tokens": 1.5}, "max_tokens must be a whole number"),
        ({"prompt": "a", "max_tokens": 10**400}, "max_tokens is too large"),
        ({"prompt": "a", "temperature": -1}, "temperature -1"),
        ({"prompt": "a", "temperature": "hot"}, "temperature must be a number"),
        (b'{"prompt": "a", "temperature": NaN}', "temperature is too large"),
        ({"prompt": "a", "top_p": 0}, "top_p 0"),
        ({"prompt": "a", "top_k": -5}, "top_k -5"),
        ({"prompt": "a", "seed": -5}, "seed -5"),
        ({"prompt": "a", "stop": ["x"] * 99}, "stop must be up to 16 texts"),
        ({"prompt": "a", "stop": 5}, "stop must be up to 16 texts"),
        ({"prompt": "a", "logprobs": 1000}, "logprobs must be a number from 0 to 20"),
        ({"prompt": "a", "n": 3}, "n is not computed here"),
        ({"prompt": "a", "logit_bias": {"5": 100}}, "logit_bias is not computed here"),
        ({"prompt": "word " * 20_000}, "tokens, of 16,448 at most"),
    ],
)
def test_a_request_that_cannot_be_answered_is_named(port: int, body: Any, words: str) -> None:
    status, answer = send(port, body)
    assert status == 400 and words in answer["error"]["message"], answer
    assert answer["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "half a character"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "is not text"),
        ({"messages": [{"role": "user", "content": 5}]}, "not a conversation"),
        ({"messages": {}}, "messages must be a list of turns"),
        ({"logprobs": 5}, "logprobs must be true where top_logprobs is given"),
        ({"top_logprobs": 5}, "logprobs must be true where top_logprobs is given"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs must be a number from 0 to 20"),
        ({"response_format": {"type": "json_object"}}, "response_format is not computed here"),
    ],
)
def test_a_chat_that_cannot_be_answered_is_named(
    port: int, changes: dict[str, Any], words: str
) -> None:
    body = {"messages": [{"role": "user", "content": "a"}]} | changes
    status, answer = send(port, body, path="/v1/chat/completions")
    assert status == 400 and words in answer["error"]["message"], answer


def test_no_request_takes_memory_for_what_it_does_not_write() -> None:
    """Without ALiBi nothing bounds the context: 10^12 tokens were made room for."""
    plain = sample_loaded(alibi=False)
    for asked in (10**12, SEQ_LEN, 5):
        found = read_request({"prompt": [3, 4], "max_tokens": asked}, plain, chat=False)
        assert found.options.max_tokens == min(asked, SEQ_LEN - 2)
    with pytest.raises(BadRequestError, match=f"the prompt has {SEQ_LEN} tokens, of {SEQ_LEN} at"):
        read_request({"prompt": [3] * SEQ_LEN}, plain, chat=False)


def test_strangers_and_floods_are_turned_away(port: int, guarded: int) -> None:
    good = {"prompt": "a", "max_tokens": 2}
    assert send(port, good)[0] == 200
    assert send(port, good, Host="evil.example")[0] == 400
    assert send(port, good, Content_Type="text/plain")[0] == 415
    assert send(port, b" " * (2 << 20))[0] == 413
    assert send(port, good, path="/v1/embeddings")[0] == 404
    assert send(guarded, good)[0] == 401
    assert send(guarded, good, Authorization="Bearer wrong")[0] == 401
    with pytest.raises(openai.AuthenticationError):
        client(guarded).models.list()
    assert client(guarded, TOKEN).models.list().data[0].id == "sample"
    assert send(guarded, good, Authorization=f"Bearer {TOKEN}")[0] == 200
    connection = http.client.HTTPConnection("127.0.0.1", guarded, timeout=20)
    connection.request("GET", "/")
    answer = connection.getresponse()
    assert answer.status == 200 and b"<!doctype html>" in answer.read()
    assert "default-src 'none'" in (answer.getheader("Content-Security-Policy") or "")
    connection.close()


def test_a_connection_that_is_closed_ends_its_drawing(
    port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    events, put = list[object](), Reply.put

    def slowly(self: Reply, event: Any) -> None:
        events.append(event)
        time.sleep(0.02)
        put(self, event)

    monkeypatch.setattr(Reply, "put", slowly)
    body = json.dumps({"prompt": "a", "max_tokens": 400, "stream": True})
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(
            "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json"
            f"\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()
        )
        assert connection.recv(200).startswith(b"HTTP/1.1 200")
    ends_at = time.monotonic() + 20
    while events[-1:] != [None] and time.monotonic() < ends_at:
        time.sleep(0.02)
    assert events[-1] is None and len(events) < 200


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_the_page_shows_the_model_in_a_browser(port: int, tmp_path: Path) -> None:
    assert CHROMIUM is not None
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
             "--no-first-run", "--disable-background-networking", "--disable-component-update",
             "--disable-sync",
             f"--user-data-dir={tmp_path}", "--virtual-time-budget=3000", "--dump-dom"]  # fmt: skip
    seen = subprocess.run(
        [CHROMIUM, *flags, f"http://127.0.0.1:{port}/"], capture_output=True, text=True, timeout=60
    )
    assert '<h1 id="name">sample</h1>' in seen.stdout
    assert 'placeholder="Ask something"' in seen.stdout
    assert "CONSOLE" not in seen.stderr


def test_the_queue_is_bounded_and_a_failure_leaves_the_engine_running(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = Generation(max_tokens=2, sampling=Sampling(temperature=0))

    async def main() -> None:
        engine = Engine(loaded, 1, 2)
        step, broken = engine._batch.step, threading.Event()

        def failing() -> None:
            if not broken.is_set():
                broken.set()
                raise RuntimeError("out of memory")
            step()

        monkeypatch.setattr(engine._batch, "step", failing)
        first = engine.submit([3], options, None)
        with pytest.raises(RuntimeError, match="out of memory"):
            [token async for token in first.tokens()]
        again = engine.submit([3], options, None)
        assert [token async for token in again.tokens()] == generate(loaded, [3], options)
        engine.stop()
        engine.submit([3], options, None)
        engine.submit([3], options, None)
        with pytest.raises(BusyError):
            engine.submit([3], options, None)

    asyncio.run(main())


def test_a_signal_ends_what_is_being_written(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    command = [sys.executable, "-m", "tools.serve", "--run", str(tmp_path / "run"), "--port", "0"]
    for number, code in ((signal.SIGINT, 0), (signal.SIGTERM, -signal.SIGTERM)):
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY
        ) as process:
            assert process.stdout is not None and process.stderr is not None
            found = re.search(r"http://\S+", process.stdout.readline())
            assert found is not None
            with openai.OpenAI(base_url=f"{found[0]}/v1", api_key="x", max_retries=0) as api:
                asked = {"model": "x", "prompt": "a", "max_tokens": 10_000}
                stream = api.completions.create(**asked, stream=True)
                next(stream)
                process.send_signal(number)
                for _ in stream:
                    pass
            assert process.wait(20) == code
            assert "Traceback" not in process.stderr.read()


def test_others_on_the_network_need_a_token() -> None:
    result = CliRunner().invoke(main, ["--host", "0.0.0.0"])
    assert result.exit_code == 1 and result.stderr.count("\n") == 1
    assert "others could reach it; give --token TEXT too" in result.stderr
    result = CliRunner().invoke(main, ["--run", "nowhere", "--port", "0"])
    assert result.exit_code == 1 and result.stderr.startswith("error: nowhere: no config.json")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = CliRunner().invoke(main, ["--port", str(taken.getsockname()[1])])
    assert result.exit_code == 1 and "cannot be listened on" in result.stderr
