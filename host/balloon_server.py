"""The balloon device of this host: a vhost-user back-end on a unix socket, served by one thread.

Rule 1: never wait for the guest: sockets do not block, interrupts are written and forgotten, rings are
        taken in bounded passes. A guest that floods or falls silent costs nobody but itself.
Rule 2: the device outlives its front-ends. A front-end that goes away takes rings and memory with it; balloon
        size, features, ids and counters stay, and the next one finds them. The newest connection is served.
Rule 3: garbage costs the connection it came on, and is counted by kind.
Rule 4: hints that arrive after `close_hints` drained the queue are stale, whatever id they are for.
Rule 5: DONE reaches the guest whatever happened: it is in the configuration space until the next id, for
        whoever connects to read.

Public methods are thread-safe: they run on the device's thread and return when done.
"""

from __future__ import annotations

import errno
import os
import socket
from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol

from host.balloon_queues import BalloonQueues, HintBatch
from host.call_loop import READ, CallLoop
from host.errors import DeviceNotReady, LoopEnded
from host.vhost_connection import VhostConnection
from virtio.balloon import F_FREE_PAGE_HINT, QUEUE_DEFLATE, QUEUE_HINT, QUEUE_INFLATE, has
from virtio.balloon_device import FEATURES_DEFAULT, BalloonDevice
from virtio.balloon_device import DeviceState as SavedDevice
from virtio.errors import LocalProtocolError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from host.device_log import DeviceLog

__all__ = ["BalloonServer", "DeviceState", "DeviceStatus", "HintBatch"]

PAGES_UNKNOWN = 1 << 32  # before a guest shared its RAM: as many as page frame numbers can name
DRAIN_PASSES_MAX = 64  # 64 rings full: an honest report ends long before
QUIET_S_MAX = 10.0


class CarriesDeviceState(Protocol):
    """What `adopt_state` reads: `DeviceState` here, or the protobuf message of that name."""

    @property
    def features(self) -> int: ...
    @property
    def num_pages(self) -> int: ...
    @property
    def actual(self) -> int: ...
    @property
    def poison_value(self) -> int: ...
    @property
    def next_command_id(self) -> int: ...
    @property
    def hints_open(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class DeviceState:
    """What travels with the guest (migration.proto). `hints_open`: the guest still waits for DONE."""

    features: int
    num_pages: int
    actual: int
    poison_value: int
    next_command_id: int
    hints_open: bool
    ring_bases: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class DeviceStatus:
    """How things stand. `ready`: the driver is up, its rings run, and it hears of configuration changes."""

    ready: bool
    features: int
    num_pages: int
    actual: int
    hints_negotiated: bool
    hint_state: str
    inflated_pages: int
    deflated_pages: int
    guest_errors: dict[str, int]
    connection_errors: dict[str, int]


class BalloonServer:
    """One device, listening at `socket_path` from `start` to `stop`.

    Args:
        socket_path: created with mode 0600, removed by `stop`.
        sink: gets every `HintBatch` on the device's thread; it must not wait for this device.
        log: gets every store the device makes into guest RAM.
        features_offered: device feature bits.
    """

    def __init__(
        self,
        socket_path: str | Path,
        *,
        sink: Callable[[HintBatch], None],
        log: DeviceLog,
        features_offered: int = FEATURES_DEFAULT,
    ) -> None:
        self.socket_path = os.fspath(socket_path)
        self._device = BalloonDevice(PAGES_UNKNOWN, features_offered=features_offered)
        self._queues = BalloonQueues(self._device, log, sink)
        self._loop = CallLoop("balloon-device")
        self._listener: socket.socket | None = None
        self._connection: VhostConnection | None = None
        self._done_owed = False
        self._connection_errors: Counter[str] = Counter()

    # --- life -------------------------------------------------------------------------------------

    def start(self) -> None:
        """Listen and serve. Raises OSError when the path cannot be used or another device listens there."""
        try:
            self._listener = listen(self.socket_path)
        except BaseException:
            self._loop.stop()
            raise
        self._loop.watch(self._listener.fileno(), READ, self._accept)
        self._loop.start()

    def stop(self) -> None:
        """Stop the rings, drop the front-end, remove the socket. Idempotent."""
        listener, self._listener = self._listener, None
        if listener is not None:
            try:
                self._loop.call(partial(self._close, listener))
            except LoopEnded:  # its thread failed: nobody else touches any of this now
                self._close(listener)
        self._loop.stop()

    def _close(self, listener: socket.socket) -> None:
        self._drop()
        self._loop.unwatch(listener.fileno())
        listener.close()
        os.unlink(self.socket_path)  # noqa: PTH108

    # --- what the roles ask for -------------------------------------------------------------------

    def open_hints(self) -> int:
        """Ask the guest to hint its free pages; returns the command id.

        Raises:
            DeviceNotReady: no driver with free page hinting is up, or a report is open already.
        """
        return self._loop.call(self._open_hints)

    def close_hints(self) -> HintBatch:
        """End the report: drain the queue, then show STOP. Returns what was still in the queue.

        Whatever comes later is stale. Harmless when no report is open.
        """
        return self._loop.call(self._close_hints)

    def hints_done(self) -> None:
        """Tell the guest that it may have its pages back."""
        self._loop.call(self._hints_done)

    def set_num_pages(self, num_pages: int) -> None:
        """Ask the guest for a balloon of this size.

        Raises:
            DeviceNotReady: no guest has shared its RAM yet.
            ValueError: more pages than the guest has.
        """
        self._loop.call(lambda: self._set_num_pages(num_pages))

    def status(self) -> DeviceStatus:
        """How things stand now."""
        return self._loop.call(self._status)

    def device_state(self) -> DeviceState:
        """What the destination's device must carry on with. Complete once the rings are stopped."""
        return self._loop.call(self._device_state)

    def adopt_state(self, state: CarriesDeviceState) -> None:
        """Become the device that a guest had elsewhere, before its agent connects here.

        Rings go on at the bases that the front-end gives. Hints of the report it may still hold are stale.

        Raises:
            DeviceNotReady: a front-end is connected.
            virtio.errors.RemoteProtocolError: the state cannot be, or wants a feature that is not offered.
        """
        self._loop.call(lambda: self._adopt(state))

    def rings_stopped(self, timeout: float = QUIET_S_MAX) -> None:
        """Wait until no ring runs: the device touches guest RAM no more, and all its stores are logged.

        Raises:
            DeviceNotReady: rings still run after `timeout` seconds.
        """
        if not self._queues.quiet.wait(timeout):
            raise DeviceNotReady(f"the balloon's rings still run after {timeout:g} s")

    # --- the same, on the device's thread ---------------------------------------------------------

    def _ready(self) -> bool:
        heard = self._connection is not None and self._connection.hears_announcements
        return heard and self._queues.running >= {QUEUE_INFLATE, QUEUE_DEFLATE}

    def _open_hints(self) -> int:
        if not self._ready() or QUEUE_HINT not in self._queues.running:
            raise DeviceNotReady("no guest driver with free page hinting is up")
        try:
            self._queues.command_id = self._device.open_hints()
        except LocalProtocolError as error:
            raise DeviceNotReady(str(error)) from error
        self._done_owed = True
        self._announce()
        return self._queues.command_id

    def _close_hints(self) -> HintBatch:
        last = self._queues.drain_hints(DRAIN_PASSES_MAX)
        was_shown = self._device.hints.config_command_id
        self._device.close_hints()
        if self._device.hints.config_command_id != was_shown:
            self._announce()
        return last

    def _hints_done(self) -> None:
        self._device.hints_done()
        self._done_owed = False
        self._announce()

    def _set_num_pages(self, num_pages: int) -> None:
        if not self._queues.mapped:
            raise DeviceNotReady("no guest has connected its balloon")
        if not 0 <= num_pages <= self._device.pages:
            raise ValueError(f"a balloon of {num_pages} pages in a guest of {self._device.pages}")
        self._device.set_num_pages(num_pages)
        self._announce()

    def _status(self) -> DeviceStatus:
        return DeviceStatus(
            ready=self._ready(),
            features=self._device.features,
            num_pages=self._device.config.num_pages,
            actual=self._device.config.actual,
            hints_negotiated=has(self._device.features, F_FREE_PAGE_HINT),
            hint_state=self._device.hints.state.value,
            inflated_pages=self._queues.inflated_pages,
            deflated_pages=self._queues.deflated_pages,
            guest_errors=dict(+self._device.guest_errors),
            connection_errors=dict(self._connection_errors),
        )

    def _device_state(self) -> DeviceState:
        saved = self._device.save()
        return DeviceState(
            features=saved["features"],
            num_pages=saved["num_pages"],
            actual=saved["actual"],
            poison_value=saved["poison_value"],
            next_command_id=saved["next_command_id"],
            hints_open=self._done_owed,
            ring_bases=self._queues.ring_bases(),
        )

    def _adopt(self, state: CarriesDeviceState) -> None:
        if self._connection is not None:
            raise DeviceNotReady("a guest is connected; its device cannot become another's")
        self._device.pages = PAGES_UNKNOWN
        self._device.restore(
            SavedDevice(
                features=state.features,
                num_pages=state.num_pages,
                actual=state.actual,
                poison_value=state.poison_value,
                next_command_id=state.next_command_id,
                hints_open=state.hints_open,
            )
        )
        self._done_owed = state.hints_open

    # --- connections ------------------------------------------------------------------------------

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            connection, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return  # gone before it was served
        self._drop()
        self._connection = VhostConnection(connection, self._loop, self._queues, self._gone)

    def _gone(self, kind: str) -> None:
        if kind:
            self._connection_errors[kind] += 1
        self._drop()

    def _drop(self) -> None:
        """End the connection, if there is one; the device stays as it is."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()
        self._queues.unmap()

    def _announce(self) -> None:
        if self._connection is not None:
            self._connection.announce()


def listen(path: str) -> socket.socket:
    """A non-blocking stream listener at `path`, 0600 from its first moment.

    Raises:
        OSError: the path cannot be used, or somebody listens there.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        answer = probe.connect_ex(path)
    if answer == errno.ECONNREFUSED:
        os.unlink(path)  # noqa: PTH108 - left behind by a process that was killed
    elif answer != errno.ENOENT:
        raise OSError(answer, f"cannot listen, is another device there? {os.strerror(answer)}", path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        os.fchmod(listener.fileno(), 0o600)  # before bind: the file is never there with wider rights
        listener.bind(path)
        listener.listen(4)
    except BaseException:
        listener.close()
        raise
    return listener
