"""Nobody outside reaches a job: what each command listens on; ranks end with their launcher."""

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from listening import family, listening
from shards.errors import SummerError
from test_trainer_processes import LIMIT_S, command, started, wait_for_step
from trainer.checkpoint.runs import checkpoints
from trainer.distributed.rendezvous import bound_store, local_address
from trainer.metrics.metrics import read_metrics
from trainer_samples import free_ports, make_shards, set_texts

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
LOOPBACK = {"127.0.0.1"}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("shards"), fineweb=300, the_stack=90, slimorca=9)


def test_a_store_listens_where_it_is_told_to(tmp_path: Path) -> None:
    store = bound_store("127.0.0.1", 0)
    assert listening(os.getpid()) == LOOPBACK
    store.set("key", "value")
    assert bound_store("127.0.0.1", store.port).get("key") == b"value"  # taken: a client of it
    with pytest.raises(SummerError, match=r"nowhere\.invalid:29500, where ranks meet: "):
        bound_store("nowhere.invalid", 29500)


def test_a_name_that_only_this_machine_knows_is_no_place_to_meet(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Debian's /etc/hosts gives a machine's own name the address 127.0.1.1."""
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.1.1", 29500))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *of, **how: found)
    with pytest.raises(SummerError, match=r"node-0 is 127\.0\.1\.1 on this machine"):
        bound_store("node-0", 29500)


def test_the_way_to_an_address_names_our_own() -> None:
    assert local_address("127.0.0.1") == "127.0.0.1"
    assert local_address("nowhere.invalid") == ""


@pytest.mark.slow
def test_a_job_on_one_machine_listens_on_loopback_and_ends_with_its_launcher(
    shards: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    sets = set_texts(max_steps=5000, loader__num_workers=1)
    process = started(command(shards, run, "--nproc", "2", sets=sets), tmp_path / "log")
    ranks = list[int]()
    try:
        wait_for_step(process, run, 2)
        assert listening(process.pid) == LOOPBACK
        ranks = family(process.pid)[1:]
    finally:
        process.kill()
        process.wait()
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in ranks):
        assert time.monotonic() < deadline, (tmp_path / "log").read_text()
        time.sleep(0.05)
    assert checkpoints(run), "the ranks saved before they ended"
    assert "Traceback" not in (tmp_path / "log").read_text()


@pytest.mark.slow
def test_launchers_that_meet_listen_on_the_named_address_alone(
    shards: Path, tmp_path: Path
) -> None:
    run, port = tmp_path / "run", free_ports(1)[0]
    sets = set_texts(max_steps=5000, loader__num_workers=0)
    flags = ["--nproc", "1", "--nnodes", "2", "--rdzv-backend", "c10d"]
    flags += ["--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "a-name"]
    both = [
        started(command(shards, run, *flags, sets=sets), tmp_path / f"log-{n}") for n in range(2)
    ]
    try:
        wait_for_step(both[0], run, 2)
        assert set().union(*(listening(one.pid) for one in both)) == LOOPBACK
        for one in both:
            one.send_signal(signal.SIGTERM)
        assert [one.wait(LIMIT_S) for one in both] == [75, 75], (tmp_path / "log-0").read_text()
    finally:
        for one in both:
            one.kill()
            one.wait()


@pytest.mark.slow
def test_a_job_that_was_suspended_goes_on(shards: Path, tmp_path: Path) -> None:
    """Ctrl-Z, a moved virtual machine: longer than the hang timeout, and nobody hung."""
    run = tmp_path / "run"
    sets = set_texts(max_steps=5000, loader__num_workers=0, guard__hang_timeout_s=2)
    process = started(command(shards, run, "--nproc", "2", sets=sets), tmp_path / "log")
    try:
        wait_for_step(process, run, 2)
        every = family(process.pid)
        for number in (signal.SIGSTOP, signal.SIGCONT):
            for pid in every:
                os.kill(pid, number)
            last = read_metrics(run)[-1]["step"]
            time.sleep(5 if number == signal.SIGSTOP else 0)
        wait_for_step(process, run, last + 20)
        assert family(process.pid) == every, (tmp_path / "log").read_text()
    finally:
        for pid in family(process.pid)[::-1]:
            os.kill(pid, signal.SIGKILL)
        process.wait()
    assert "no sign of life" not in (tmp_path / "log").read_text()


def test_a_reader_that_has_seen_enough_does_not_end_the_run(shards: Path, tmp_path: Path) -> None:
    """`summer-train ... | head -1`"""
    run = tmp_path / "run"
    line = shlex.join(command(shards, run, sets=set_texts(max_steps=3)))
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", f"{line} | head -1"],
        capture_output=True, text=True, timeout=LIMIT_S, check=False,
    )  # fmt: skip
    assert done.stdout.startswith("model   ")
    assert (done.returncode, done.stderr) == (0, "")
    assert checkpoints(run)[-1].name == "step-3"
