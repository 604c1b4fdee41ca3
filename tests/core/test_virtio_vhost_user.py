"""Both ends of vhost-user joined in memory, and the back-end against the Linux driver's transcript.

Descriptors are counted as a kernel would: passing one makes a new number, and at the end none may be left.
"""

from __future__ import annotations

import struct
from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from virtio import vhost_user_messages as wire
from virtio.balloon import F_FREE_PAGE_HINT, F_VERSION_1, QUEUE_COUNT, BalloonConfig, mask
from virtio.errors import LocalProtocolError, VhostUserError
from virtio.split_ring import DeviceRing, DriverRing, layout_at
from virtio.vhost_user import (
    BackendChannel,
    BackendReply,
    BackendSession,
    CloseFds,
    ConfigRead,
    ConfigWriteDone,
    ConfigWritten,
    Effect,
    FeaturesSet,
    FrontendSession,
    MapRegion,
    Message,
    Negotiated,
    Reply,
    Request,
    RingFdsChanged,
    RingSetup,
    RingsStarted,
    RingsStopped,
    StartRing,
    StopRing,
    decode,
)

OFFERED = mask(F_VERSION_1, F_FREE_PAGE_HINT, 0, 2)
MEMORY_BYTES = 1 << 20
USER_ADDRESS = 0x7F00_0000_0000
PROTOCOL = 1 << 30
NEED_REPLY = 8


class Host:
    """A back-end and the little that executes its effects."""

    def __init__(self, memory: memoryview) -> None:
        self.memory = memory
        self.config = BalloonConfig()
        self.session = BackendSession(OFFERED, self.config.to_bytes, QUEUE_COUNT)
        self.rings: dict[int, DeviceRing] = {}
        self.open_fds: set[int] = set()
        self.fds_made = 1000
        self.log: list[Effect] = []
        self.replies: deque[bytes] = deque()

    def receive(self, data: bytes, fds: tuple[int, ...] = ()) -> None:
        passed = tuple(self.fds_made + index for index in range(len(fds)))
        self.fds_made += len(fds)
        self.open_fds |= set(passed)
        self.execute(self.session.feed(decode(data, passed)))

    def execute(self, effects: list[Effect]) -> None:
        for effect in effects:
            self.log.append(effect)
            match effect:
                case Reply(data):
                    self.replies.append(data)
                case StartRing(index, layout, base):
                    self.rings[index] = DeviceRing(self.memory, layout, next_avail=base)
                case StopRing(index):
                    if not self.session.failed:
                        self.execute(self.session.ring_stopped(index, self.rings.pop(index).next_avail))
                case MapRegion(fd) | BackendChannel(fd):
                    self.open_fds.remove(fd)
                case CloseFds(fds):
                    self.open_fds -= set(fds)
                case FeaturesSet() | ConfigWritten() | RingFdsChanged():
                    pass

    def disconnect(self) -> None:
        self.execute(self.session.disconnected())
        assert self.open_fds == set()


class Pair:
    """A front-end and a back-end, joined; `run` carries messages until nothing moves."""

    def __init__(self, backend_fd: int = 9) -> None:
        self.memory = memoryview(bytearray(MEMORY_BYTES))
        self.host = Host(self.memory)
        self.front = FrontendSession(lambda offered: offered & ~1, backend_fd)
        self.layouts = [layout_at(0x1000 * (1 + queue), 64) for queue in range(QUEUE_COUNT)]

    def run(self, actions: list[object]) -> list[object]:
        events = []
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

    def setups(self, bases: dict[int, int] | None = None) -> list[RingSetup]:
        return [
            RingSetup(index, layout, (bases or {}).get(index, 0), kick_fd=20 + index, call_fd=30 + index)
            for index, layout in enumerate(self.layouts)
        ]

    def up(self) -> None:
        self.run(self.front.start())
        self.run(self.front.set_memory(8, MEMORY_BYTES, USER_ADDRESS))
        self.run(self.front.start_rings(self.setups()))


@pytest.fixture
def pair() -> Pair:
    return Pair()


def test_the_handshake_agrees_on_features_and_reads_the_configuration(pair: Pair):
    pair.host.config.num_pages = 77
    events = pair.run(pair.front.start())
    assert events == [Negotiated(OFFERED & ~1), ConfigRead(pair.host.config.to_bytes())]
    assert pair.host.session.features == OFFERED & ~1 == pair.front.features
    assert pair.host.session.protocol_features == 1 << 3 | 1 << 5 | 1 << 9
    assert [type(effect) for effect in pair.host.log if not isinstance(effect, Reply)] == [
        BackendChannel,
        FeaturesSet,
    ]
    pair.host.disconnect()


def test_what_is_wished_for_before_the_handshake_is_over_comes_after_it(pair: Pair):
    actions = pair.front.start() + pair.front.set_memory(8, MEMORY_BYTES, USER_ADDRESS)
    actions += pair.front.start_rings(pair.setups())
    events = pair.run(actions)
    assert [type(event) for event in events] == [Negotiated, ConfigRead, RingsStarted]


def test_rings_start_where_they_lie_and_carry_chains(pair: Pair):
    pair.run(pair.front.start())
    pair.run(pair.front.set_memory(8, MEMORY_BYTES, USER_ADDRESS))
    events = pair.run(pair.front.start_rings(pair.setups({3: 0})))
    assert events == [RingsStarted((0, 1, 2, 3, 4))]
    started = [effect for effect in pair.host.log if isinstance(effect, StartRing)]
    assert [effect.layout for effect in started] == pair.layouts
    assert pair.host.session.running == (0, 1, 2, 3, 4)
    driver = DriverRing(pair.memory, pair.layouts[3])
    driver.add([(0x8000, 4)], [], None)
    driver.publish()
    assert [chain.readable for chain in pair.host.rings[3].pop_all()] == [[(0x8000, 4)]]
    pair.host.disconnect()


def test_stopped_rings_say_their_bases_and_go_on_there_under_another_back_end(pair: Pair):
    pair.up()
    driver = DriverRing(pair.memory, pair.layouts[1])
    for _ in range(3):
        driver.add([(0x8000, 4)], [], None)
    driver.publish()
    chains = pair.host.rings[1].pop_all(2)
    pair.host.rings[1].push_many([chain.head for chain in chains])
    pair.host.rings[1].publish()
    events = pair.run(pair.front.stop(range(QUEUE_COUNT)))
    assert events == [RingsStopped({0: 0, 1: 2, 2: 0, 3: 0, 4: 0})]
    assert pair.host.session.running == ()
    assert pair.host.rings == {}
    other = Pair()
    other.memory[:] = pair.memory
    other.run(other.front.start())
    other.run(other.front.set_memory(8, MEMORY_BYTES, USER_ADDRESS))
    other.run(other.front.start_rings(other.setups(events[0].bases)))
    assert len(other.host.rings[1].pop_all()) == 1
    pair.host.disconnect()
    other.host.disconnect()


def test_a_stopped_ring_starts_again_on_the_same_connection(pair: Pair):
    pair.up()
    (stopped,) = pair.run(pair.front.stop([0, 3]))
    assert pair.host.session.running == (1, 2, 4)
    pair.run(
        pair.front.start_rings(
            [setup for setup in pair.setups(stopped.bases) if setup.index in stopped.bases]
        )
    )
    assert pair.host.session.running == (0, 1, 2, 3, 4)
    (again,) = pair.run(pair.front.stop([]))
    assert again == RingsStopped({})
    pair.host.disconnect()


def test_stopping_twice_answers_the_same_base(pair: Pair):
    pair.up()
    pair.run(pair.front.stop([2]))
    assert pair.run(pair.front.stop([2])) == [RingsStopped({2: 0})]


def test_the_configuration_is_written_and_changes_are_announced(pair: Pair):
    pair.up()
    assert pair.run(pair.front.write_config(4, b"\x05\0\0\0")) == [ConfigWriteDone(4)]
    assert ConfigWritten(4, b"\x05\0\0\0") in pair.host.log
    pair.host.config.num_pages = 3
    announcement = decode(pair.host.session.config_changed())
    assert announcement == Message(2, 1)
    assert pair.run(pair.front.feed_backend(announcement)) == [ConfigRead(pair.host.config.to_bytes())]


def test_an_announcement_that_wants_a_reply_gets_one(pair: Pair):
    pair.up()
    reply, *_ = pair.run(pair.front.feed_backend(Message(2, 1 | NEED_REPLY)))
    assert reply == BackendReply(struct.pack("<IIIQ", 2, 5, 8, 0))


def test_a_front_end_without_a_channel_does_not_negotiate_one():
    pair = Pair(backend_fd=-1)
    pair.up()
    assert not pair.front.protocol_features >> 5 & 1
    pair.host.disconnect()


def test_descriptors_that_are_replaced_are_closed_and_running_rings_learn_of_it(pair: Pair):
    pair.up()
    before = len(pair.host.open_fds)
    pair.host.receive(Message(Request.SET_VRING_CALL, 1, struct.pack("<Q", 2)).to_bytes(), (50,))
    *_, changed, closed = pair.host.log
    assert isinstance(changed, RingFdsChanged)
    assert isinstance(closed, CloseFds)
    assert (changed.index, changed.call_fd) == (2, pair.host.fds_made - 1)
    assert len(pair.host.open_fds) == before
    pair.host.receive(Message(Request.SET_VRING_CALL, 1, struct.pack("<Q", 2 | 0x100)).to_bytes())
    assert len(pair.host.open_fds) == before - 1
    pair.host.disconnect()


def test_a_new_memory_table_stops_the_rings_first(pair: Pair):
    pair.up()
    pair.host.log.clear()
    pair.run(pair.front.set_memory(8, MEMORY_BYTES, USER_ADDRESS))
    kinds = [type(effect) for effect in pair.host.log]
    assert kinds == [StopRing] * QUEUE_COUNT + [MapRegion, Reply]
    pair.host.disconnect()


# The Linux driver (User-Mode Linux) as the peer.


def message(request: Request, payload: bytes = b"", *, ack: bool = True) -> bytes:
    return Message(request, 1 | (NEED_REPLY if ack else 0), payload).to_bytes()


def reply(request: Request, payload: bytes) -> bytes:
    return struct.pack("<III", request, 5, len(payload)) + payload


def test_the_linux_drivers_transcript():
    """Its order, sizes and omissions: bit 30 dropped, no SET_VRING_ENABLE, GET_CONFIG from offset 0, pipes."""
    host = Host(memoryview(bytearray(MEMORY_BYTES)))
    start = 0x10000
    u64 = struct.Struct("<Q").pack

    def exchange(data: bytes, answer: bytes | None, *, fds: int = 0) -> None:
        host.receive(data, tuple(range(fds)))
        assert (host.replies.popleft() if host.replies else None) == answer
        assert not host.replies

    exchange(message(Request.SET_OWNER, ack=False), None)
    exchange(message(Request.GET_FEATURES, ack=False), reply(Request.GET_FEATURES, u64(OFFERED | PROTOCOL)))
    protocol = 1 << 3 | 1 << 5 | 1 << 9
    get_protocol = Request.GET_PROTOCOL_FEATURES
    exchange(message(get_protocol, ack=False), reply(get_protocol, u64(protocol)))
    # It acts on REPLY_ACK in the very message that sets it.
    set_protocol = Request.SET_PROTOCOL_FEATURES
    exchange(message(set_protocol, u64(protocol)), reply(set_protocol, u64(0)))
    exchange(message(Request.SET_BACKEND_REQ_FD), reply(Request.SET_BACKEND_REQ_FD, u64(0)), fds=1)
    exchange(message(Request.SET_FEATURES, u64(OFFERED)), reply(Request.SET_FEATURES, u64(0)))
    head = struct.pack("<III", 0, 12, 0)  # free_page_hint_cmd_id: 4 bytes at 8, read as 12 bytes from 0
    host.config.num_pages, host.config.free_page_hint_cmd_id = 5, 0x80000000
    space = host.config.to_bytes()[:12]
    exchange(
        message(Request.GET_CONFIG, head + bytes(12), ack=False), reply(Request.GET_CONFIG, head + space)
    )
    region = struct.pack("<QQQQ", start, MEMORY_BYTES - start, start, start)
    table = struct.pack("<II", 1, 0) + region + bytes(32)  # room for two regions, one is used
    exchange(message(Request.SET_MEM_TABLE, table), reply(Request.SET_MEM_TABLE, u64(0)), fds=1)
    assert MapRegion(host.fds_made - 1, start, MEMORY_BYTES - start) in host.log
    layout = layout_at(start, 128)
    for index in (0, 1):
        exchange(message(Request.SET_VRING_CALL, u64(index)), reply(Request.SET_VRING_CALL, u64(0)), fds=1)
        for request, number in ((Request.SET_VRING_NUM, 128), (Request.SET_VRING_BASE, 0)):
            exchange(message(request, struct.pack("<II", index, number)), reply(request, u64(0)))
        addresses = struct.pack("<IIQQQQ", index, 0, layout.desc, layout.used, layout.avail, (1 << 64) - 1)
        exchange(message(Request.SET_VRING_ADDR, addresses), reply(Request.SET_VRING_ADDR, u64(0)))
        assert host.session.running == tuple(range(index))
        exchange(message(Request.SET_VRING_KICK, u64(index)), reply(Request.SET_VRING_KICK, u64(0)), fds=1)
        assert host.session.running == tuple(range(index + 1))
    # The module is reloaded: no GET_VRING_BASE, straight to new features, memory and rings.
    exchange(message(Request.SET_FEATURES, u64(OFFERED)), reply(Request.SET_FEATURES, u64(0)))
    exchange(message(Request.SET_MEM_TABLE, table), reply(Request.SET_MEM_TABLE, u64(0)), fds=1)
    assert host.session.running == ()
    exchange(message(Request.SET_VRING_CALL, u64(0)), reply(Request.SET_VRING_CALL, u64(0)), fds=1)
    addresses = struct.pack("<IIQQQQ", 0, 0, layout.desc, layout.used, layout.avail, (1 << 64) - 1)
    exchange(message(Request.SET_VRING_ADDR, addresses), reply(Request.SET_VRING_ADDR, u64(0)))
    exchange(message(Request.SET_VRING_KICK, u64(0)), reply(Request.SET_VRING_KICK, u64(0)), fds=1)
    assert host.session.running == (0,)
    assert host.session.config_changed() == struct.pack("<III", 2, 1, 0), "no reply is asked for"
    host.disconnect()


def test_with_bit_30_a_ring_waits_for_its_enable_and_stops_with_its_disable(pair: Pair):
    pair.up()
    pair.host.receive(message(Request.SET_VRING_ENABLE, struct.pack("<II", 1, 0)))
    assert pair.host.session.running == (0, 2, 3, 4)
    assert pair.host.replies.pop() == reply(Request.SET_VRING_ENABLE, bytes(8))
    pair.host.receive(message(Request.SET_VRING_KICK, struct.pack("<Q", 1)), (60,))
    assert pair.host.session.running == (0, 2, 3, 4), "kicked, and still not enabled"
    pair.host.receive(message(Request.SET_VRING_ENABLE, struct.pack("<II", 1, 1)))
    assert pair.host.session.running == (0, 1, 2, 3, 4)


def test_the_reply_to_get_vring_base_waits_for_the_device(pair: Pair):
    pair.up()
    session = pair.host.session
    payload = struct.pack("<II", 2, 0)
    assert session.feed(Message(Request.GET_VRING_BASE, 1, payload)) == [StopRing(2)]
    with pytest.raises(LocalProtocolError):
        session.feed(Message(Request.GET_FEATURES))
    with pytest.raises(LocalProtocolError):
        session.ring_stopped(1, 0)
    assert session.ring_stopped(2, 41) == [Reply(reply(Request.GET_VRING_BASE, struct.pack("<II", 2, 41)))]


def test_acknowledgements_come_only_when_negotiated():
    host = Host(memoryview(bytearray(MEMORY_BYTES)))
    host.receive(message(Request.SET_FEATURES, struct.pack("<Q", OFFERED)))
    assert not host.replies


# Bad peers.

U64 = struct.Struct("<Q")
PAIR = struct.Struct("<II")
BAD_MESSAGES = {
    "an unknown request": (99, b"", 0),
    "a request of a feature that was not offered": (Request.SET_LOG_BASE, bytes(16), 1),
    "features that were not offered": (Request.SET_FEATURES, U64.pack(1 << 23), 0),
    "protocol features that were not offered": (Request.SET_PROTOCOL_FEATURES, U64.pack(1 << 12), 0),
    "features of the wrong size": (Request.SET_FEATURES, b"\0", 0),
    "a ring too many": (Request.SET_VRING_NUM, PAIR.pack(5, 64), 0),
    "a size that is no power of two": (Request.SET_VRING_NUM, PAIR.pack(0, 65), 0),
    "a size of nothing": (Request.SET_VRING_NUM, PAIR.pack(0, 0), 0),
    "a base of 17 bits": (Request.SET_VRING_BASE, PAIR.pack(0, 65536), 0),
    "an enable that is no flag": (Request.SET_VRING_ENABLE, PAIR.pack(0, 2), 0),
    "a kick without its descriptor": (Request.SET_VRING_KICK, U64.pack(0), 0),
    "a kick with two descriptors": (Request.SET_VRING_KICK, U64.pack(0), 2),
    "a kick that says no descriptor and has one": (Request.SET_VRING_KICK, U64.pack(0x100), 1),
    "a memory table without its descriptor": (Request.SET_MEM_TABLE, PAIR.pack(1, 0) + bytes(32), 0),
    "a memory table of two regions": (Request.SET_MEM_TABLE, PAIR.pack(2, 0) + bytes(64), 2),
    "a memory table that is cut": (Request.SET_MEM_TABLE, PAIR.pack(1, 0) + bytes(31), 1),
    "a memory table of nothing": (Request.SET_MEM_TABLE, PAIR.pack(0, 0), 0),
    "a region of no bytes": (Request.SET_MEM_TABLE, PAIR.pack(1, 0) + bytes(32), 1),
    "a region elsewhere than its offset": (
        Request.SET_MEM_TABLE,
        PAIR.pack(1, 0) + struct.pack("<QQQQ", 4096, 4096, 0, 0),
        1,
    ),
    "a region that wraps": (
        Request.SET_MEM_TABLE,
        PAIR.pack(1, 0) + struct.pack("<QQQQ", (1 << 64) - 4096, 8192, 0, (1 << 64) - 4096),
        1,
    ),
    "a configuration access that is cut": (Request.GET_CONFIG, struct.pack("<III", 0, 16, 0), 0),
    "a configuration access far outside": (
        Request.GET_CONFIG,
        struct.pack("<III", 250, 16, 0) + bytes(16),
        0,
    ),
    "a channel without its descriptor": (Request.SET_BACKEND_REQ_FD, b"", 0),
    "an owner with a payload": (Request.SET_OWNER, b"\0", 0),
}


@pytest.mark.parametrize(("request_number", "payload", "fds"), BAD_MESSAGES.values(), ids=BAD_MESSAGES)
def test_a_violation_ends_the_session_and_leaks_nothing(request_number: int, payload: bytes, fds: int):
    host = Host(memoryview(bytearray(MEMORY_BYTES)))
    with pytest.raises(VhostUserError):
        host.receive(Message(request_number, 1, payload).to_bytes(), tuple(range(fds)))
    assert host.session.failed
    with pytest.raises(LocalProtocolError):
        host.session.feed(Message(Request.GET_FEATURES))
    host.disconnect()


@pytest.mark.parametrize("address", [0, USER_ADDRESS - 16, USER_ADDRESS + MEMORY_BYTES])
def test_ring_addresses_outside_the_region_are_refused(address: int):
    pair = Pair()
    pair.run(pair.front.start())
    pair.run(pair.front.set_memory(8, MEMORY_BYTES, USER_ADDRESS))
    addresses = wire.VRING_ADDR.pack(0, 0, address, USER_ADDRESS + 0x2000, USER_ADDRESS + 0x1000, 0)
    for request, payload in (
        (Request.SET_VRING_NUM, PAIR.pack(0, 64)),
        (Request.SET_VRING_ADDR, addresses),
        (Request.SET_VRING_ENABLE, PAIR.pack(0, 1)),
    ):
        pair.host.receive(Message(request, 1, payload).to_bytes())
    with pytest.raises(VhostUserError) as caught:
        pair.host.receive(Message(Request.SET_VRING_KICK, 1, U64.pack(0)).to_bytes(), (1,))
    assert caught.value.kind == "ring_address"
    pair.host.disconnect()


def test_a_running_ring_is_not_set_up_again(pair: Pair):
    pair.up()
    with pytest.raises(VhostUserError) as caught:
        pair.host.receive(Message(Request.SET_VRING_NUM, 1, PAIR.pack(0, 64)).to_bytes())
    assert caught.value.kind == "ring_running"
    pair.host.disconnect()


@pytest.mark.parametrize(
    "answer",
    [
        Message(Request.SET_OWNER, 5, bytes(8)),
        Message(Request.GET_FEATURES, 1, bytes(8)),
        Message(Request.GET_FEATURES, 13, bytes(8)),
        Message(Request.GET_FEATURES, 5, bytes(7)),
        Message(
            Request.GET_FEATURES, 5, U64.pack(OFFERED)
        ),  # no protocol features, so no configuration space
    ],
)
def test_a_front_end_takes_no_other_answer_than_the_one_it_waits_for(answer: Message):
    front = FrontendSession(lambda offered: offered)
    sent = front.start()
    assert [action.request for action in sent] == [Request.SET_OWNER, Request.GET_FEATURES]
    with pytest.raises(VhostUserError):
        front.feed(answer)
    assert front.failed
    with pytest.raises(LocalProtocolError):
        front.start()


def test_a_refusal_ends_the_front_ends_session(pair: Pair):
    pair.up()
    pair.front.write_config(4, bytes(4))
    with pytest.raises(VhostUserError) as caught:
        pair.front.feed(Message(Request.SET_CONFIG, 5, U64.pack(1)))
    assert caught.value.kind == "refused"


def test_rings_before_memory_are_our_own_mistake(pair: Pair):
    pair.run(pair.front.start())
    with pytest.raises(LocalProtocolError):
        pair.front.start_rings(pair.setups())


@pytest.mark.parametrize(
    "data",
    [
        b"",
        bytes(11),
        bytes(12),
        struct.pack("<III", 1, 2, 0),
        struct.pack("<III", 1, 1, 4097),
        bytes([1, 0, 0, 0, 1]),
    ],
)
def test_bad_headers_are_refused(data: bytes):
    with pytest.raises(VhostUserError):
        decode(data)


@given(
    request=st.integers(0, 45),
    flags=st.sampled_from([1, 5, 9, 13]),
    payload=st.one_of(
        st.binary(max_size=48),
        st.tuples(st.integers(0, 6), st.integers(0, 70_000)).map(lambda numbers: PAIR.pack(*numbers)),
        st.sampled_from([0, 1, 0x101, OFFERED, OFFERED | PROTOCOL]).map(U64.pack),
    ),
    fds=st.integers(0, 3),
)
def test_random_messages_end_in_effects_or_in_a_typed_error(
    request: int, flags: int, payload: bytes, fds: int
):
    pair = Pair()
    pair.up()
    try:
        pair.host.receive(Message(request, flags, payload).to_bytes(), tuple(range(fds)))
    except VhostUserError:
        assert pair.host.session.failed
    pair.host.disconnect()
