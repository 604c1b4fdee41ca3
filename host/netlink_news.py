"""What the kernel announces over netlink, kept until somebody looks.

Rule 1: there is no thread: announcements wait in the socket's buffer until `take`.
Rule 2: a buffer that ran over is not an error here: it is counted, and who relies on the news says what that means.
"""

from __future__ import annotations

import contextlib
import errno
import select
import socket
import struct
import weakref
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

NEWS_BYTES_MAX: Final = 64 * 1024  # of one read; the kernel's own messages are smaller
BUFFER_BYTES: Final = 1 << 20  # as far as net.core.rmem_max allows
LENGTH: Final = struct.Struct("<I")  # struct nlmsghdr begins with it
ALIGNMENT: Final = 4


class NetlinkNews:
    """A subscription to multicast groups of a netlink family; `take` by one thread at a time."""

    def __init__(self, family: int, groups: int) -> None:
        self.overruns = 0
        self._socket = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, family
        )
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)
        self._socket.bind((0, groups))
        weakref.finalize(self, self._socket.close)  # meters end with their attempt, whoever forgets them

    def take(self) -> Iterator[bytes]:
        """The announcements that have come since, oldest first."""
        while True:
            try:
                news = self._socket.recv(NEWS_BYTES_MAX)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                self.overruns += 1
                continue
            while len(news) >= LENGTH.size:
                (length,) = LENGTH.unpack_from(news)
                if length < LENGTH.size:
                    return
                yield news[:length]
                news = news[-(-length // ALIGNMENT) * ALIGNMENT :]

    def wait(self, timeout_s: float) -> bool:
        """Whether there is something to take, at latest after this time."""
        waiting = select.poll()
        waiting.register(self._socket, select.POLLIN)
        return timeout_s > 0 and bool(waiting.poll(timeout_s * 1e3))

    def close(self) -> None:
        """Ends the subscription."""
        with contextlib.suppress(OSError):
            self._socket.close()
