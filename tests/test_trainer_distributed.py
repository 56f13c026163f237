"""Processes: a rank that has done its work ends with 0, and freed memory stays with it."""

import os
import subprocess
import sys

import pytest

from trainer_samples import free_ports

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
