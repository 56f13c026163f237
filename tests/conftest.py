"""What all tests share: the folder of real text, which only some checkouts have beside them."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared() -> Path:
    """The data folder beside the checkout: real rows in the schemas of the real data sets."""
    data = REPOSITORY.parent / "shared" / "data"
    if not data.is_dir():
        pytest.skip("no real text beside this checkout")
    return data


@pytest.fixture(scope="session", autouse=True)
def python_can_exit() -> Iterator[None]:
    """A thread that Python waits for at its exit is an error, not a suite that never ends."""
    yield
    waited_for = [
        thread
        for thread in threading.enumerate()
        if not thread.daemon and thread is not threading.main_thread()
    ]
    assert not waited_for, waited_for


@pytest.fixture
def one_thread() -> Iterator[None]:
    """torch on one thread: small products gain nothing from two."""
    import torch  # most tests do without

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
