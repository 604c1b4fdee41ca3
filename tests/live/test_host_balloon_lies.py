"""Hazards 8 and 9 in full: a driver that lies about everything, through the real device.

What must hold whatever it does: the device answers, and serves the next guest; each lie is counted under a known
name; memory outside the guest is never touched, and inside it the device writes used rings and punches whole
pages, nothing else.
"""

import contextlib
import os
import resource
import struct

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from host.errors import DeviceNotReady
from tests.live.balloon_peers import FEATURES, PAGE_BYTES, Guest, fixture_host, wait_for
from virtio.balloon import (
    CMD_ID_FIRST,
    F_FREE_PAGE_HINT,
    F_PAGE_POISON,
    F_REPORTING,
    F_RING_EVENT_IDX,
    F_RING_INDIRECT_DESC,
    F_SG,
    F_STATS_VQ,
    F_VERSION_1,
    QUEUE_COUNT,
    QUEUE_HINT,
    QUEUE_INFLATE,
    QUEUE_REPORTING,
    QUEUE_STATS,
    mask,
)
from virtio.ring_layout import layout_at
from virtio.testing import MockDriver
from virtio.vhost_user_frontend import RingSetup, _Step
from virtio.vhost_user_messages import F_PROTOCOL_FEATURES, MemoryRegion, Request, pack_mem_table

pytestmark = pytest.mark.live
host = pytest.fixture(fixture_host)

RING_SIZE = 16
PAGES = 256
CANARY_PAGES = 8
PATTERN = 0xAA
EVERYTHING = FEATURES | mask(F_STATS_VQ, F_REPORTING, F_PAGE_POISON, F_SG, F_RING_EVENT_IDX)
CHAIN_ERRORS = {
    "address_range",
    "chain_bytes",
    "chain_length",
    "chain_loop",
    "direction",
    "indirect_next",
    "indirect_nested",
    "indirect_not_negotiated",
    "indirect_size",
    "length_zero",
    "next_range",
}
RING_ERRORS = {"avail_index", "head_range", "head_in_flight"}
BALLOON_ERRORS = {
    "config_write",
    "hint",
    "partial_page",
    "pfn_array_size",
    "pfn_range",
    "poison_changed",
    "queue_not_negotiated",
    "stats_buffers",
    "stats_size",
}
KNOWN = CHAIN_ERRORS | RING_ERRORS | BALLOON_ERRORS

ADDRESSES = st.one_of(
    st.integers(0, PAGES * PAGE_BYTES + 8),
    st.integers(0, PAGES + 1).map(lambda page: page * PAGE_BYTES),
    st.sampled_from([2**32 - 1, 2**63, 2**64 - 4096, 2**64 - 1]),
)
LENGTHS = st.one_of(
    st.integers(0, 20),
    st.integers(1, 64).map(lambda pages: pages * PAGE_BYTES),
    st.sampled_from([PAGE_BYTES - 1, PAGE_BYTES + 1, PAGES * PAGE_BYTES, 2**31, 2**32 - 4096, 2**32 - 1]),
)
QUEUES = st.integers(0, QUEUE_COUNT - 1)
INDICES = st.integers(0, RING_SIZE - 1)
LIES = st.one_of(
    st.tuples(
        st.just("descriptor"),
        QUEUES,
        INDICES,
        ADDRESSES,
        LENGTHS,
        st.integers(0, 7) | st.integers(0, 0xFFFF),
        INDICES | st.integers(0, 0xFFFF),
    ),
    st.tuples(
        st.just("available"), QUEUES, st.lists(INDICES | st.integers(0, 0xFFFF), min_size=1, max_size=6)
    ),
    st.tuples(st.just("available_index"), QUEUES, st.integers(0, 0xFFFF)),
    st.tuples(st.just("bytes"), st.integers(70, PAGES - 1), st.binary(min_size=4, max_size=64)),
    st.tuples(st.just("config"), st.sampled_from([0, 4, 8, 12, 2]), st.sampled_from([1, 4, 8])),
)
HONEST = st.one_of(
    st.tuples(st.just("kick"), QUEUES),
    st.tuples(
        st.just("host"), st.sampled_from(["open_hints", "close_hints", "hints_done", "stats", "target"])
    ),
    st.tuples(st.just("restart")),
)


def act(host, guest, action):
    """One thing that a driver, or its host, does."""
    driver = guest.driver
    match action:
        case "descriptor", queue, index, address, length, flags, following:
            driver.lie_descriptor(queue, index, address, length, flags=flags, following=following)
            driver.lie_available(queue, index)
        case "available", queue, heads:
            driver.lie_available(queue, *heads)
        case "available_index", queue, index:
            driver.lie_available_index(queue, index)
        case "bytes", page, data:
            guest.memory[page * PAGE_BYTES : page * PAGE_BYTES + len(data)] = data
        case "config", offset, size:
            guest.exchange(guest.session.write_config(offset, bytes(size)))
        case "kick", queue:
            guest.kick(queue)
        case ("restart",):
            guest.start(guest_bases(guest))
        case "host", what:
            ask(host, what)


def guest_bases(guest):
    bases = guest.stop()
    return [bases.get(queue, 0) for queue in range(QUEUE_COUNT)]


def ask(host, what):
    with contextlib.suppress(DeviceNotReady):
        match what:
            case "stats":
                host.server.guest_stats(timeout=0)
            case "target":
                host.server.set_num_pages(PAGES // 2)
            case _:
                getattr(host.server, what)()


def fill_and_fence(guest):
    """Pattern in every page the driver does not use, and pages beyond guest RAM in the same file."""
    first = 1 + -(-guest.driver.area_bytes // PAGE_BYTES)
    guest.memory[first * PAGE_BYTES :] = bytes([PATTERN]) * ((PAGES - first) * PAGE_BYTES)
    os.ftruncate(guest.fd, (PAGES + CANARY_PAGES) * PAGE_BYTES)
    os.pwrite(guest.fd, bytes([PATTERN]) * (CANARY_PAGES * PAGE_BYTES), PAGES * PAGE_BYTES)
    return first


def check_memory(guest, first, scribbled):
    """Beyond guest RAM nothing changed; inside, pages are whole or punched."""
    canary = os.pread(guest.fd, CANARY_PAGES * PAGE_BYTES, PAGES * PAGE_BYTES)
    assert set(canary) == {PATTERN}
    pages = np.frombuffer(os.pread(guest.fd, PAGES * PAGE_BYTES, 0), np.uint8).reshape(PAGES, PAGE_BYTES)
    for pfn in set(range(first, PAGES)) - scribbled:
        assert (pages[pfn] == pages[pfn, 0]).all(), f"page {pfn} was written by the device"
        assert pages[pfn, 0] in (0, PATTERN)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    features=st.sampled_from(
        [EVERYTHING, EVERYTHING & ~mask(F_SG), FEATURES, FEATURES & ~mask(F_RING_INDIRECT_DESC)]
    ),
    actions=st.lists(LIES | HONEST, max_size=40),
)
def test_hazard_9_no_lie_of_a_driver_ends_the_device_or_touches_other_memory(host, features, actions):
    before = host.errors
    guest = Guest(host.path, features=features, pages=PAGES, ring_size=RING_SIZE)
    with contextlib.closing(guest):
        first = fill_and_fence(guest)
        for action in actions:
            act(host, guest, action)
        for queue in range(QUEUE_COUNT):
            guest.kick(queue)
        for _ in range(2):  # each answer is a turn of the device's loop: the kicks had theirs
            assert host.server.status().ready
        new = {kind for kind, count in host.errors.items() if count != before.get(kind, 0)}
        assert new <= KNOWN, new - KNOWN
        assert host.server.status().connection_errors == {}
        guest.stop()
        host.server.rings_stopped(timeout=0)
        check_memory(guest, first, {action[1] for action in actions if action[0] == "bytes"})
    host.server.hints_done()
    after = Guest(host.path, pages=PAGES, ring_size=RING_SIZE)
    released = host.server.status().released_pages
    after.driver.inflate([first + 1])
    after.kick(QUEUE_INFLATE)
    after.wait_used(QUEUE_INFLATE, 1)
    assert host.server.status().released_pages == released + 1
    after.close()


RANDOM_FEATURES = [0, mask(F_FREE_PAGE_HINT), mask(F_REPORTING), mask(F_STATS_VQ, F_REPORTING), EVERYTHING]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_driver_that_changes_its_features_and_rings_at_will_ends_nothing(host, data):
    """Other features under running rings, other numberings, other sets of rings, with buffers held."""
    guest = Guest(host.path, features=EVERYTHING, pages=PAGES, ring_size=RING_SIZE)
    with contextlib.closing(guest):
        for _ in range(data.draw(st.integers(1, 6))):
            word = data.draw(st.sampled_from(RANDOM_FEATURES)) | mask(F_VERSION_1, F_PROTOCOL_FEATURES)
            guest.exchange(guest.session._then(_Step(Request.SET_FEATURES, struct.pack("<Q", word))))
            for queue in data.draw(st.lists(QUEUES, max_size=4)):
                flags = data.draw(st.sampled_from([0, 2]))
                guest.driver.lie_descriptor(queue, 0, 64 * PAGE_BYTES, 20, flags=flags)
                guest.driver.lie_available(queue, 0)
                guest.kick(queue)
            if data.draw(st.booleans()):
                guest.start(guest_bases(guest))
            ask(host, data.draw(st.sampled_from(["open_hints", "stats", "close_hints"])))
        guest.stop()
    assert host.errors.keys() <= KNOWN
    assert host.server.status().connection_errors == {}


def test_hazard_9_the_largest_ring_of_the_largest_arrays_costs_bounded_memory_and_time(host):
    """32768 chains that share one array of 4096 page numbers: 512 MiB of numbers, taken a quarter MiB at a time."""
    size = 32768
    pages = 1024
    guest = Guest(host.path, pages=pages, ring_size=1)
    guest.stop()
    layout = layout_at(200 * PAGE_BYTES, size)
    guest.driver.layouts[QUEUE_INFLATE] = layout
    table = np.frombuffer(guest.memory, "<u8,<u4,<u2,<u2", count=size, offset=layout.desc)
    table["f0"], table["f1"] = 900 * PAGE_BYTES, 4 * 4096
    available = np.frombuffer(guest.memory, "<u2", count=size + 2, offset=layout.avail)
    available[2:] = np.arange(size)
    available[1] = size
    del table, available
    numbers = np.random.default_rng(1).integers(500, 900, 4096).astype("<u4")
    guest.memory[900 * PAGE_BYTES :][: 4 * 4096] = numbers.tobytes()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    guest.start([0] * QUEUE_COUNT)
    for _ in range(50):
        host.server.status()  # the device has time for others between its passes
    assert 0 < host.server.status().inflated_pages < 512 * size
    guest.main.close()
    wait_for(lambda: not host.server.status().ready)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 64 << 10, "KiB"
    guest.close()


def test_hazard_4_a_report_without_end_is_cut_off_and_costs_bounded_memory(host):
    guest = Guest(host.path, pages=PAGES, ring_size=256)
    guest.driver.command(host.server.open_hints())
    guest.kick(QUEUE_HINT)
    hinted = 0
    for _ in range(20):
        guest.driver.hint([128 * PAGE_BYTES] * 200, 16 * PAGE_BYTES)
        guest.kick(QUEUE_HINT)
        wait_for(lambda: guest.driver.used(QUEUE_HINT))
        wait_for(
            lambda: guest.driver.used(QUEUE_HINT) or guest.driver.rings[QUEUE_HINT].free_descriptors == 256
        )
    last = host.server.close_hints()
    while not host.batches.empty():
        batch = host.batches.get_nowait()
        assert batch.command_id == CMD_ID_FIRST
        hinted += int(batch.page_count.sum())
    assert hinted + int(last.page_count.sum()) == 4 * PAGES, "all of RAM four times over, and no more"
    assert host.errors["hint"] > 0
    guest.close()


def test_a_guest_cannot_shrink_its_memory_under_the_device(host):
    guest = Guest(host.path, pages=PAGES, ring_size=RING_SIZE)
    assert host.server.status().memory_sealed
    with pytest.raises(PermissionError):
        os.ftruncate(guest.fd, PAGE_BYTES)
    guest.close()


@pytest.mark.parametrize("then", ["kick", "stats", "close_hints", "stop"])
def test_memory_that_cannot_be_sealed_and_shrinks_costs_the_connection_not_the_node(host, then):
    guest = Guest(host.path, features=EVERYTHING, pages=PAGES, ring_size=RING_SIZE, sealable=False)
    assert not host.server.status().memory_sealed
    host.server.open_hints()
    guest.driver.stats(bytes(10))
    guest.kick(2)
    wait_for(lambda: host.server.status().stats)
    os.ftruncate(guest.fd, 0)
    match then:
        case "kick":
            guest.kick(QUEUE_REPORTING)
        case "stop":
            guest.main.close()
        case _:
            ask(host, then)
    wait_for(lambda: not host.server.status().ready)
    host.server.rings_stopped(timeout=0)
    assert host.server.status().connection_errors == ({} if then == "stop" else {"region_shrunk": 1})
    guest.close()


def test_a_file_that_is_no_signal_cannot_be_a_rings_descriptor(host, tmp_path):
    """A file may belong to a file system that answers when it likes."""
    guest = Guest(host.path, pages=PAGES, ring_size=RING_SIZE)
    guest.stop()
    with (tmp_path / "file").open("wb") as file:
        os.dup2(file.fileno(), guest.calls[QUEUE_INFLATE])
    with pytest.raises((EOFError, OSError)):
        guest.start([0] * QUEUE_COUNT)
    assert host.server.status().connection_errors == {"ring_fd": 1}
    guest.close()


def test_hazard_9_what_lies_below_the_shared_region_is_not_the_guests(host):
    """Linux UML shares its file from the end of its kernel image on: the image is no guest RAM."""
    first = 100
    guest = Guest(host.path, features=EVERYTHING, pages=PAGES, ring_size=RING_SIZE)
    guest.stop()
    guest.driver = MockDriver(guest.memory, area=first * PAGE_BYTES, ring_size=RING_SIZE)
    start = first * PAGE_BYTES
    user = guest.session._user_address + start
    table = pack_mem_table((MemoryRegion(start, (PAGES - first) * PAGE_BYTES, user, start),))
    guest.exchange(guest.session._then(_Step(Request.SET_MEM_TABLE, table, (guest.fd,))))
    rings = zip(guest.driver.layouts, guest.kicks, guest.calls, strict=True)
    guest.exchange(
        guest.session.start_rings([RingSetup(i, ring[0], 0, *ring[1:]) for i, ring in enumerate(rings)])
    )
    guest.memory[: 8 * PAGE_BYTES] = bytes([PATTERN]) * (8 * PAGE_BYTES)
    guest.driver.inflate([5, first - 1, PAGES - 1])
    guest.driver.give(QUEUE_INFLATE, [(2 * PAGE_BYTES, PAGE_BYTES)])
    guest.driver.rings[QUEUE_INFLATE].add([(3 * PAGE_BYTES, 8)], [], None)
    guest.driver.rings[QUEUE_INFLATE].publish()
    guest.kick(QUEUE_INFLATE)
    guest.wait_used(QUEUE_INFLATE, 3)
    assert host.errors == {"pfn_range": 2, "address_range": 2}
    assert host.server.status().inflated_pages == 1
    assert set(os.pread(guest.fd, 8 * PAGE_BYTES, 0)) == {PATTERN}
    guest.close()


def test_a_buffer_held_for_a_driver_that_chose_otherwise_goes_back(host):
    guest = Guest(host.path, features=EVERYTHING, pages=PAGES, ring_size=RING_SIZE)
    guest.driver.stats(bytes(10))
    guest.kick(QUEUE_STATS)
    wait_for(lambda: host.server.status().stats)
    word = mask(F_VERSION_1, F_PROTOCOL_FEATURES)
    guest.exchange(guest.session._then(_Step(Request.SET_FEATURES, struct.pack("<Q", word))))
    guest.kick(QUEUE_STATS)
    guest.wait_used(QUEUE_STATS, 1)
    assert host.errors == {"queue_not_negotiated": 1}
    guest.close()
