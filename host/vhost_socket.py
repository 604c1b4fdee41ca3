"""vhost-user messages over a stream socket that never blocks, and bytes that wait until the peer reads.

Rule 1: a message is assembled in two reads, header and payload, so that descriptors are never attributed to
        the wrong message (SCM_RIGHTS travel beside the header's first byte).
Rule 2: descriptors of an unfinished message are closed with the socket; those of a finished one belong to it.
Rule 3: a peer that does not read its answers is not read from: what we hold for it stays bounded.
"""

from __future__ import annotations

import socket

from host.descriptors import close_all, receive
from virtio.errors import VhostUserError
from virtio.vhost_user import FDS_MAX, HEADER_BYTES, Message, decode, decode_header

OUTGOING_BYTES_MAX = 64 * 1024  # of replies, or of 5000 announcements that nobody read


class PeerGone(ConnectionError):
    """The peer closed the connection, or it broke."""


class Outgoing:
    """Bytes on their way to a non-blocking stream socket."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._waiting = bytearray()

    @property
    def waiting(self) -> bool:
        """Whether something could not be sent yet: watch the socket for writing, then `flush`."""
        return bool(self._waiting)

    def send(self, data: bytes) -> None:
        """Send now what goes, keep the rest. Raises PeerGone, also when too much was left unread."""
        self._waiting += data
        self.flush()
        if len(self._waiting) > OUTGOING_BYTES_MAX:
            raise PeerGone(f"the peer left {len(self._waiting)} bytes unread")

    def flush(self) -> None:
        """Send what goes. Raises PeerGone."""
        while self._waiting:
            try:
                sent = self._connection.send(self._waiting, socket.MSG_NOSIGNAL)
            except BlockingIOError:
                return
            except OSError as error:
                raise PeerGone(error.strerror) from error
            del self._waiting[:sent]


class VhostSocket:
    """The main connection, the device's end. Takes the socket over and makes it non-blocking."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._connection = connection
        self._data = bytearray()
        self._fds: list[int] = []
        self._wanted = HEADER_BYTES
        self.outgoing = Outgoing(connection)

    def fileno(self) -> int:
        """The descriptor, -1 after `close`."""
        return self._connection.fileno()

    def close(self) -> None:
        """Close the socket and what came with an unfinished message. Idempotent."""
        self._connection.close()
        close_all(self._fds)
        self._fds = []

    def receive(self) -> Message | None:
        """The next message, or None until more arrives. Its descriptors are the caller's.

        Raises:
            PeerGone: the connection ended.
            VhostUserError: a header that cannot be, or too many descriptors.
        """
        while len(self._data) < self._wanted:
            try:
                data, fds, cut_off = receive(self._connection, self._wanted - len(self._data), FDS_MAX)
            except BlockingIOError:
                return None
            except OSError as error:
                raise PeerGone(error.strerror) from error
            self._fds += fds
            if cut_off or len(self._fds) > FDS_MAX:
                raise VhostUserError("fds", f"more than {FDS_MAX} descriptors with one message")
            if not data:
                raise PeerGone("closed by the peer")
            self._data += data
            if self._wanted == HEADER_BYTES == len(self._data):
                self._wanted += decode_header(bytes(self._data))[2]
        message = decode(bytes(self._data), tuple(self._fds))
        self._data, self._fds, self._wanted = bytearray(), [], HEADER_BYTES
        return message
