"""Units on a Ray cluster whose machines all see the output folder, and the input if it is local.

A unit is a task. It tells an actor beside the driver how far it is, and the driver asks that actor
every second. Ray runs a task again elsewhere when its process or its machine is lost.
"""

from __future__ import annotations

import contextlib
import functools
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
from pipeline.units.work import Job, Limit, Report, Step, Submit, run_unit
from shards.format import Receipt

STEP_INTERVAL_S: Final = 1.0
ANSWER_S: Final = 10.0
GONE_AFTER_S: Final = 30.0
"""Ray itself ends a driver, without a word, when the cluster is silent for 60 s."""
GOES_ON: Final = "start the same command again, it goes on where it stopped"


@contextlib.contextmanager
def on_ray(address: str, job: Job, report: Report) -> Iterator[Submit]:
    """A function that starts a unit somewhere on the cluster at `address`, or on one of our own."""
    ray = _connected(address)
    cluster = _Cluster(ray, job, report)
    try:
        yield cluster.submit
    finally:
        cluster.close()


class _Cluster:
    """The driver's side: what it asked for, and who listens for news."""

    def __init__(self, ray: Any, job: Job, report: Report) -> None:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        context = ray.get_runtime_context()
        here = NodeAffinitySchedulingStrategy(context.get_node_id(), soft=False)
        self._ray, self._report, self._address = ray, report, context.gcs_address
        self._news = ray.remote(num_cpus=0, scheduling_strategy=here)(_News).remote()
        self._job = ray.put(job)  # its listing may be long: it travels once a machine
        self._task = ray.remote(num_cpus=1, max_retries=3)(_in_ray)
        self._open: dict[Future[Receipt], tuple[int, Any]] = {}
        self._closing = threading.Event()
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def submit(self, position: int, limit: Limit) -> Future[Receipt]:
        """Hand a unit to the cluster."""
        future: Future[Receipt] = Future()
        task = self._task.remote(self._job, position, limit, self._news)
        self._open[future] = position, task
        task.future().add_done_callback(functools.partial(self._settle, future))
        return future

    def close(self) -> None:
        """Leave the cluster; what is not done by now is not wanted."""
        self._closing.set()
        tasks = [task for _, task in list(self._open.values())]
        for task in tasks:  # it removes its temporary files
            self._ray.cancel(task)
        if tasks:
            self._ray.wait(tasks, num_returns=len(tasks), timeout=ANSWER_S)
        self._listener.join(ANSWER_S)
        self._ray.shutdown()

    def _settle(self, future: Future[Receipt], done: Any) -> None:
        self._open.pop(future, None)
        if future.done():
            return
        if error := done.exception():
            future.set_exception(_told(error))
            return
        receipt, step = done.result()
        self._report(step)
        future.set_result(receipt)

    def _listen(self) -> None:
        heard = time.monotonic()
        while not self._closing.wait(STEP_INTERVAL_S):
            with contextlib.suppress(self._ray.exceptions.RayError):
                news = self._ray.get(self._news.take.remote(), timeout=ANSWER_S)
                at_work = {position for position, _ in list(self._open.values())}
                for step in news:  # of a unit that is done its last step is known
                    if step.unit in at_work:
                        self._report(step)
            if _answers(self._address):
                heard = time.monotonic()
            elif time.monotonic() - heard > GONE_AFTER_S:
                self._give_up()
                return

    def _give_up(self) -> None:
        error = PrepareError(f"the Ray cluster at {self._address} is gone: {GOES_ON}")
        for future in list(self._open):
            self._open.pop(future)
            future.set_exception(error)


class _News:
    """What the tasks have told, until the driver asks."""

    def __init__(self) -> None:
        self._steps: list[Step] = []

    def tell(self, step: Step) -> None:
        self._steps.append(step)

    def take(self) -> list[Step]:
        taken, self._steps = self._steps, []
        return taken


def _connected(address: str) -> Any:
    """The module `ray`, connected; PrepareError if it is not there or nobody answers."""
    try:
        import ray
    except ImportError as error:
        raise PrepareError(
            "--executor ray needs Ray: `pip install 'summerlm[ray]'`, or leave --executor out"
        ) from error
    address = address or os.environ.get("RAY_ADDRESS", "")
    if ":" in address and "://" not in address and not _answers(address):
        raise PrepareError(
            f"no Ray cluster answers at {address}: give --address the HOST:PORT that "
            "`ray start --head` printed, or leave it out"
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


def _in_ray(job: Job, position: int, limit: Limit, news: Any) -> tuple[Receipt, Step]:
    """The receipt and the last step; runs in a process of Ray's."""
    import pyarrow as pa

    pa.set_cpu_count(1)
    last, told = Step(position), 0.0

    def report(step: Step) -> None:
        nonlocal last, told
        last = step
        if not step.text_bytes or time.monotonic() - told > STEP_INTERVAL_S:
            told = time.monotonic()
            news.tell.remote(step)

    return run_unit(job, position, limit, report), last


def _told(error: Any) -> BaseException:
    """What a task failed of: our own error as it was raised, or Ray's in one line."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, BaseException):
        return cause
    what = str(error).strip().split("\n")[0] or type(error).__name__
    return PrepareError(f"Ray gave a unit up after three more tries ({what}): {GOES_ON}")
