"""A machine that is fit gets a go; each thing that is not is named."""

import contextlib
import json
import multiprocessing
import os
import resource
import shutil
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from click.testing import CliRunner

from model.config import ModelError, count_params
from tools.diagnosis import checks, host, rates, speed
from tools.diagnosis import environment_variables as variables
from tools.diagnosis import expected_rate as expectation
from tools.diagnosis.checks import examine
from tools.diagnosis.collective import ExchangeError, measure_exchange
from tools.diagnosis.findings import Finding, Subject
from tools.diagnosis.shards import shards
from tools.doctor import main
from tools_samples import sample_config, write_shards
from trainer.config.config import configure
from trainer.distributed.devices import ACCELERATORS


@pytest.fixture
def subject(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> Subject:
    monkeypatch.setattr(checks, "PROBE_BYTES", 1 << 20)
    config = configure(preset="tiny").config
    config = replace(config, compile=False, model=sample_config(), global_batch_tokens=256)
    return Subject(config=config, device="cpu", folder=tmp_path)


def only(question: Callable[..., Any], subject: Subject) -> list[Finding]:
    return list(question(subject))


def named(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Let the driver call the device by another name."""
    monkeypatch.setattr(speed, "device_name", lambda device: name)


def test_this_machine_can_train_a_small_model(subject: Subject) -> None:
    findings = list(examine(subject))
    assert not [finding for finding in findings if finding.verdict == "fail"]
    topics = {finding.topic for finding in findings}
    assert topics >= {
        "python", "torch", "driver", "devices", "memory", "bf16", "attention", "products",
        "bandwidth", "all-reduce", "open files", "disk", "write rate", "environment", "expected",
        "shards",
    }  # fmt: skip
    assert not list(subject.folder.iterdir())
    assert subject.measured["tokens_per_s"] > 0


def test_the_command_ends_with_the_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = Finding("ok", "torch", "2.13 " * 40, source="a document")
    bad = Finding("fail", "attention", "off by 1 nats", "another build")
    for found, code, last in (
        ([good], 0, "go: tiny can run"),
        ([good, bad, bad], 1, "no-go: attention"),
    ):
        monkeypatch.setattr(checks, "examine", lambda subject, found=found: iter(found))
        result = CliRunner().invoke(main, ["--preset", "tiny", "--out", str(tmp_path)])
        assert (result.exit_code, result.output.splitlines()[-1]) == (code, last)
        assert all(len(line) <= 100 for line in result.output.splitlines())
        assert ("-> another build" in result.output) == (code == 1)
        assert "a document" not in result.output
        result = CliRunner().invoke(main, ["--preset", "tiny", "--json", "--nproc", "3"])
        assert result.exit_code == code
        answer = json.loads(result.output)
        assert answer["go"] == (code == 0)
        assert (answer["ranks"], answer["expected_tokens_per_s"]) == (3, None)
        first = {"verdict": "ok", "topic": "torch", "detail": "2.13 " * 40, "mend": ""}
        assert answer["findings"][0] == {**first, "source": "a document", "figures": {}}
    result = CliRunner().invoke(main, ["--preset", "tiny", "--sources"])
    assert "a document" in result.output


def test_an_unknown_preset_is_one_line() -> None:
    result = CliRunner().invoke(main, ["--preset", "tinny"])
    assert result.exit_code == 1
    assert result.output.startswith("error: ") and result.output.count("\n") == 1
    assert "tiny" in result.output


def test_a_preset_that_does_not_fit_is_no_go(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "device_memory_bytes", lambda device, sharers: 1_000_000)
    (finding,) = only(checks.memory_fits, subject)
    assert finding.verdict == "fail"
    assert "tiny needs" in finding.detail and "of 0.0 GB" in finding.detail
    assert "does not fit" in only(speed.expected, subject)[0].detail


def test_a_wrong_kernel_is_no_go(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*args: object) -> float:
        raise ModelError("attention is off by 0.5 nats")

    monkeypatch.setattr(checks, "self_test", wrong)
    (finding,) = only(checks.attention, subject)
    assert finding == Finding("fail", "attention", "attention is off by 0.5 nats")


def test_a_full_disk_is_no_go(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage(NamedTuple):
        free: int

    one = 12 * count_params(subject.config.model)
    for free, verdict in ((one - 1, "fail"), (2 * one, "warn"), (3 * one, "ok")):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: Usage(free))
        assert only(checks.disk, subject)[0].verdict == verdict


@pytest.mark.parametrize(
    ("name", "rate", "verdict", "says"),
    [
        ("AMD Instinct MI300X", 700e12, "ok", "54% of MI300X's peak 1307.4, 99% of the 708"),
        ("AMD Instinct MI300X", 540e12, "warn", "76% of the 708 that its maker measures"),
        ("NVIDIA H200", 100e12, "warn", "10% of H200's peak 989.4"),
        ("NVIDIA H200", 700e12, "ok", "71% of H200's"),
        ("NVIDIA Quux 9000", 500e12, "note", "no MFU is shown"),
    ],
)
def test_the_rate_is_set_against_a_known_peak_only(
    subject: Subject, monkeypatch: pytest.MonkeyPatch, name: str, rate: float, verdict: str,
    says: str,
) -> None:  # fmt: skip
    named(monkeypatch, name)
    monkeypatch.setattr(rates, "product_rate", lambda device, dtype: rate)
    (finding,) = only(speed.products, subject)
    assert finding.verdict == verdict
    assert says in finding.detail
    assert finding.figures["flops_per_s"] == rate
    assert bool(finding.source) == (verdict != "note")
    assert bool(finding.mend) == (verdict == "warn")


def test_more_ranks_than_devices_is_no_go(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: "AMD Instinct MI300X")
    monkeypatch.setattr(checks, "device_memory_bytes", lambda device: 192 * 10**9)
    (good,) = only(checks.devices, replace(subject, device="cuda", nproc=4))
    assert (good.verdict, good.detail) == ("ok", "4 x AMD Instinct MI300X, 192 GB")
    bad = only(checks.devices, replace(subject, device="cuda", nproc=8))[0]
    assert (bad.verdict, bad.mend) == ("fail", "--nproc 4")


def test_the_slowest_of_several_devices_counts(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    named(monkeypatch, "AMD Instinct MI300X")
    found = iter((700e12, 690e12, 300e12, 695e12))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "device", lambda number: contextlib.nullcontext())
    monkeypatch.setattr(rates, "product_rate", lambda device, dtype: next(found))
    (finding,) = only(speed.products, replace(subject, device="cuda", nproc=4))
    assert finding.verdict == "warn" and "on device 2, the slowest (best: 700)" in finding.detail


def test_a_busy_machine_is_warned_of(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    for load, verdict in ((0.0, "ok"), (1e3, "warn")):
        monkeypatch.setattr(os, "getloadavg", lambda load=load: (load, load, load))
        assert only(host.other_work, subject)[0].verdict == verdict


def test_memory_far_below_what_its_maker_states_is_suspicious(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    named(monkeypatch, "AMD Instinct MI325X")
    for rate, verdict in ((4.5e12, "ok"), (2e12, "warn")):
        monkeypatch.setattr(rates, "memory_rate", lambda device, rate=rate: rate)
        assert only(speed.bandwidth, subject)[0].verdict == verdict


def test_every_known_device_names_its_source() -> None:
    for known in ACCELERATORS:
        assert known.source and known.memory_tb_s > 0
        assert (known.gemm_tflops is None) == (known.gemm_source == "")
        assert known.gemm_tflops is None or known.gemm_tflops < known.bf16_tflops


def test_mfu_is_withheld_for_an_unknown_device(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = {"fits": 1.0, "product_flops_per_s": 1e11, "memory_bytes_per_s": 1e10}
    subject.measured.update(known)
    (finding,) = only(speed.expected, subject)
    assert "ESTIMATE" in finding.detail and "MFU withheld" in finding.detail
    assert "mfu" not in finding.figures
    named(monkeypatch, "NVIDIA H100 80GB HBM3")
    (finding,) = only(speed.expected, subject)
    assert "MFU (causal attention" in finding.detail
    assert 0 < finding.figures["mfu"] < 1


def test_an_expectation_adds_up(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """By rates alone, every part follows from a rate; an exchange between ranks only adds to it."""
    monkeypatch.setattr(expectation, "_quick_size", lambda *arguments: 0)
    known = {"product_flops_per_s": 1e9, "memory_bytes_per_s": 1e9}
    subject.measured.update(known)
    alone = expectation.expect(subject)
    n_params = count_params(subject.config.model)
    assert alone.how.startswith("an upper bound")
    assert alone.tokens_per_s == alone.by_rates_alone == 256 / sum(alone.seconds.values())
    assert alone.seconds["update"] == pytest.approx(40 * n_params / 1e9)
    assert set(alone.seconds) == {"forward and backward", "update"}
    subject.measured["exchange_bytes_per_s"] = 1e6
    together = expectation.expect(replace(subject, nproc=2))
    assert together.seconds["exchange"] == pytest.approx(4 * n_params / 1e6)
    assert together.tokens_per_s < alone.tokens_per_s


def test_a_covered_exchange_counts_as_one_block_of_it(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expectation, "_quick_size", lambda *arguments: 0)
    monkeypatch.setattr(expectation, "device_memory_bytes", lambda device, sharers: 10**9)
    subject.measured.update(
        product_flops_per_s=1e9, memory_bytes_per_s=1e9, exchange_bytes_per_s=1e12
    )
    n_params = count_params(subject.config.model)
    found = expectation.expect(replace(subject, device="cuda", nproc=2))
    assert found.seconds["exchange"] == pytest.approx(4 * n_params / 1e12 / 2)


def test_two_processes_add_up() -> None:
    exchange = measure_exchange("cpu", 2, 1 << 16)
    assert exchange.seconds > 0
    assert exchange.bus_rate == pytest.approx(exchange.algorithm_rate)  # 2 (2 - 1) / 2 = 1
    assert exchange._replace(n_ranks=8).bus_rate == pytest.approx(1.75 * exchange.algorithm_rate)
    assert not multiprocessing.active_children()


def test_an_exchange_that_hangs_is_a_finding_and_leaves_nothing_behind(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop_one() -> None:
        while not (ranks := multiprocessing.active_children()):
            time.sleep(0.01)
        os.kill(int(ranks[0].pid or 0), signal.SIGSTOP)  # never ends by itself

    stopper = threading.Thread(target=stop_one)
    stopper.start()
    with pytest.raises(ExchangeError, match=r"hangs: after 2 s rank"):
        measure_exchange("cpu", 2, 1 << 16, limit_s=2.0)
    stopper.join()
    assert not multiprocessing.active_children()
    with pytest.raises(ExchangeError, match=r"rank 0: .*nonsense"):
        measure_exchange("cpu", 1, 1 << 16, backend="nonsense")

    def hang(*arguments: object) -> None:
        raise ExchangeError("all-reduce of 2 ranks hangs")

    monkeypatch.setattr(speed, "measure_exchange", hang)
    (finding,) = only(speed.all_reduce, replace(subject, nproc=2))
    assert finding == Finding("fail", "all-reduce", "all-reduce of 2 ranks hangs")


@pytest.mark.parametrize(
    ("text", "verdict"), [("1\n", "warn"), ("2\n", "warn"), ("0\n", "ok"), (None, "ok")]
)
def test_numa_balancing_is_warned_of(
    subject: Subject, monkeypatch: pytest.MonkeyPatch, text: str | None, verdict: str
) -> None:
    path = subject.folder / "numa_balancing"
    if text is not None:
        path.write_text(text)
    monkeypatch.setattr(host, "NUMA_BALANCING", path)
    (finding,) = only(host.numa_balancing, subject)
    assert finding.verdict == verdict
    if verdict == "warn":
        assert finding.mend == "sudo sysctl kernel.numa_balancing=0"
        assert "MI300X" in finding.source


def test_too_little_shared_memory_is_warned_of(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage(NamedTuple):
        free: int

    monkeypatch.setattr(host, "SHARED_MEMORY", subject.folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(64 << 20))
    assert only(host.shared_memory, subject)[0].verdict == "ok"
    eight = replace(subject, device="cuda", nproc=8)
    assert only(host.shared_memory, eight)[0].verdict == "warn"


def test_open_files_are_counted(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    for soft, verdict in ((256, "warn"), (1 << 20, "ok"), (resource.RLIM_INFINITY, "ok")):
        limit = (soft, resource.RLIM_INFINITY)
        monkeypatch.setattr(resource, "getrlimit", lambda which, limit=limit: limit)
        assert only(host.limits, subject)[0].verdict == verdict


def test_rows_are_read_and_proven(subject: Subject) -> None:
    folder = subject.folder / "shards"
    write_shards(folder / "good", train_texts=["a b c " * 200] * 3, val_texts=["d e f"])
    (finding,) = only(shards, replace(subject, shards=folder))
    assert finding.verdict == "ok" and finding.figures["tokens_per_s"] > 0
    assert finding.detail.startswith("good: ") and "1 of 1 files, sane" in finding.detail
    slow = replace(subject, shards=folder, measured={"tokens_per_s": 1e15})
    assert only(shards, slow)[0].verdict == "warn"


def test_damaged_shards_are_no_go(subject: Subject) -> None:
    folder = subject.folder / "shards"
    for name in ("good", "damaged"):
        write_shards(folder / name, train_texts=["a b c " * 200] * 3, val_texts=["d e f"])
    rows = folder / "damaged" / "00000-000.npy"
    data = bytearray(rows.read_bytes())
    data[-1] ^= 1
    rows.write_bytes(data)
    found = {finding.verdict: finding for finding in shards(replace(subject, shards=folder))}
    assert set(found) == {"ok", "fail"}
    assert "is damaged" in found["fail"].detail and "summer-prep repair" in found["fail"].detail
    rows.write_bytes(data[:-100])
    assert "fail" in {finding.verdict for finding in shards(replace(subject, shards=folder))}
    (finding,) = only(shards, replace(subject, shards=subject.folder / "nothing"))
    assert finding.verdict == "fail" and "no prepared source" in finding.detail


def test_harmful_variables_are_warned_of_and_secrets_stay_out() -> None:
    secret = {"HF_TOKEN": "hf_secret"}
    (finding,) = variables.look_at(secret, "cpu")
    assert finding == Finding("note", "environment", "no other variable that matters is set")
    chosen = {**secret, "NCCL_P2P_DISABLE": "1", "SUMMER_FAULT": "", "OMP_NUM_THREADS": "4"}
    warned, noted = variables.look_at(chosen, "cpu")
    assert warned.verdict == "warn" and "NCCL_P2P_DISABLE=1" in warned.detail
    assert (warned.mend, "NCCL" in warned.source) == ("unset NCCL_P2P_DISABLE", True)
    assert noted.detail == "OMP_NUM_THREADS=4"


def test_what_amd_advises_is_named_on_rocm_alone() -> None:
    unset, *others = variables.look_at({"HIP_FORCE_DEV_KERNARG": "1"}, "rocm")
    assert unset.detail.startswith("NCCL_MIN_NCHANNELS is not set")
    assert unset.mend == "export NCCL_MIN_NCHANNELS=112"
    assert "HIP_FORCE_DEV_KERNARG=1" in [finding.detail for finding in others]
    details = " ".join(finding.detail for finding in variables.look_at({}, "cuda"))
    assert "NCHANNELS" not in details and "PYTORCH_ALLOC_CONF" in details


def test_every_variable_says_why_and_who_says_so() -> None:
    groups = (variables.HARMFUL, variables.SHOWN, variables.ADVISED_ON_ROCM)
    every = [variable for group in groups for variable in group]
    assert all(variable.why and variable.source for variable in every)
    assert len({variable.name for variable in every}) == len(every)
    assert not {name for name in os.environ if "TOKEN" in name} & {v.name for v in every}


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
