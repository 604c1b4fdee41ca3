"""The token bucket of a host's interface, by netlink, and the interface by the host's address.

Rule 1: our bucket is known by its handle; an interface with another queueing discipline is not touched.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar

from testbed.faults.errors import FaultError, OffNetworkError
from testbed.faults.namespace import in_namespace, namespace_of

if TYPE_CHECKING:
    from collections.abc import Callable

Answer = TypeVar("Answer")
HANDLE: Final = 0xBA11 << 16
BURST_S: Final = 0.002  # what a bucket holds: two ticks of the slowest kernel clock would be 20 ms, of ours 2
BURST_BYTES_MIN: Final = 128 << 10  # two of the largest packets that a kernel makes
# Disciplines that an interface has by itself: nobody configured them, and they come back by themselves.
BY_THEMSELVES: Final = ("noqueue", "pfifo_fast", "fq_codel", "fq", "mq", "pfifo")


@dataclass(frozen=True, slots=True)
class Bucket:
    """Bytes a second, and how long a packet may wait before it is dropped."""

    rate: int
    queue_ms: int

    @property
    def burst_bytes(self) -> int:
        """What goes out at once after a silence."""
        return max(BURST_BYTES_MIN, int(self.rate * BURST_S))


def limit(pid: int, address: str, bucket: Bucket) -> Bucket | None:
    """Sets the rate; what it was before, None for no limit. Raises FaultError."""

    def set_it(netlink: Any, interface: int) -> Bucket | None:
        before = _ours(netlink, interface)
        verb = "add" if before is None else "change"
        netlink.tc(verb, "tbf", interface, HANDLE, root=True, **_parameters(bucket))
        return before

    return _with_interface(pid, address, set_it)


def restore(pid: int, address: str, before: Bucket | None) -> None:
    """As it was before; where our bucket is gone there is nothing to do."""

    def set_back(netlink: Any, interface: int) -> None:
        if _ours(netlink, interface) is None:
            return
        if before is None:
            netlink.tc("del", index=interface, handle=HANDLE, root=True)
        else:
            netlink.tc("change", "tbf", interface, HANDLE, root=True, **_parameters(before))

    with contextlib.suppress(OffNetworkError):  # its interface is gone, and our bucket with it
        _with_interface(pid, address, set_back)


def interface_of(netlink: Any, address: str) -> int:
    """The index of the interface with this address in the namespace that `netlink` is of. Raises FaultError."""
    for entry in netlink.get_addr(family=2):
        if entry.get_attr("IFA_LOCAL") == address or entry.get_attr("IFA_ADDRESS") == address:
            return int(entry["index"])
    raise OffNetworkError(f"no interface of the host has the address {address}: it is off the network")


def _with_interface(pid: int, address: str, action: Callable[[Any, int], Answer]) -> Answer:
    from pyroute2 import IPRoute  # noqa: PLC0415 - slow to import, and every scenario loads this module
    from pyroute2.netlink.exceptions import NetlinkError  # noqa: PLC0415

    def inside() -> Answer:
        with IPRoute() as netlink:
            return action(netlink, interface_of(netlink, address))

    try:
        return in_namespace(namespace_of(pid), inside)
    except NetlinkError as error:
        raise FaultError(f"the rate of {address} cannot be set: {error}") from error


def _ours(netlink: Any, interface: int) -> Bucket | None:
    for entry in netlink.get_qdiscs(index=interface):
        if entry["index"] != interface:
            continue
        kind = entry.get_attr("TCA_KIND")
        if entry["handle"] == HANDLE and kind == "tbf":
            parameters = entry.get_attr("TCA_OPTIONS").get_attr("TCA_TBF_PARMS")
            rate = int(parameters["rate"])
            burst = Bucket(rate, 0).burst_bytes
            return Bucket(rate, round((int(parameters["limit"]) - burst) * 1000 / rate))
        if kind not in BY_THEMSELVES:
            raise FaultError(f"the interface has a queueing discipline of its own ({kind}), which stays")
    return None


def _parameters(bucket: Bucket) -> dict[str, int]:
    # The kernel takes a limit in bytes; the library computes it from a latency in microseconds.
    return {"rate": bucket.rate, "burst": bucket.burst_bytes, "latency": bucket.queue_ms * 1000}
