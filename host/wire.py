"""Bytes on the wire in local mode: TCP_INFO of the very connections between this process and a peer.

Rule 1: a connection counts if its remote address is the peer's and this process owns its socket.
Rule 2: counts only grow: a connection that closed keeps the last value that was seen. Sample before closing.
Rule 3: retransmitted bytes are on the wire too: they are part of `tx_bytes`, and also told apart.

sock_diag over netlink needs no privilege. gRPC connects through dual-stack sockets, so that an IPv4 peer
shows up in the IPv6 table as ::ffff:a.b.c.d; both tables are read and addresses compared in short form.
"""

from __future__ import annotations

import os
import socket
import threading
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address
from typing import TYPE_CHECKING, Any

from pyroute2 import DiagSocket
from pyroute2.netlink.diag import SS_CONN

if TYPE_CHECKING:
    from collections.abc import Iterator
    from ipaddress import IPv4Address

INET_DIAG_INFO = 2  # linux/inet_diag.h
INFO_EXTENSION = 1 << (INET_DIAG_INFO - 1)


@dataclass(frozen=True, slots=True)
class WireCount:
    """TCP payload bytes of all counted connections so far; `connections` are those seen alive now."""

    tx_bytes: int
    rx_bytes: int
    retransmitted_bytes: int
    connections: int


class TcpMeter:
    """Counts what this process exchanges with one remote TCP address. Thread-safe.

    Args:
        remote: "host:port"; the host is a literal address or a name that resolves to one.
    """

    def __init__(self, remote: str) -> None:
        host, _, port = remote.rpartition(":")
        address = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)[0][4][0]
        self._address = _short(str(address))
        self._port = int(port)
        self._lock = threading.Lock()
        self._seen: dict[int, tuple[int, int, int]] = {}  # socket cookie -> tx, rx, retransmitted

    def sample(self) -> WireCount:
        """Read the kernel's counters now; about 1 ms."""
        with self._lock:
            alive = 0
            inodes = _own_socket_inodes()
            with DiagSocket() as diag:
                for message in self._messages(diag):
                    cookie = int(message["idiag_cookie"])
                    # A socket that its process closed has no inode while it still sends its rest.
                    if message["idiag_inode"] in inodes or cookie in self._seen:
                        self._seen[cookie] = _bytes_of(message)
                        alive += 1
            totals = [sum(column) for column in zip(*self._seen.values(), strict=True)] or [0, 0, 0]
            return WireCount(totals[0], totals[1], totals[2], alive)

    def _messages(self, diag: DiagSocket) -> Iterator[Any]:
        for family in (socket.AF_INET, socket.AF_INET6):
            found = diag.get_sock_stats(
                family=family, states=SS_CONN, extensions=INFO_EXTENSION, dport=self._port
            )
            for message in found:
                if (
                    message["idiag_dport"] == self._port
                    and _short(message["idiag_dst"]) == self._address
                    and message.get_attr("INET_DIAG_INFO") is not None
                ):
                    yield message


def _bytes_of(message: Any) -> tuple[int, int, int]:
    info = message.get_attr("INET_DIAG_INFO")
    return info["tcpi_bytes_sent"], info["tcpi_bytes_received"], info["tcpi_bytes_retrans"]


def _own_socket_inodes() -> set[int]:
    """Inodes of the sockets this process holds, from the links "socket:[12345]"."""
    inodes = set()
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208 - names are all we want
        try:
            target = os.readlink(f"/proc/self/fd/{name}")  # noqa: PTH115
        except FileNotFoundError:  # closed since it was listed
            continue
        if target.startswith("socket:["):
            inodes.add(int(target[8:-1]))
    return inodes


def _short(address: str) -> IPv4Address | IPv6Address:
    parsed = ip_address(address)
    mapped = parsed.ipv4_mapped if isinstance(parsed, IPv6Address) else None
    return parsed if mapped is None else mapped
