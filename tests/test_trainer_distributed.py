"""Processes: a rank that has done its work ends with 0, and freed memory stays with it."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.config

from shards.errors import SummerError
from trainer.config.config import configure
from trainer.distributed import devices, world
from trainer.errors import ConfigError
from trainer.session.network import _prepare_compiler, build_network
from trainer.start import Request, start
from trainer_samples import ALONE, free_ports, set_texts

LEAVE = """
import os, sys
from pathlib import Path
import torch, torch.distributed as dist
from trainer.distributed.world import join_world

if hasattr(os, "sched_setaffinity"):  # a thread that waits for Python's lock hardly gets it now
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
sys.setswitchinterval(10)
numbers = [torch.ones(1) for _ in range(64)]
with join_world("cpu") as world:
    {meanwhile}
    for number in numbers:
        world.all_reduce(number)
if Path("/proc/self/task").is_dir():
    names = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
    print(sum("gloo" in name for name in names))
"""
"""A rank that ends right after a reduction. Its output: how many threads of gloo are left."""


def codes_and_threads(meanwhile: str) -> set[tuple[int, str]]:
    """The exit codes and outputs of two ranks, which share one processor."""
    [port] = free_ports(1)
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", LEAVE.replace("{meanwhile}", meanwhile)],
            env={**os.environ, **shared, "RANK": place, "LOCAL_RANK": place},
            stdout=subprocess.PIPE,
            text=True,
        )
        for place in ("0", "1")
    ]
    try:
        said = [rank.communicate(timeout=100)[0].strip() for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    return {(rank.returncode, text) for rank, text in zip(ranks, said, strict=True)}


@pytest.mark.skipif(sys.platform != "linux", reason="reads the threads' names from /proc")
def test_nothing_is_left_of_the_group_whatever_is_imported_in_it() -> None:
    """A default argument that kept the group let one in 25 evaluations end with SIGABRT."""
    assert codes_and_threads("import torch.distributed.checkpoint") == {(0, "0")}


@pytest.mark.slow
def test_ranks_end_well_although_something_keeps_the_group() -> None:
    """Without the pause each rank aborts three times in four (31 of 40 did)."""
    for _ in range(3):
        assert {code for code, _ in codes_and_threads("kept = dist.group.WORLD")} == {0}


COUNT = """
import resource, sys
import torch
from trainer.distributed.devices import keep_freed_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

if sys.argv[1] == "kept":
    assert keep_freed_memory()
for _ in range(16):  # aligned blocks settle after some rounds
    torch.empty(2**24).fill_(1.0)
before = faults()
for _ in range(4):
    torch.empty(2**24).fill_(1.0)  # 64 MiB, 16,384 pages
print(faults() - before)
"""


def page_faults(how: str) -> int:
    done = subprocess.run([sys.executable, "-c", COUNT, how], capture_output=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="the C library of Linux")
def test_a_block_of_the_same_size_comes_without_page_faults() -> None:
    assert page_faults("kept") < 100 < page_faults("plain")


def joined_with(timeouts: list[timedelta], hang_timeout_s: float) -> None:
    """A process group of one rank that pretends to be one of two."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**RANK_3, "RANK": "0", "WORLD_SIZE": "2"}.items():
            patch.setenv(name, value)
        patch.setattr(world, "_leave", lambda: None)
        patch.setattr(world, "meet_ranks", lambda *of: None)
        patch.setattr(world, "PrefixStore", lambda *of: None)
        patch.setattr(world, "_wait_for_peers", lambda *of: None)
        patch.setattr(
            torch.distributed,
            "init_process_group",
            lambda *of, timeout, **how: timeouts.append(timeout),
        )
        with world.join_world("cpu", hang_timeout_s):
            pass


def test_who_watches_the_ranks_speaks_before_a_collective_gives_up() -> None:
    """NCCL's own limit is the watchdog's: which of both ended a run was chance."""
    timeouts = list[timedelta]()
    for hang_timeout_s in (0.0, 600.0, 3600.0):
        joined_with(timeouts, hang_timeout_s)
    assert [limit.total_seconds() for limit in timeouts] == [1800, 1800, 7200]


def test_a_gpu_that_torch_cannot_use_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commonest mistake on a rented machine: torch's build for the CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(devices, "_GPU_NODES", {"an AMD GPU": tmp_path / "kfd"})
    monkeypatch.setattr(torch.version, "hip", None)
    assert devices.unused_gpu() == ""
    (tmp_path / "kfd").touch()
    config = configure(preset="tiny", sets=set_texts()).config
    for built, found in (
        (None, "is built for the CPU and cannot use an AMD GPU that is here"),
        ("13.0", "does not see an AMD GPU that is here: look at its driver, at who may open"),
    ):
        monkeypatch.setattr(torch.version, "cuda", built)
        assert found in devices.unused_gpu()
        assert build_network(config, ALONE).notes[1] == f"! {devices.unused_gpu()}"
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(
        SummerError, match="is built for the CPU: install its CUDA or ROCm build; l"
    ):
        devices.pick_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert devices.unused_gpu() == ""


def test_ranks_share_the_cores_to_compile_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would start as many processes as there are cores: 256 on eight ranks."""
    monkeypatch.delenv("TORCHINDUCTOR_COMPILE_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(96)))
    with torch._inductor.config.patch(compile_threads=7):
        for ranks, threads in ((1, 32), (8, 12), (200, 1)):
            assert _prepare_compiler(replace(ALONE, local_world_size=ranks)) == []
            assert torch._inductor.config.compile_threads == threads
        monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "5")
        _prepare_compiler(ALONE)
        assert torch._inductor.config.compile_threads == 1  # as it was: the variable counts


MASTER = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
RANK_3 = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
SRUN = {
    "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}  # fmt: skip
MPIRUN = {
    f"OMPI_COMM_WORLD_{name}": value
    for name, value in (("RANK", "3"), ("LOCAL_RANK", "1"), ("SIZE", "4"), ("LOCAL_SIZE", "2"))
}


@pytest.mark.parametrize("launcher", [RANK_3, SRUN, MPIRUN])
def test_a_launchers_complete_variables_are_obeyed(launcher: dict[str, str]) -> None:
    environment = MASTER | launcher
    assert world.adopt_launcher(environment) == ""
    assert environment == MASTER | launcher | RANK_3


@pytest.mark.parametrize(
    ("given", "note"),
    [
        (
            {"WORLD_SIZE": "2"},
            "WORLD_SIZE=2 without RANK, LOCAL_RANK, LOCAL_WORLD_SIZE, MAST",
        ),
        (
            MASTER | {"RANK": "0", "WORLD_SIZE": "2"},
            "out LOCAL_RANK, LOCAL_WORLD_SIZE: ignored",
        ),
        (RANK_3, "without MASTER_ADDR, MASTER_PORT: ignored, this process trains on its own"),
        (SRUN, ""),  # a script of sbatch, or srun without a place to meet: one process
        (MASTER, ""),
    ],
)
def test_incomplete_variables_are_named_and_ignored(given: dict[str, str], note: str) -> None:
    environment = dict(given)
    assert note in world.adopt_launcher(environment)
    assert not environment.keys() & RANK_3.keys()


def test_who_waits_for_ranks_that_do_not_come_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world, "_PEERS_S", 0.2)
    for name, value in {**RANK_3, "RANK": "0", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", str(free_ports(1)[0]))
    with pytest.raises(ConfigError, match="1 of 4 ranks came within"), world.join_world("cpu"):
        pass


def test_more_processes_than_devices_are_rejected_by_every_rank(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """On an H100 the second of two ranks left alone, and the first waited for it 600 s."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for local_rank in ("0", "1"):
        for name, value in {**RANK_3, "LOCAL_RANK": local_rank}.items():
            monkeypatch.setenv(name, value)
        with (
            pytest.raises(SummerError, match="2 processes, 1 devices here: give --nproc 1"),
            world.join_world("cuda"),
        ):
            pass
    for name in RANK_3:
        monkeypatch.delenv(name)
    configured = configure(preset="tiny", sets=["device=cuda"], shards=str(tmp_path))
    with pytest.raises(SummerError, match="2 processes, 1 devices here: give --nproc 1"):
        start(Request(configured=configured, shards=str(tmp_path), nproc=2), sys.stdout)


LISTEN = """
import time
from trainer.distributed.world import listen_for_stop

with listen_for_stop() as asked:
    print("ready", flush=True)
    while not asked():
        time.sleep(0.01)
    print("asked", flush=True)
    time.sleep(60)  # a long step
"""


def test_ctrl_c_is_acknowledged_and_again_ends_at_once() -> None:
    """The same Ctrl-C comes twice, from the terminal and from the launcher: that is not again."""
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started: Any = subprocess.Popen([sys.executable, "-c", LISTEN], **pipes)
    with started as process:
        try:
            assert process.stdout.readline() == "ready\n"
            for _ in range(2):
                process.send_signal(signal.SIGINT)
            assert process.stdout.readline() == "asked\n"
            time.sleep(1.2)
            assert process.poll() is None
            process.send_signal(signal.SIGINT)
            assert process.wait(10) == -signal.SIGINT
            said = process.stderr.read().strip()
            assert said == "stopping after this step; Ctrl-C again to end now, without saving"
        finally:
            process.kill()


def test_under_nohup_a_closed_terminal_stops_nothing() -> None:
    ignore = "import signal\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
    quiet = ignore + LISTEN.replace('print("asked"', 'print("asked", time.monotonic() - began')
    quiet = quiet.replace('    print("ready"', '    began = time.monotonic()\n    print("ready"')
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started: Any = subprocess.Popen([sys.executable, "-c", quiet], **pipes)
    with started as process:
        try:
            assert process.stdout.readline() == "ready\n"
            process.send_signal(signal.SIGHUP)
            time.sleep(0.3)
            assert process.poll() is None
            process.send_signal(signal.SIGTERM)  # the first that is heard
            _, seconds = process.stdout.readline().split()
            assert float(seconds) > 0.3
        finally:
            process.kill()
