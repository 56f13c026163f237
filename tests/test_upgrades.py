"""Files of an older version mean what they meant; what only a newer one knows is refused by name.

The files are those of the golden folder v0.1, keys taken away and added one at a time; newer
versions of this code are made by adding a field to one of its configuration classes.
"""

import dataclasses
import hashlib
import json
import re
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import golden
from conftest import REPOSITORY
from model.config import ModelConfig
from shards import format as shard_format
from shards import shape
from shards.errors import SummerError, VersionError
from shards.files import json_bytes
from shards.format import Facts, Manifest
from shards.versions import VERSION, WRITER_KEY
from test_golden import near
from tools.convert import main as convert
from tools.evaluate import main as evaluate
from tools.models import hf_folder as hugging_face
from tools.models.loading import ModelSpec, load
from tools.trace import main as trace
from trainer.checkpoint.storage import read_record
from trainer.cli import main as train
from trainer.config import config as config_module
from trainer.config.config import RunConfig, configure, load_config
from trainer.config.resolve import make_plan
from trainer.config.train_plan import TrainPlan
from trainer.errors import ConfigError
from trainer.session.state import state_from

GOLDEN = REPOSITORY / "tests" / "data" / "v0.1"
RUN, EXPORT = Path("runs", "alibi"), Path("exports", "alibi")
CHECKPOINT = RUN / "checkpoints" / "step-4"
CONFIGURATION = json.loads((GOLDEN / RUN / "config.json").read_text())
RECORD = json.loads((GOLDEN / CHECKPOINT / "COMMIT.json").read_text())
EXPORTED = json.loads((GOLDEN / EXPORT / "config.json").read_text())
SECTIONS = sorted(key for key, value in CONFIGURATION.items() if isinstance(value, dict))
CLASSES = sorted({"", *SECTIONS} - {"mixture", "max_epochs"})  # those are tables of sources

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def in_the_golden_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(GOLDEN, tmp_path / "golden")
    monkeypatch.chdir(tmp_path / "golden")


def dotted(table: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """The names of a table's keys, those of the tables in it too."""
    for key, value in table.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from dotted(value, f"{prefix}{key}.")


def changed(path: Path, name: str, *value: Any, **added: Any) -> None:
    """Write a JSON file again, a key set to a value or (without one) taken away, others added."""
    table = json.loads(path.read_text())
    sealed = table.pop("sha256", None)
    *sections, key = name.split(".")
    inner = table
    for section in sections:
        inner = inner[section]
    if value:
        [inner[key]] = value
    else:
        del inner[key]
    table |= added
    if sealed:
        table["sha256"] = hashlib.sha256(json_bytes(table)).hexdigest()
    path.write_bytes(json_bytes(table))


def unknown(name: str, writer: str = "0.3.0") -> str:
    """The refusal of a key that a newer version has written."""
    text = f"written by SummerLM {writer} with {name}, which this version ({VERSION}) does not know"
    return re.escape(f"{text}: upgrade")


def newer(section: str, **default: Any) -> type[RunConfig]:
    """The configuration of a version that has one more key, in the run or one of its sections."""
    [(key, value)] = default.items()
    base = type(getattr(RunConfig(), section)) if section else RunConfig
    field = (key, type(value), dataclasses.field(default=value))
    made = dataclasses.make_dataclass("Newer", [field], bases=(base,), frozen=True, kw_only=True)
    if not section:
        return made
    holder = (section, made, dataclasses.field(default_factory=made))
    return dataclasses.make_dataclass(
        "NewerRun", [holder], bases=(RunConfig,), frozen=True, kw_only=True
    )


def golden_plan(*sets: str) -> TrainPlan:
    return make_plan(configure(file=Path("alibi.toml"), sets=sets, shards="shards"))


@pytest.mark.parametrize("section", CLASSES)
def test_a_run_goes_on_under_a_version_with_one_more_key(
    section: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config_module, "RunConfig", newer(section, novelty=False))
    out = str(RUN)
    said = golden.run(train, "--shards", "shards", "--config", "alibi.toml", "--out", out)
    assert '"novelty": false' in (RUN / "config.json").read_text() and "changed:" not in said
    expected = json.loads((GOLDEN / golden.EXPECTED).read_text())
    assert golden.logged(RUN) == near(expected["logged"])
    events = [line["event"] for line in golden.json_lines((RUN / "events.jsonl").read_text())]
    assert events[-3:] == ["resume", "checkpoint", "done"]
    stored = json.loads((RUN / "config.json").read_text())
    assert (stored[section] if section else stored)["novelty"] is False


def test_a_new_key_whose_default_is_not_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Old files mean what they computed; a run says how to stay as it is."""
    monkeypatch.setattr(config_module, "RunConfig", newer("model", novelty=True))
    monkeypatch.setitem(config_module.MEANT_BEFORE, "model.novelty", False)
    assert load_config(RUN).model.novelty is False  # type: ignore[attr-defined]
    command = ("--shards", "shards", "--config", "alibi.toml", "--out", str(RUN))
    refusal = golden.refused(train, *command)
    assert "model.novelty is true and was false in this run" in refusal
    [fix] = re.findall(r"go on with (--set \S+)", refusal)
    golden.run(train, *command, *fix.split())
    assert load_config(RUN).model.novelty is False  # type: ignore[attr-defined]
    changed(RUN / "config.json", "model", 3)
    with pytest.raises(ConfigError, match="model=3: must be a table"):
        load_config(RUN)
    monkeypatch.setattr(hugging_face, "ModelConfig", type(newer("model", novelty=True)().model))
    assert hugging_face.read_model(EXPORT)[0].novelty is False  # type: ignore[attr-defined]
    changed(EXPORT / "config.json", "novelty", True)
    assert hugging_face.read_model(EXPORT)[0].novelty is True  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", list(dotted(CONFIGURATION)))
def test_a_key_that_a_run_s_configuration_lacks_is_its_default(name: str) -> None:
    before = load_config(RUN)
    changed(RUN / "config.json", name)
    section, _, key = name.rpartition(".")
    if section in ("mixture", "max_epochs"):
        assert key not in getattr(load_config(RUN), section)
        return
    default = getattr(getattr(RunConfig(), section) if section else RunConfig(), key)
    if name == "model.n_heads":  # its default does not divide this width
        with pytest.raises(ConfigError, match=r"multiple of n_heads \(32\)"):
            load_config(RUN)
        return
    if name == "shards":
        default = str(Path(default).absolute())
    inner = dataclasses.replace(getattr(before, section), **{key: default}) if section else default
    assert load_config(RUN) == dataclasses.replace(before, **{section or key: inner})


LACKING = [name for name in dotted(RECORD) if name.split(".")[0] not in ("files", "sha256")]


@pytest.mark.parametrize("name", [*LACKING, "files"])
def test_a_checkpoint_that_lacks_a_key_is_gone_on_from_or_the_key_is_named(name: str) -> None:
    changed(CHECKPOINT / "COMMIT.json", name)
    plan = golden_plan()
    try:
        state, _ = state_from(read_record(CHECKPOINT), plan)
    except SummerError as error:
        assert name.rpartition(".")[2] in str(error) and "\n" not in str(error)
        assert not set(name.split(".")) & OPTIONAL
    else:
        assert (state.step, state.next_index) == (4, 16)
        assert not set(name.split(".")) & {"root", "n_rows", "phases", "tokenizer_sha256"}


OPTIONAL = {"time_s", "refused_in_a_row", "norms", "skipped", "ledger", "anneal", "spent_s",
            "unix_s", "world_size", "versions", "optim", "loader", "guard"}  # fmt: skip


def test_without_any_optional_key_the_commands_do_their_work() -> None:
    for name in OPTIONAL - {"optim", "loader", "guard"}:
        changed(CHECKPOINT / "COMMIT.json", name)
    golden.run(convert, "--from", str(RUN), "--to", "again")
    golden.run(trace, str(RUN), "--step", "5")
    golden.train_on("alibi")
    expected = json.loads((GOLDEN / golden.EXPECTED).read_text())
    assert golden.logged(RUN) == near(expected["logged"])


@pytest.mark.parametrize("name", [key for key in EXPORTED if key != "model_type"])
def test_an_export_that_lacks_a_key_is_the_same_model_or_is_refused(name: str) -> None:
    tokens = torch.arange(3, 43)[None]
    before = load(ModelSpec(hf=EXPORT, device="cpu", dtype="fp32")).model.logits(tokens)
    changed(EXPORT / "config.json", name)
    try:
        loaded = load(ModelSpec(hf=EXPORT, device="cpu", dtype="fp32"))
    except SummerError as error:
        assert "config.json" in str(error) and "\n" not in str(error)
        assert name in ("vocab_size", "n_layers", "d_model", "n_heads", "n_kv_heads", "d_ff")
    else:
        assert torch.equal(loaded.model.logits(tokens), before)


@pytest.mark.parametrize("writer", [{}, {WRITER_KEY: "0.3.0"}])
@pytest.mark.parametrize("section", CLASSES)
def test_a_key_that_is_not_known_is_refused_by_the_version_that_wrote_it(
    section: str, writer: dict[str, str]
) -> None:
    name = f"{section}.foo".lstrip(".")
    refusal = unknown(name, writer.get(WRITER_KEY, "0.1.0"))
    changed(CHECKPOINT / "COMMIT.json", f"config.{name}", 1, **writer)
    with pytest.raises(VersionError, match=refusal):
        state_from(read_record(CHECKPOINT), golden_plan())
    changed(RUN / "config.json", name, 1, **writer)
    with pytest.raises(VersionError, match=refusal):
        load_config(RUN)


@pytest.mark.parametrize(
    ("file", "name", "said", "commands"),
    [
        (RUN / "config.json", "optim.foo", "optim.foo", ("train", "score", "trace", "convert")),
        (CHECKPOINT / "COMMIT.json", "foo", "foo", ("train", "score", "trace", "convert")),
        (CHECKPOINT / "COMMIT.json", "data.prose.foo", "data.prose.foo", ("train",)),
        (EXPORT / "config.json", "foo", "model.foo", ("score exported", "convert back")),
    ],
)
def test_each_command_says_so_in_one_line_and_harms_nothing(
    file: Path, name: str, said: str, commands: tuple[str, ...]
) -> None:
    changed(file, name, 1, **{WRITER_KEY: "0.3.0"})
    before = {path: path.read_bytes() for path in RUN.rglob("*.json*")}
    score = ("heldout", "--shards", "shards", "--device", "cpu")
    known: dict[str, tuple[Any, ...]] = {
        "train": (train, "--shards", "shards", "--config", "alibi.toml", "--out", str(RUN)),
        "score": (evaluate, *score, "--run", str(RUN)),
        "trace": (trace, str(RUN), "--step", "1"),
        "convert": (convert, "--from", str(RUN), "--to", "again"),
        "score exported": (evaluate, *score, "--hf", str(EXPORT)),
        "convert back": (convert, "--from", str(EXPORT), "--to", "again"),
    }
    for command in commands:
        main, *arguments = known[command]
        line = golden.refused(main, *arguments)
        assert re.search(unknown(said), line), (command, line)
        assert str(file) in line or "the record of step 4" in line
    assert {path: path.read_bytes() for path in before} == before


def test_a_checkpoint_of_another_format_is_refused_and_not_called_damaged() -> None:
    changed(CHECKPOINT / "COMMIT.json", "format", "summerlm-commit/2", **{WRITER_KEY: "2.0.0"})
    line = golden.refused(train, "--shards", "shards", "--config", "alibi.toml", "--out", str(RUN))
    assert "of format 'summerlm-commit/2', written by SummerLM 2.0.0" in line
    changed(RUN / "config.json", "format", "summerlm-run/2")
    with pytest.raises(VersionError, match=r"'summerlm-run/2', written by SummerLM 0\.1\.0"):
        load_config(RUN)


def test_what_transformers_adds_to_an_export_is_known() -> None:
    transformers = pytest.importorskip("transformers")
    path = EXPORT / "config.json"
    stored = json.loads(path.read_text())
    path.write_text(json.dumps({**transformers.PretrainedConfig().to_dict(), **stored}))
    assert hugging_face.read_model(EXPORT)[0] == load_config(RUN).model


def test_what_is_written_names_its_version() -> None:
    golden.train_on("alibi")
    golden.export("alibi", Path("again"))
    written = [RUN / "config.json", RUN / "checkpoints" / "step-6" / "checkpoint.json",
               Path("again", "config.json")]  # fmt: skip
    assert [json.loads(path.read_text())[WRITER_KEY] for path in written] == 3 * [VERSION]
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    dynamic = project["tool"]["setuptools"]["dynamic"]["version"]
    assert dynamic == {"attr": "shards.versions.VERSION"} and "version" not in project["project"]


def test_a_manifest_lacks_what_a_later_version_has_added(monkeypatch: pytest.MonkeyPatch) -> None:
    field = ("novelty", str, dataclasses.field(default="none"))
    later = dataclasses.make_dataclass("Later", [field], bases=(Facts,), frozen=True, kw_only=True)
    monkeypatch.setattr(shard_format, "Facts", later)
    monkeypatch.setattr(shape, "_fields_of", shape._fields_of.__wrapped__)  # no fields of before
    stored = json.loads(Path("shards", "prose", "manifest.json").read_text())
    assert Manifest.from_json(stored).facts.novelty == "none"  # type: ignore[attr-defined]


def test_formats_are_named_in_one_place() -> None:
    named = [
        str(path.relative_to(REPOSITORY))
        for folder in ("shards", "model", "pipeline", "trainer", "tools")
        for path in (REPOSITORY / folder).rglob("*.py")
        if re.search(r'"summerlm-\w+/\d+"', path.read_text())
    ]
    assert named == ["shards/versions.py"]
    assert ModelConfig in {type(getattr(RunConfig(), name)) for name in CLASSES if name}
