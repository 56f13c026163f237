"""Which addresses a process and its descendants listen on, from /proc (Linux)."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

from tools.rehearsal.processes import family

_LISTEN = "0A"  # of /proc/net/tcp


def listening(pid: int) -> set[str]:
    """The addresses on which a process and its descendants accept connections."""
    inodes = set[str]()
    for one in family(pid):
        for handle in Path(f"/proc/{one}/fd").glob("*"):
            try:
                inodes.add(os.readlink(handle))
            except OSError:  # closed meanwhile
                continue
    return {address for address, inode in _sockets() if f"socket:[{inode}]" in inodes}


def _sockets() -> Iterator[tuple[str, str]]:
    for table, kind in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == _LISTEN:
                yield socket.inet_ntop(kind, _network_order(words[1].partition(":")[0])), words[9]


def _network_order(text: str) -> bytes:
    """The kernel prints an address as numbers of four bytes, each in the machine's order."""
    data = bytes.fromhex(text)
    return b"".join(data[i : i + 4][::-1] for i in range(0, len(data), 4))
