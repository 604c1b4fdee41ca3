"""Both ends of vhost-user joined in memory, and the back-end against the Linux driver's transcript.

Descriptors are counted as a kernel would: passing one makes a new number, and at the end none may be left.
"""

from __future__ import annotations

import struct

import pytest

from virtio.balloon import F_FREE_PAGE_HINT, F_VERSION_1, QUEUE_COUNT, mask
from virtio.split_ring import DriverRing
from virtio.testing_vhost_user import USER_ADDRESS, JoinedSessions
from virtio.vhost_user import (
    BackendChannel,
    BackendReply,
    CloseFds,
    ConfigRead,
    ConfigWriteDone,
    ConfigWritten,
    FeaturesSet,
    MapRegion,
    Message,
    Negotiated,
    Reply,
    Request,
    RingFdsChanged,
    RingsStarted,
    RingsStopped,
    StartRing,
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


def test_the_handshake_agrees_on_features_and_reads_the_configuration(pair: JoinedSessions):
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


def test_what_is_wished_for_before_the_handshake_is_over_comes_after_it(pair: JoinedSessions):
    actions = pair.front.start() + pair.front.set_memory(8, MEMORY_BYTES, USER_ADDRESS)
    actions += pair.front.start_rings(pair.setups())
    events = pair.run(actions)
    assert [type(event) for event in events] == [Negotiated, ConfigRead, RingsStarted]


def test_rings_start_where_they_lie_and_carry_chains(pair: JoinedSessions):
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


def test_stopped_rings_say_their_bases_and_go_on_there_under_another_back_end(pair: JoinedSessions):
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
    other = JoinedSessions(OFFERED)
    other.memory[:] = pair.memory
    other.run(other.front.start())
    other.run(other.front.set_memory(8, MEMORY_BYTES, USER_ADDRESS))
    other.run(other.front.start_rings(other.setups(events[0].bases)))
    assert len(other.host.rings[1].pop_all()) == 1
    pair.host.disconnect()
    other.host.disconnect()


def test_a_stopped_ring_starts_again_on_the_same_connection(pair: JoinedSessions):
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


def test_stopping_twice_answers_the_same_base(pair: JoinedSessions):
    pair.up()
    pair.run(pair.front.stop([2]))
    assert pair.run(pair.front.stop([2])) == [RingsStopped({2: 0})]


def test_the_configuration_is_written_and_changes_are_announced(pair: JoinedSessions):
    pair.up()
    assert pair.run(pair.front.write_config(4, b"\x05\0\0\0")) == [ConfigWriteDone(4)]
    assert ConfigWritten(4, b"\x05\0\0\0") in pair.host.log
    pair.host.config.num_pages = 3
    announcement = decode(pair.host.session.config_changed())
    assert announcement == Message(2, 1)
    assert pair.run(pair.front.feed_backend(announcement)) == [ConfigRead(pair.host.config.to_bytes())]


def test_an_announcement_that_wants_a_reply_gets_one(pair: JoinedSessions):
    pair.up()
    reply, *_ = pair.run(pair.front.feed_backend(Message(2, 1 | NEED_REPLY)))
    assert reply == BackendReply(struct.pack("<IIIQ", 2, 5, 8, 0))


def test_a_front_end_without_a_channel_does_not_negotiate_one():
    pair = JoinedSessions(OFFERED, backend_fd=-1)
    pair.up()
    assert not pair.front.protocol_features >> 5 & 1
    pair.host.disconnect()


def test_descriptors_that_are_replaced_are_closed_and_running_rings_learn_of_it(pair: JoinedSessions):
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


def test_a_new_memory_table_stops_the_rings_first(pair: JoinedSessions):
    pair.up()
    pair.host.log.clear()
    pair.run(pair.front.set_memory(8, MEMORY_BYTES, USER_ADDRESS))
    kinds = [type(effect) for effect in pair.host.log]
    assert kinds == [StopRing] * QUEUE_COUNT + [MapRegion, Reply]
    pair.host.disconnect()
