"""A machine that is fit gets a go; each thing that is not is named."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from click.testing import CliRunner

from model.config import ModelError
from tools import checks
from tools.checks import Finding, Subject, examine
from tools.doctor import main
from trainer.config import configure


@pytest.fixture
def subject(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Subject:
    monkeypatch.setattr(checks, "PROBE_BYTES", 1 << 20)
    config = replace(configure(preset="tiny").config, compile=False)
    return Subject(config=config, device="cpu", folder=tmp_path)


def only(question: Callable[..., Any], subject: Subject) -> list[Finding]:
    return list(question(subject))


def test_this_machine_can_train_tiny(subject: Subject) -> None:
    findings = list(examine(subject))
    assert not [finding for finding in findings if finding.verdict == "fail"]
    topics = {finding.topic for finding in findings}
    assert topics >= {
        "python", "torch", "driver", "devices", "memory", "bf16", "attention", "products",
        "disk", "write rate", "environment",
    }  # fmt: skip
    assert not list(subject.folder.iterdir())


def test_the_command_ends_with_the_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good, bad = Finding("ok", "torch", "2.13"), Finding("fail", "attention", "off by 1 nats")
    for found, code, last in (
        ([good], 0, "go: tiny can run"),
        ([good, bad], 1, "no-go: attention"),
    ):
        monkeypatch.setattr(checks, "examine", lambda subject, found=found: iter(found))
        result = CliRunner().invoke(main, ["--preset", "tiny", "--out", str(tmp_path)])
        assert (result.exit_code, result.output.splitlines()[-1]) == (code, last)
        result = CliRunner().invoke(main, ["--preset", "tiny", "--json"])
        assert result.exit_code == code
        answer = json.loads(result.output)
        assert answer["go"] == (code == 0)
        assert answer["findings"][0] == {"verdict": "ok", "topic": "torch", "detail": "2.13"}


def test_an_unknown_preset_is_one_line() -> None:
    result = CliRunner().invoke(main, ["--preset", "tinny"])
    assert result.exit_code == 1
    assert result.output.startswith("error: ") and result.output.count("\n") == 1
    assert "tiny" in result.output


def test_a_preset_that_does_not_fit_is_no_go(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "device_memory_bytes", lambda device: 100_000_000)
    (finding,) = only(checks.memory_fits, subject)
    assert finding.verdict == "fail"
    assert "tiny needs" in finding.detail and "of 0.1 GB" in finding.detail


def test_a_wrong_kernel_is_no_go(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*args: object) -> float:
        raise ModelError("attention is off by 0.5 nats")

    monkeypatch.setattr(checks, "self_test", wrong)
    (finding,) = only(checks.attention, subject)
    assert finding == Finding("fail", "attention", "attention is off by 0.5 nats")


def test_a_full_disk_is_no_go(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage(NamedTuple):
        free: int

    one = 12 * 12_194_048
    for free, verdict in ((one - 1, "fail"), (2 * one, "warn"), (3 * one, "ok")):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: Usage(free))
        assert only(checks.disk, subject)[0].verdict == verdict


@pytest.mark.parametrize(
    ("name", "rate", "verdict", "says"),
    [
        ("AMD Instinct MI300X", 708e12, "ok", "54% of MI300X's 1307"),
        ("NVIDIA H200", 100e12, "warn", "10% of H200's 989"),
        ("NVIDIA Quux 9000", 500e12, "note", "no MFU will be shown"),
    ],
)
def test_the_rate_is_set_against_a_known_peak_only(
    subject: Subject, monkeypatch: pytest.MonkeyPatch, name: str, rate: float, verdict: str,
    says: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(checks, "device_name", lambda device: name)
    monkeypatch.setattr(checks, "_product_rate", lambda device: rate)
    (finding,) = only(checks.products, subject)
    assert finding.verdict == verdict
    assert says in finding.detail


def test_harmful_variables_are_warned_of_and_secrets_stay_out(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (*checks.VARIABLES, *checks.HARMFUL):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    (finding,) = only(checks.environment, subject)
    assert finding.verdict == "note" and "none of the variables" in finding.detail
    monkeypatch.setenv("NCCL_P2P_DISABLE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    warned, noted = only(checks.environment, subject)
    assert warned.verdict == "warn" and "NCCL_P2P_DISABLE=1" in warned.detail
    assert noted.detail == "OMP_NUM_THREADS=4"


def test_an_old_torch_is_no_go(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.4.1+rocm6.1")
    finding = only(checks.versions, subject)[1]
    assert finding.verdict == "fail"
    assert "2.4.1+rocm6.1 is too old: install 2.9 or newer" in finding.detail


def test_a_question_that_breaks_is_a_finding(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken_driver(subject: Subject) -> Any:
        raise RuntimeError("HIP error: invalid\ndevice function")

    monkeypatch.setattr(checks, "QUESTIONS", (broken_driver, checks.versions))
    first, *others = examine(subject)
    expected = "RuntimeError: HIP error: invalid device function"
    assert first == Finding("fail", "broken driver", expected)
    assert others
