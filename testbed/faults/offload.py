"""Segmentation offloads of a host's interface, by ethtool's ioctl inside its namespace.

Rule 1: with offloads a "packet" may be 64 KiB: counters count it as one, and its loss is one decision. Without them
        packets are what would be on a wire, and cost what they cost.
"""

from __future__ import annotations

import ctypes
import fcntl
import socket
import struct
from typing import Final

from testbed.faults.errors import FaultError
from testbed.faults.namespace import in_namespace, namespace_of
from testbed.faults.qdisc import interface_of

SIOCETHTOOL: Final = 0x8946
# linux/ethtool.h: command to ask, command to set.
FEATURES: Final = {"tso": (0x1E, 0x1F), "gso": (0x23, 0x24), "gro": (0x2B, 0x2C)}
VALUE: Final = struct.Struct("=II")


def read(pid: int, address: str) -> dict[str, bool]:
    """Which offloads the interface with this address has on. Raises FaultError."""
    return _in_interface(pid, address, None)


def write(pid: int, address: str, wanted: dict[str, bool]) -> dict[str, bool]:
    """Sets offloads; what they were before. Raises FaultError."""
    return _in_interface(pid, address, wanted)


def is_there(pid: int, address: str) -> bool:
    """Whether the interface still is."""
    try:
        read(pid, address)
    except FaultError:
        return False
    return True


def _in_interface(pid: int, address: str, wanted: dict[str, bool] | None) -> dict[str, bool]:
    from pyroute2 import IPRoute  # noqa: PLC0415 - slow to import

    def inside() -> dict[str, bool]:
        with IPRoute() as netlink:
            name = socket.if_indextoname(interface_of(netlink, address))
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as handle:
            before = {feature: bool(_ioctl(handle, name, ask, 0)) for feature, (ask, _) in FEATURES.items()}
            for feature, on in (wanted or {}).items():
                if before[feature] is not on:
                    _ioctl(handle, name, FEATURES[feature][1], int(on))
        return before

    try:
        return in_namespace(namespace_of(pid), inside)
    except OSError as error:
        raise FaultError(f"the offloads of {address} cannot be set: {error.strerror or error}") from error


def _ioctl(handle: socket.socket, name: str, command: int, value: int) -> int:
    buffer = ctypes.create_string_buffer(VALUE.pack(command, value), VALUE.size)
    request = struct.pack("=16sQ16x", name.encode(), ctypes.addressof(buffer))
    fcntl.ioctl(handle, SIOCETHTOOL, request)
    return int(VALUE.unpack(buffer.raw)[1])
