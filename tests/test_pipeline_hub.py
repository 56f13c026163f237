"""Sources read from the Hub: the real code path, against a server on loopback."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from hub_server import COMMIT, TOKEN, HubServer, Repo
from pipeline_samples import (
    TEXTS,
    contents,
    documents,
    prepared,
    request,
    tokenizer,
    write_jsonl,
    write_parquet,
)
from shards.reader import read_manifest

DRIVER = """
import json, sys
from click.testing import CliRunner
from pipeline.cli import main
for arguments in json.load(sys.stdin):
    result = CliRunner().invoke(main, arguments)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    print(json.dumps([result.exit_code, result.stderr]))
"""


def summer_prep(environment: Any, *commands: Any) -> Any:
    """[(exit code, stderr)] of each command, run in one process that sees this environment."""
    done = subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", "-c", DRIVER],
        input=json.dumps([list(map(str, command)) for command in commands]),
        env={**os.environ, **environment}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


def card(**paths: Any) -> Any:
    lines = ["---", "configs:"]
    for config, path in paths.items():
        split = "test" if config.startswith("wikitext") else "train"
        lines += [f"- config_name: {config.replace('_', '-')}", "  data_files:",
                  f"  - split: {split}", f"    path: {path}"]  # fmt: skip
    return "\n".join([*lines, "---", "A data set."])


WIKI = ["", " = Title = \n", "", " Some text . \n", " = Other = \n", " More . \n"]
CHATS = [[{"from": "human", "value": t}, {"from": "gpt", "value": "yes"}] for t in TEXTS[:50]]


@pytest.fixture(scope="module")
def repos(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Each source's repository in small, in the layout of the real one."""
    import zstandard

    place = tmp_path_factory.mktemp("repos")

    def parquet(rows: Any, column: Any = "text") -> Any:
        return write_parquet(place / "x.parquet", rows, column, group=40).read_bytes()

    def jsonl(rows: Any, column: Any = "text") -> Any:
        return write_jsonl(place / "x.jsonl", rows, column).read_bytes()

    return {
        "HuggingFaceFW/fineweb": Repo(
            {
                "sample/100BT/000_00000.parquet": parquet(TEXTS[:100]),
                "sample/100BT/000_00001.parquet": parquet(TEXTS[100:200]),
                "data/CC-MAIN-2013-20/000_00000.parquet": parquet(["not of this config"]),
            },
            card(default="data/*/*", sample_100BT="sample/100BT/*"),
        ),
        "bigcode/the-stack-dedup": Repo(
            {
                "data/python/data-00000-of-00001.parquet": parquet(TEXTS[:40], "content"),
                "data/c++/data-00000-of-00001.parquet": parquet(TEXTS[40:90], "content"),
                "data/tex/data-00000-of-00001.parquet": parquet(["not asked for"], "content"),
            },
            "---\nlicense: other\n---\n",
            gated=True,
        ),
        "EleutherAI/proof-pile-2": Repo(
            {
                "proof-pile-2.py": b"raise RuntimeError('code of a data set was run')",
                "arxiv/train/arXiv_000.jsonl.zst": zstandard.compress(jsonl(TEXTS[:70])),
                "open-web-math/train/a.jsonl.zst": zstandard.compress(jsonl(["not asked for"])),
            }
        ),
        "Open-Orca/SlimOrca": Repo(
            {"oo-labeled_correct.gpt4.sharegpt.jsonl": jsonl(CHATS, "conversations")}
        ),
        "emozilla/pg19": Repo(
            {
                "data/train-00000-of-00001.parquet": parquet(TEXTS[:30]),
                "data/test-00000-of-00001.parquet": parquet(TEXTS[30:35]),
            },
            card(default="data/train-*"),
        ),
        "common-pile/arxiv_papers": Repo({"data/train-00000.parquet": parquet(TEXTS[:20])}),
        "Salesforce/wikitext": Repo(
            {"wikitext-2-raw-v1/test-00000-of-00001.parquet": parquet(WIKI)},
            card(wikitext_2_raw_v1="wikitext-2-raw-v1/test-*"),
        ),
    }


def tokenize(source: str, place: Path, *options: Any) -> Any:
    return ["tokenize", "--source", source, "--out", place / "shards", "--seq-len", 64,
            "--tokenizer", place / "small.model", *options]  # fmt: skip


@pytest.fixture
def place(tmp_path: Path) -> Any:
    (tmp_path / "small.model").write_bytes(tokenizer().model)
    return tmp_path


def test_every_source_of_the_hub_is_read_from_there(repos: dict[str, Repo], place: Path) -> None:
    commands = [tokenize(name, place) for name in
                ("fineweb", "arxiv", "slimorca", "pg19", "arxiv-papers", "wikitext2")]  # fmt: skip
    commands += [
        tokenize("the-stack", place, "--config", "python,c++"),
        tokenize("mine", place, "--dataset", "emozilla/pg19", "--data-files", "data/test-*"),
        tokenize("fineweb", place),
    ]
    with HubServer(repos) as hub:
        done = summer_prep(hub.environment(place / "home", TOKEN), *commands)
        assert hub.unexpected == []
    assert done == [(0, error) for _, error in done], done
    wanted = {
        "fineweb": TEXTS[:200],
        "the-stack": TEXTS[:90],
        "arxiv": TEXTS[:70],
        "pg19": TEXTS[:30],
        "arxiv-papers": TEXTS[:20],
        "mine": TEXTS[30:35],
        "wikitext2": [
            " \n = Title = \n \n Some text . \n",
            " = Other = \n More . \n",
        ],
    }
    for name, texts in wanted.items():
        found = documents(place / "shards" / name)
        assert sorted(tokenizer().decode(ids) for ids in found) == sorted(texts), name
        manifest = json.loads((place / "shards" / name / "manifest.json").read_text())
        assert manifest["revision"] == COMMIT and "/" in manifest["dataset"]
    assert manifest["dataset"] == "Salesforce/wikitext" and manifest["n_val_rows"]
    assert len(documents(place / "shards" / "slimorca")) == 50
    mine = json.loads((place / "shards" / "mine" / "manifest.json").read_text())
    assert mine["licence"] == "cc0-1.0"  # a corpus of one's own: what its card says


def test_files_of_any_repository_by_their_addresses(place: Path) -> None:
    """hf://, through fsspec: a file, a pattern, a folder; and what is none."""
    data = write_jsonl(place / "x" / "x.jsonl", TEXTS).read_bytes()
    repo = "hf://datasets/org/name"
    asked = [f"{repo}/a/x.jsonl", f"{repo}/a/*", f"{repo}/", repo, f"{repo}/a/y.jsonl"]
    common = ["--tokenizer", place / "small.model", "--seq-len", 64, "--workers", 1]
    start = ["tokenize", "--source", "mine", *common, "--out"]
    commands = [[*start, place / "x" / str(n), "--data-files", url] for n, url in enumerate(asked)]
    with HubServer({"org/name": Repo({"a/x.jsonl": data})}) as hub:
        *good, folder, absent = summer_prep(hub.environment(place), *commands)
    assert [code for code, _ in good] == [0, 0, 0], good
    assert folder == (1, f"error: {repo}: a folder: name it as {repo}/: check the address (a "
                         "folder's ends in /) and whether you are logged in\n")  # fmt: skip
    assert absent[0] == 1 and "y.jsonl: check the address" in absent[1]
    made = [read_manifest(place / "x" / str(n) / "mine") for n in range(3)]
    assert {manifest.root for manifest in made} == {made[0].root} and made[0].n_documents == 300


def test_what_cannot_be_had_says_so_in_a_line(repos: dict[str, Repo], place: Path) -> None:
    with HubServer(repos) as hub:
        done = summer_prep(
            hub.environment(place / "home"),
            tokenize("the-stack", place),
            tokenize("mine", place, "--dataset", "nobody/nothing"),
            tokenize("pg19", place, "--revision", "nowhere"),
            tokenize("mine", place, "--dataset", "emozilla/pg19", "--split", "dev"),
            tokenize("mine", place, "--dataset", "emozilla/pg19", "--config", "other"),
            tokenize("mine", place, "--dataset", "emozilla/pg19", "--text-column", "body"),
            tokenize("books3", place),
        )
    wanted = [
        "bigcode/the-stack-dedup is gated: accept its terms at",
        "nobody/nothing is not on the Hub",
        "has no revision 'nowhere'",
        "has no split 'dev' (it has train)",
        "BuilderConfig 'other' not found",
        "has no column 'body'; it has id, text",
        "prepare its substitute: `summer-prep tokenize --source pg19`",
    ]
    for (code, error), message in zip(done, wanted, strict=True):
        assert code == 1 and message in error and error.count("\n") == 1, error


def test_a_hub_out_of_reach_is_reported_at_once(place: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        dead = f"http://127.0.0.1:{unused.getsockname()[1]}"
    began = time.monotonic()
    ((code, error),) = summer_prep(
        {"HF_ENDPOINT": dead, "HF_HOME": str(place)}, tokenize("pg19", place)
    )
    assert time.monotonic() - began < 15
    assert code == 1 and error.startswith(f"error: the Hub ({dead}) cannot be reached")


def test_a_hub_source_is_repaired_from_the_hub(repos: dict[str, Repo], place: Path) -> None:
    with HubServer(repos) as hub:
        environment = hub.environment(place / "home")
        assert summer_prep(environment, tokenize("pg19", place))[0][0] == 0
        before = contents(place / "shards")
        (place / "shards" / "pg19" / "00000-000.npy").unlink()
        ((code, _),) = summer_prep(environment, ["repair", place / "shards" / "pg19"])
    assert code == 0 and contents(place / "shards") == before


def test_local_copies_and_the_hub_give_the_same_rows(repos: dict[str, Repo], place: Path) -> None:
    files = place / "copy"
    for path, data in repos["emozilla/pg19"].files.items():
        if "train" in path:
            (files / path).parent.mkdir(parents=True, exist_ok=True)
            (files / path).write_bytes(data)
    local = prepared(request(place / "local", str(files), unit_bytes=1 << 28, val_fraction=None))
    with HubServer(repos) as hub:
        summer_prep(hub.environment(place / "home"), tokenize("pg19", place))
    remote = json.loads((place / "shards" / "pg19" / "manifest.json").read_text())
    assert remote["root"] == local.root
