"""Each end of vhost-user against a peer of another kind: the Linux driver's transcript, and peers that lie."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from virtio import vhost_user_messages as wire
from virtio.balloon import F_FREE_PAGE_HINT, F_VERSION_1, mask
from virtio.errors import LocalVirtioError, VhostUserError
from virtio.split_ring import layout_at
from virtio.testing_vhost_user import USER_ADDRESS, JoinedSessions, MockBackend
from virtio.vhost_user import (
    FrontendSession,
    MapRegion,
    Message,
    Reply,
    Request,
    StopRing,
    decode,
)

OFFERED = mask(F_VERSION_1, F_FREE_PAGE_HINT, 0, 2)
MEMORY_BYTES = 1 << 20
PROTOCOL = 1 << 30
NEED_REPLY = 8


@pytest.fixture
def pair() -> JoinedSessions:
    return JoinedSessions(OFFERED)


# The Linux driver (User-Mode Linux) as the peer.


def message(request: Request, payload: bytes = b"", *, ack: bool = True) -> bytes:
    return Message(request, 1 | (NEED_REPLY if ack else 0), payload).to_bytes()


def reply(request: Request, payload: bytes) -> bytes:
    return struct.pack("<III", request, 5, len(payload)) + payload


def test_the_linux_drivers_transcript():
    """Its order, sizes and omissions: bit 30 dropped, no SET_VRING_ENABLE, GET_CONFIG from offset 0, pipes."""
    host = MockBackend(memoryview(bytearray(MEMORY_BYTES)), OFFERED)
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


def test_with_bit_30_a_ring_waits_for_its_enable_and_stops_with_its_disable(pair: JoinedSessions):
    pair.up()
    pair.host.receive(message(Request.SET_VRING_ENABLE, struct.pack("<II", 1, 0)))
    assert pair.host.session.running == (0, 2, 3, 4)
    assert pair.host.replies.pop() == reply(Request.SET_VRING_ENABLE, bytes(8))
    pair.host.receive(message(Request.SET_VRING_KICK, struct.pack("<Q", 1)), (60,))
    assert pair.host.session.running == (0, 2, 3, 4), "kicked, and still not enabled"
    pair.host.receive(message(Request.SET_VRING_ENABLE, struct.pack("<II", 1, 1)))
    assert pair.host.session.running == (0, 1, 2, 3, 4)


def test_the_reply_to_get_vring_base_waits_for_the_device(pair: JoinedSessions):
    pair.up()
    session = pair.host.session
    payload = struct.pack("<II", 2, 0)
    assert session.feed(Message(Request.GET_VRING_BASE, 1, payload)) == [StopRing(2)]
    with pytest.raises(LocalVirtioError):
        session.feed(Message(Request.GET_FEATURES))
    with pytest.raises(LocalVirtioError):
        session.ring_stopped(1, 0)
    assert session.ring_stopped(2, 41) == [Reply(reply(Request.GET_VRING_BASE, struct.pack("<II", 2, 41)))]


def test_acknowledgements_come_only_when_negotiated():
    host = MockBackend(memoryview(bytearray(MEMORY_BYTES)), OFFERED)
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
    host = MockBackend(memoryview(bytearray(MEMORY_BYTES)), OFFERED)
    with pytest.raises(VhostUserError):
        host.receive(Message(request_number, 1, payload).to_bytes(), tuple(range(fds)))
    assert host.session.failed
    with pytest.raises(LocalVirtioError):
        host.session.feed(Message(Request.GET_FEATURES))
    host.disconnect()


@pytest.mark.parametrize("address", [0, USER_ADDRESS - 16, USER_ADDRESS + MEMORY_BYTES])
def test_ring_addresses_outside_the_region_are_refused(address: int):
    pair = JoinedSessions(OFFERED)
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


def test_a_running_ring_is_not_set_up_again(pair: JoinedSessions):
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
    with pytest.raises(LocalVirtioError):
        front.start()


def test_a_refusal_ends_the_front_ends_session(pair: JoinedSessions):
    pair.up()
    pair.front.write_config(4, bytes(4))
    with pytest.raises(VhostUserError) as caught:
        pair.front.feed(Message(Request.SET_CONFIG, 5, U64.pack(1)))
    assert caught.value.kind == "refused"


def test_rings_before_memory_are_our_own_mistake(pair: JoinedSessions):
    pair.run(pair.front.start())
    with pytest.raises(LocalVirtioError):
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
    pair = JoinedSessions(OFFERED)
    pair.up()
    try:
        pair.host.receive(Message(request, flags, payload).to_bytes(), tuple(range(fds)))
    except VhostUserError:
        assert pair.host.session.failed
    pair.host.disconnect()
