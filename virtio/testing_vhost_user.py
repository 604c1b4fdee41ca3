"""Both ends of a vhost-user connection in memory, for tests of either session.

Rule 1: descriptors are counted as a kernel would: passing one makes a new number, and after `disconnect` none
        may be left open.
Rule 2: effects are executed at once and in order, as a host must.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from virtio.balloon import QUEUE_COUNT, BalloonConfig
from virtio.errors import RemoteVirtioError
from virtio.ring_layout import layout_at
from virtio.split_ring import DeviceRing
from virtio.vhost_user import (
    BackendChannel,
    BackendSession,
    CloseFds,
    MapRegion,
    Message,
    Reply,
    RingSetup,
    StartRing,
    StopRing,
    decode,
)
from virtio.vhost_user_frontend import Event, FrontendSession

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from virtio.vhost_user import Action, Effect

USER_ADDRESS = 0x7F00_0000_0000  # where the front-end has guest RAM mapped
MEMORY_FD, BACKEND_FD, KICK_FD, CALL_FD = 8, 9, 20, 30


class MockBackend:
    """A back-end session and the little that executes its effects.

    Attributes:
        config: the device's configuration space.
        rings: the rings that run.
        open_fds: descriptors received and not yet closed or handed on.
        log: every effect, in order.
        replies: bytes sent and not yet taken.
    """

    def __init__(self, memory: memoryview, features_offered: int) -> None:
        """A back-end over guest memory that needs no mapping."""
        self.memory = memory
        self.config = BalloonConfig()
        self.session = BackendSession(features_offered, self.config.to_bytes, QUEUE_COUNT)
        self.rings: dict[int, DeviceRing] = {}
        self.open_fds: set[int] = set()
        self.log: list[Effect] = []
        self.replies: deque[bytes] = deque()
        self.fds_made = 1000

    def receive(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Take one message; its descriptors get new numbers. Raises as the session."""
        passed = tuple(self.fds_made + index for index in range(len(fds)))
        message = decode(data, passed)  # descriptors of what is no message never reach the session
        self.fds_made += len(fds)
        self.open_fds |= set(passed)
        self._execute(self.session.feed(message))

    def disconnect(self) -> None:
        """End the connection. Raises AssertionError when a descriptor is left."""
        self._execute(self.session.disconnected())
        assert not self.open_fds, self.open_fds

    def _execute(self, effects: list[Effect]) -> None:
        """In order; what a failing effect leaves undone is closed, as a real back-end has to."""
        for done, effect in enumerate(effects, 1):
            self.log.append(effect)
            try:
                self._do(effect)
            except RemoteVirtioError:
                for undone in effects[done:]:
                    if isinstance(undone, MapRegion | BackendChannel | CloseFds):
                        self._do(undone)
                raise

    def _do(self, effect: Effect) -> None:
        if isinstance(effect, Reply):
            self.replies.append(effect.data)
        elif isinstance(effect, StartRing):
            self.rings[effect.index] = DeviceRing(self.memory, effect.layout, next_avail=effect.base)
        elif isinstance(effect, StopRing):
            ring = self.rings.pop(effect.index, None)  # none where it lay in no guest's memory
            if not self.session.failed and ring is not None:  # `disconnected` wants no answer
                self._execute(self.session.ring_stopped(effect.index, ring.next_avail))
        elif isinstance(effect, MapRegion | BackendChannel):
            self.open_fds.remove(effect.fd)
        elif isinstance(effect, CloseFds):
            self.open_fds -= set(effect.fds)


class JoinedSessions:
    """A front-end and a back-end session, joined; `run` carries messages until nothing moves.

    Attributes:
        memory: guest RAM, 1 MiB.
        host: the back-end.
        front: the front-end; it accepts everything offered but bit 0.
        layouts: where five rings of 64 entries lie.
    """

    def __init__(
        self,
        features_offered: int,
        backend_fd: int = BACKEND_FD,
        negotiate: Callable[[int], int] = lambda offered: offered & ~1,
    ) -> None:
        """Two fresh sessions that have not spoken yet."""
        self.memory = memoryview(bytearray(1 << 20))
        self.host = MockBackend(self.memory, features_offered)
        self.front = FrontendSession(negotiate, backend_fd)
        self.layouts = [layout_at(0x1000 * (1 + queue), 64) for queue in range(QUEUE_COUNT)]

    def run(self, actions: list[Action]) -> list[Event]:
        """Carry these actions and what follows from them; returns the events, in order."""
        events: list[Event] = []
        waiting = deque(actions)
        while waiting:
            action = waiting.popleft()
            if not isinstance(action, Message):
                events.append(action)
                continue
            self.host.receive(action.to_bytes(), action.fds)
            while self.host.replies:
                waiting += self.front.feed(decode(self.host.replies.popleft()))
        assert self.front.idle
        return events

    def setups(self, bases: Mapping[int, int] | None = None) -> list[RingSetup]:
        """How to start all five rings, at `bases` where given."""
        return [
            RingSetup(index, layout, (bases or {}).get(index, 0), KICK_FD + index, CALL_FD + index)
            for index, layout in enumerate(self.layouts)
        ]

    def up(self) -> None:
        """Everything a driver does until its rings run."""
        self.run(self.front.start())
        self.run(self.front.set_memory(MEMORY_FD, len(self.memory), USER_ADDRESS))
        self.run(self.front.start_rings(self.setups()))
