"""Who runs the units: this process, a pool of processes, or a Ray cluster (cluster.py).

Each is a context that gives a `Submit`. `--part I/N` is a choice of units, made in prepare.py.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

from pipeline.errors import PrepareError
from pipeline.inputs.inputs import LocalInputs
from pipeline.units.job import Limit, PrepareJob, ReportProgress, Submit, UnitProgress
from pipeline.units.work import run_unit
from shards.format import UnitRecord


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

    def running(
        self, job: PrepareJob, n_units: int, report: ReportProgress
    ) -> AbstractContextManager[Submit]:
        """A function that starts a unit; `report` hears of the work as it is done."""
        if self.kind == "ray":
            from pipeline.units.cluster import on_ray

            return on_ray(self.address, job, run_unit, report)
        if (workers := min(self.workers, n_units)) > 1:
            return _pool(workers, job, report)

        def run_here(position: int, limit: Limit) -> Future[UnitRecord]:
            future: Future[UnitRecord] = Future()
            future.set_result(run_unit(job, position, limit, report))
            return future

        return nullcontext(run_here)


def default_workers() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


@contextlib.contextmanager
def _pool(workers: int, job: PrepareJob, report: ReportProgress) -> Iterator[Submit]:
    """Processes of this machine. They end with the one that started them, however it ends."""
    context = multiprocessing.get_context("fork" if _may_fork(job) else "spawn")
    steps = context.SimpleQueue()
    listener = threading.Thread(target=_listen, args=(steps, report), daemon=True)
    pool = ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(job, steps))

    def submit(position: int, limit: Limit) -> Future[UnitRecord]:
        with _undisturbed_start():  # it starts a process, until there are enough
            return pool.submit(_in_pool, position, limit)

    try:
        if context.get_start_method() == "fork":
            with _undisturbed_start(), warnings.catch_warnings():
                # Python 3.12 warns of threads at a fork; NumPy's and Arrow's are prepared for one
                warnings.filterwarnings("ignore", ".*multi-threaded.*fork", DeprecationWarning)
                pool.submit(os.getpid)  # all are forked now, before there is a thread
        listener.start()
        yield submit
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


def _may_fork(job: PrepareJob) -> bool:
    """Whether workers may begin as copies of this process, which saves each half a second.

    A thread of ours might hold a lock in the moment of the fork, and a connection to the Hub must
    not be shared: then they are spawned.
    """
    alone = sys.platform == "linux" and threading.active_count() == 1
    return alone and isinstance(job.inputs, LocalInputs)


@contextlib.contextmanager
def _undisturbed_start() -> Iterator[None]:
    """Processes started here do not run the user's script again, and signals wait until they are.

    Python imports the script into every process it spawns: one that calls `prepare` without
    `if __name__ == "__main__"` would prepare again in each. Workers need nothing of it.
    """
    script, sys.modules["__main__"] = sys.modules["__main__"], ModuleType("__main__")
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # a new process inherits it
    heard: list[int] = []
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):  # half a start ends in a child's traceback
            if callable(signal.getsignal(number)):
                before[number] = signal.signal(number, lambda number, _: heard.append(number))
    try:
        yield
    finally:
        sys.modules["__main__"] = script
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in before.items():
            signal.signal(number, handler)
        if heard:
            signal.raise_signal(heard[0])


_worker: dict[str, Any] = {}
"""What `_begin` gave this worker process: the job and the queue of steps."""


def _begin(job: PrepareJob, steps: Any) -> None:
    import pyarrow as pa

    pa.set_cpu_count(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; one answers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _worker.update(job=job, steps=steps)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: Any) -> None:
    """End this process when the one that started it is gone: nobody waits for its work."""
    multiprocessing.connection.wait([sentinel])
    os._exit(1)


def _in_pool(position: int, limit: Limit) -> UnitRecord:
    return run_unit(_worker["job"], position, limit, _worker["steps"].put)


def _listen(steps: Any, report: ReportProgress) -> None:
    while isinstance(step := steps.get(), UnitProgress):
        report(step)
