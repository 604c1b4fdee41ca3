"""The node's end of the sideband to its local guest agent (virtio/sideband.py).

Rule 1: every request ends: with its reply, with AgentError (the agent said no), or with AgentLost (nothing
        came in time, or the link broke). A link that broke stays broken until `connect` is called again.
Rule 2: every received descriptor is handed to exactly one caller or closed here; replies that nobody waits
        for any more, refused replies and malformed ones lose their descriptors here.
Rule 3: replies are matched by id, never by order; notifications come on the reading thread, in order.
Rule 4: garbage from the agent ends the connection: after it nothing that follows can be believed.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import itertools
import os
import socket
import struct
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from host.descriptors import close_all, receive
from host.errors import AgentError, AgentLost
from host.peer_credentials import why_not_trusted
from virtio.errors import SidebandError
from virtio.sideband import (
    FDS_MAX,
    FDS_OF_REPLY,
    MESSAGE_BYTES_MAX,
    NOTIFY,
    REPLY,
    check_reply,
    decode,
    encode,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from migration.pages import U8Array

RETRY_S = 0.02  # between two tries to connect: the agent's start takes tenths of a second
SEND_S_MAX = 5.0  # an agent that reads nothing for so long is lost
REPLY_S_MAX = 10.0  # operations that only look or flip a switch
LONG_REPLY_S_MAX = 120.0  # operations that pass over all of guest RAM

Reply = tuple[dict[str, Any], list[int]]


@dataclass(frozen=True, slots=True)
class Hello:
    """What `hello` says; counts are pages of guest RAM."""

    version: int
    kind: str
    state: str
    guest_epoch: int
    pages: int
    free_pages: int
    ballooned_pages: int
    held_pages: int
    balloon_ready: bool
    operations: int
    workloads: dict[str, Any]
    pid: int
    ready: bool
    cpu_seconds: float = 0.0  # of the agent process; not every agent tells
    balloon: dict[str, Any] = field(default_factory=dict)  # the driver's account, likewise


@dataclass(frozen=True, slots=True)
class GuestRamInfo:
    """Guest RAM as the agent passes it. Both descriptors belong to whoever got this object."""

    memfd: int
    pagemap_fd: int | None
    base_address: int
    memory_bytes: int
    write_protect_reason: str

    def close(self) -> None:
        """Close the descriptors, for a caller that hands neither of them on."""
        close_all(fd for fd in (self.memfd, self.pagemap_fd) if fd is not None)


@dataclass(frozen=True, slots=True)
class Paused:
    """All guest threads stopped at `at_ns` (CLOCK_MONOTONIC), then the rings, at these avail indices."""

    at_ns: int
    ring_bases: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class RestoredImage:
    """What a standby agent took in: pages of RAM, and the xxh3_64 of the state bytes."""

    image_pages: int
    state_digest: int


class AgentLink:
    """One connection to one agent. Thread-safe; requests of several threads may be under way at once.

    Args:
        socket_path: where the agent listens.
        on_notify: called as (event, fields) on the reading thread; it must not wait for a request here.
        on_lost: called once per connection with the reason, unless `close` ended it: on the reading thread, or on
            that of a request that could not be sent. It must not wait for a request here.
    """

    def __init__(
        self,
        socket_path: str | Path,
        *,
        on_notify: Callable[[str, dict[str, Any]], None] | None = None,
        on_lost: Callable[[str], None] | None = None,
    ) -> None:
        self.socket_path = os.fspath(socket_path)
        self.on_notify = on_notify
        self.on_lost = on_lost
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._ids = itertools.count(1)
        self._connection: socket.socket | None = None
        self._reader: threading.Thread | None = None
        self._waiting: dict[int, Future[Reply]] = {}

    # --- the connection ---------------------------------------------------------------------------

    @property
    def connected(self) -> bool:
        """Whether the link is up as far as is known."""
        return self._connection is not None

    def connect(self, timeout: float) -> None:
        """Connect, trying again until the agent listens or `timeout` seconds passed. No-op when connected.

        Raises:
            AgentLost: nobody of ours listened in time, or the link is being closed.
        """
        deadline = time.monotonic() + timeout
        while True:
            if self._closing.is_set():
                raise AgentLost("the link was closed")
            if self.connected:
                return
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            try:
                connection.connect(self.socket_path)
                reason = why_not_trusted(connection)
            except (FileNotFoundError, ConnectionRefusedError, BlockingIOError) as error:
                reason = error.strerror or type(error).__name__
            except BaseException:
                connection.close()
                raise
            if not reason:
                self._adopt(connection)
                return
            connection.close()
            if time.monotonic() >= deadline:
                raise AgentLost(f"no guest agent at {self.socket_path}: {reason}")
            self._closing.wait(RETRY_S)

    def close(self) -> None:
        """End the connection and the reading thread. Requests under way raise AgentLost. Idempotent."""
        self._closing.set()
        self._drop("the link was closed", self._connection)
        if self._reader is not None and self._reader is not threading.current_thread():
            self._reader.join()  # ends: its connection is closed

    def _adopt(self, connection: socket.socket) -> None:
        seconds = int(SEND_S_MAX)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", seconds, 0))
        with self._lock:
            if self._connection is not None or self._closing.is_set():
                connection.close()
                return
            self._connection = connection
            self._reader = threading.Thread(
                target=self._read, args=(connection,), name="agent-link", daemon=True
            )
            self._reader.start()

    def _drop(self, reason: str, connection: socket.socket | None) -> bool:
        """Give `connection` up if it is still the current one; false when that was done before."""
        with self._lock:
            if connection is None or self._connection is not connection:
                return False
            self._connection = None
            waiting, self._waiting = self._waiting, {}
        # Only shut down: the reader owns the descriptor and closes it, so that its number is not reused
        # under a recvmsg that is about to start.
        with contextlib.suppress(OSError):  # the peer may have gone first
            connection.shutdown(socket.SHUT_RDWR)
        for future in waiting.values():
            future.set_exception(AgentLost(reason))
        return True

    # --- reading ----------------------------------------------------------------------------------

    def _read(self, connection: socket.socket) -> None:
        reason = "the guest agent closed the link"
        try:
            while self._read_one(connection):
                pass
        except SidebandError as error:
            reason = f"the guest agent sent garbage: {error}"
        except OSError as error:
            reason = f"the link to the guest agent broke: {error.strerror}"
        finally:
            lost = self._drop(reason, connection)
            connection.close()
        if lost and self.on_lost is not None:
            self.on_lost(reason)

    def _read_one(self, connection: socket.socket) -> bool:
        """Receive and route one datagram; false at the end of the connection."""
        data, fds, cut_off = receive(connection, MESSAGE_BYTES_MAX + 1, FDS_MAX)
        try:
            if not data and not fds:
                return False
            if cut_off:
                raise SidebandError("size", "a datagram or its descriptors were cut off")
            op, fields = decode(data)
            if op == REPLY:
                with self._lock:
                    future = self._waiting.pop(fields["id"], None)
                if future is not None:
                    future.set_result((fields, fds))
                    fds = []  # the request's now
            elif op == NOTIFY:
                if self.on_notify is not None:
                    self.on_notify(fields.pop("event"), fields)
            else:
                raise SidebandError("op", f"the agent asked for {op!r}")
        finally:
            close_all(fds)
        return True

    # --- asking -----------------------------------------------------------------------------------

    def request(
        self, op: str, *, fds: Sequence[int] = (), timeout: float = REPLY_S_MAX, **fields: Any
    ) -> Reply:
        """Ask and wait: (reply fields without "id" and "ok", descriptors, which are the caller's).

        `fds` stay the caller's.

        Raises:
            AgentError: the agent refused, or its reply was malformed.
            AgentLost: no connection, no reply within `timeout` seconds, or the link broke meanwhile.
        """
        identity = next(self._ids)
        datagram = encode(op, id=identity, **fields)
        future: Future[Reply] = Future()
        with self._lock:
            connection = self._connection
            if connection is None:
                raise AgentLost(f"no connection to the guest agent for {op!r}")
            self._waiting[identity] = future
        try:
            socket.send_fds(connection, [datagram], list(fds))
        except OSError as error:
            why = f"sending {op!r} failed: {error.strerror}"
            if self._drop(why, connection) and self.on_lost is not None:
                self.on_lost(why)
        try:
            reply, received = future.result(timeout)
        except TimeoutError:
            with self._lock:
                late = self._waiting.pop(identity, None) is None
            if not late:
                raise AgentLost(f"the guest agent did not answer {op!r} within {timeout:g} s") from None
            reply, received = future.result()  # ends: it came between the timeout and our giving up
        return self._checked(op, reply, received)

    @staticmethod
    def _checked(op: str, reply: dict[str, Any], fds: list[int]) -> Reply:
        """The reply without its envelope. Descriptors are closed when it is no good one."""
        fewest, most = FDS_OF_REPLY.get(op, (0, 0))
        reason = ""
        if not reply["ok"]:
            reason = reply["error"] or "no reason given"
        elif not fewest <= len(fds) <= most:
            reason = f"malformed reply: {len(fds)} descriptors came along"
        else:
            try:
                check_reply(op, reply)
            except SidebandError as error:
                reason = f"malformed reply: {error}"
        if reason:
            close_all(fds)
            raise AgentError(op, reason)
        return {name: value for name, value in reply.items() if name not in ("id", "ok")}, fds

    # --- the operations ---------------------------------------------------------------------------

    def hello(self) -> Hello:
        """How things stand in the guest now."""
        fields, _ = self.request("hello")
        known = {name: fields[name] for name in Hello.__dataclass_fields__ if name in fields}
        return Hello(**known)

    def ram(self) -> GuestRamInfo:
        """Guest RAM and, where the kernel tracks writes, the agent's pagemap."""
        fields, fds = self.request("ram")
        return GuestRamInfo(
            memfd=fds[0],
            pagemap_fd=fds[1] if len(fds) > 1 else None,
            base_address=fields["base_address"],
            memory_bytes=fields["memory_bytes"],
            write_protect_reason=fields["write_protect"],
        )

    def pause(self) -> Paused:
        """Stop all guest threads, then the rings. Idempotent."""
        fields, _ = self.request("pause")
        return Paused(fields["paused_at_ns"], tuple(fields["ring_bases"]))

    def resume(self, guest_epoch: int) -> None:
        """Let the paused guest go on; refused unless it is at this epoch. Idempotent."""
        self.request("resume", guest_epoch=guest_epoch)

    def throttle(self, percent: int) -> None:
        """Take this share of its time from the guest."""
        self.request("throttle", percent=percent)

    def save(self) -> bytes:
        """The vCPU state of the paused guest, at most 16 KiB."""
        fields, _ = self.request("save")
        try:
            return base64.b64decode(fields["state"], validate=True)
        except binascii.Error as error:
            raise AgentError("save", f"malformed reply: {error}") from error

    def restore(
        self, guest_epoch: int, state: bytes, device: Mapping[str, object], memfd: int
    ) -> RestoredImage:
        """Have the standby agent take the image in, at this epoch, without running it.

        `device` is {features, num_pages, actual, poison_value, ring_bases}; `memfd` stays the caller's.
        """
        text = base64.b64encode(state).decode()
        fields, _ = self.request(
            "restore",
            fds=[memfd],
            timeout=LONG_REPLY_S_MAX,
            guest_epoch=guest_epoch,
            state=text,
            device=dict(device),
        )
        try:
            return RestoredImage(fields["image_pages"], int(fields["digest_hex"], 16))
        except ValueError as error:
            raise AgentError("restore", f"malformed reply: {error}") from error

    def run(self, guest_epoch: int) -> int:
        """Start the restored guest; CLOCK_MONOTONIC ns of its start. Idempotent for one epoch."""
        fields, _ = self.request("run", guest_epoch=guest_epoch)
        return int(fields["started_at_ns"])

    def discard(self) -> None:
        """Have a restored but never run image dropped; the agent is standby again."""
        self.request("discard", timeout=LONG_REPLY_S_MAX)

    def frames(self) -> U8Array:
        """One byte per page of the paused guest: 0 used, 1 free, 2 ballooned, 3 held."""
        _, fds = self.request("frames", timeout=LONG_REPLY_S_MAX)
        try:
            return _read_bytes(fds[0])
        finally:
            close_all(fds)

    def check(self, expectations: bytes) -> tuple[int, list[str]]:
        """Every workload's self-check against oracle records: (items that were right, problems)."""
        memfd = os.memfd_create("ballast-expectations", os.MFD_CLOEXEC)
        with os.fdopen(memfd, "wb", buffering=0) as file:
            written = 0
            while written < len(expectations):
                written += file.write(expectations[written:])
            fields, _ = self.request("check", fds=[memfd], timeout=LONG_REPLY_S_MAX)
        return fields["ok_items"], list(fields["problems"])

    def freeze(self) -> None:
        """The guest was given away: it stays paused for ever here."""
        self.request("freeze")

    def stand_by(self) -> None:
        """Have the frozen guest and its RAM dropped: the agent can take another one in."""
        self.request("standby", timeout=LONG_REPLY_S_MAX)

    def shutdown(self) -> None:
        """End the agent process."""
        self.request("shutdown")


def _read_bytes(fd: int) -> U8Array:
    """The whole file, from its start whatever its position is."""
    data: U8Array = np.empty(os.fstat(fd).st_size, dtype=np.uint8)
    done = 0
    while done < len(data):
        count = os.preadv(fd, [data[done:].data], done)
        if count == 0:
            raise AgentError("frames", f"the file ended after {done} of {len(data)} bytes")
        done += count
    return data
