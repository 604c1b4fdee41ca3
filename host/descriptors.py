"""Receiving descriptors over unix sockets, without losing one and without leaking one into a child.

`socket.recv_fds` ignores its `flags` argument (CPython 3.11), so that what it receives is
inherited by every process we start: a guest's RAM would stay alive in a child that knows nothing of it.
"""

from __future__ import annotations

import array
import os
import socket
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

FD_BYTES = array.array("i").itemsize


def receive(connection: socket.socket, bytes_max: int, fds_max: int) -> tuple[bytes, list[int], bool]:
    """One recvmsg: (data, descriptors, whether anything was cut off). The descriptors are the caller's.

    Raises OSError; then no descriptor was received.
    """
    data, ancillary, flags, _ = connection.recvmsg(
        bytes_max, socket.CMSG_SPACE(fds_max * FD_BYTES), socket.MSG_CMSG_CLOEXEC
    )
    fds = array.array("i")
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            # The kernel may cut the list in the middle of its padding, never in the middle of a descriptor.
            fds.frombytes(content[: len(content) - len(content) % FD_BYTES])
    return data, fds.tolist(), bool(flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC))


def close_all(fds: Iterable[int]) -> None:
    """Close every one of them."""
    for fd in fds:
        os.close(fd)
