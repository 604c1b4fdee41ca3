"""The other end of a host's veth: where a packet is put so that it arrives at the host as from the network.

Rule 1: it is in the machine's own namespace (a bridge's port) or in another host's; two interfaces belong together
        when each names the other's index.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from testbed.faults.errors import FaultError
from testbed.faults.namespace import in_namespace, namespace_of
from testbed.faults.qdisc import interface_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from testbed.faults.fault import Port


@dataclass(frozen=True, slots=True)
class Wire:
    """Where to send, and the host's hardware address in hexadecimal digits."""

    namespace: str
    interface: str
    hardware_address: str


def other_end(port: Port, ports: Sequence[Port]) -> Wire:
    """Raises FaultError when it is not on this machine."""
    from pyroute2 import IPRoute  # noqa: PLC0415 - slow to import

    def own() -> tuple[int, int, str]:
        with IPRoute() as netlink:
            link = netlink.link("get", index=interface_of(netlink, port.address))[0]
            return (
                int(link["index"]),
                int(link.get_attr("IFLA_LINK") or 0),
                str(link.get_attr("IFLA_ADDRESS")),
            )

    index, peer_index, hardware_address = in_namespace(namespace_of(port.pid), own)
    for pid in (os.getpid(), *(other.pid for other in ports if other.pid != port.pid)):
        namespace = namespace_of(pid)
        name = in_namespace(namespace, lambda: _named(peer_index, index))
        if name:
            return Wire(namespace, name, hardware_address.replace(":", ""))
    raise FaultError(f"the other end of the link of {port.address} is not on this machine")


def _named(index: int, peer_index: int) -> str:
    """The interface's name, if it is there and its other end is `peer_index`."""
    from pyroute2 import IPRoute  # noqa: PLC0415

    with IPRoute() as netlink:
        links: list[Any] = [link for link in netlink.get_links() if link["index"] == index]
        if not links or links[0].get_attr("IFLA_LINK") != peer_index:
            return ""
        return str(links[0].get_attr("IFLA_IFNAME"))
