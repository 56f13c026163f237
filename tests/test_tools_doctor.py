"""A machine that is fit is called ready; each thing that prevents a run is named."""

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from model.config import ModelError, count_params
from tools.diagnosis import checks, data, machine, speed, trial
from tools.diagnosis.checks import run_checks
from tools.diagnosis.collective import ExchangeError, time_all_reduce
from tools.diagnosis.machine import CheckResult, Context
from tools.doctor import main
from tools.rehearsal.processes import Comparison
from tools_samples import sample_config, write_shards
from trainer.config.accelerators import ACCELERATORS
from trainer.config.config import configure


@pytest.fixture
def context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> Context:
    monkeypatch.setattr(data, "PROBE_BYTES", 1 << 20)
    names = ("n_layers", "d_model", "n_heads", "d_ff", "vocab_size", "seq_len")
    shape = [f"model.{name}={getattr(sample_config(), name)}" for name in names]
    settings = (*shape, "compile=false", "global_batch_tokens=256", "device=cpu")
    config = configure(preset="tiny", sets=settings).config
    return Context(config=config, settings=settings, device="cpu", folder=tmp_path)


def only(check: Callable[..., Any], context: Context) -> list[CheckResult]:
    return list(run_checks(context, [check]))


def named(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Let the driver call the device by another name."""
    monkeypatch.setattr(speed, "device_name", lambda device: name)


def free_bytes(monkeypatch: pytest.MonkeyPatch, n_bytes: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=n_bytes))


def test_this_machine_can_train_a_small_model(context: Context) -> None:
    results = list(run_checks(context))
    assert not [result for result in results if result.verdict == "fail"]
    assert {result.topic for result in results} >= {
        "torch", "driver", "devices", "memory", "attention", "products", "bandwidth",
        "all-reduce", "numa", "disk", "write rate", "environment", "training", "shards",
    }  # fmt: skip
    assert not list(context.folder.iterdir())
    assert context.measured["tokens_per_s"] > 0


def test_the_command_ends_with_the_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = CheckResult("ok", "torch", "2.13 " * 40, source="a document")
    bad = CheckResult("fail", "attention", "off by 1 nats", "another build")
    for found, code, last in (
        ([good], 0, "ready: tiny can run"),
        ([good, bad, bad], 1, "not ready: attention"),
    ):
        monkeypatch.setattr(checks, "run_checks", lambda context, found=found: iter(found))
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
        first = {"verdict": "ok", "topic": "torch", "detail": "2.13 " * 40, "fix": "", "mend": ""}
        assert answer["findings"][0] == {**first, "source": "a document", "figures": {}}
    result = CliRunner().invoke(main, ["--preset", "tiny", "--sources"])
    assert "a document" in result.output


def test_an_unknown_preset_is_one_line() -> None:
    result = CliRunner().invoke(main, ["--preset", "tinny"])
    assert result.exit_code == 1
    assert result.output.startswith("error: ") and result.output.count("\n") == 1
    assert "tiny" in result.output


def test_a_preset_that_does_not_fit_is_not_ready(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "device_memory_bytes", lambda device, sharers: 1_000)
    (result,) = only(machine.memory_fits, context)
    assert result.verdict == "fail"
    assert "tiny needs" in result.detail and "of 0.0 GB" in result.detail


def test_a_wrong_kernel_is_not_ready(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*args: object) -> float:
        raise ModelError("attention is off by 0.5 nats")

    monkeypatch.setattr(machine, "self_test", wrong)
    (result,) = only(machine.attention, context)
    assert result == CheckResult("fail", "attention", "attention is off by 0.5 nats")


def test_a_full_disk_is_not_ready(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    one = 12 * count_params(context.config.model)
    for free, verdict in ((one - 1, "fail"), (2 * one, "warn"), (3 * one, "ok")):
        free_bytes(monkeypatch, free)
        assert only(data.disk, context)[0].verdict == verdict


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
    context: Context, monkeypatch: pytest.MonkeyPatch, name: str, rate: float, verdict: str,
    says: str,
) -> None:  # fmt: skip
    named(monkeypatch, name)
    monkeypatch.setattr(speed, "product_rate", lambda device, dtype: rate)
    (result,) = only(speed.products, context)
    assert result.verdict == verdict
    assert says in result.detail
    assert result.figures["flops_per_s"] == rate
    assert bool(result.source) == (verdict != "note")
    assert bool(result.fix) == (verdict == "warn")


def test_more_ranks_than_devices_is_not_ready(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: "AMD Instinct MI300X")
    monkeypatch.setattr(machine, "device_memory_bytes", lambda device: 192 * 10**9)
    (good,) = only(machine.devices, replace(context, device="cuda", nproc=4))
    assert (good.verdict, good.detail) == ("ok", "4 x AMD Instinct MI300X, 192 GB")
    bad = only(machine.devices, replace(context, device="cuda", nproc=8))[0]
    assert (bad.verdict, bad.fix) == ("fail", "--nproc 4")


def test_a_gpu_that_torch_ignores_is_not_ready(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "unused_gpu", lambda: "torch is built for the CPU")
    assert [found.detail for found in only(machine.devices, context)][1:] == [
        "torch is built for the CPU"
    ]
    monkeypatch.setattr(machine, "unused_gpu", lambda: "")
    assert [found.verdict for found in only(machine.devices, context)] == ["note"]


def test_the_slowest_of_several_devices_counts(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    named(monkeypatch, "AMD Instinct MI300X")
    found = iter((700e12, 690e12, 300e12, 695e12))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "device", lambda number: contextlib.nullcontext())
    monkeypatch.setattr(speed, "product_rate", lambda device, dtype: next(found))
    (result,) = only(speed.products, replace(context, device="cuda", nproc=4))
    assert result.verdict == "warn" and "on device 2, the slowest (best: 700)" in result.detail


def test_memory_far_below_what_its_maker_states_is_suspicious(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    named(monkeypatch, "AMD Instinct MI325X")
    for rate, verdict in ((4.5e12, "ok"), (2e12, "warn")):
        monkeypatch.setattr(speed, "memory_rate", lambda device, rate=rate: rate)
        assert only(speed.bandwidth, context)[0].verdict == verdict


def test_every_known_device_names_its_source() -> None:
    for known in ACCELERATORS:
        assert known.source and known.memory_tb_s > 0
        assert (known.gemm_tflops is None) == (known.gemm_source == "")
        assert known.gemm_tflops is None or known.gemm_tflops < known.bf16_tflops


def test_the_rate_is_that_of_real_steps_on_all_ranks(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial, "STEPS", 3)
    (result,) = only(trial.training, replace(context, nproc=2))
    assert result.verdict == "ok"
    assert "the median of 3 steps of 256 tokens on 2 ranks; MFU withheld" in result.detail
    assert result.figures == context.measured and set(result.figures) == {"tokens_per_s"}
    assert result.detail.startswith(f"{result.figures['tokens_per_s']:,.0f} tokens/s")
    assert not list(context.folder.iterdir())


def test_a_probe_prices_the_rest_and_resumes(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial, "PROBE", 6)
    monkeypatch.setattr(trial, "RESUMED", 2)
    paid = replace(context, config=replace(context.config, dollars_per_hour=3600.0))
    note, rate, rest, resume = only(trial.probe, paid)
    assert note.detail.startswith("trains 6 steps of 256 tokens, then 2 of them again")
    assert "the median of 4 steps of 256 tokens" in rate.detail
    seconds = (context.config.max_steps - 6) * 256 / rate.figures["tokens_per_s"]
    assert f": {seconds / 3600:,.1f} hours, ${seconds:,.2f}, " in rest.detail
    assert resume.verdict == "ok"
    assert resume.detail == "steps 5 to 6 again from the checkpoint: the same bits"
    monkeypatch.setattr(Comparison, "identical", False)
    *_, resume = only(trial.probe, context)
    assert resume.verdict == "warn" and "OTHER BITS" in resume.detail
    assert not list(context.folder.iterdir())


def test_steps_that_take_too_long_have_no_rate(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial, "LIMIT_S", 0.0)
    (result,) = only(trial.training, context)
    assert (
        result.verdict == "note" and "no rate: 3 steps of 256 tokens take longer" in result.detail
    )
    assert not context.measured and not list(context.folder.iterdir())


def test_a_run_that_cannot_train_is_not_ready(context: Context) -> None:
    (result,) = only(trial.training, replace(context, nproc=3))
    assert result.verdict == "fail" and "global_batch_tokens" in result.detail
    assert not list(context.folder.iterdir())


def test_two_processes_add_up(context: Context) -> None:
    (result,) = only(speed.all_reduce, replace(context, nproc=2))
    rate = result.figures["algorithm_bytes_per_s"]
    assert result.verdict == "ok" and rate > 0
    assert result.figures["bus_bytes_per_s"] == pytest.approx(rate)  # 2 (2 - 1) / 2 = 1
    assert not multiprocessing.active_children()


def test_the_bus_bandwidth_is_that_of_nccl_tests(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed, "time_all_reduce", lambda *exchange: 0.5)
    (result,) = only(speed.all_reduce, replace(context, nproc=8))
    n_bytes = result.figures["bytes"]
    assert result.figures["algorithm_bytes_per_s"] == pytest.approx(n_bytes / 0.5)
    assert result.figures["bus_bytes_per_s"] == pytest.approx(1.75 * n_bytes / 0.5)


def test_an_exchange_that_hangs_or_fails_is_reported_and_leaves_nothing_behind(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop_one() -> None:
        while not (ranks := multiprocessing.active_children()):
            time.sleep(0.01)
        os.kill(int(ranks[0].pid or 0), signal.SIGSTOP)  # never ends by itself

    stopper = threading.Thread(target=stop_one)
    stopper.start()
    with pytest.raises(ExchangeError, match=r"hangs: not done after 2 s"):
        time_all_reduce("cpu", 2, 1 << 16, limit_s=2.0)
    stopper.join()
    assert not multiprocessing.active_children()
    with pytest.raises(ExchangeError, match=r"rank 0: .*nonsense"):
        time_all_reduce("cpu", 1, 1 << 16, backend="nonsense")

    def hang(*arguments: object) -> None:
        raise ExchangeError("all-reduce of 2 ranks hangs")

    monkeypatch.setattr(speed, "time_all_reduce", hang)
    (result,) = only(speed.all_reduce, replace(context, nproc=2))
    assert result == CheckResult("fail", "all-reduce", "all-reduce of 2 ranks hangs")


@pytest.mark.parametrize(
    ("text", "verdict"), [("1\n", "warn"), ("2\n", "warn"), ("0\n", "ok"), (None, "ok")]
)
def test_numa_balancing_is_warned_of(
    context: Context, monkeypatch: pytest.MonkeyPatch, text: str | None, verdict: str
) -> None:
    path = context.folder / "numa_balancing"
    if text is not None:
        path.write_text(text)
    monkeypatch.setattr(machine, "NUMA_BALANCING", path)
    (result,) = only(machine.numa_balancing, context)
    assert result.verdict == verdict
    if verdict == "warn":
        assert result.fix == "sudo sysctl kernel.numa_balancing=0"
        assert "MI300X" in result.source


def test_sequences_are_read_and_verified(context: Context) -> None:
    folder = context.folder / "shards"
    write_shards(folder / "good", train_texts=["a b c " * 200] * 3, val_texts=["d e f"])
    (result,) = only(data.shards, replace(context, shards=folder))
    assert result.verdict == "ok" and result.figures["tokens_per_s"] > 0
    assert result.detail.startswith("good: 1 of 1 files verified, ")
    slow = replace(context, shards=folder, measured={"tokens_per_s": 1e15})
    assert only(data.shards, slow)[0].verdict == "warn"


def test_damaged_shards_are_not_ready(context: Context) -> None:
    folder = context.folder / "shards"
    for name in ("good", "damaged"):
        write_shards(folder / name, train_texts=["a b c " * 200] * 3, val_texts=["d e f"])
    rows = folder / "damaged" / "00000-000.npy"
    raw = bytearray(rows.read_bytes())
    raw[-1] ^= 1
    rows.write_bytes(raw)
    found = {result.verdict: result for result in data.shards(replace(context, shards=folder))}
    assert set(found) == {"ok", "fail"}
    assert "is damaged" in found["fail"].detail and "summer-prep repair" in found["fail"].detail
    rows.write_bytes(raw[:-100])
    assert "fail" in {result.verdict for result in data.shards(replace(context, shards=folder))}
    (result,) = only(data.shards, replace(context, shards=context.folder / "nothing"))
    assert result.verdict == "fail" and "no prepared source" in result.detail


def test_harmful_variables_are_warned_of_and_secrets_stay_out(context: Context) -> None:
    secret = {"HF_TOKEN": "hf_secret"}
    (result,) = machine.environment(context, secret)
    assert result.verdict == "ok" and "secret" not in result.detail
    chosen = {**secret, "NCCL_P2P_DISABLE": "1", "SUMMER_FAULT": "", "NCCL_IB_DISABLE": "0"}
    (warned,) = machine.environment(context, chosen)
    assert warned.verdict == "warn" and "NCCL_P2P_DISABLE=1" in warned.detail
    assert (warned.fix, "NCCL" in warned.source) == ("unset NCCL_P2P_DISABLE", True)
    assert all(effect and source for _, effect, source in machine.HARMFUL)


def test_an_old_torch_is_not_ready(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.4.1+rocm6.1")
    result = only(machine.versions, context)[0]
    assert result.verdict == "fail"
    assert "2.4.1+rocm6.1 is too old: install 2.9 or newer" in result.detail


def test_a_check_that_breaks_is_a_failure(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken_driver(context: Context) -> Any:
        raise RuntimeError("HIP error: invalid\ndevice function")

    first, *others = run_checks(context, [broken_driver, machine.versions])
    expected = "RuntimeError: HIP error: invalid device function"
    assert first == CheckResult("fail", "broken-driver", expected)
    assert others
