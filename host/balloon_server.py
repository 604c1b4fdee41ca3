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
import threading
from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol, assert_never

from host.balloon_queues import BalloonQueues, HintBatch
from host.call_loop import READ, WRITE, CallLoop
from host.descriptors import close_all
from host.errors import DeviceNotReady, LoopEnded
from host.vhost_socket import Outgoing, PeerGone, VhostSocket
from virtio.balloon import F_FREE_PAGE_HINT, QUEUE_DEFLATE, QUEUE_HINT, QUEUE_INFLATE, has
from virtio.balloon_device import FEATURES_DEFAULT, BalloonDevice
from virtio.balloon_device import DeviceState as SavedDevice
from virtio.errors import GuestProtocolError, LocalProtocolError, VhostUserError
from virtio.vhost_user import (
    BackendChannel,
    BackendSession,
    CloseFds,
    ConfigWritten,
    FeaturesSet,
    MapRegion,
    Reply,
    RingFdsChanged,
    StartRing,
    StopRing,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from host.device_log import DeviceLog
    from virtio.vhost_user import Effect

__all__ = ["BalloonServer", "DeviceState", "DeviceStatus", "HintBatch"]

PAGES_UNKNOWN = 1 << 32  # before a guest shared its RAM: as many as page frame numbers can name
MESSAGES_PER_TURN_MAX = 64  # then other descriptors have their turn
PASSES_PER_TURN_MAX = 4
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
        self._front_end: VhostSocket | None = None
        self._session: BackendSession | None = None
        self._channel: socket.socket | None = None
        self._announcements: Outgoing | None = None
        self._done_owed = False
        self._connection_errors: Counter[str] = Counter()
        self._quiet = threading.Event()  # no ring runs
        self._quiet.set()

    # --- life -------------------------------------------------------------------------------------

    def start(self) -> None:
        """Listen and serve. Raises OSError when the path cannot be used or another device listens there."""
        self._listener = listen(self.socket_path)
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
        if not self._quiet.wait(timeout):
            raise DeviceNotReady(f"the balloon's rings still run after {timeout:g} s")

    # --- the same, on the device's thread ---------------------------------------------------------

    def _ready(self) -> bool:
        wanted = {QUEUE_INFLATE, QUEUE_DEFLATE}
        return self._announcements is not None and wanted <= self._queues.running

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
        if self._front_end is not None:
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

    def _announce(self) -> None:
        """Tell the guest that the configuration space changed; it reads it when it likes."""
        if self._announcements is None or self._session is None:
            return
        try:
            self._announcements.send(self._session.config_changed())
        except PeerGone:
            self._drop_channel()
        else:
            self._watch_channel()

    # --- connections ------------------------------------------------------------------------------

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            connection, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return  # gone before it was served
        self._drop()
        self._front_end = VhostSocket(connection)
        self._session = BackendSession(self._device.features_offered, self._device.read_config)
        self._loop.watch(self._front_end.fileno(), READ, self._front_end_ready)

    def _front_end_ready(self) -> None:
        try:
            self._receive_messages()
        except PeerGone:
            self._drop()
        except (VhostUserError, GuestProtocolError) as error:
            self._connection_errors[error.kind] += 1
            self._drop()

    def _receive_messages(self) -> None:
        for _ in range(MESSAGES_PER_TURN_MAX):
            front_end, session = self._front_end, self._session
            assert front_end is not None
            assert session is not None
            front_end.outgoing.flush()
            if front_end.outgoing.waiting:
                break  # read on when it has read (rule 1)
            message = front_end.receive()
            if message is None:
                break
            self._carry_out(session.feed(message), session)
        waiting = self._front_end is not None and self._front_end.outgoing.waiting
        if self._front_end is not None:
            events = WRITE if waiting else READ
            self._loop.watch(self._front_end.fileno(), events, self._front_end_ready)

    def _drop(self) -> None:
        """The front-end is gone, or will be: stop its rings, close everything it gave us. Idempotent."""
        session, self._session = self._session, None
        front_end, self._front_end = self._front_end, None
        self._drop_channel()
        if session is not None:
            for effect in session.disconnected():
                if isinstance(effect, StopRing):
                    self._stop_ring(effect.index)
                elif isinstance(effect, CloseFds):
                    close_all(effect.fds)
        if front_end is not None:
            self._loop.unwatch(front_end.fileno())
            front_end.close()
        self._queues.unmap()

    def _drop_channel(self) -> None:
        channel, self._channel, self._announcements = self._channel, None, None
        if channel is not None:
            self._loop.unwatch(channel.fileno())
            channel.close()

    def _take_channel(self, fd: int) -> None:
        self._drop_channel()
        try:
            self._channel = socket.socket(fileno=fd)
        except OSError as error:
            os.close(fd)
            raise VhostUserError("backend_fd", "the back-end channel is no socket") from error
        self._channel.setblocking(False)
        self._announcements = Outgoing(self._channel)
        self._watch_channel()

    def _watch_channel(self) -> None:
        assert self._channel is not None
        assert self._announcements is not None
        events = READ | WRITE if self._announcements.waiting else READ
        self._loop.watch(self._channel.fileno(), events, self._channel_ready)

    def _channel_ready(self) -> None:
        """The front-end closed its end, sent what we never ask for, or has room again."""
        assert self._channel is not None
        assert self._announcements is not None
        try:
            if not self._channel.recv(4096):  # we ask for no replies: what comes is read and dropped
                raise PeerGone("closed by the peer")
        except BlockingIOError:
            pass
        except OSError:
            self._drop_channel()
            return
        try:
            self._announcements.flush()
        except PeerGone:
            self._drop_channel()
        else:
            self._watch_channel()

    # --- effects ----------------------------------------------------------------------------------

    def _carry_out(self, effects: Sequence[Effect], session: BackendSession) -> None:
        """Do what the session says, in order. What a failing effect leaves undone, `_drop` closes."""
        remaining = list(effects)
        try:
            while remaining:
                remaining[1:1] = self._do(remaining[0], session)
                del remaining[0]
        except BaseException:
            for effect in remaining[1:]:
                if isinstance(effect, CloseFds):
                    close_all(effect.fds)
                elif isinstance(effect, MapRegion | BackendChannel):
                    os.close(effect.fd)
            raise

    def _do(self, effect: Effect, session: BackendSession) -> Sequence[Effect]:
        """One effect; returns what follows from it, to be done next."""
        match effect:
            case Reply():
                assert self._front_end is not None
                self._front_end.outgoing.send(effect.data)
            case MapRegion():
                self._queues.map_region(effect.fd, effect.guest_address, effect.size)
            case FeaturesSet():
                self._device.negotiate(effect.features)
            case StartRing():
                self._start_ring(effect)
            case RingFdsChanged():
                self._loop.unwatch(self._queues.kick_fd(effect.index))
                self._queues.change_fds(effect)
                self._watch_kick(effect.index)
            case StopRing():
                return session.ring_stopped(effect.index, self._stop_ring(effect.index))
            case ConfigWritten():
                self._device.write_config(effect.offset, effect.data)
            case BackendChannel():
                self._take_channel(effect.fd)
            case CloseFds():
                close_all(effect.fds)
            case _ as never:
                assert_never(never)
        return ()

    # --- rings ------------------------------------------------------------------------------------

    def _start_ring(self, order: StartRing) -> None:
        self._queues.start(order)
        self._quiet.clear()
        self._watch_kick(order.index)
        self._serve(order.index)  # chains may wait whose kick went to a device before us

    def _stop_ring(self, index: int) -> int:
        if index in self._queues.running:
            self._loop.unwatch(self._queues.kick_fd(index))
        base = self._queues.stop(index)
        if not self._queues.running:
            self._quiet.set()
        return base

    def _watch_kick(self, index: int) -> None:
        try:
            self._loop.watch(self._queues.kick_fd(index), READ, partial(self._kicked, index))
        except OSError as error:
            raise VhostUserError("ring_fd", f"ring {index}'s kick cannot be waited for") from error

    def _kicked(self, index: int) -> None:
        fd = self._queues.kick_fd(index)
        try:
            alive = bool(os.read(fd, 4096))
        except BlockingIOError:
            return
        except OSError:
            alive = False
        if not alive:  # a pipe whose writer is gone would be ready for ever
            self._loop.unwatch(fd)
        self._serve(index)

    def _serve(self, index: int) -> None:
        for _ in range(PASSES_PER_TURN_MAX):
            if not self._queues.serve(index):
                break
        else:
            self._loop.soon(index, partial(self._serve, index))
        if self._queues.broken(index):
            self._loop.unwatch(self._queues.kick_fd(index))


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
