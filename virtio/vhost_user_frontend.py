"""The front-end's (the guest side's) half of a vhost-user connection.

Rule 1: one request is on the wire at a time: the next leaves when the last is answered or acknowledged. Every
        method returns what to do now: a `Message` is to be sent (its descriptors with it), all else is an
        event.
Rule 2: the order is the standard's: owner, features, protocol features, back-end channel, accepted features,
        configuration; then memory; then per ring size, base, addresses, call, kick, enable.
Rule 3: a back-end that answers something else raises VhostUserError, and the session is in error for good.
Rule 4: descriptors belong to the caller and stay open; sending duplicates them.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from virtio.balloon import CONFIG_BYTES
from virtio.errors import LocalVirtioError, VhostUserError
from virtio.vhost_user_messages import (
    CONFIG_HEAD,
    F_PROTOCOL_FEATURES,
    FLAG_NEED_REPLY,
    FLAG_REPLY,
    FLAG_VERSION,
    NO_FD,
    PROTOCOL_F_BACKEND_REQ,
    PROTOCOL_F_CONFIG,
    PROTOCOL_F_REPLY_ACK,
    PROTOCOL_FEATURES,
    U64,
    VRING_ADDR,
    VRING_NO_FD,
    VRING_STATE,
    BackendRequest,
    MemoryRegion,
    Message,
    Request,
    pack_mem_table,
    reply_to,
    unpack,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from virtio.ring_layout import RingLayout


@dataclass(frozen=True, slots=True)
class RingSetup:
    """How to start one ring: where it lies (guest addresses), its base, and its eventfds (-1: none)."""

    index: int
    layout: RingLayout
    base: int
    kick_fd: int
    call_fd: int


@dataclass(frozen=True, slots=True)
class Negotiated:
    """The device features both sides have from now on (without bit 30)."""

    features: int


@dataclass(frozen=True, slots=True)
class ConfigRead:
    """The device's configuration space as it was read, 16 bytes."""

    config: bytes


@dataclass(frozen=True, slots=True)
class ConfigWriteDone:
    """The back-end has what `write_config` wrote."""

    offset: int


@dataclass(frozen=True, slots=True)
class RingsStarted:
    """The back-end was told everything about these rings and serves them."""

    indices: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class RingsStopped:
    """The device touches these rings no more; their bases, by ring index."""

    bases: dict[int, int]


@dataclass(frozen=True, slots=True)
class BackendReply:
    """Send these bytes back on the back-end channel."""

    data: bytes


Event = Negotiated | ConfigRead | ConfigWriteDone | RingsStarted | RingsStopped | BackendReply
Action = Message | Event


@dataclass(frozen=True, slots=True)
class _Step:
    """One request; `event` happens when it is through."""

    request: Request
    payload: bytes = b""
    fds: tuple[int, ...] = ()
    event: Event | None = None


_GETTERS = frozenset(
    {Request.GET_FEATURES, Request.GET_PROTOCOL_FEATURES, Request.GET_CONFIG, Request.GET_VRING_BASE}
)
_AT_ONCE = frozenset({Request.GET_VRING_BASE})


class FrontendSession:
    """One vhost-user connection, from the guest's side.

    Attributes:
        features: the device features agreed on, without bit 30; 0 before `Negotiated`.
        protocol_features: what was agreed on of the transport.
        failed: whether a violation ended the session.
    """

    def __init__(self, negotiate: Callable[[int], int], backend_fd: int = NO_FD) -> None:
        """`negotiate` picks from the offered device features.

        `backend_fd` is the back-end's end of its channel; without it no configuration change is announced.
        """
        self.features = 0
        self.protocol_features = 0
        self.failed = False
        self._negotiate = negotiate
        self._backend_fd = backend_fd
        self._user_address: int | None = None
        self._steps: deque[_Step] = deque()  # bounded: one set-up of all rings
        self._waiting: deque[_Step] = deque()  # bounded: as above; sent, in the order in which answers come
        self._bases: dict[int, int] = {}

    @property
    def idle(self) -> bool:
        """Whether everything asked for so far is through."""
        return not self._waiting and not self._steps

    def start(self) -> list[Action]:
        """Begin the handshake; ends with `Negotiated` and `ConfigRead`."""
        return self._then(_Step(Request.SET_OWNER), _Step(Request.GET_FEATURES))

    def set_memory(self, fd: int, memory_bytes: int, user_address: int) -> list[Action]:
        """Share guest RAM: one region, guest address 0 == offset 0, mapped at `user_address` here.

        Ring addresses go over the wire as `user_address` + guest address, as the standard wants it.
        """
        self._user_address = user_address
        region = MemoryRegion(guest_address=0, size=memory_bytes, user_address=user_address, file_offset=0)
        return self._then(_Step(Request.SET_MEM_TABLE, pack_mem_table((region,)), (fd,)))

    def start_rings(self, rings: Sequence[RingSetup]) -> list[Action]:
        """Set rings up and start them, after `set_memory`; ends with `RingsStarted`."""
        steps: list[_Step] = []
        for ring in rings:
            steps += self._ring_steps(ring)
        if not steps:
            return [RingsStarted(())]
        last = steps[-1]
        started = RingsStarted(tuple(ring.index for ring in rings))
        steps[-1] = _Step(last.request, last.payload, last.fds, started)
        return self._then(*steps)

    def stop(self, indices: Sequence[int]) -> list[Action]:
        """Stop rings (GET_VRING_BASE); ends with `RingsStopped`. Start them again with `start_rings`."""
        if not indices:
            return [RingsStopped({})]
        return self._then(*(_Step(Request.GET_VRING_BASE, VRING_STATE.pack(index, 0)) for index in indices))

    def read_config(self) -> list[Action]:
        """Read the configuration space; ends with `ConfigRead`."""
        payload = CONFIG_HEAD.pack(0, CONFIG_BYTES, 0) + bytes(CONFIG_BYTES)
        return self._then(_Step(Request.GET_CONFIG, payload))

    def write_config(self, offset: int, data: bytes) -> list[Action]:
        """Write a part of the configuration space; ends with `ConfigWriteDone`."""
        payload = CONFIG_HEAD.pack(offset, len(data), 0) + data
        return self._then(_Step(Request.SET_CONFIG, payload, event=ConfigWriteDone(offset)))

    def feed(self, message: Message) -> list[Action]:
        """What follows from a message of the back-end on the main connection.

        Raises VhostUserError when it is not the answer that was awaited.
        """
        if self.failed:
            raise LocalVirtioError("the session has failed")
        try:
            actions = self._take_answer(message)
        except VhostUserError:
            self.failed = True
            raise
        return actions + self._advance()

    def feed_backend(self, message: Message) -> list[Action]:
        """What follows from a message on the back-end channel: a changed configuration is read at once.

        Raises VhostUserError for anything else than CONFIG_CHANGE_MSG.
        """
        if self.failed:
            raise LocalVirtioError("the session has failed")
        if message.is_reply or message.request != BackendRequest.CONFIG_CHANGE_MSG or message.payload:
            self.failed = True
            raise VhostUserError("backend_request", f"request {message.request} flags {message.flags:#x}")
        actions = self.read_config()
        if message.needs_reply:
            actions.insert(0, BackendReply(reply_to(message.request, U64.pack(0)).to_bytes()))
        return actions

    def _then(self, *steps: _Step) -> list[Action]:
        if self.failed:
            raise LocalVirtioError("the session has failed")
        self._steps += steps
        return self._advance()

    def _advance(self) -> list[Action]:
        """Send what can be sent: up to and including the first request that is answered.

        Rings are stopped all at once: their answers come in order, and the guest waits for the last one.
        """
        actions: list[Action] = []
        acknowledged = bool(self.protocol_features >> PROTOCOL_F_REPLY_ACK & 1)
        while self._steps and (not self._waiting or self._steps[0].request in _AT_ONCE):
            step = self._steps.popleft()
            getter = step.request in _GETTERS
            flags = FLAG_VERSION | (FLAG_NEED_REPLY if acknowledged and not getter else 0)
            actions.append(Message(step.request, flags, step.payload, step.fds))
            if getter or acknowledged:
                self._waiting.append(step)
            elif step.event is not None:
                actions.append(step.event)
        return actions

    def _take_answer(self, message: Message) -> list[Action]:
        step = self._waiting.popleft() if self._waiting else None
        if step is None or message.request != step.request:
            raise VhostUserError("unexpected_message", f"request {message.request}")
        if message.flags != FLAG_VERSION | FLAG_REPLY:
            raise VhostUserError("reply_flags", f"request {message.request}: {message.flags:#x}")
        match step.request:
            case Request.GET_FEATURES:
                self._offered(unpack(U64, message)[0])
            case Request.GET_PROTOCOL_FEATURES:
                self._protocol_offered(unpack(U64, message)[0])
            case Request.GET_CONFIG:
                return [ConfigRead(_config_of(message))]
            case Request.GET_VRING_BASE:
                return self._base(step, *unpack(VRING_STATE, message))
            case _:
                (status,) = unpack(U64, message)
                if status:
                    raise VhostUserError("refused", f"{step.request.name}: {status}")
        return [] if step.event is None else [step.event]

    def _offered(self, offered: int) -> None:
        device = offered & ~(1 << F_PROTOCOL_FEATURES)
        self.features = self._negotiate(device)
        if self.features & ~device:
            raise LocalVirtioError(f"features {self.features:#x} picked, {device:#x} offered")
        if device == offered:
            raise VhostUserError("protocol_features", "the back-end has no configuration space")
        self._steps.appendleft(_Step(Request.GET_PROTOCOL_FEATURES))

    def _protocol_offered(self, offered: int) -> None:
        chosen = offered & PROTOCOL_FEATURES
        if self._backend_fd == NO_FD:
            chosen &= ~(1 << PROTOCOL_F_BACKEND_REQ)
        if not chosen >> PROTOCOL_F_CONFIG & 1:
            raise VhostUserError("protocol_features", "the back-end has no configuration space")
        rest = [
            _Step(
                Request.SET_FEATURES,
                U64.pack(self.features | 1 << F_PROTOCOL_FEATURES),
                event=Negotiated(self.features),
            ),
            _Step(Request.GET_CONFIG, CONFIG_HEAD.pack(0, CONFIG_BYTES, 0) + bytes(CONFIG_BYTES)),
        ]
        if chosen >> PROTOCOL_F_BACKEND_REQ & 1:
            rest.insert(0, _Step(Request.SET_BACKEND_REQ_FD, fds=(self._backend_fd,)))
        # Ahead of what the caller may have asked for meanwhile.
        self._steps.extendleft(reversed([_Step(Request.SET_PROTOCOL_FEATURES, U64.pack(chosen)), *rest]))
        self.protocol_features = chosen

    def _base(self, step: _Step, index: int, base: int) -> list[Action]:
        if index != VRING_STATE.unpack(step.payload)[0] or base > 0xFFFF:
            raise VhostUserError("ring_base", f"ring {index}: {base}")
        self._bases[index] = base
        following = (*self._waiting, *self._steps)
        if following and following[0].request == Request.GET_VRING_BASE:
            return []
        bases, self._bases = self._bases, {}
        return [RingsStopped(bases)]

    def _ring_steps(self, ring: RingSetup) -> list[_Step]:
        if self._user_address is None:
            raise LocalVirtioError("rings cannot start before set_memory")
        origin, layout = self._user_address, ring.layout
        addresses = (origin + layout.desc, origin + layout.used, origin + layout.avail)
        return [
            _Step(Request.SET_VRING_NUM, VRING_STATE.pack(ring.index, layout.size)),
            _Step(Request.SET_VRING_BASE, VRING_STATE.pack(ring.index, ring.base)),
            _Step(Request.SET_VRING_ADDR, VRING_ADDR.pack(ring.index, 0, *addresses, 0)),
            _fd_step(Request.SET_VRING_CALL, ring.index, ring.call_fd),
            _fd_step(Request.SET_VRING_KICK, ring.index, ring.kick_fd),
            _Step(Request.SET_VRING_ENABLE, VRING_STATE.pack(ring.index, 1)),
        ]


def _fd_step(request: Request, index: int, fd: int) -> _Step:
    if fd == NO_FD:
        return _Step(request, U64.pack(index | VRING_NO_FD))
    return _Step(request, U64.pack(index), (fd,))


def _config_of(message: Message) -> bytes:
    if len(message.payload) != CONFIG_HEAD.size + CONFIG_BYTES:
        raise VhostUserError("config_size", f"{len(message.payload)} bytes")
    offset, size, _ = CONFIG_HEAD.unpack_from(message.payload)
    if (offset, size) != (0, CONFIG_BYTES):
        raise VhostUserError("config_size", f"{size} bytes from {offset}")
    return message.payload[CONFIG_HEAD.size :]
