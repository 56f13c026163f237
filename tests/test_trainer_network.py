"""Nobody outside reaches a job: what each command listens on; ranks end with their launcher."""

import hashlib
import hmac
import os
import pickle
import shlex
import signal
import socket
import subprocess
import sys
import time
from base64 import b64decode, b64encode
from pathlib import Path

import pytest
from torch._C._distributed_c10d import HashStore
from torch.distributed import DistStoreError
from torch.distributed.elastic.rendezvous import (
    RendezvousConnectionError,
    RendezvousStateError,
    RendezvousTimeoutError,
)

from listening import listening
from shards.errors import SummerError
from test_trainer_processes import LIMIT_S, command, started, wait_for_step
from tools.rehearsal.processes import family
from trainer.checkpoint.runs import checkpoints
from trainer.distributed.machines import machine_counts, relaunch_after_loss
from trainer.distributed.rendezvous import _Machines, bound_store, local_address
from trainer.errors import ConfigError, TrainingError
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


class Spoiled:
    """What a stranger would have unpickled: it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def test_what_machines_meet_with_is_signed_with_the_name_of_the_job(tmp_path: Path) -> None:
    """The name is not sent, and what was written without it is never unpickled."""
    store = HashStore()
    one, other = _Machines(store, "secret"), _Machines(store, "secret")
    assert one.get_state() is None
    written = one.set_state(b"state")
    assert written is not None and written[0] == b"state" and written[2]
    found = other.get_state()
    assert found is not None and found[0] == b"state"
    assert other.set_state(b"second", found[1]) is not None
    late = one.set_state(b"third", written[1])  # another was quicker
    assert late is not None and late[0] == b"second" and not late[2]
    none_of_its = one.set_state(b"fourth", 7)
    assert none_of_its is not None and not none_of_its[2]

    key = f"torch.rendezvous.{hashlib.sha256(b'secret').hexdigest()}"
    assert b64decode(store.get(key))[32:] == b"second"
    for signature in (b"", bytes(32), hmac.digest(b"another", b"x", "sha256")):
        store.set(key, b64encode(signature + pickle.dumps(Spoiled(tmp_path / "spoiled"))).decode())
        with pytest.raises(RendezvousStateError, match="not of this --rdzv-id"):
            one.get_state()
    assert not (tmp_path / "spoiled").exists()


@pytest.mark.parametrize("text", ["0", "", "2:1", "1:", "a", "-1", "1:2:3"])
def test_a_number_of_machines_that_is_none(text: str) -> None:
    with pytest.raises(ConfigError, match="give a number of machines, or least:most as in 1:2"):
        machine_counts(text)


def test_numbers_of_machines() -> None:
    assert (machine_counts("2"), machine_counts("1:4")) == ((2, 2), (1, 4))


def test_a_launcher_tries_again_when_the_machine_where_all_meet_is_back(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("trainer.distributed.machines.RETURN_S", 3.0)
    (port,) = free_ports(1)
    where, lost = f"127.0.0.1:{port}", iter([RendezvousConnectionError(), DistStoreError()])

    def launch() -> None:
        for error in lost:
            raise error

    with pytest.raises(TrainingError, match=f"{where}, where .* did not come back within 0 min"):
        relaunch_after_loss(launch, where, 3)
    with socket.create_server(("127.0.0.1", port)):
        relaunch_after_loss(launch, where, 3)
        assert capsys.readouterr().err.count(f"! {where}, where the machines meet, was lost") == 2
        lost = iter([RendezvousConnectionError()] * 9)
        with pytest.raises(TrainingError, match="was lost 3 times: run the same command again"):
            relaunch_after_loss(launch, where, 2)
        lost = iter([RendezvousTimeoutError()])
        with pytest.raises(TrainingError, match="the other machines did not come to"):
            relaunch_after_loss(launch, where, 2)
        lost = iter([RendezvousStateError("not of this --rdzv-id")])
        with pytest.raises(TrainingError, match="not of this --rdzv-id: run the same command"):
            relaunch_after_loss(launch, where, 2)


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
