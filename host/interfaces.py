"""Bytes on the wire where a host has a network of its own: the counters of its interfaces.

Rule 1: everything that leaves or enters by an interface of this network namespace counts, from the moment at
        which the meter is made; the loopback and interfaces that only pass packets on inside the namespace do not.
Rule 2: counts only grow. An interface that goes takes its counters with it and the next one begins at 0: the
        kernel tells the last figures when it goes down and when it goes (RTM_NEWLINK, RTM_DELLINK), and they are
        kept.
Rule 3: counters of interfaces count what is handed to them: with segmentation offload packets of up to 64 KiB,
        without it what a cable would carry. Which of the two is said beside the figures.

Reading needs no privilege. Counters are those of the whole namespace: a host that shares the machine's network
counts its connections instead (wire.py), see `towards`.
"""

from __future__ import annotations

import array
import errno
import fcntl
import socket
import struct
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pyroute2 import IPRoute
from pyroute2.netlink.rtnl import RTM_DELLINK, RTMGRP_LINK
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg

from host.netlink_news import NetlinkNews
from host.wire import peer_address

if TYPE_CHECKING:
    from collections.abc import Iterable

IFF_LOOPBACK: Final = 8  # linux/if.h
INNER_KINDS: Final = frozenset({"ifb", "dummy", "bridge"})  # what crosses them crosses a real one, too
NAMESPACE_KINDS: Final = frozenset({"veth", "macvlan", "ipvlan"})  # what a network namespace is joined by
SIOCETHTOOL: Final = 0x8946
ETHTOOL_GTSO: Final = 0x1E
ETHTOOL_GGSO: Final = 0x23
MTU_DEFAULT: Final = 1500
PROC_COLUMNS: Final = (0, 1, 8, 9)  # of /proc/net/dev: received bytes and packets, sent bytes and packets


@dataclass(frozen=True, slots=True)
class InterfaceCount:
    """What crossed the interfaces since the meter was made; bytes with their Ethernet headers."""

    tx_bytes: int = 0
    rx_bytes: int = 0
    tx_packets: int = 0
    rx_packets: int = 0

    def __add__(self, other: InterfaceCount) -> InterfaceCount:
        return InterfaceCount(
            self.tx_bytes + other.tx_bytes,
            self.rx_bytes + other.rx_bytes,
            self.tx_packets + other.tx_packets,
            self.rx_packets + other.rx_packets,
        )

    def __sub__(self, other: InterfaceCount) -> InterfaceCount:
        return InterfaceCount(
            self.tx_bytes - other.tx_bytes,
            self.rx_bytes - other.rx_bytes,
            self.tx_packets - other.tx_packets,
            self.rx_packets - other.rx_packets,
        )

    def at_least(self, other: InterfaceCount) -> InterfaceCount:
        """Each figure or the other's, whichever is larger."""
        return InterfaceCount(
            max(self.tx_bytes, other.tx_bytes),
            max(self.rx_bytes, other.rx_bytes),
            max(self.tx_packets, other.tx_packets),
            max(self.rx_packets, other.rx_packets),
        )

    def fields(self) -> dict[str, int]:
        """For an event."""
        return {
            "tx_bytes": self.tx_bytes,
            "rx_bytes": self.rx_bytes,
            "tx_packets": self.tx_packets,
            "rx_packets": self.rx_packets,
        }


NOTHING: Final = InterfaceCount()


class InterfaceMeter:
    """Counts what crosses the interfaces of this process's network namespace. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._news = NetlinkNews(socket.NETLINK_ROUTE, RTMGRP_LINK)
        self._gone = NOTHING  # of interfaces that are no more
        self._counted: dict[int, bool] = {}  # by ifindex
        self._before: dict[int, InterfaceCount] = self._counters()  # by ifindex, as the meter found them
        self._last = dict(self._before)

    @classmethod
    def towards(cls, address: str) -> InterfaceMeter | None:
        """A meter, if that address ("host:port") is reached by an interface of a network of our own."""
        return cls() if _own_network_towards(address) else None

    def sample(self) -> InterfaceCount:
        """Since the meter was made; about 0.3 ms: the guest may stand still meanwhile."""
        with self._lock:
            for message in self._news.take():
                self._told(message)
            self._last |= self._counters()
            total = self._gone
            for index, count in self._last.items():
                total += count - self._before.get(index, NOTHING)
            return total

    def close(self) -> None:
        """Ends the subscription."""
        self._news.close()

    def _counters(self) -> dict[int, InterfaceCount]:
        lines = Path("/proc/self/net/dev").read_text(encoding="ascii").splitlines()
        by_name = {name.strip(): line.split() for name, _, line in (line.partition(":") for line in lines)}
        found = {}
        for index, name in socket.if_nameindex():
            if index not in self._counted:
                with IPRoute() as route:
                    self._counted |= {link["index"]: _counts(link) for link in route.get_links()}
            if self._counted.get(index) and name in by_name:
                rx_bytes, rx_packets, tx_bytes, tx_packets = (int(by_name[name][at]) for at in PROC_COLUMNS)
                found[index] = InterfaceCount(tx_bytes, rx_bytes, tx_packets, rx_packets)
        return found

    def _told(self, raw: bytes) -> None:
        message = ifinfmsg(raw)
        message.decode()
        index = message["index"]
        if index not in self._last and not _counts(message):
            return
        # A veth whose peer is gone already has forgotten what it received: the larger figures are the true ones.
        count = (_count_of(message) or NOTHING).at_least(self._last.get(index, NOTHING))
        if message["header"]["type"] == RTM_DELLINK:
            self._gone += count - self._before.pop(index, NOTHING)
            self._last.pop(index, None)
            self._counted.pop(index, None)
        else:
            self._last[index] = count


def segmentation_offload() -> bool | None:
    """Whether any counted interface is handed packets larger than its MTU; None where no interface says so."""
    with IPRoute() as route:
        names = [link.get_attr("IFLA_IFNAME") for link in route.get_links() if _counts(link)]
    answers = [_ethtool(name, command) for name in names for command in (ETHTOOL_GTSO, ETHTOOL_GGSO)]
    known = [answer for answer in answers if answer is not None]
    return any(known) if known else None


def mtu_bytes() -> int:
    """The largest MTU of the counted interfaces."""
    with IPRoute() as route:
        sizes = [link.get_attr("IFLA_MTU") for link in route.get_links() if _counts(link)]
    return max((size for size in sizes if size), default=MTU_DEFAULT)


def _own_network_towards(address: str) -> bool:
    target, _ = peer_address(address)
    with IPRoute() as route:
        ways = list(route.route("get", dst=str(target)))
        index = ways[0].get_attr("RTA_OIF") if ways else None
        links: Iterable[Any] = route.get_links(index) if index else ()
        return any(_kind(link) in NAMESPACE_KINDS for link in links)


def _counts(link: Any) -> bool:
    return not link["flags"] & IFF_LOOPBACK and _kind(link) not in INNER_KINDS


def _kind(link: Any) -> str | None:
    info = link.get_attr("IFLA_LINKINFO")
    return None if info is None else info.get_attr("IFLA_INFO_KIND")


def _count_of(link: Any) -> InterfaceCount | None:
    stats = link.get_attr("IFLA_STATS64")
    if stats is None:
        return None
    return InterfaceCount(stats["tx_bytes"], stats["rx_bytes"], stats["tx_packets"], stats["rx_packets"])


def _ethtool(name: str, command: int) -> bool | None:
    """A yes or no of the interface (linux/ethtool.h, struct ethtool_value in struct ifreq)."""
    value = array.array("I", [command, 0])
    request = struct.pack("16sP", name.encode(), value.buffer_info()[0])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        try:
            fcntl.ioctl(any_socket, SIOCETHTOOL, request)
        except OSError as error:
            if error.errno in (errno.EOPNOTSUPP, errno.ENODEV):
                return None
            raise
    return bool(value[1])
