"""Hazard 9: what a guest may write into a ring to harm its host. Each lie has its kind, costs the guest the chain
or the ring, and nothing else.
"""

from __future__ import annotations

import numpy as np
import pytest

from virtio.balloon import F_SG, QUEUE_HINT, QUEUE_INFLATE
from virtio.errors import GuestProtocolError, LocalVirtioError
from virtio.hint_session import HintStarted, HintState, RejectedRange
from virtio.ring_layout import layout_at
from virtio.split_ring import DeviceRing, DriverRing
from virtio.testing import MockHost

PAGES = 1024
PAGE = 4096
NEXT, WRITE, INDIRECT = 1, 2, 4


@pytest.fixture
def host() -> MockHost:
    return MockHost(PAGES)


def bad_chain(host: MockHost, queue: int = QUEUE_INFLATE) -> GuestProtocolError:
    """The error of the one chain in the queue; it must have come back used with length 0."""
    ring = host.rings[queue]
    with pytest.raises(GuestProtocolError) as caught:
        ring.pop()
    ring.publish()
    if ring.broken is None:
        assert host.guest.used_entries(queue)[-1] == (0, 0)
        assert ring.in_flight == 0
        assert ring.pop() is None
    return caught.value


def test_hazard_9_a_loop_is_cut(host: MockHost):
    host.guest.lie_descriptor(QUEUE_INFLATE, 0, PAGE, 4, flags=NEXT, following=1)
    host.guest.lie_descriptor(QUEUE_INFLATE, 1, PAGE, 4, flags=NEXT, following=0)
    host.guest.lie_available(QUEUE_INFLATE, 0)
    assert bad_chain(host).kind == "chain_loop"


def test_hazard_9_a_loop_in_an_indirect_table_is_cut(host: MockHost):
    host.guest.lie_descriptor(QUEUE_INFLATE, 0, 0x200000, 32, flags=INDIRECT)
    host.guest.lie_descriptor_at(0x200000, PAGE, 4, flags=NEXT, following=1)
    host.guest.lie_descriptor_at(0x200010, PAGE, 4, flags=NEXT, following=1)
    host.guest.lie_available(QUEUE_INFLATE, 0)
    assert bad_chain(host).kind == "chain_loop"


def test_hazard_9_a_chain_longer_than_the_queue_is_refused(host: MockHost):
    host.guest.lie_descriptor(QUEUE_INFLATE, 0, 0x200000, 16 * 40, flags=INDIRECT)
    for index in range(40):
        host.guest.lie_descriptor_at(0x200000 + 16 * index, PAGE, 4, flags=NEXT, following=index + 1)
    host.guest.lie_available(QUEUE_INFLATE, 0)
    assert bad_chain(host).kind == "chain_length"


@pytest.mark.parametrize(
    ("address", "length", "kind"),
    [
        (PAGES * PAGE - 4, 8, "address_range"),
        (PAGES * PAGE, 4, "address_range"),
        ((1 << 64) - 4, 8, "address_range"),
        ((1 << 64) - 1, 0xFFFFFFFF, "address_range"),
        (0, 0xFFFFFFFF, "address_range"),
        (PAGE, 0, "length_zero"),
    ],
)
@pytest.mark.parametrize("place", ["alone", "chained", "indirect"])
def test_hazard_9_a_buffer_outside_ram_or_empty_is_refused(
    host: MockHost, address: int, length: int, kind: str, place: str
):
    if place == "indirect":
        host.guest.lie_descriptor(QUEUE_INFLATE, 0, 0x200000, 16, flags=INDIRECT)
        host.guest.lie_descriptor_at(0x200000, address, length)
    elif place == "chained":
        host.guest.lie_descriptor(QUEUE_INFLATE, 0, PAGE, 4, flags=NEXT, following=3)
        host.guest.lie_descriptor(QUEUE_INFLATE, 3, address, length, flags=WRITE)
    else:
        host.guest.lie_descriptor(QUEUE_INFLATE, 0, address, length)
    host.guest.lie_available(QUEUE_INFLATE, 0)
    assert bad_chain(host).kind == kind


def test_hazard_9_a_chain_of_4_gib_or_more_is_refused():
    # Each buffer is legal; only their sum has no 32-bit length. Memory is small, the claim is what counts.
    host = MockHost(PAGES, ring_size=2048)
    whole = PAGES * PAGE
    for index in range(1025):
        host.guest.lie_descriptor(QUEUE_HINT, index, 0, whole, flags=NEXT | WRITE, following=index + 1)
    host.guest.lie_available(QUEUE_HINT, 0)
    assert bad_chain(host, QUEUE_HINT).kind == "chain_bytes"


@pytest.mark.parametrize(
    ("length", "flags", "inner_flags", "kind"),
    [
        (32, INDIRECT, INDIRECT, "indirect_nested"),
        (24, INDIRECT, 0, "indirect_size"),
        (0, INDIRECT, 0, "indirect_size"),
        (32, INDIRECT | NEXT, 0, "indirect_next"),
        (0xFFFFFFF0, INDIRECT, 0, "address_range"),
    ],
)
def test_hazard_9_bad_indirect_tables_are_refused(
    host: MockHost, length: int, flags: int, inner_flags: int, kind: str
):
    host.guest.lie_descriptor(QUEUE_INFLATE, 0, 0x200000, length, flags=flags)
    host.guest.lie_descriptor_at(0x200000, 0x200000, 32, flags=inner_flags)
    host.guest.lie_available(QUEUE_INFLATE, 0)
    assert bad_chain(host).kind == kind


def test_hazard_9_an_indirect_table_that_was_not_negotiated_is_refused(host: MockHost):
    host.rings[QUEUE_INFLATE] = DeviceRing(host.memory, host.guest.layouts[QUEUE_INFLATE], indirect=False)
    host.guest.lie_descriptor(QUEUE_INFLATE, 0, 0x200000, 16, flags=INDIRECT)
    host.guest.lie_available(QUEUE_INFLATE, 0)
    assert bad_chain(host).kind == "indirect_not_negotiated"


def test_hazard_9_a_next_outside_the_table_is_refused(host: MockHost):
    host.guest.lie_descriptor(QUEUE_INFLATE, 0, PAGE, 4, flags=NEXT, following=16)
    host.guest.lie_available(QUEUE_INFLATE, 0)
    assert bad_chain(host).kind == "next_range"


def test_hazard_9_a_readable_buffer_after_a_writable_one_is_refused(host: MockHost):
    host.guest.lie_descriptor(QUEUE_INFLATE, 0, PAGE, 4, flags=NEXT | WRITE, following=1)
    host.guest.lie_descriptor(QUEUE_INFLATE, 1, PAGE, 4)
    host.guest.lie_available(QUEUE_INFLATE, 0)
    assert bad_chain(host).kind == "direction"


@pytest.mark.parametrize(
    ("heads", "index", "kind"),
    [
        ([16], None, "head_range"),
        ([0xFFFF], None, "head_range"),
        ([], 17, "avail_index"),
        ([], 0xFFFF, "avail_index"),
    ],
)
def test_hazard_9_an_index_that_cannot_be_breaks_the_ring_for_good(
    host: MockHost, heads: list[int], index: int | None, kind: str
):
    host.guest.lie_available(QUEUE_INFLATE, *heads)
    if index is not None:
        host.guest.lie_available_index(QUEUE_INFLATE, index)
    assert bad_chain(host).kind == kind
    assert host.guest.used_entries(QUEUE_INFLATE) == []
    host.guest.lie_available_index(QUEUE_INFLATE, 0)
    ring = host.rings[QUEUE_INFLATE]
    with pytest.raises(GuestProtocolError):
        ring.pop()
    assert ring.pop_all() == []
    assert ring.broken is not None
    assert ring.broken.kind == kind


def test_hazard_9_more_in_flight_than_the_ring_holds_breaks_the_ring(host: MockHost):
    host.guest.lie_descriptor(QUEUE_INFLATE, 0, PAGE, 4)
    host.guest.lie_available(QUEUE_INFLATE, 0, 0)
    ring = host.rings[QUEUE_INFLATE]
    assert len(ring.pop_all()) == 1
    assert ring.broken is not None
    assert [error.kind for error in ring.take_errors()] == ["head_in_flight"]


def test_hazard_9_bad_chains_among_good_ones_come_back_and_the_good_ones_are_served(host: MockHost):
    for index in range(4):
        host.guest.lie_descriptor(QUEUE_INFLATE, index, PAGE, 4 * (index % 2))
    host.guest.lie_available(QUEUE_INFLATE, 0, 1, 2, 3)
    ring = host.rings[QUEUE_INFLATE]
    chains = ring.pop_all()
    assert [chain.head for chain in chains] == [1, 3]
    ring.push_many([1, 3])
    assert ring.publish()
    assert sorted(host.guest.used_entries(QUEUE_INFLATE)) == [(0, 0), (1, 0), (2, 0), (3, 0)]
    assert [error.kind for error in ring.take_errors()] == ["length_zero", "length_zero"]


@pytest.mark.parametrize("data", [b"\0", b"\0\0\0\x80\0", bytes(16)])
def test_hazard_9_a_command_is_exactly_4_bytes(host: MockHost, data: bytes):
    host.device.open_hints()
    host.guest.command_bytes(data)
    (event,) = host.hints()
    assert isinstance(event, RejectedRange)
    assert host.device.hints.state is HintState.REQUESTED


def test_hazard_9_direction_decides_what_a_buffer_is_not_its_length(host: MockHost):
    command_id = host.device.open_hints()
    host.guest.hint([64 * PAGE], 4)  # four writable bytes are no command
    host.guest.command_bytes(bytes(1024))  # a kilobyte of readable bytes is no range
    first, second = host.hints()
    assert isinstance(first, RejectedRange)
    assert isinstance(second, RejectedRange)
    host.guest.command(command_id)
    assert host.hints() == [HintStarted(command_id)]


def test_hazard_9_pages_on_the_inflate_queue_are_refused_without_f_sg(host: MockHost):
    host.guest.rings[QUEUE_INFLATE].add([], [(64 * PAGE, PAGE)], None)
    host.guest.rings[QUEUE_INFLATE].publish()
    chain = host.rings[QUEUE_INFLATE].pop()
    assert chain is not None
    host.device.negotiate(host.device.features & ~(1 << F_SG))
    assert host.device.process_inflate([chain], host.read).pages == 0
    assert host.device.guest_errors == {"direction": 1}


def test_hazard_9_random_ring_memory_never_raises_anything_else():
    random = np.random.default_rng(9)
    for trial in range(200):
        host = MockHost(PAGES, ring_size=16)
        layout = host.guest.layouts[QUEUE_INFLATE]
        noise = random.integers(0, 256, 16 * 16, np.uint8)
        table = noise.view(np.dtype("<u8,<u4,<u2,<u2"))
        if trial % 2:  # mostly plausible: small addresses and lengths, flags that mean something
            table["f0"] %= PAGES * PAGE
            table["f1"] %= 8192
            table["f2"] &= 7
            table["f3"] %= 18
        host.memory[layout.desc : layout.desc + noise.size] = noise.tobytes()
        host.guest.lie_available(QUEUE_INFLATE, *random.permutation(16).tolist())
        ring = host.rings[QUEUE_INFLATE]
        for chain in ring.pop_all():
            for address, length in chain.readable + chain.writable:
                assert 0 < length <= PAGES * PAGE - address
            host.device.process_inflate([chain], host.read)
            ring.push(chain.head)
        ring.publish()
        assert len(host.guest.used_entries(QUEUE_INFLATE)) == 16


def test_hazard_9_memory_below_guest_ram_is_not_the_guests():
    """A front-end's file may hold its own things below the region it shares: Linux UML's does."""
    host = MockHost(PAGES)
    first_address = 600 * PAGE
    layout = layout_at(first_address, 16)
    driver = DriverRing(host.memory, layout)
    driver.format()
    ring = DeviceRing(host.memory, layout, first_address=first_address)
    buffers = [(first_address - 1, 2), (0, 8), (first_address, 8), (first_address - PAGE, PAGE)]
    for buffer in buffers:
        driver.add([buffer], [], None)
    driver.publish()
    assert [chain.readable for chain in ring.pop_all()] == [[(first_address, 8)]]
    assert [error.kind for error in ring.take_errors()] == ["address_range"] * 3
    with pytest.raises(GuestProtocolError, match="ring_layout"):
        DeviceRing(host.memory, layout_at(first_address - 16, 16), first_address=first_address)


@pytest.mark.parametrize("chained", [False, True])
def test_hazard_9_one_pass_takes_only_so_many_bytes_to_read(chained: bool):
    host = MockHost(PAGES, ring_size=64)
    ring = host.rings[QUEUE_INFLATE]
    for _ in range(20):
        buffers = [(64 * PAGE, 50), (64 * PAGE, 50)] if chained else [(64 * PAGE, 100)]
        host.guest.rings[QUEUE_INFLATE].add(buffers, [], None)
    host.guest.rings[QUEUE_INFLATE].publish()
    portions = []
    while chains := ring.pop_all(readable_bytes_max=350):
        portions.append(len(chains))
    assert portions == [4] * 5


def test_behind_a_bad_chain_nothing_is_taken_back(host: MockHost):
    """The entry before the next one is the bad chain's: the one held before it would be lost, and it seen twice."""
    host.guest.inflate([1])
    host.guest.rings[QUEUE_INFLATE].add([(PAGES * PAGE, 4)], [], None)
    host.guest.rings[QUEUE_INFLATE].publish()
    ring = host.rings[QUEUE_INFLATE]
    held = ring.pop()
    assert held is not None
    with pytest.raises(GuestProtocolError):
        ring.pop()
    assert ring.newest is None
    with pytest.raises(LocalVirtioError):
        ring.unpop(held.head)
    assert (ring.next_avail, ring.in_flight) == (2, 1)


def test_what_a_guest_writes_over_the_available_ring_does_not_confuse_an_unpop(host: MockHost):
    host.guest.inflate([1])
    ring = host.rings[QUEUE_INFLATE]
    chain = ring.pop()
    assert chain is not None
    assert ring.newest == chain.head
    layout = host.guest.layouts[QUEUE_INFLATE]
    host.memory[layout.avail + 4 : layout.avail + 6] = b"\xff\xff"
    ring.unpop(chain.head)
    assert (ring.next_avail, ring.newest) == (0, None)
