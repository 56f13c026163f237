"""Units on a Ray cluster whose machines all see the output folder, and the input if it is local.

Progress is by finished units. Ray runs one again elsewhere when its process or machine is lost.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any, Final

from pipeline.errors import PrepareError
from pipeline.units.job import Limit, PrepareJob, ReportProgress, RunUnit, Submit, UnitProgress
from shards.format import UnitRecord

WAIT_S: Final = 1.0
ANSWER_S: Final = 10.0
GONE_AFTER_S: Final = 30.0
"""Ray itself ends a driver, without a word, when the cluster is silent for 60 s."""
GOES_ON: Final = "start the same command again, it goes on where it stopped"


@contextlib.contextmanager
def on_ray(
    address: str, job: PrepareJob, run_unit: RunUnit, report: ReportProgress
) -> Iterator[Submit]:
    """A function that starts a unit somewhere on the cluster at `address`, or on one of our own."""
    ray = _connected(address)
    stored = ray.put(job)  # its listing may be long: it travels once a machine
    task = ray.remote(num_cpus=1, max_retries=3)(_in_ray)
    running: dict[Any, Future[UnitRecord]] = {}
    closing = threading.Event()

    def submit(position: int, limit: Limit) -> Future[UnitRecord]:
        future: Future[UnitRecord] = Future()
        running[task.remote(run_unit, stored, position, limit)] = future
        return future

    listener = threading.Thread(target=_collect, args=(ray, running, report, closing), daemon=True)
    listener.start()
    try:
        yield submit
    finally:
        closing.set()
        left = list(running)
        for unfinished in left:  # the task removes its temporary files
            ray.cancel(unfinished)
        if left:
            ray.wait(left, num_returns=len(left), timeout=ANSWER_S)
        listener.join(ANSWER_S)
        ray.shutdown()


def _collect(
    ray: Any,
    running: dict[Any, Future[UnitRecord]],
    report: ReportProgress,
    closing: threading.Event,
) -> None:
    """Settle the futures of finished tasks, or all of them if the cluster is gone."""
    address, heard = ray.get_runtime_context().gcs_address, time.monotonic()
    while not closing.is_set():
        tasks = list(running)
        try:
            done, in_order = ray.wait(tasks, timeout=WAIT_S)[0] if tasks else [], True
        except Exception:  # a cluster that goes on like this counts as gone
            done, tasks, in_order = [], [], False
        for task in done:
            try:
                record, step = ray.get(task)
                report(step)
                running.pop(task).set_result(record)
            except Exception as error:  # of the task, or of Ray
                running.pop(task).set_exception(_explained(error))
        if done or (in_order and _answers(address)):
            heard = time.monotonic()
        elif time.monotonic() - heard > GONE_AFTER_S:
            gone = PrepareError(f"the Ray cluster at {address} is gone: {GOES_ON}")
            while running:
                running.popitem()[1].set_exception(gone)
        if not tasks:
            closing.wait(WAIT_S)


def _connected(address: str) -> Any:
    """The module `ray`, connected; PrepareError if it is not there or nobody answers."""
    address = address or os.environ.get("RAY_ADDRESS", "")
    if not address:  # a cluster of our own: read when Ray is imported, it listens on loopback
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    try:
        import ray
    except ImportError as error:
        raise PrepareError(
            "--executor ray needs Ray: `pip install 'summerlm[ray]'`, or leave --executor out"
        ) from error
    if ":" in address and "://" not in address and not _answers(address):
        raise PrepareError(
            f"no Ray cluster answers at {address}: give the HOST:PORT that `ray start` printed"
        )
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a cluster of ours reports to nobody
    before = signal.getsignal(signal.SIGTERM)
    ours: dict[str, Any] = {} if address else {"include_dashboard": False}
    try:
        ray.init(
            address=address or "local", log_to_driver=False, logging_level=logging.ERROR, **ours
        )
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise PrepareError(f"Ray at {address or 'this machine'}: {error}") from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)  # Ray puts its own in place
    return ray


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_S):
            return True
    except (OSError, ValueError):
        return False


def _in_ray(
    run_unit: RunUnit, job: PrepareJob, position: int, limit: Limit
) -> tuple[UnitRecord, UnitProgress]:
    """The unit's record and its last step; runs in a process of Ray's."""
    import pyarrow as pa

    pa.set_cpu_count(1)
    steps = [UnitProgress(position)]
    record = run_unit(job, position, limit, steps.append)
    return record, steps[-1]


def _explained(error: Exception) -> BaseException:
    """Why a task failed: our own error as it was raised, or Ray's in one line."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, BaseException):
        return cause
    what = str(error).strip().split("\n")[0] or type(error).__name__
    return PrepareError(f"Ray gave a unit up after three more tries ({what}): {GOES_ON}")
