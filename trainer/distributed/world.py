"""Ranks: joining them, adding up over them, deciding once for all; requests to stop, lost ranks."""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Final, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore
from torch.distributed.constants import default_pg_timeout
from torch.distributed.tensor import DTensor

from trainer.distributed.devices import check_devices, pick_device
from trainer.distributed.rendezvous import meet_ranks
from trainer.errors import ConfigError, LostRankError

T = TypeVar("T")

_RELEASE_S: Final = 0.05
_AGAIN_S: Final = 1.0  # a terminal and the launcher both send a rank the same Ctrl-C
_PEERS_S: Final = 600.0  # how long a rank waits for the others to come
_NUMBERS: Final = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
"""What torchrun sets in the environment of each process, besides `_MASTER`."""

_MASTER: Final = ("MASTER_ADDR", "MASTER_PORT")
_ALIKE: Final = (
    ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_TASKS_PER_NODE"),
    tuple(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "LOCAL_RANK", "SIZE", "LOCAL_SIZE")),
)
"""The same numbers as srun and mpirun set them."""

STOP_SIGNALS: Final = (
    signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2,
)  # fmt: skip
"""A scheduler's, Ctrl-C, a closed terminal (unless under nohup), and those of sbatch --signal."""

_TRANSPORTS: Final = ("gloo", "NCCL", "Connection", "ProcessGroup")


@dataclass(frozen=True)
class World:
    """This process among its ranks. With one rank, every collective is the identity."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    device: torch.device
    group: dist.ProcessGroup | None = None  # of its collectives; None: the default one

    @property
    def is_main(self) -> bool:
        """Whether this rank is the one that writes and prints."""
        return self.rank == 0

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of `tensor` over all ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def gather(self, value: T) -> list[T]:
        """Every rank's value, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[T | None] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values  # type: ignore[return-value]  # each None has been replaced

    def on_all(self, act: Callable[[], T]) -> list[T]:
        """What `act` returns on every rank; what it raises on any of them, on every rank."""
        outcomes = self.gather(_attempt(act))
        for _, failure in outcomes:
            if failure is not None:
                raise failure
        return [value for value, _ in outcomes]  # type: ignore[misc]  # none has failed

    def on_main(self, act: Callable[[], T]) -> T:
        """What `act` returns or raises on the main rank, on every rank: none waits in vain."""
        outcome = [_attempt(act) if self.is_main else (None, None)]
        if self.world_size > 1:
            device = torch.device("cpu")
            dist.broadcast_object_list(outcome, src=0, group=self.group, device=device)
        value, failure = outcome[0]
        if failure is not None:
            raise failure
        return value  # type: ignore[return-value]

    def with_own_group(self) -> World:
        """The same ranks on a process group of their own, to be used from another thread."""
        return self if self.world_size == 1 else replace(self, group=dist.new_group(backend="gloo"))


def local_tensor(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor: its slice where it is sharded, else all of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_count(tensor: Tensor) -> int:
    """How many ranks hold one copy of a tensor between them."""
    mesh = tensor.device_mesh if isinstance(tensor, DTensor) else None
    return 1 if mesh is None else mesh.size(mesh.ndim - 1)


def _attempt(act: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return act(), None
    except Exception as error:
        return None, error


def adopt_launcher(environment: MutableMapping[str, str]) -> str:
    """Spell what srun or mpirun says as torchrun does; drop what is incomplete, and return a note.

    A complete set is a launcher's four numbers with MASTER_ADDR and MASTER_PORT.
    """
    given = {name: environment[name] for name in _NUMBERS if name in environment}
    absent = [name for name in (*_NUMBERS, *_MASTER) if name not in environment]
    if not given and absent == list(_NUMBERS):
        for names in _ALIKE:
            values = [environment.get(name, "").partition("(")[0] for name in names]
            if all(value.isdigit() for value in values):  # "4(x2)" is Slurm's 4 on each of 2
                environment.update(zip(_NUMBERS, values, strict=True))
                return ""
    if not given or not absent:
        return ""
    for name in given:
        del environment[name]
    spelled = " ".join(f"{name}={value}" for name, value in given.items())
    return f"! {spelled} without {', '.join(absent)}: ignored, this process trains on its own"


def launched_by_torchrun() -> bool:
    """Whether this process is one of several that torchrun, or the like, started."""
    return all(name in os.environ for name in _NUMBERS)


def restarted_by_torchrun() -> bool:
    """Whether torchrun has started this job before, and a rank of it was lost."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


@contextlib.contextmanager
def join_world(device: str, hang_timeout_s: float = 0.0) -> Iterator[World]:
    """This process as a rank: its device chosen, its threads set, the process group joined.

    A collective waits at least twice `hang_timeout_s`, so that who watches the ranks names the one
    that hangs before NCCL or RCCL, whose own limit is 600 s, ends them all without a name.
    """
    rank, local_rank, world_size, local_world_size = (
        int(os.environ[name]) if launched_by_torchrun() else default
        for name, default in zip(_NUMBERS, (0, 0, 1, 1), strict=True)
    )
    kind = pick_device(device)
    check_devices(kind, local_world_size)  # on all of them: the others would wait for one that left
    if kind == "cuda":
        torch.cuda.set_device(local_rank)
    elif world_size > 1:
        # torchrun gives every process one thread, whatever the machine has
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_world_size))
    place = torch.device(kind, local_rank) if kind == "cuda" else torch.device(kind)
    if world_size > 1:
        # objects and flags travel on gloo, so that they never queue behind gradients
        backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
        _join(backend, rank, world_size, world_size == local_world_size, hang_timeout_s)
    try:
        yield World(rank, local_rank, world_size, local_world_size, place)
    finally:
        if world_size > 1:
            _leave()


def _join(
    backend: str, rank: int, world_size: int, one_machine: bool, hang_timeout_s: float
) -> None:
    """Join the process group, under names of this start alone.

    A launcher that serves the ranks' store (torchrun 2.13) keeps it over its restarts, with the
    addresses of the former ranks, which gloo would dial for 30 s. A store that rank 0 serves is new
    each time, and its ranks may not count alike: a host that came back has started nothing before.
    """
    # its functions keep, as a default, the group that is there when it is first imported: none yet
    importlib.import_module("torch.distributed.nn.functional")
    store = meet_ranks(rank, one_machine)
    kept = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if kept else "0"
    named = PrefixStore(f"attempt-{attempt}", store)
    _wait_for_peers(named, world_size)
    timeout = max(default_pg_timeout, timedelta(seconds=2 * hang_timeout_s))
    dist.init_process_group(backend, store=named, rank=rank, world_size=world_size, timeout=timeout)


def _wait_for_peers(store: PrefixStore, world_size: int) -> None:
    """Return when every rank is here; ConfigError after `_PEERS_S`. Can be interrupted."""
    here, deadline = store.add("here", 1), time.monotonic() + _PEERS_S
    while here < world_size:
        if time.monotonic() > deadline:
            raise ConfigError(
                f"{here} of {world_size} ranks came within {_PEERS_S:.0f} s: start the others too, "
                "and see whether their machines reach MASTER_ADDR and MASTER_PORT"
            )
        time.sleep(_RELEASE_S)
        here = store.add("here", 0)


def _leave() -> None:
    """Leave the process group, and let its threads release their last tensors.

    A thread of gloo that drops a tensor takes Python's lock for it. One that still waits for it
    when Python ends aborts the process: one in 25 evaluations by two processes printed its score
    and then died of SIGABRT (torch 2.13).
    """
    dist.destroy_process_group()
    time.sleep(_RELEASE_S)


@contextlib.contextmanager
def listen_for_stop() -> Iterator[Callable[[], bool]]:
    """A function that says whether one of `STOP_SIGNALS` has asked this process to stop."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set  # handlers belong to the main thread; here there are none
        return
    first_s = 0.0

    def ask(number: int, frame: object) -> None:
        nonlocal first_s
        if number == signal.SIGINT and asked.is_set() and time.monotonic() - first_s > _AGAIN_S:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if not asked.is_set() and number == signal.SIGINT and os.environ.get("RANK", "0") == "0":
            os.write(2, b"\nstopping after this step; Ctrl-C again to end now, without saving\n")
        first_s = first_s or time.monotonic()
        asked.set()

    under_nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    numbers = [n for n in STOP_SIGNALS if n != signal.SIGHUP or not under_nohup]
    before = {number: signal.signal(number, ask) for number in numbers}
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def translate_comm_errors(world: World) -> Iterator[None]:
    """Turn torch's error in a reduction that misses a rank into LostRankError."""
    try:
        yield
    except RuntimeError as error:
        if world.world_size > 1 and any(word in str(error) for word in _TRANSPORTS):
            first = re.sub(r"^\[[^]]*\]\s*", "", str(error)).partition("\n")[0].partition(". ")[0]
            raise LostRankError(
                f"rank {world.rank} lost another rank ({first}); the last checkpoint is intact: "
                "torchrun restarts all ranks, as often as --max-restarts says"
            ) from error
        raise
