"""Bytes of the very connections between this process and a peer: TCP_INFO over netlink.

Rule 1: a connection counts if its remote address is the peer's and this process owns its socket; what it carried
        before the meter was made does not.
Rule 2: counts only grow. A connection that ended keeps its last figures: the kernel announces them when it destroys
        the socket, from a worker, a moment later: a sample waits ANNOUNCED_NS_MAX at most. One whose end
        was not heard is counted in `unheard`, with what was seen of it last.
Rule 3: retransmitted bytes are on the wire too: they are part of `tx_bytes`, and also told apart.

sock_diag over netlink needs no privilege. gRPC connects through dual-stack sockets, so that an IPv4 peer
shows up in the IPv6 table as ::ffff:a.b.c.d; both tables are read and addresses compared in short form.
"""

from __future__ import annotations

import os
import socket
import threading
from abc import ABC, abstractmethod
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from pyroute2 import DiagSocket
from pyroute2.netlink.diag import (
    SKNLGRP_INET6_TCP_DESTROY,
    SKNLGRP_INET_TCP_DESTROY,
    SS_CONN,
    inet_diag_msg,
)

from host.clock import now_ns
from host.netlink_news import NetlinkNews

if TYPE_CHECKING:
    from collections.abc import Iterator
    from ipaddress import IPv4Address

INET_DIAG_INFO = 2  # linux/inet_diag.h
INFO_EXTENSION = 1 << (INET_DIAG_INFO - 1)
NETLINK_SOCK_DIAG: Final = 4  # linux/netlink.h
DESTROY_GROUPS: Final = 1 << (SKNLGRP_INET_TCP_DESTROY - 1) | 1 << (SKNLGRP_INET6_TCP_DESTROY - 1)
COUNTERS: Final = (
    "tcpi_bytes_sent", "tcpi_bytes_received", "tcpi_bytes_retrans", "tcpi_segs_out", "tcpi_segs_in",
)  # fmt: skip
ANNOUNCED_NS_MAX: Final = 500_000_000  # after a connection ended; a worker that need not wait takes 1 ms
Figures: TypeAlias = tuple[int, ...]  # in the order of COUNTERS
UNMEASURED_US: Final = 2**32 - 1  # tcpi_min_rtt before the first round trip
ZEROES: Final[Figures] = (0,) * len(COUNTERS)


@dataclass(frozen=True, slots=True)
class WireCount:
    """The TCP streams of all counted connections so far; `connections` are those seen alive now.

    Segments are what a cable would carry, whatever the interface is handed.
    """

    tx_bytes: int
    rx_bytes: int
    retransmitted_bytes: int
    connections: int
    tx_segments: int = 0
    rx_segments: int = 0
    unheard: int = 0

    def fields(self) -> dict[str, int]:
        """For an event."""
        return {
            "tx_bytes": self.tx_bytes,
            "rx_bytes": self.rx_bytes,
            "retransmitted_bytes": self.retransmitted_bytes,
            "tx_segments": self.tx_segments,
            "rx_segments": self.rx_segments,
            "unheard": self.unheard,
        }


class ConnectionMeter(ABC):
    """Counts connections of this network namespace that `_matches`. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._news = NetlinkNews(NETLINK_SOCK_DIAG, DESTROY_GROUPS)
        with DiagSocket() as diag:
            messages = list(self._messages(diag))
        self._before = {_cookie(message): _figures(message) for message in messages}
        self._seen: dict[int, Figures] = {}  # socket cookie -> the latest figures
        self._ended: set[int] = set()
        self._unheard: set[int] = set()
        self._round_trip_us = UNMEASURED_US

    def sample(self) -> WireCount:
        """Read the kernel's counters now; about 1 ms."""
        with self._lock:
            with DiagSocket() as diag:
                alive = self._look(self._messages(diag))
            self._hear(alive)
            totals = [0] * len(COUNTERS)
            for cookie, figures in self._seen.items():
                since = zip(figures, self._before.get(cookie, ZEROES), strict=True)
                totals = [total + now - then for total, (now, then) in zip(totals, since, strict=True)]
            sent, received, again, segments_out, segments_in = totals
            count = len(alive - self._ended)
            return WireCount(
                sent, received, again, count, segments_out, segments_in, len(self._unheard - self._ended)
            )

    @property
    def round_trip_ms(self) -> float:
        """The shortest of all round trips that a sample has seen so far; 0 when it has seen none."""
        return 0.0 if self._round_trip_us == UNMEASURED_US else self._round_trip_us / 1e3

    def close(self) -> None:
        """Ends the subscription."""
        self._news.close()

    @abstractmethod
    def _matches(self, message: Any) -> bool:
        """Whether a connection is one of those that are counted."""

    def _is_known(self, message: Any) -> bool:
        """Whether an ended connection, which has no owner any more, is one of ours."""
        return self._matches(message)

    def _look(self, messages: Iterator[Any]) -> set[int]:
        alive, inodes = set(), _own_socket_inodes()
        for message in messages:
            cookie = _cookie(message)
            # A socket that its process closed has no inode while it still sends its rest.
            if message["idiag_inode"] in inodes or cookie in self._seen:
                self._seen[cookie] = _figures(message)
                alive.add(cookie)
                round_trip_us = int(message.get_attr("INET_DIAG_INFO")["tcpi_min_rtt"])
                self._round_trip_us = min(self._round_trip_us, round_trip_us)
        return alive

    def _hear(self, alive: set[int]) -> None:
        """Take the news; of a connection that is gone and not announced yet, wait for them a moment."""
        deadline_ns = now_ns() + ANNOUNCED_NS_MAX
        while True:
            for news in self._news.take():
                self._told(news)
            missing = self._seen.keys() - alive - self._ended - self._unheard
            if not missing or not self._news.wait((deadline_ns - now_ns()) / 1e9):
                self._unheard |= missing
                return

    def _told(self, raw: bytes) -> None:
        message = inet_diag_msg(raw)
        message.decode()
        if message.get_attr("INET_DIAG_INFO") is not None and self._is_known(message):
            cookie = _cookie(message)
            self._seen[cookie] = _figures(message)
            self._ended.add(cookie)

    def _messages(self, diag: DiagSocket) -> Iterator[Any]:
        return (message for message in _connections(diag) if self._matches(message))


class TcpMeter(ConnectionMeter):
    """What this process exchanges with one remote TCP address.

    Args:
        remote: "host:port"; the host is a literal address or a name that resolves to one.
    """

    def __init__(self, remote: str) -> None:
        self._peer = peer_address(remote)
        super().__init__()

    def _matches(self, message: Any) -> bool:
        return (_short(message["idiag_dst"]), message["idiag_dport"]) == self._peer


class OtherTraffic(ConnectionMeter):
    """What this process exchanges by the network with everybody but that address: its control connections."""

    def __init__(self, remote: str) -> None:
        self._peer = peer_address(remote)
        super().__init__()

    def _matches(self, message: Any) -> bool:
        remote = _short(message["idiag_dst"])
        inside = remote.is_loopback or remote == _short(message["idiag_src"])
        return not inside and (remote, message["idiag_dport"]) != self._peer


class ServedTraffic(ConnectionMeter):
    """What this process's server exchanges with one peer, by whatever connections.

    Args:
        connection: the remote "host:port" of one of them, which is open: the others come from that host and reach
            the same port. When it is gone already, nothing is counted.
    """

    def __init__(self, connection: str) -> None:
        self._host, port = peer_address(connection)
        self._served_port = _own_port_towards((self._host, port))
        super().__init__()

    def _matches(self, message: Any) -> bool:
        return (_short(message["idiag_dst"]), message["idiag_sport"]) == (self._host, self._served_port)


def peer_address(remote: str) -> tuple[IPv4Address | IPv6Address, int]:
    """The address and port of "host:port", resolved."""
    host, _, port = remote.rpartition(":")
    address = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)[0][4][0]
    return _short(str(address)), int(port)


def _connections(diag: DiagSocket) -> Iterator[Any]:
    for family in (socket.AF_INET, socket.AF_INET6):
        for message in diag.get_sock_stats(family=family, states=SS_CONN, extensions=INFO_EXTENSION):
            if message.get_attr("INET_DIAG_INFO") is not None:
                yield message


def _own_port_towards(peer: tuple[IPv4Address | IPv6Address, int]) -> int:
    """The local port of the connection with that peer; 0 when there is none."""
    with DiagSocket() as diag:
        for message in _connections(diag):
            if (_short(message["idiag_dst"]), message["idiag_dport"]) == peer:
                return int(message["idiag_sport"])
    return 0


def _cookie(message: Any) -> int:
    return int(message["idiag_cookie"])


def _figures(message: Any) -> Figures:
    info = message.get_attr("INET_DIAG_INFO")
    return tuple(int(info[name]) for name in COUNTERS)


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
