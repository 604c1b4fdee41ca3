"""The back-end's (the device's) side of a vhost-user connection.

Rule 1: `feed` takes one whole message and returns what to do, in order; nothing is done here.
Rule 2: a violation raises VhostUserError and the session is in error for good: do what `disconnected` says,
        and close the connection.
Rule 3: every descriptor is accounted for. Those of `MapRegion` and `BackendChannel` belong to the caller from
        then on; ring descriptors stay the session's until a `CloseFds` names them, which always comes last.
Rule 4: a ring runs when it is configured, its kick descriptor is set, and it is enabled. Rings are enabled
        from the start unless bit 30 was negotiated: Linux's driver drops that bit, so SET_VRING_ENABLE
        never comes.
Rule 5: every `StopRing` is answered by `ring_stopped` with the ring's base before the next message is fed;
        GET_VRING_BASE is replied to only then, so that its reply means "the device touches this ring no
        more".

A new memory table stops every ring: Linux's driver reloads without GET_VRING_BASE, and its old ring addresses
mean nothing in a new table. Rings start again with their next SET_VRING_KICK.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from virtio.errors import LocalVirtioError, VhostUserError
from virtio.ring_layout import SIZE_MAX, RingLayout
from virtio.vhost_user_effects import (
    BackendChannel,
    CloseFds,
    ConfigWritten,
    Effect,
    FeaturesSet,
    MapRegion,
    Reply,
    RingFdsChanged,
    StartRing,
    StopRing,
)
from virtio.vhost_user_messages import (
    CONFIG_HEAD,
    CONFIG_SIZE_MAX,
    F_PROTOCOL_FEATURES,
    FLAG_VERSION,
    NO_FD,
    PROTOCOL_F_REPLY_ACK,
    PROTOCOL_FEATURES,
    U64,
    VRING_ADDR,
    VRING_INDEX_MASK,
    VRING_NO_FD,
    VRING_STATE,
    BackendRequest,
    MemoryRegion,
    Message,
    Request,
    reply_to,
    unpack,
    unpack_mem_table,
)

if TYPE_CHECKING:
    from collections.abc import Callable

_RING_FDS = {
    Request.SET_VRING_KICK: "kick_fd",
    Request.SET_VRING_CALL: "call_fd",
    Request.SET_VRING_ERR: "err_fd",
}

_Handler: TypeAlias = "Callable[[Message], list[Effect]]"


@dataclass(slots=True)
class _Ring:
    """What is known of one ring; `addresses`: (descriptors, used, available) as the front-end sees them."""

    size: int = 0
    addresses: tuple[int, int, int] | None = None
    base: int = 0
    kick_fd: int = NO_FD
    call_fd: int = NO_FD
    err_fd: int = NO_FD
    kick_set: bool = False
    enabled: bool = False
    running: bool = False


@dataclass(slots=True)
class _Pending:
    """Rings whose `ring_stopped` is awaited, and what to do after the last of them."""

    indices: set[int] = field(default_factory=set)
    then: list[Effect] = field(default_factory=list)
    base_of: int | None = None  # GET_VRING_BASE of this ring is to be replied to


class BackendSession:
    """One vhost-user connection, from the device's side.

    Attributes:
        features: what the driver accepted, without bit 30.
        protocol_features: what was negotiated of the transport.
        failed: whether a violation ended the session.
    """

    def __init__(self, features_offered: int, config: Callable[[], bytes], ring_count: int = 5) -> None:
        """A fresh connection of a device that offers these features; `config` returns its config space."""
        self.features = 0
        self.protocol_features = 0
        self.failed = False
        self._offered = features_offered | 1 << F_PROTOCOL_FEATURES
        self._config = config
        self._rings = [_Ring() for _ in range(ring_count)]
        self._region: MemoryRegion | None = None
        self._bit_30 = False
        self._pending: _Pending | None = None
        self._orphans: list[int] = []
        self._getters: dict[Request, _Handler] = {
            Request.GET_FEATURES: self._get_features,
            Request.GET_PROTOCOL_FEATURES: self._get_protocol_features,
            Request.GET_QUEUE_NUM: self._get_queue_num,
            Request.GET_CONFIG: self._get_config,
            Request.GET_VRING_BASE: self._get_vring_base,
        }
        self._setters: dict[Request, _Handler] = {
            Request.SET_FEATURES: self._set_features,
            Request.SET_PROTOCOL_FEATURES: self._set_protocol_features,
            Request.SET_OWNER: self._set_owner,
            Request.RESET_OWNER: self._reset_owner,
            Request.SET_MEM_TABLE: self._set_mem_table,
            Request.SET_VRING_NUM: self._set_vring_num,
            Request.SET_VRING_BASE: self._set_vring_base,
            Request.SET_VRING_ADDR: self._set_vring_addr,
            Request.SET_VRING_KICK: self._set_vring_fd,
            Request.SET_VRING_CALL: self._set_vring_fd,
            Request.SET_VRING_ERR: self._set_vring_fd,
            Request.SET_VRING_ENABLE: self._set_vring_enable,
            Request.SET_BACKEND_REQ_FD: self._set_backend_req_fd,
            Request.SET_CONFIG: self._set_config,
        }

    @property
    def running(self) -> tuple[int, ...]:
        """Indices of the rings that run."""
        return tuple(index for index, ring in enumerate(self._rings) if ring.running)

    def feed(self, message: Message) -> list[Effect]:
        """What one message from the front-end asks for.

        Raises:
            VhostUserError: the front-end broke the protocol (rule 2).
            LocalVirtioError: a StopRing has not been answered yet.
        """
        if self.failed or self._pending is not None:
            raise LocalVirtioError("the session has failed" if self.failed else "a StopRing is unanswered")
        self._orphans += message.fds
        try:
            effects = self._handle(message)
        except VhostUserError:
            self.failed = True
            raise
        if self._orphans:  # descriptors that this message has no use for
            self._at_the_end(effects, CloseFds(self._take_orphans()))
        return effects

    def ring_stopped(self, index: int, next_avail: int) -> list[Effect]:
        """Answer a `StopRing`: the ring's base is `next_avail`. Returns what to do next.

        Raises LocalVirtioError when no such answer was awaited.
        """
        pending = self._pending
        if pending is None or index not in pending.indices:
            raise LocalVirtioError(f"ring {index} was not asked to stop")
        pending.indices.remove(index)
        self._rings[index].base = next_avail & 0xFFFF
        if pending.indices:
            return []
        self._pending = None
        effects = list(pending.then)
        if pending.base_of is not None:
            base = self._rings[pending.base_of].base
            reply = reply_to(Request.GET_VRING_BASE, VRING_STATE.pack(pending.base_of, base))
            effects.insert(0, Reply(reply.to_bytes()))
        return effects

    def disconnected(self) -> list[Effect]:
        """The connection is gone or will be closed: stop the rings, close the descriptors.

        The StopRing effects here want no answer; the session is finished.
        """
        effects: list[Effect] = [StopRing(index) for index in self.running]
        for ring in self._rings:
            ring.running = False
            self._orphans += [fd for fd in (ring.kick_fd, ring.call_fd, ring.err_fd) if fd != NO_FD]
            ring.kick_fd = ring.call_fd = ring.err_fd = NO_FD
        if self._pending is not None:
            waiting = [effect.fds for effect in self._pending.then if isinstance(effect, CloseFds)]
            self._orphans += [fd for fds in waiting for fd in fds]
            self._orphans += [effect.fd for effect in self._pending.then if isinstance(effect, MapRegion)]
            self._pending = None
        self.failed = True
        if self._orphans:
            effects.append(CloseFds(self._take_orphans()))
        return effects

    def config_changed(self) -> bytes:
        """The bytes to send on the `BackendChannel` after the configuration space changed.

        No reply is asked for: the only CPU of a Linux UML guest may be spinning for ours (never wait for it).
        """
        return Message(BackendRequest.CONFIG_CHANGE_MSG, FLAG_VERSION).to_bytes()

    def _take_orphans(self) -> tuple[int, ...]:
        fds, self._orphans = tuple(self._orphans), []
        return fds

    def _handle(self, message: Message) -> list[Effect]:
        if message.is_reply:
            raise VhostUserError("unexpected_reply", f"request {message.request}")
        try:
            request = Request(message.request)
        except ValueError as error:
            raise VhostUserError("unknown_request", str(message.request)) from error
        if request in self._getters:
            return self._getters[request](message)
        if request not in self._setters:
            raise VhostUserError("unsupported_request", request.name)
        effects = self._setters[request](message)
        if message.needs_reply and self.protocol_features >> PROTOCOL_F_REPLY_ACK & 1:
            self._at_the_end(effects, Reply(reply_to(request, U64.pack(0)).to_bytes()))
        return effects

    def _at_the_end(self, effects: list[Effect], effect: Effect) -> None:
        """Do `effect` after these, and after the rings that must stop first have stopped."""
        (effects if self._pending is None else self._pending.then).append(effect)

    # What is asked for.

    def _get_features(self, message: Message) -> list[Effect]:
        return [Reply(reply_to(message.request, U64.pack(self._offered)).to_bytes())]

    def _get_protocol_features(self, message: Message) -> list[Effect]:
        return [Reply(reply_to(message.request, U64.pack(PROTOCOL_FEATURES)).to_bytes())]

    def _get_queue_num(self, message: Message) -> list[Effect]:
        return [Reply(reply_to(message.request, U64.pack(len(self._rings))).to_bytes())]

    def _get_config(self, message: Message) -> list[Effect]:
        offset, size, flags = self._config_access(message)
        # Beyond the space reads as zeros: front-ends ask for a size of their own choosing.
        data = self._config().ljust(CONFIG_SIZE_MAX, b"\0")[offset : offset + size]
        return [Reply(reply_to(message.request, CONFIG_HEAD.pack(offset, size, flags) + data).to_bytes())]

    def _get_vring_base(self, message: Message) -> list[Effect]:
        index, _ = unpack(VRING_STATE, message)
        ring = self._ring(index)
        ring.kick_set = False  # it starts again with its next SET_VRING_KICK only
        if not ring.running:
            return [Reply(reply_to(message.request, VRING_STATE.pack(index, ring.base)).to_bytes())]
        return self._stop([index], base_of=index)

    # What is told.

    def _set_features(self, message: Message) -> list[Effect]:
        (features,) = unpack(U64, message)
        if features & ~self._offered:
            raise VhostUserError("features", f"{features:#x} accepted, {self._offered:#x} offered")
        self._bit_30 = bool(features >> F_PROTOCOL_FEATURES & 1)
        self.features = features & ~(1 << F_PROTOCOL_FEATURES)
        return [FeaturesSet(self.features)]

    def _set_protocol_features(self, message: Message) -> list[Effect]:
        (features,) = unpack(U64, message)
        if features & ~PROTOCOL_FEATURES:
            raise VhostUserError("protocol_features", f"{features:#x}, offered {PROTOCOL_FEATURES:#x}")
        self.protocol_features = features
        return []

    def _set_owner(self, message: Message) -> list[Effect]:
        if message.payload:
            raise VhostUserError("payload_size", f"request {message.request}: {len(message.payload)} bytes")
        return []

    def _reset_owner(self, message: Message) -> list[Effect]:
        del message
        for ring in self._rings:
            ring.kick_set = ring.enabled = False
        return self._stop(list(self.running))

    def _set_mem_table(self, message: Message) -> list[Effect]:
        regions = unpack_mem_table(message)
        if len(regions) != 1 or len(self._orphans) != 1:
            raise VhostUserError(
                "regions", f"{len(regions)} regions, {len(self._orphans)} descriptors; one is served"
            )
        region = regions[0]
        if region.guest_address != region.file_offset:
            raise VhostUserError(
                "regions", f"guest {region.guest_address:#x} != offset {region.file_offset:#x}"
            )
        if region.size == 0 or max(region.guest_address, region.user_address) + region.size > 1 << 64:
            raise VhostUserError("regions", f"{region.size:#x} bytes at {region.guest_address:#x}")
        self._region = region
        mapping = MapRegion(self._orphans.pop(), region.guest_address, region.size)
        for ring in self._rings:
            ring.kick_set = False
        effects = self._stop(list(self.running))
        self._at_the_end(effects, mapping)
        return effects

    def _set_vring_num(self, message: Message) -> list[Effect]:
        index, size = unpack(VRING_STATE, message)
        ring = self._stopped_ring(index)
        if not 0 < size <= SIZE_MAX or size & (size - 1):
            raise VhostUserError("ring_size", f"ring {index}: {size}")
        ring.size = size
        return []

    def _set_vring_base(self, message: Message) -> list[Effect]:
        index, base = unpack(VRING_STATE, message)
        if base > 0xFFFF:
            raise VhostUserError("ring_base", f"ring {index}: {base}")
        self._stopped_ring(index).base = base
        return []

    def _set_vring_addr(self, message: Message) -> list[Effect]:
        index, _, table, used, available, _ = unpack(VRING_ADDR, message)
        self._stopped_ring(index).addresses = (table, used, available)
        return []

    def _set_vring_fd(self, message: Message) -> list[Effect]:
        (word,) = unpack(U64, message)
        index = word & VRING_INDEX_MASK
        ring = self._ring(index)
        without = bool(word & VRING_NO_FD)
        if without == bool(self._orphans) or len(self._orphans) > 1:
            raise VhostUserError(
                "ring_fd", f"ring {index}: {len(self._orphans)} descriptors, no-fd {without}"
            )
        fd = NO_FD if without else self._orphans.pop()
        name = _RING_FDS[Request(message.request)]
        old = getattr(ring, name)
        setattr(ring, name, fd)
        if old != NO_FD:
            self._orphans.append(old)
        if name == "kick_fd":
            ring.kick_set = True
        if ring.running:
            return [RingFdsChanged(index, ring.kick_fd, ring.call_fd, ring.err_fd)]
        return self._start_if_ready(index)

    def _set_vring_enable(self, message: Message) -> list[Effect]:
        index, enable = unpack(VRING_STATE, message)
        if enable > 1:
            raise VhostUserError("ring_enable", f"ring {index}: {enable}")
        ring = self._ring(index)
        ring.enabled = bool(enable)
        if ring.running and not enable:
            return self._stop([index])
        return self._start_if_ready(index)

    def _set_backend_req_fd(self, message: Message) -> list[Effect]:
        if len(self._orphans) != 1:
            raise VhostUserError("backend_fd", f"request {message.request}: {len(self._orphans)} descriptors")
        return [BackendChannel(self._orphans.pop())]

    def _set_config(self, message: Message) -> list[Effect]:
        offset, _, _ = self._config_access(message)
        return [ConfigWritten(offset, message.payload[CONFIG_HEAD.size :])]

    # Parts.

    def _config_access(self, message: Message) -> tuple[int, int, int]:
        if len(message.payload) < CONFIG_HEAD.size:
            raise VhostUserError("payload_size", f"config access of {len(message.payload)} bytes")
        offset, size, flags = CONFIG_HEAD.unpack_from(message.payload)
        if offset + size > CONFIG_SIZE_MAX or len(message.payload) != CONFIG_HEAD.size + size:
            raise VhostUserError("config_range", f"{offset}+{size} in {len(message.payload)} bytes")
        return offset, size, flags

    def _ring(self, index: int) -> _Ring:
        if index >= len(self._rings):
            raise VhostUserError("ring_index", f"{index} of {len(self._rings)}")
        return self._rings[index]

    def _stopped_ring(self, index: int) -> _Ring:
        ring = self._ring(index)
        if ring.running:
            raise VhostUserError("ring_running", f"ring {index} is set up while it runs")
        return ring

    def _start_if_ready(self, index: int) -> list[Effect]:
        ring = self._rings[index]
        enabled = ring.enabled or not self._bit_30
        if ring.running or not (ring.kick_set and enabled and ring.size and ring.addresses):
            return []
        table, used, available = ring.addresses
        layout = RingLayout(
            desc=self._guest_address(table),
            avail=self._guest_address(available),
            used=self._guest_address(used),
            size=ring.size,
        )
        ring.running = True
        return [StartRing(index, layout, ring.base, ring.kick_fd, ring.call_fd, ring.err_fd)]

    def _guest_address(self, user_address: int) -> int:
        region = self._region
        if region is None or not region.user_address <= user_address < region.user_address + region.size:
            raise VhostUserError("ring_address", f"{user_address:#x} is in no memory region")
        return user_address - region.user_address + region.guest_address

    def _stop(self, indices: list[int], base_of: int | None = None) -> list[Effect]:
        for index in indices:
            self._rings[index].running = False
        if indices:
            self._pending = _Pending(indices=set(indices), base_of=base_of)
        return [StopRing(index) for index in indices]
