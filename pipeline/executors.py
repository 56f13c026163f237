"""Who runs the units: this process, a pool of processes, or a Ray cluster.

All of them run `run_unit`; they differ in where. Each is a context that gives a `Submit`.
`--part I/N` needs no executor of its own: it is a choice of units, made in prepare.py.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.errors import PrepareError
from pipeline.work import Job, Limit, Report, Step, run_unit
from shards.format import Receipt

Submit = Callable[[int, Limit], "Future[Receipt]"]


@dataclass(frozen=True)
class Executor:
    """Where units run: `workers` at once, on this machine or on a Ray cluster at `address`."""

    kind: Literal["local", "ray"] = "local"
    workers: int = 1
    address: str = ""

    @property
    def at_once(self) -> int:
        """Units handed out at a time; a cluster knows for itself how many it can run."""
        return 1000 if self.kind == "ray" else self.workers

    @contextlib.contextmanager
    def running(self, job: Job, n_units: int, report: Report) -> Iterator[Submit]:
        """A function that starts a unit; `report` hears of the work as it is done."""
        if self.kind == "ray":
            with _ray(self.address, job, report) as submit:
                yield submit
        elif min(self.workers, n_units) > 1:
            with _pool(min(self.workers, n_units), job, report) as submit:
                yield submit
        else:
            yield lambda position, limit: _at_once(job, position, limit, report)


def default_workers() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _at_once(job: Job, position: int, limit: Limit, report: Report) -> Future[Receipt]:
    future: Future[Receipt] = Future()
    future.set_result(run_unit(job, position, limit, report))
    return future


@contextlib.contextmanager
def _pool(workers: int, job: Job, report: Report) -> Iterator[Submit]:
    """Processes of this machine. They end with the one that started them, however it ends."""
    context = multiprocessing.get_context("spawn")
    steps = context.SimpleQueue()
    listener = threading.Thread(target=_listen, args=(steps, report), daemon=True)
    listener.start()
    pool = ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(job, steps))
    try:
        yield lambda position, limit: pool.submit(_in_pool, position, limit)
        pool.shutdown(wait=True)
        steps.put(None)
        listener.join()
    except BaseException as error:
        # What the others are at is done again the next time. (3.14 has terminate_workers for this.)
        for process in list((pool._processes or {}).values()):
            process.terminate()
        pool.shutdown(wait=True, cancel_futures=True)
        if isinstance(error, BrokenProcessPool):
            raise PrepareError(
                "a worker process was ended from outside (out of memory?): start the same command "
                "again, it goes on where it stopped; fewer --workers need less memory"
            ) from error
        raise


_worker: dict[str, Any] = {}
"""What `_begin` gave this worker process: the job and the queue of steps."""


def _begin(job: Job, steps: Any) -> None:
    import pyarrow as pa

    pa.set_cpu_count(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; one answers
    _worker.update(job=job, steps=steps)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: Any) -> None:
    """End this process when the one that started it is gone: nobody waits for its work."""
    multiprocessing.connection.wait([sentinel])
    os._exit(1)


def _in_pool(position: int, limit: Limit) -> Receipt:
    return run_unit(_worker["job"], position, limit, _worker["steps"].put)


def _listen(steps: Any, report: Report) -> None:
    while isinstance(step := steps.get(), Step):
        report(step)


@contextlib.contextmanager
def _ray(address: str, job: Job, report: Report) -> Iterator[Submit]:
    """A Ray cluster whose machines all see the output folder, and the input if it is local."""
    try:
        import ray
    except ImportError as error:
        raise PrepareError(
            "--executor ray needs Ray: `pip install 'summerlm[ray]'`, or leave --executor out"
        ) from error
    ray.init(address=address or None, ignore_reinit_error=True, log_to_driver=False)
    remote = ray.remote(num_cpus=1, max_retries=3)(_in_ray)

    def submit(position: int, limit: Limit) -> Future[Receipt]:
        future: Future[Receipt] = Future()
        reference = remote.remote(job, position, limit)
        reference.future().add_done_callback(lambda done: _settle(future, done, report))
        return future

    try:
        yield submit
    finally:
        ray.shutdown()


def _in_ray(job: Job, position: int, limit: Limit) -> tuple[Receipt, Step]:
    steps: list[Step] = []
    receipt = run_unit(job, position, limit, steps.append)
    return receipt, sum(steps, Step())


def _settle(future: Future[Receipt], done: Any, report: Report) -> None:
    """Hand on what became of a Ray task."""
    if error := done.exception():
        future.set_exception(getattr(error, "cause", None) or error)
        return
    receipt, step = done.result()
    report(step)
    future.set_result(receipt)
