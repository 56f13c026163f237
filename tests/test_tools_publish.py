"""A run goes to a Hub on loopback, and plain transformers loads it from there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import REPOSITORY
from hub_models import ModelHub
from hub_server import TOKEN
from tools_samples import trained_run

pytest.importorskip("transformers")

IN_PLAIN_TRANSFORMERS = """
import json, sys
sys.path = [place for place in sys.path if place != sys.argv[1]]
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained("me/tiny", trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained("me/tiny", trust_remote_code=True)
made = model.generate(**tokenizer("import", return_tensors="pt"), max_new_tokens=8, do_sample=False)
print(json.dumps([str(model.dtype), made[0].tolist()]))
"""


def run(hub: ModelHub, home: Path, *command: str, token: str = TOKEN) -> tuple[int, str]:
    """The exit code and all that a command says, which sees this Hub alone."""
    environment = {**os.environ, **hub.environment(home, token)}
    done = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, check=False
    )
    return done.returncode, (done.stdout + done.stderr).strip()


@pytest.mark.slow
@pytest.mark.parametrize("alibi", [False, True])
def test_a_run_is_published_and_loaded_with_plain_transformers(tmp_path: Path, alibi: bool) -> None:
    source, folder = trained_run(tmp_path / "run", alibi=alibi), tmp_path / "hf"
    convert = ("-m", "tools.convert", "--push", "me/tiny", "--from")
    with ModelHub(refuse_uploads=int(not alibi)) as hub:
        code, said = run(hub, tmp_path, *convert, str(source), "--to", str(folder))
        if not alibi:
            assert code == 1 and said.splitlines()[-1].startswith("error: "), said
            assert f"the same command with --from {folder} and without --to" in said
            code, said = run(hub, tmp_path, *convert, str(folder))  # what the message says
        assert code == 0, said
        assert f"uploaded: {hub.url}/me/tiny/commit/" in said
        assert hub.private == {"me/tiny": True} and not hub.unexpected
        sent = hub.models["me/tiny"]
        assert sent == {path.name: path.read_bytes() for path in folder.iterdir()}
        code, said = run(hub, tmp_path / "other", "-c", IN_PLAIN_TRANSFORMERS, str(REPOSITORY))
        assert code == 0, said
        dtype, ids = json.loads(next(n for n in said.splitlines() if n.startswith("[")))
        assert dtype == "torch.bfloat16" and len(ids) > 2
        assert "license: other" in sent["README.md"].decode()


@pytest.mark.slow
def test_what_cannot_be_published_is_said_before_any_work(tmp_path: Path) -> None:
    source = str(trained_run(tmp_path / "run", alibi=False))
    with ModelHub() as hub:
        for name, token, said in (
            ("tiny", TOKEN, "write it as OWNER/NAME"),
            ("me/ti ny", TOKEN, "write it as OWNER/NAME"),
            ("me/tiny", "", "hf auth login"),
            ("me/tiny", "hf_wrong", "the Hub answers Invalid user token"),
        ):
            to = ("--to", str(tmp_path / "hf"), "--push", name)
            code, found = run(
                hub, tmp_path, "-m", "tools.convert", "--from", source, *to, token=token
            )
            assert code == 1 and said in found and found.count("\n") == 0, found
        assert not hub.models
    code, found = run(hub, tmp_path, "-m", "tools.convert", "--from", source, *to)
    assert code == 1 and "the Hub answers" in found and "Traceback" not in found, found
    assert not (tmp_path / "hf").exists()
