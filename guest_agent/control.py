"""The agent's end of the sideband: one listening socket, one served node at a time.

Rule 1: the newest connection is the one served; an older one is closed. A node that died is thereby replaced.
Rule 2: whatever a node sends costs at most its connection; a bad datagram drops it.
Rule 3: every descriptor that arrives is either taken by an operation or closed here.
Rule 4: nothing waits for the node: a reply that cannot be sent within a second costs the connection.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import structlog

from guest_agent.errors import OperationRefused
from guest_agent.peer_credentials import why_not_trusted
from virtio.errors import SidebandError
from virtio.sideband import (
    FDS_MAX,
    MESSAGE_BYTES_MAX,
    NOTIFY,
    REQUESTS,
    decode,
    encode,
    encode_error,
    encode_reply,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

__all__ = ["ControlServer", "Reply", "Request"]

SEND_S_MAX = 1.0  # a node that takes no answer for so long is let go of; the guest goes on
WAKE_BYTES = 4096
NOTIFICATIONS_MAX = 64  # unread news of a node that does not come back; `hello` tells the state anyway


@dataclass(slots=True)
class Request:
    """One operation asked for. The handler takes descriptors with `take_fd`; the rest are closed."""

    op: str
    fields: dict[str, Any]
    fds: list[int]

    def take_fd(self) -> int:
        """The next descriptor that came along, from now on the caller's.

        Raises:
            OperationRefused: none came along.
        """
        if not self.fds:
            raise OperationRefused(f"{self.op} needs a descriptor and none came along")
        return self.fds.pop(0)


@dataclass(slots=True)
class Reply:
    """What an operation answers; `owned_fds` are closed once sent, `fds` stay the agent's."""

    fields: dict[str, Any] = field(default_factory=dict)
    fds: list[int] = field(default_factory=list)
    owned_fds: list[int] = field(default_factory=list)


class ControlServer:
    """Listens on `path` (0600). All methods but `notify` and `wake` belong to the serving thread."""

    def __init__(self, path: Path, handle: Callable[[Request], Reply]) -> None:
        self._path = path
        self._handle = handle
        self._log = structlog.get_logger(component="control")
        self._notifications: deque[bytes] = deque(maxlen=NOTIFICATIONS_MAX)  # bounded: by NOTIFICATIONS_MAX
        # A pipe and not an eventfd: `signal.set_wakeup_fd` writes single bytes.
        self._wake_fd, self.wake_write_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._connection: socket.socket | None = None
        self._listener = _listen(path)

    def notify(self, event: str, **fields: Any) -> None:
        """Queue news for the node that is served; from any thread."""
        self._notifications.append(encode(NOTIFY, event=event, **fields))
        self.wake()

    def wake(self) -> None:
        """Make `serve` look at `keep_going` again; from any thread or signal handler."""
        with contextlib.suppress(BlockingIOError):  # full: it will wake up anyway
            os.write(self.wake_write_fd, b"w")

    def serve(self, keep_going: Callable[[], bool]) -> None:
        """Serve until `keep_going` says no; it is asked after every operation and every `wake`."""
        while keep_going():
            watched = select.poll()
            for waited_fd in (self._wake_fd, self._listener.fileno()):
                watched.register(waited_fd, select.POLLIN)
            if self._connection is not None:
                watched.register(self._connection.fileno(), select.POLLIN)
            ready = {fd for fd, _ in watched.poll()}
            if self._wake_fd in ready:
                os.read(self._wake_fd, WAKE_BYTES)
                self._send_notifications()
            if self._connection is not None and self._connection.fileno() in ready:
                self._serve_one(self._connection)
            if self._listener.fileno() in ready:
                self._accept()
        self._send_notifications()

    def close(self) -> None:
        """Close all and remove the socket from the file system."""
        self._drop()
        self._listener.close()
        os.close(self._wake_fd)
        os.close(self.wake_write_fd)
        self._path.unlink(missing_ok=True)

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return  # the node was gone before it was served
        if reason := why_not_trusted(connection):
            self._log.warning("node_refused", reason=reason)
            connection.close()
            return
        connection.settimeout(SEND_S_MAX)
        if self._connection is not None:
            self._log.info("node_replaced")
        self._drop()
        self._connection = connection
        self._notifications.clear()  # news of before; `hello` says how things stand now

    def _drop(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _serve_one(self, connection: socket.socket) -> None:
        """Receive one datagram and answer it."""
        try:
            datagram, fds, flags, _ = socket.recv_fds(
                connection, MESSAGE_BYTES_MAX + 1, FDS_MAX, socket.MSG_CMSG_CLOEXEC
            )
        except OSError as error:
            self._log.info("node_lost", reason=str(error))
            self._drop()
            return
        try:
            if not datagram and not fds:
                self._log.info("node_left")
                self._drop()
                return
            self._answer(_parse(datagram, fds, flags))
        except SidebandError as error:
            self._log.warning("bad_datagram", reason=str(error), datagram_bytes=len(datagram))
            self._drop()
        finally:
            for fd in fds:
                os.close(fd)

    def _answer(self, request: Request) -> None:
        identity = request.fields["id"]
        try:
            reply = self._handle(request)
        except OperationRefused as refusal:
            self._log.warning("refused", op=request.op, reason=str(refusal))
            self._send(encode_error(identity, str(refusal)), [])
            return
        try:
            self._send(encode_reply(identity, **reply.fields), reply.fds + reply.owned_fds)
        finally:
            for fd in reply.owned_fds:
                os.close(fd)

    def _send_notifications(self) -> None:
        while self._notifications and self._connection is not None:
            self._send(self._notifications.popleft(), [])

    def _send(self, datagram: bytes, fds: list[int]) -> None:
        if self._connection is None:
            return
        try:
            if fds:
                socket.send_fds(self._connection, [datagram], fds)
            else:
                self._connection.send(datagram)
        except OSError as error:  # the timeout is one too
            self._log.info("node_lost", reason=str(error))
            self._drop()


def _parse(datagram: bytes, fds: list[int], flags: int) -> Request:
    if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
        raise SidebandError("size", "datagram or descriptors do not fit")
    op, fields = decode(datagram)
    if op not in REQUESTS:
        raise SidebandError("op", f"{op!r} is no request")
    return Request(op, fields, fds)


def _listen(path: Path) -> socket.socket:
    """A SOCK_SEQPACKET listener at `path`, 0600 from its first moment.

    Raises:
        OSError: the path cannot be used, or another agent is listening there.
    """
    with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as probe:
        # A stream socket asks whether somebody listens without ever becoming a connection (the types differ).
        asked = probe.connect_ex(str(path))
    if asked == errno.ECONNREFUSED:
        path.unlink()  # what an agent that was killed left behind
    elif asked != errno.ENOENT:
        raise OSError(asked, f"cannot listen, is another agent there? {os.strerror(asked)}", str(path))
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
    os.fchmod(listener.fileno(), 0o600)  # before bind: the file is never there with wider rights
    listener.bind(str(path))
    listener.listen(4)
    return listener
