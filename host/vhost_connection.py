"""One front-end's connection to the balloon device: messages in, effects done, rings watched.

Rule 1: what the session (virtio/vhost_user_backend.py) says is done in its order, before the next message.
Rule 2: whatever goes wrong on a connection ends that connection: `on_gone` is called once, with the kind of
        violation, or "" for a peer that went away.
Rule 3: `on_write` is called after the driver chose features or wrote to the configuration space.
Rule 4: `close` stops the rings and closes every descriptor that came over this connection.
"""

from __future__ import annotations

import os
import socket
from functools import partial
from typing import TYPE_CHECKING, assert_never

from host.call_loop import READ, WRITE, CallLoop
from host.descriptors import close_all
from host.vhost_socket import Outgoing, PeerGone, VhostSocket
from virtio.errors import GuestProtocolError, VhostUserError
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

    from host.balloon_queues import BalloonQueues
    from virtio.vhost_user import Effect

MESSAGES_PER_TURN_MAX = 64  # then other descriptors have their turn
PASSES_PER_TURN_MAX = 4  # of a ring, about 10 ms each; then other descriptors have their turn


class VhostConnection:
    """Belongs to the loop's thread. Takes the socket over."""

    def __init__(
        self,
        connection: socket.socket,
        loop: CallLoop,
        queues: BalloonQueues,
        *,
        on_gone: Callable[[str], None],
        on_write: Callable[[], None],
    ) -> None:
        self._loop = loop
        self._queues = queues
        self._device = queues.device
        self._on_gone = on_gone
        self._on_write = on_write
        self._socket = VhostSocket(connection)
        self._session = BackendSession(self._device.features_offered, self._device.read_config)
        self._channel: socket.socket | None = None
        self._announcements: Outgoing | None = None
        self._closed = False
        loop.watch(self._socket.fileno(), READ, self._ready)

    @property
    def hears_announcements(self) -> bool:
        """Whether the front-end can be told of configuration changes."""
        return self._announcements is not None

    def announce(self) -> None:
        """Tell the guest that the configuration space changed; it reads it when it likes."""
        if self._announcements is None:
            return
        try:
            self._announcements.send(self._session.config_changed())
        except PeerGone:
            self._drop_channel()
        else:
            self._watch_channel()

    def close(self) -> None:
        """Stop the rings, close everything the front-end gave us. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._drop_channel()
        for effect in self._session.disconnected():
            if isinstance(effect, StopRing):
                self._stop_ring(effect.index)
            elif isinstance(effect, CloseFds):
                close_all(effect.fds)
        self._loop.unwatch(self._socket.fileno())
        self._socket.close()

    # --- messages ---------------------------------------------------------------------------------

    def _ready(self) -> None:
        try:
            self._receive_messages()
        except PeerGone:
            self._on_gone("")
        except (VhostUserError, GuestProtocolError) as error:
            self._on_gone(error.kind)

    def _receive_messages(self) -> None:
        outgoing = self._socket.outgoing
        for _ in range(MESSAGES_PER_TURN_MAX):
            outgoing.flush()
            if outgoing.waiting:
                break  # read on when it has read: what we hold for it stays bounded
            message = self._socket.receive()
            if message is None:
                break
            self._carry_out(self._session.feed(message))
        self._loop.watch(self._socket.fileno(), WRITE if outgoing.waiting else READ, self._ready)

    # --- the channel for announcements ------------------------------------------------------------

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

    def _carry_out(self, effects: Sequence[Effect]) -> None:
        """Do what the session says, in order. What a failing effect leaves undone is closed."""
        remaining = list(effects)
        try:
            while remaining:
                remaining[1:1] = self._do(remaining[0])
                del remaining[0]
        except BaseException:
            for effect in remaining[1:]:
                if isinstance(effect, CloseFds):
                    close_all(effect.fds)
                elif isinstance(effect, MapRegion | BackendChannel):
                    os.close(effect.fd)
            raise

    def _do(self, effect: Effect) -> Sequence[Effect]:
        """One effect; returns what follows from it, to be done next."""
        match effect:
            case Reply():
                self._socket.outgoing.send(effect.data)
            case MapRegion():
                self._queues.map_region(effect.fd, effect.guest_address, effect.size)
            case FeaturesSet():
                self._queues.driver_chose(effect.features)
                self._on_write()
            case StartRing():
                self._start_ring(effect)
            case RingFdsChanged():
                self._loop.unwatch(self._queues.kick_fd(effect.index))
                self._queues.change_fds(effect)
                self._watch_kick(effect.index)
            case StopRing():
                return self._session.ring_stopped(effect.index, self._stop_ring(effect.index))
            case ConfigWritten():
                self._device.write_config(effect.offset, effect.data)
                self._on_write()
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
        self._watch_kick(order.index)
        self._serve(order.index)  # chains may wait whose kick went to a device before us

    def _stop_ring(self, index: int) -> int:
        if self._queues.serves(index):
            self._loop.unwatch(self._queues.kick_fd(index))
        return self._queues.stop(index)

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
        self._serve_or_end(index)

    def _serve_or_end(self, index: int) -> None:
        """As `_serve`, from the loop: what the front-end did wrong ends its connection and not the loop."""
        if self._closed:
            return
        try:
            self._serve(index)
        except VhostUserError as error:
            self._on_gone(error.kind)

    def _serve(self, index: int) -> None:
        for _ in range(PASSES_PER_TURN_MAX):
            if not self._queues.serve(index):
                break
        else:
            self._loop.soon(index, partial(self._serve_or_end, index))
        if self._queues.broken(index):
            self._loop.unwatch(self._queues.kick_fd(index))
