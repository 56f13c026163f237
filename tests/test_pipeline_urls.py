"""Sources behind URLs: an S3-compatible server and an HTTP server with ranges, on loopback."""

import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pipeline.checks.repair import repair
from pipeline.errors import SourceError
from pipeline.inputs.urls import UrlInputs, open_inputs
from pipeline.units.executors import Executor
from pipeline_samples import TEXT, contents, corpus, prepared, request, write_jsonl

s3fs = pytest.importorskip("s3fs", reason="the extra `dev` has it")
moto_server = pytest.importorskip("moto.server", reason="the extra `dev` has it")

Files = dict[str, bytes]


class RangeHandler(http.server.BaseHTTPRequestHandler):
    """Serves bytes from memory, or ranges of them, with an ETag."""

    files: Files
    asked: list[str]

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        data = self.files.get(self.path)
        if data is None:
            self.send_error(404)
            return
        first, last, code = 0, len(data), 200
        if wanted := self.headers.get("Range"):
            self.asked.append(wanted)
            begin, _, end = wanted.removeprefix("bytes=").partition("-")
            first, last, code = int(begin), min(len(data), int(end or len(data)) + 1), 206
        self.send_response(code)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{hash(data)}"')
        self.send_header("Content-Length", str(last - first))
        if code == 206:
            self.send_header("Content-Range", f"bytes {first}-{last - 1}/{len(data)}")
        self.end_headers()
        if body:
            self.wfile.write(data[first:last])

    def log_message(self, *of: Any) -> None:
        """Say nothing."""


@contextmanager
def http_server(files: Files) -> Iterator[tuple[str, list[str]]]:
    asked: list[str] = []
    handler = type("Handler", (RangeHandler,), {"files": files, "asked": asked})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(scope="module")
def s3() -> Iterator[Any]:
    """A file system of an S3-compatible server; the library's usual variables name it."""
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        system = s3fs.S3FileSystem()
        system.mkdir("bucket")
        yield system
        s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


def local_files(folder: Path) -> Files:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*")}


def shards(folder: Path) -> Files:
    return {name: data for name, data in contents(folder).items() if name.endswith(".npy")}


@pytest.mark.parametrize("workers", [1, 2])
def test_a_bucket_gives_the_shards_of_the_local_files(
    s3: Any, tmp_path: Path, workers: int
) -> None:
    corpus(tmp_path / "in")
    for name, data in local_files(tmp_path / "in").items():
        s3.pipe(f"bucket/corpus/{name}", data)
    s3.pipe("bucket/corpus/README.md", b"a card")
    s3.pipe("bucket/corpus/.cache/0.jsonl", b"{}")
    prepared(request(tmp_path / "local", str(tmp_path / "in")))
    for number, pattern in enumerate(("s3://bucket/corpus/", "s3://bucket/corpus/*.[jp]*")):
        wanted = request(tmp_path / f"out{number}", pattern)
        manifest = prepared(wanted, workers=workers)
        assert manifest.facts.dataset == "s3://bucket/corpus"
        assert shards(tmp_path / f"out{number}") == shards(tmp_path / "local")
    inputs = open_inputs(TEXT, ("s3://bucket/corpus/",))
    reasons = {entry.path.rpartition("corpus/")[2]: entry.why for entry in inputs.left_out}
    assert reasons == {"README.md": "a card", ".cache/0.jsonl": "hidden"}


def test_an_object_that_changes_stops_the_run(s3: Any, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", ["text"] * 9)
    s3.pipe("bucket/one/a.jsonl", file.read_bytes())
    inputs = open_inputs(TEXT, ("s3://bucket/one/a.jsonl",))
    (listed,) = inputs.files
    assert isinstance(inputs, UrlInputs) and listed.path == "a.jsonl" and listed.version
    inputs.check(listed)
    s3.pipe("bucket/one/a.jsonl", file.read_bytes().replace(b"text", b"TEXT"))
    with pytest.raises(
        SourceError, match=r"s3://bucket/one/a\.jsonl has changed since it was list"
    ):
        inputs.check(listed)


def test_a_damaged_unit_is_repaired_from_the_bucket(s3: Any, tmp_path: Path) -> None:
    s3.pipe("bucket/two/a.jsonl", write_jsonl(tmp_path / "a.jsonl", ["text"] * 99).read_bytes())
    prepared(request(tmp_path / "out", "s3://bucket/two/a.jsonl"))
    before = contents(tmp_path / "out")
    (tmp_path / "out" / "mine" / "00000-000.npy").unlink()
    assert repair(tmp_path / "out" / "mine", (), Executor(workers=1))
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("ending", ["jsonl", "parquet", "csv"])
def test_a_web_server_is_read_in_ranges(tmp_path: Path, ending: str) -> None:
    corpus(tmp_path / "in")
    (tmp_path / "in" / "a.csv").write_text("text\none\ntwo\n")
    name = {"jsonl": "0.jsonl", "parquet": "1.parquet", "csv": "a.csv"}[ending]
    data = (tmp_path / "in" / name).read_bytes()
    prepared(request(tmp_path / "local", str(tmp_path / "in" / name)))
    with http_server({f"/data/{name}": data}) as (place, asked):
        prepared(request(tmp_path / "out", f"{place}/data/{name}"))
        assert asked or ending == "csv"
        assert shards(tmp_path / "out") == shards(tmp_path / "local")
        plan = json.loads((tmp_path / "out" / "mine" / "units.json").read_text())
        assert plan["dataset"] == f"{place}/data"
        assert plan["files"][0]["path"] == name and plan["files"][0]["version"]


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (("s3://bucket/nothing/*.jsonl",), "no data file there"),
        (("s3://bucket/nothing.jsonl",), "s3://bucket/nothing.jsonl: .*check the address"),
        (
            ("https://user:secret@host/a.jsonl",),
            r"https://host\.\.\.: no password or token in a URL",
        ),
        (("https://host/a.jsonl?token=secret",), "no password or token in a URL"),
        (("nowhere://x/a.jsonl",), "nowhere://x/a.jsonl: .*[Pp]rotocol"),
        (("s3://bucket/a.jsonl", "b.jsonl"), "local files and URLs do not go together"),
    ],
)
def test_a_wrong_address_is_an_error_in_a_line(
    s3: Any, patterns: tuple[str, ...], message: str
) -> None:
    with pytest.raises(SourceError, match=message) as caught:
        open_inputs(TEXT, patterns)
    assert "secret" not in str(caught.value)
