"""Resuming means the same run: its mixture, its tokenizer; and its figures are true."""

import json
import math
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from shards.files import json_bytes
from trainer.checkpoint import storage
from trainer.checkpoint.runs import newest_checkpoint
from trainer.cli import main
from trainer.config.config import configure, load_config
from trainer.config.deadline import parse_duration, stop_time
from trainer.errors import ConfigError
from trainer.metrics.metrics import read_metrics
from trainer.session.state import initial_state
from trainer.train import train
from trainer_samples import RecordingDisplay, make_shards, set_texts, small_plan


def summer_train(shards: Path, run: Path, *sets: str, max_steps: int = 2) -> Result:
    changes = [*set_texts(max_steps=max_steps), *sets]
    flags = [text for change in changes for text in ("--set", change)]
    options = ["--shards", str(shards), "--out", str(run), "--preset", "tiny"]
    return CliRunner().invoke(main, [*options, *flags])


def test_a_source_prepared_meanwhile_is_listed_and_not_drawn(tmp_path: Path) -> None:
    shards = make_shards(tmp_path / "shards", fineweb=60)
    assert summer_train(shards, tmp_path / "run").exit_code == 0
    make_shards(tmp_path / "shards", fineweb=60, the_stack=30)
    result = summer_train(shards, tmp_path / "run", max_steps=4)
    assert result.exit_code == 0, result.stderr
    assert "! prepared but not drawn: the-stack (--set mixture.the-stack=SHARE" in result.stdout
    record = storage.read_record(newest_checkpoint(tmp_path / "run"))
    assert record["phases"] == [[0, {"fineweb": 1}]]
    asked = ("mixture.fineweb=3", "mixture.the-stack=1")
    result = summer_train(shards, tmp_path / "run", *asked, max_steps=6)
    assert result.exit_code == 0, result.stderr
    record = storage.read_record(newest_checkpoint(tmp_path / "run"))
    assert record["phases"][1][1] == {"fineweb": 3, "the-stack": 1}
    assert load_config(tmp_path / "run").mixture == {"fineweb": 3, "the-stack": 1}


def test_what_is_seldom_meant_is_one_line_each(tmp_path: Path) -> None:
    shards = make_shards(tmp_path / "shards", fineweb=60)
    result = summer_train(shards, tmp_path / "run", "optim.warmup_steps=100", max_steps=40)
    assert "! optim.warmup_steps=100 is not over at max_steps=40" in result.stdout
    assert "! fineweb is seen 5.33 times: beyond 4" in result.stdout  # 40 steps of 8 of 60 rows
    result = summer_train(shards, tmp_path / "run", "optim.warmup_steps=100", max_steps=80)
    assert "jumps" not in result.stdout  # still warming up
    result = summer_train(shards, tmp_path / "run", "optim.warmup_steps=10", max_steps=81)
    assert "! the learning rate jumps: 0.00243 was next, 0.000301 is" in result.stdout


def test_dropout_may_change_and_what_weights_depend_on_may_not(tmp_path: Path) -> None:
    shards = make_shards(tmp_path / "shards", fineweb=60)
    assert summer_train(shards, tmp_path / "run").exit_code == 0
    result = summer_train(
        shards, tmp_path / "run", "model.dropout=0.0", "model.attention_dropout=0", max_steps=3
    )
    assert result.exit_code == 0, result.stderr
    assert "changed: model.dropout was 0.1, is 0.0" in result.stdout
    result = summer_train(shards, tmp_path / "run", "model.n_layers=1", max_steps=4)
    assert "model.n_layers is 1 and was 2 in this run" in result.stderr


def test_weights_of_another_tokenizer_of_the_same_size_are_refused(tmp_path: Path) -> None:
    shards = make_shards(tmp_path / "shards", fineweb=60)
    train(small_plan(shards, max_steps=1), tmp_path / "base")
    record_file = newest_checkpoint(tmp_path / "base") / "checkpoint.json"
    record = json.loads(record_file.read_bytes())
    record["tokenizer_sha256"] = "1" * 64
    del record["sha256"]
    storage._publish_record(record_file.parent, record)
    assert json_bytes(record) != record_file.read_bytes()
    with pytest.raises(ConfigError, match="its tokenizer is not that of the shards"):
        train(small_plan(shards, max_steps=1, init_from=tmp_path / "base"), tmp_path / "tuned")


def test_samples_that_were_left_out_are_not_counted_as_trained_on(tmp_path: Path) -> None:
    plan = small_plan(make_shards(tmp_path / "shards", fineweb=60))
    state = initial_state(plan)
    state.leave_out([(8, 40)])
    for _ in range(3):
        state.advance(8, 0.1)
    assert state.next_index == 56
    assert state.n_samples == 24


def test_the_eta_knows_of_evaluations_and_checkpoints(tmp_path: Path) -> None:
    shards = make_shards(tmp_path / "shards", fineweb=60)
    display = RecordingDisplay()
    plan = small_plan(shards, max_steps=4, checkpoint__interval_steps=1)
    train(plan, tmp_path / "run", display=display)
    last = read_metrics(tmp_path / "run")[-2]
    spent_s = last["spent_s"]["checkpoint"] + last["spent_s"]["evaluation"]
    assert spent_s > 0
    steps_s = plan.step_tokens / last["tokens_per_s"]
    expected = steps_s * (1 + spent_s / last["time_s"])
    assert display.values[-2]["eta_s"] == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(
    ("text", "seconds"), [("23h50m", 85_800), ("90m", 5400), ("1d12h", 129_600), ("", math.inf)]
)
def test_a_duration_is_read(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["1.5h", "h", "1h 30", "-1h", "1h!"])
def test_another_duration_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="write it as 23h50m, 90m or 1d12h"):
        configure(preset="tiny", sets=[f"stop_after={text}"])


def test_a_job_stops_before_its_time_is_up() -> None:
    """The earlier of what was asked for and the allocation's end, less what saving takes."""
    job = {"SUMMER_START_UNIX_S": "1000"}
    assert stop_time("1h", 0, job) == 4600
    assert stop_time("", 0, job) == math.inf
    slurm = {**job, "SLURM_JOB_END_TIME": "5000"}
    assert stop_time("", int(1e9), slurm) == 5000 - 60 - 10
    assert stop_time("1h", 0, slurm) == 4600


def test_a_run_whose_time_is_up_saves_and_says_75(tmp_path: Path) -> None:
    shards = make_shards(tmp_path / "shards", fineweb=60)
    result = summer_train(shards, tmp_path / "run", "stop_after=1s", max_steps=5000)
    assert result.exit_code == 75
    assert "saved: the same command goes on" in result.stdout


def test_a_run_finds_its_shards_from_anywhere_and_beside_it_when_both_were_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = tmp_path / "project"
    make_shards(project / "shards")
    monkeypatch.chdir(project)
    given = [text for s in set_texts(max_steps=2) for text in ("--set", s)]
    first = CliRunner().invoke(main, ["--preset", "tiny", "--out", "runs/r", *given])
    assert first.exit_code == 0, first.output
    stored = load_config(Path("runs/r"))
    assert Path(stored.shards) == project / "shards"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    more = [text for s in set_texts(max_steps=4) for text in ("--set", s)]
    start = ["--preset", "tiny", "--out"]
    second = CliRunner().invoke(main, [*start, "../project/runs/r", *more])
    assert second.exit_code == 0 and "resumed" in second.output, second.output
    project.rename(tmp_path / "moved")
    assert Path(load_config(tmp_path / "moved" / "runs" / "r").shards) == tmp_path / "moved/shards"
    run = str(tmp_path / "moved" / "runs" / "r")
    more = [text for s in set_texts(max_steps=6) for text in ("--set", s)]
    third = CliRunner().invoke(main, [*start, run, *more])
    assert third.exit_code == 0 and "resumed" in third.output, third.output


def test_a_dry_run_rejects_what_the_real_start_would(tmp_path: Path) -> None:
    shards = make_shards(tmp_path / "shards")
    train(small_plan(shards, max_steps=1), tmp_path / "base")
    dry = ["--shards", str(shards), "--preset", "tiny", "--dry-run"]
    dry += [text for s in set_texts(max_steps=1) for text in ("--set", s)]
    base, other = str(tmp_path / "base"), str(tmp_path / "other")
    wrong_width = ["--set", f"init_from={base}", "--set", "model.d_ff=96", "--out", other]
    for more, said in (
        (["--out", base, "--resume", "never"], "--resume never would mix two runs"),
        (["--out", other, "--resume", str(tmp_path / "nothing")], "nothing"),
        (["--out", other, "--nnodes", "2"], "say where the machines meet"),
        (["--out", other, "--nnodes", "2", "--rdzv-endpoint", "h:1"], "--rdzv-id"),
        (wrong_width, "its blocks.0.ffn.gate_up.weight is"),
    ):
        result = CliRunner().invoke(main, [*dry, *more])
        assert result.exit_code == 1 and said in result.output, result.output
        assert not Path(other).exists()
    assert CliRunner().invoke(main, [*dry, "--out", other]).exit_code == 0
