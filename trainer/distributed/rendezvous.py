"""Where launchers and ranks meet: on loopback on one machine, else on the one named address.

torch's stores listen on every interface of a machine, and whoever reaches one can write into it:
what torchrun unpickles from there (2.13) is then a stranger's code. So each store here is given a
socket that is bound already; on one machine nothing is unpickled at all, and among several only
what is signed with the name of the job.
"""

from __future__ import annotations

import copy
import errno
import hashlib
import hmac
import os
import socket
from datetime import timedelta
from typing import Final

from torch import distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStateError,
    rendezvous_handler_registry,
)
from torch.distributed.elastic.rendezvous.api import RendezvousStoreInfo
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import Token, create_handler
from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

from shards.errors import SummerError
from trainer.distributed.machines import PORT

ONE_MACHINE: Final = "summer-one-machine"
"""Name of a rendezvous, as --rdzv-backend takes it, of one launcher with itself."""

MACHINES: Final = "summer-machines"
"""torchrun's c10d, whose store listens on the address of --rdzv-endpoint alone."""

_SIGNATURE_BYTES: Final = 32
_LOOPBACK: Final = "127.0.0.1"
_STORE_S: Final = timedelta(seconds=60)
"""How long a launcher waits for an answer of the store, which a cut link leaves silent."""


def bound_store(host: str, port: int) -> TCPStore:
    """The store at `host`, served by this process on that address alone if it is free here.

    Port 0 is any free one. SummerError for a name that nobody knows.
    """
    try:
        listening = _bind(host, port)
    except OSError as error:
        where = f"{host}:{port}"
        raise SummerError(f"{where}, where ranks meet: {error.strerror or error}") from error
    if listening is None:
        (store := _client(host, port)).set_timeout(_STORE_S)
        return store
    port = listening.getsockname()[1]
    return TCPStore(
        host, port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach()
    )


def meet_ranks(rank: int, one_machine: bool) -> TCPStore:
    """The store of all ranks, at MASTER_ADDR:MASTER_PORT: torchrun's, or else rank 0 serves it.

    gloo and NCCL listen on loopback from now on, or on the interface that leads to MASTER_ADDR,
    unless their variables name one already.
    """
    master, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    _use_one_interface(master, one_machine)
    if rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return bound_store(master, port)
    return _client(master, port)


def _client(host: str, port: int) -> TCPStore:
    try:
        return TCPStore(host, port, is_master=False)
    except dist.DistError as error:  # after 300 s
        raise SummerError(
            f"nobody answers at {host}:{port}, where ranks meet: start rank 0 there first"
        ) from error


def _use_one_interface(master: str, one_machine: bool) -> None:
    name = _interface_of(_LOOPBACK if one_machine else local_address(master))
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if name else ():
        os.environ.setdefault(variable, name)


def local_address(master: str) -> str:
    """This machine's address on the way to `master`; "" where there is no way."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(master, PORT, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)  # of a datagram socket: nothing is sent
            return str(probe.getsockname()[0])
    except OSError:
        return ""


def _bind(host: str, port: int) -> socket.socket | None:
    """A socket at an address; None where it is taken, or belongs to another machine."""
    family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    if str(address[0]).startswith("127.") and host != "localhost" and not host.startswith("127."):
        raise SummerError(  # as Debian's /etc/hosts has it: other machines would find themselves
            f"{host} is {address[0]} on this machine, which no other reaches: give its address on "
            "the network"
        )
    bound = socket.socket(family, kind)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(address)
    except OSError as error:
        bound.close()
        if error.errno in (errno.EADDRINUSE, errno.EADDRNOTAVAIL):
            return None
        raise
    return bound


def _interface_of(address: str) -> str:
    """The name of the interface that has an IPv4 address, or "" (of macOS and IPv6: unknown)."""
    import fcntl

    asked_for_address = 0x8915  # SIOCGIFADDR
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe, asked_for_address, name.encode().ljust(256, b"\0"))
            except OSError:  # it has none
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return ""


class _OneMachine(StaticTCPRendezvous):
    """A launcher that meets nobody: its ranks find its store on loopback."""

    def __init__(self, parameters: RendezvousParameters) -> None:
        self._bound = bound_store(_LOOPBACK, 0)  # torch's own would listen on all interfaces
        super().__init__(_LOOPBACK, self._bound.port, 0, 1, parameters.run_id, timeout=0)

    def get_backend(self) -> str:
        return ONE_MACHINE

    def next_rendezvous(self) -> RendezvousInfo:
        where = RendezvousStoreInfo(_LOOPBACK, self._bound.port)
        return RendezvousInfo(PrefixStore(self.run_id, self._bound), 0, 1, where)


class _Machines(C10dRendezvousBackend):
    """torchrun's way to meet over a store; what is unpickled is of those who know --rdzv-id.

    The name itself is never sent, only its hash.
    """

    def __init__(self, store: Store, secret: str) -> None:
        self._secret = secret.encode()
        super().__init__(store, hashlib.sha256(self._secret).hexdigest())

    @property
    def name(self) -> str:
        return MACHINES

    def get_state(self) -> tuple[bytes, Token] | None:
        found = super().get_state()
        return None if found is None else (self._verified(found[0]), found[1])

    def set_state(
        self, state: bytes, token: Token | None = None
    ) -> tuple[bytes, Token, bool] | None:
        if token and not isinstance(token, bytes):  # never the one that is there
            found = self.get_state()
            return None if found is None else (*found, False)
        written = super().set_state(self._signature(state) + state, token)
        return None if written is None else (self._verified(written[0]), *written[1:])

    def _signature(self, state: bytes) -> bytes:
        return hmac.digest(self._secret, state, "sha256")

    def _verified(self, signed: bytes) -> bytes:
        signature, state = signed[:_SIGNATURE_BYTES], signed[_SIGNATURE_BYTES:]
        if not hmac.compare_digest(signature, self._signature(state)):
            raise RendezvousStateError("what the machines meet with is not of this --rdzv-id")
        return state


def _meet_machines(parameters: RendezvousParameters) -> RendezvousHandler:
    host, port = parse_rendezvous_endpoint(parameters.endpoint, PORT)
    backend = _Machines(store := bound_store(host, port), parameters.run_id)
    hidden = copy.copy(parameters)
    hidden.run_id = hashlib.sha256(parameters.run_id.encode()).hexdigest()
    return create_handler(store, backend, hidden)


rendezvous_handler_registry.register(ONE_MACHINE, _OneMachine)
rendezvous_handler_registry.register(MACHINES, _meet_machines)
