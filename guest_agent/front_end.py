"""The guest's end of vhost-user as real sockets and eventfds, around virtio's FrontendSession.

Rule 1: the node listens, this end connects, and connects again for as long as the guest lives: a node that dies
        costs the guest nothing but a balloon that waits.
Rule 2: where a ring goes on is known from whoever stopped it (GET_VRING_BASE); of a device that vanished it is read
        from the used index in guest RAM.
Rule 3: requests and replies go in lock step under one lock; every wait for the node is bounded, and a node that
        breaks the protocol or its silence loses the connection.
Rule 4: only the thread in `run` closes descriptors that it polls; everybody else shuts the connection down.
Rule 5: a changed configuration comes by CONFIG_CHANGE_MSG, is read by GET_CONFIG, and is handed to the driver.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
import time
from typing import TYPE_CHECKING, Protocol

import structlog

from guest_agent.peer_credentials import why_not_trusted
from virtio.balloon import (
    CONFIG_OFFSET_ACTUAL,
    CONFIG_OFFSET_POISON,
    F_FREE_PAGE_HINT,
    F_REPORTING,
    F_STATS_VQ,
    QUEUE_COUNT,
    QUEUE_DEFLATE,
    QUEUE_HINT,
    QUEUE_INFLATE,
    QUEUE_REPORTING,
    QUEUE_STATS,
    BalloonConfig,
    has,
)
from virtio.errors import RemoteVirtioError
from virtio.vhost_user import (
    HEADER_BYTES,
    BackendReply,
    ConfigRead,
    FrontendSession,
    Message,
    RingSetup,
    RingsStopped,
    decode,
    decode_header,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from guest_agent.ram import GuestRam
    from virtio.split_ring import RingLayout
    from virtio.vhost_user import Action, Event

__all__ = ["Driver", "FrontEnd", "drain"]

RETRY_S = 0.02  # a node restarts in tenths of a second; looking is one system call
EXCHANGE_S_MAX = 1.0  # below the patience of a pause: a node that hangs does not make the guest unpausable
FEATURE_QUEUES = {F_STATS_VQ: QUEUE_STATS, F_FREE_PAGE_HINT: QUEUE_HINT, F_REPORTING: QUEUE_REPORTING}
LOST = (OSError, RemoteVirtioError)  # what ends a connection; everything else is our own mistake


class Driver(Protocol):
    """What the front-end needs of the balloon driver. None of it may wait for the front-end."""

    def negotiate(self, offered: int) -> int:
        """Pick from the features that a device offers. Raises RemoteVirtioError when they will not do."""

    def config_changed(self, config: BalloonConfig) -> None:
        """The configuration as it was just read, at connecting and after each change."""

    def device_bases(self) -> list[int]:
        """Where the rings stand according to the used indices in guest RAM."""

    @property
    def poison_to_write(self) -> int | None:
        """What `poison_val` must say before the rings start (virtio 1.2, 5.5.6.6); None: nothing."""


class FrontEnd:
    """Thread-safe. `run` is the body of its thread. Rings start only after `start_rings` was called."""

    def __init__(
        self, path: Path, ram: GuestRam, layouts: Sequence[RingLayout], stopping: threading.Event
    ) -> None:
        self._path = path
        self._ram = ram
        self._layouts = layouts
        self._stopping = stopping
        self._log = structlog.get_logger(component="front_end")
        self._driver: Driver | None = None
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._main: socket.socket | None = None
        self._channel: socket.socket | None = None
        self._session: FrontendSession | None = None
        self._wanted = False  # whether rings shall run
        self._running = False  # whether the connected device was told to serve them
        self._bases: list[int] | None = None  # where to start them; None: as the used indices say
        self._last_reason = ""
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._kick_fds = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(QUEUE_COUNT)]
        self.call_fds = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(QUEUE_COUNT)]

    def wait_ready(self, timeout_s: float) -> bool:
        """Wait until a device serves the rings; False when none does in time."""
        with self._changed:
            return self._changed.wait_for(lambda: self._running, timeout_s)

    @property
    def ready(self) -> bool:
        """Whether a device serves the rings now."""
        return self._running

    def attach(self, driver: Driver) -> None:
        """Name the driver, once, before `run`."""
        self._driver = driver

    def kick(self, queue: int) -> None:
        """Tell the device that a queue has new buffers."""
        os.eventfd_write(self._kick_fds[queue], 1)

    def wait_for_call(self, queues: Sequence[int], deadline: float) -> bool:
        """Wait until the device interrupts for one of these queues; False when it does not in time."""
        waiting = select.poll()
        for queue in queues:
            waiting.register(self.call_fds[queue], select.POLLIN)
        ready = waiting.poll(max(0.0, deadline - time.monotonic()) * 1000)
        for fd, _ in ready:
            drain(fd)
        return bool(ready)

    def reset_device(self) -> None:
        """Let the device forget this driver: end the connection; `run` makes a new one, which negotiates anew.

        The rings were stopped before, and their memory is zeroed before they are started again.
        """
        with self._lock:
            assert not self._wanted, "the rings still run"
            self._bases = None
            self._session = None
            if self._main is not None:
                with contextlib.suppress(OSError):  # it is gone already
                    self._main.shutdown(socket.SHUT_RDWR)

    def wake(self) -> None:
        """Make `run` look whether it shall end, or start rings."""
        os.eventfd_write(self._wake_fd, 1)

    def start_rings(self, bases: Sequence[int] | None) -> None:
        """Let the device serve the rings, now or as soon as there is one. Idempotent.

        Args:
            bases: where each ring goes on; None: as the used indices in guest RAM say.
        """
        with self._lock:
            if not self._wanted:
                self._wanted = True
                self._bases = None if bases is None else list(bases)
            if self._session is not None and not self._running:
                self._guarded(self._start_rings)

    def want_rings(self, bases: Sequence[int] | None) -> None:
        """As `start_rings`, for who cannot wait: `run` starts them. No lock: an exchange may hold it."""
        if not self._wanted:
            self._bases = None if bases is None else list(bases)
            self._wanted = True  # last: `run` may look at any moment
        self.wake()

    def stop_rings(self) -> list[int]:
        """Stop the rings; where they stand, by queue. The device touches guest RAM no more. Idempotent."""
        with self._lock:
            self._wanted = False
            if self._running:
                self._guarded(self._stop_rings)
            if self._bases is None:
                self._bases = self._driver_bases()
            return list(self._bases)

    def write_actual(self, actual: int) -> None:
        """Tell the device how many pages are ballooned; without a device the next connection does it."""
        with self._lock:
            session = self._session
            if session is not None:
                data = actual.to_bytes(4, "little")
                self._guarded(lambda: self._exchange(session.write_config(CONFIG_OFFSET_ACTUAL, data)))

    def run(self) -> None:
        """Connect and serve the back-end channel, again and again, until told to stop."""
        while not self._stopping.is_set():
            try:
                with self._lock, self._disconnected_on_error():
                    self._connect()
                self._serve()
                self._note("the node closed the connection")
            except LOST as error:
                self._note(str(error))
            finally:
                with self._lock:
                    self._disconnect()
            self._stopping.wait(RETRY_S)

    def close(self) -> None:
        """Close the eventfds, after the threads that use them ended."""
        for fd in (self._wake_fd, *self._kick_fds, *self.call_fds):
            os.close(fd)

    def _note(self, reason: str) -> None:
        if reason != self._last_reason and not self._stopping.is_set():
            self._log.info("device_away", reason=reason)
        self._last_reason = reason

    def _guarded(self, exchange: Callable[[], object]) -> None:
        """Run an exchange; if the node fails in it, shut the connection down: `run` connects again."""
        try:
            exchange()
        except LOST as error:
            self._log.warning("device_lost", reason=str(error))
            self._running = False
            self._bases = None
            self._session = None
            if self._main is not None:
                with contextlib.suppress(OSError):  # it is gone already
                    self._main.shutdown(socket.SHUT_RDWR)

    def _driver_bases(self) -> list[int]:
        assert self._driver is not None
        return self._driver.device_bases()

    # Everything below holds the lock, except the waiting in _serve.

    def _connect(self) -> None:
        assert self._driver is not None
        self._main = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._main.settimeout(EXCHANGE_S_MAX)
        self._main.connect(str(self._path))
        if reason := why_not_trusted(self._main):
            raise PermissionError(f"no balloon device of ours at {self._path}: {reason}")
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self._channel.settimeout(EXCHANGE_S_MAX)
        with theirs:
            self._session = FrontendSession(self._driver.negotiate, theirs.fileno())
            events = self._exchange(self._session.start())
        ram = self._ram
        events += self._exchange(self._session.set_memory(ram.fd, ram.memory_bytes, ram.base_address))
        poison = self._driver.poison_to_write
        if poison is not None:
            events += self._exchange(
                self._session.write_config(CONFIG_OFFSET_POISON, poison.to_bytes(4, "little"))
            )
        if self._wanted:
            self._start_rings()
        self._last_reason = ""
        self._log.info("device_connected", features=hex(self._session.features))
        self._hand_on(events)

    @contextlib.contextmanager
    def _disconnected_on_error(self) -> Iterator[None]:
        """Whoever takes the lock next finds a whole connection or none."""
        try:
            yield
        except BaseException:
            self._disconnect()
            raise

    def _disconnect(self) -> None:
        for connection in (self._main, self._channel):
            if connection is not None:
                connection.close()
        if self._running:
            self._bases = None
        self._main = self._channel = self._session = None
        self._running = False

    def _serve(self) -> None:
        """Read configuration changes until the connection ends."""
        main, channel = self._main, self._channel
        assert main is not None
        assert channel is not None
        waiting = select.poll()
        waiting.register(main.fileno(), select.POLLRDHUP)  # replies belong to whoever asked
        waiting.register(channel.fileno(), select.POLLIN)
        waiting.register(self._wake_fd, select.POLLIN)
        while not self._stopping.is_set():
            ready = dict(waiting.poll())
            if self._wake_fd in ready:
                drain(self._wake_fd)
                with self._lock:
                    if self._wanted and not self._running and self._session is not None:
                        self._start_rings()
            if main.fileno() in ready:
                return
            if channel.fileno() in ready:
                with self._lock:
                    if self._session is None:
                        return
                    message = _receive(channel, time.monotonic() + EXCHANGE_S_MAX)
                    self._hand_on(self._exchange(self._session.feed_backend(message)))

    def _queues(self) -> list[int]:
        """The rings in use. Inflation comes last: a device that serves it has all the others."""
        assert self._session is not None
        features = self._session.features
        optional = [queue for bit, queue in FEATURE_QUEUES.items() if has(features, bit)]
        return sorted([QUEUE_INFLATE, QUEUE_DEFLATE, *optional], reverse=True)

    def _start_rings(self) -> None:
        assert self._session is not None
        bases = self._driver_bases() if self._bases is None else self._bases
        rings = [
            RingSetup(queue, self._layouts[queue], bases[queue], self._kick_fds[queue], self.call_fds[queue])
            for queue in self._queues()
        ]
        self._exchange(self._session.start_rings(rings))
        self._running = True
        self._changed.notify_all()
        self._bases = None
        for queue in self._queues():
            self.kick(queue)  # buffers may wait whose kick went to a device before this one

    def _stop_rings(self) -> None:
        assert self._session is not None
        bases = self._driver_bases()
        for event in self._exchange(self._session.stop(self._queues())):
            if isinstance(event, RingsStopped):
                for queue, base in event.bases.items():
                    bases[queue] = base
        self._running = False
        self._bases = bases

    def _hand_on(self, events: list[Event]) -> None:
        assert self._driver is not None
        for event in events:
            if isinstance(event, ConfigRead):
                self._driver.config_changed(BalloonConfig.from_bytes(event.config))

    def _exchange(self, actions: list[Action]) -> list[Event]:
        """Send what the session says and feed it the answers until it is idle; the events on the way."""
        session, main, channel = self._session, self._main, self._channel
        deadline = time.monotonic() + EXCHANGE_S_MAX
        assert session is not None
        assert main is not None
        events: list[Event] = []
        while True:
            for action in actions:
                if isinstance(action, Message):
                    _send(main, action)
                elif isinstance(action, BackendReply):
                    assert channel is not None
                    channel.sendall(action.data)
                else:
                    events.append(action)
            if session.idle:
                return events
            actions = session.feed(_receive(main, deadline))


def drain(eventfd: int) -> None:
    """Take back what an eventfd was signalled."""
    with contextlib.suppress(BlockingIOError):  # nothing was signalled
        os.eventfd_read(eventfd)


def _send(connection: socket.socket, message: Message) -> None:
    data = message.to_bytes()
    connection.settimeout(EXCHANGE_S_MAX)
    if not message.fds:
        connection.sendall(data)
        return
    sent = socket.send_fds(connection, [data], list(message.fds))
    connection.sendall(data[sent:])


def _receive(connection: socket.socket, deadline: float) -> Message:
    """One whole message. Raises OSError (also for silence and for the end), VhostUserError."""
    header = _receive_bytes(connection, HEADER_BYTES, deadline)
    _, _, size = decode_header(header)
    return decode(header + _receive_bytes(connection, size, deadline))


def _receive_bytes(connection: socket.socket, count: int, deadline: float) -> bytes:
    data = b""
    while len(data) < count:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError(f"no answer within {EXCHANGE_S_MAX} s")
        connection.settimeout(left)
        part = connection.recv(count - len(data))
        if not part:
            raise ConnectionResetError("the node closed the connection")
        data += part
    return data
