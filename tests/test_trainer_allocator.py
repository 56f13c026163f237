"""Freed memory is kept: the next tensor's pages are there, and the kernel has nothing to zero."""

import subprocess
import sys

import pytest

COUNT = """
import resource, sys
import torch
from trainer.distributed.allocator import keep_freed_memory

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
