"""What all tests share: the folder of real text, which only some checkouts have beside them."""

import faulthandler
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]


def pytest_unconfigure() -> None:
    """Where a thread is left that Python waits for, the suite fails and shows it, and ends."""
    faulthandler.dump_traceback_later(60, exit=True, file=2)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The data folder beside the checkout: real rows in the schemas of the real data sets."""
    data = REPOSITORY.parent / "shared" / "data"
    if not data.is_dir():
        pytest.skip("no real text beside this checkout")
    return data


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """torch on one thread: small products gain nothing from two."""
    import torch  # most tests do without

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two small sources of random ids, fineweb and pg19."""
    from trainer_samples import make_shards

    return make_shards(tmp_path_factory.mktemp("shards"))
