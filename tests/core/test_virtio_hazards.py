"""Hazards of free page hinting and of untrusted rings, each one by its name, driven through real rings.

The device's half here is what a host does: pop, process, push, publish; the guest's half is the mock driver.
"""

from __future__ import annotations

import numpy as np
import pytest

from virtio.balloon import (
    CMD_ID_DONE,
    CMD_ID_FIRST,
    CMD_ID_LAST,
    CMD_ID_STOP,
    F_FREE_PAGE_HINT,
    F_PAGE_POISON,
    F_VERSION_1,
    QUEUE_DEFLATE,
    QUEUE_HINT,
    QUEUE_INFLATE,
    mask,
)
from virtio.balloon_device import FEATURES_SUPPORTED, BalloonDevice, reader
from virtio.errors import GuestProtocolError, LocalProtocolError
from virtio.hint_session import (
    HintEvent,
    HintRange,
    HintSession,
    HintStarted,
    HintState,
    HintStopped,
    RejectedRange,
    StaleCommand,
    StaleRange,
)
from virtio.split_ring import DeviceRing
from virtio.testing import MockDriver

PAGES = 1024
PAGE = 4096
NEXT, WRITE, INDIRECT = 1, 2, 4


class Host:
    """A device over the mock driver's memory."""

    def __init__(self, ring_size: int = 16) -> None:
        self.memory = memoryview(bytearray(PAGES * PAGE))
        self.guest = MockDriver(self.memory, ring_size=ring_size)
        self.device = BalloonDevice(PAGES)
        self.device.negotiate(self.device.features_offered)
        self.rings = [DeviceRing(self.memory, layout) for layout in self.guest.layouts]
        self.read = reader(self.memory)

    def hints(self) -> list[HintEvent]:
        """Process the hint queue as far as it goes."""
        ring = self.rings[QUEUE_HINT]
        events: list[HintEvent] = []
        while chains := ring.pop_all():
            for chain in chains:
                events += self.device.process_hint(chain, self.read)
            ring.push_many([chain.head for chain in chains])
            ring.publish()
        self.device.count_errors(ring.take_errors())
        return events

    def bad_chain(self, queue: int = QUEUE_INFLATE) -> GuestProtocolError:
        """The error of the one chain in the queue; it must have come back used with length 0."""
        ring = self.rings[queue]
        with pytest.raises(GuestProtocolError) as caught:
            ring.pop()
        ring.publish()
        if ring.broken is None:
            assert self.guest.used_entries(queue)[-1] == (0, 0)
            assert ring.in_flight == 0
            assert ring.pop() is None
        return caught.value


@pytest.fixture
def host() -> Host:
    return Host()


# Hazard 3: stale, replayed or wrapped command ids; a late STOP.


def test_hazard_3_ranges_of_an_older_report_are_stale(host: Host):
    old = host.device.open_hints()
    host.guest.command(old)
    assert host.hints() == [HintStarted(old)]
    host.device.close_hints()
    new = host.device.open_hints()
    host.guest.hint([64 * PAGE], 8 * PAGE)
    host.guest.command(CMD_ID_STOP)
    assert host.hints() == [StaleRange(8), StaleCommand(CMD_ID_STOP)]
    host.guest.report(new, [128 * PAGE], PAGE)
    assert host.hints() == [HintStarted(new), HintRange(128, 1), HintStopped(new)]


def test_hazard_3_a_replayed_id_opens_nothing(host: Host):
    command_id = host.device.open_hints()
    host.guest.report(command_id, [], PAGE)
    host.guest.report(command_id, [64 * PAGE], PAGE)
    assert host.hints() == [
        HintStarted(command_id),
        HintStopped(command_id),
        StaleCommand(command_id),
        StaleRange(1),
        StaleCommand(CMD_ID_STOP),
    ]


def test_hazard_3_an_id_sent_twice_is_refused_and_the_report_goes_on(host: Host):
    command_id = host.device.open_hints()
    host.guest.command(command_id)
    host.guest.report(command_id, [64 * PAGE], PAGE)
    started, refused, counted, stopped = host.hints()
    assert started == HintStarted(command_id)
    assert isinstance(refused, RejectedRange)
    assert counted == HintRange(64, 1)
    assert stopped == HintStopped(command_id)
    assert host.device.guest_errors["hint"] == 1


def test_hazard_3_ids_wrap_and_never_fall_below_the_first():
    session = HintSession(CMD_ID_LAST)
    assert session.open() == CMD_ID_LAST
    session.close()
    assert session.open() == CMD_ID_FIRST
    session.close()
    session.next_command_id = CMD_ID_LAST  # 2**31 sessions later, and the guest never said STOP
    with pytest.raises(LocalProtocolError):
        session.open()
    assert session.feed_command(CMD_ID_STOP.to_bytes(4, "little")) == StaleCommand(CMD_ID_STOP)
    assert session.open() == CMD_ID_LAST


@pytest.mark.parametrize("command_id", [-1, 0, 1, 1 << 32])
def test_hazard_3_stop_and_done_are_no_ids(command_id: int):
    with pytest.raises(LocalProtocolError):
        HintSession(command_id)


def test_hazard_3_a_late_stop_does_not_end_the_next_report(host: Host):
    old = host.device.open_hints()
    host.guest.command(old)
    host.hints()
    host.device.close_hints()
    new = host.device.open_hints()
    host.guest.command(CMD_ID_STOP)
    host.guest.command(new)
    host.guest.hint([64 * PAGE], PAGE)
    assert host.hints() == [StaleCommand(CMD_ID_STOP), HintStarted(new), HintRange(64, 1)]


def test_hazard_3_a_late_stop_does_not_free_the_id_that_was_asked_for_since():
    session = HintSession()
    command_id = session.open()
    assert session.feed_command(bytes(4)) == StaleCommand(CMD_ID_STOP)
    session.close()
    session.next_command_id = command_id
    with pytest.raises(LocalProtocolError):
        session.open()


def test_hazard_3_another_id_ends_the_report_that_runs(host: Host):
    command_id = host.device.open_hints()
    host.guest.command(command_id)
    host.guest.report(command_id + 1, [64 * PAGE], PAGE)
    assert host.hints() == [
        HintStarted(command_id),
        HintStopped(command_id),
        StaleRange(1),
        StaleCommand(CMD_ID_STOP),
    ]


# Hazard 4: a guest that never ends its report, floods, or dies in the middle.


def test_hazard_4_a_report_that_never_ends_is_closed_and_what_still_comes_is_stale(host: Host):
    command_id = host.device.open_hints()
    host.guest.command(command_id)
    host.guest.hint([64 * PAGE], PAGE)
    assert host.hints() == [HintStarted(command_id), HintRange(64, 1)]
    host.device.close_hints()
    assert host.device.hints.config_command_id == CMD_ID_STOP
    host.guest.hint([65 * PAGE], PAGE)
    assert host.hints() == [StaleRange(1)]


def test_hazard_4_a_flood_is_taken_in_bounded_portions():
    host = Host(ring_size=8)
    ring = host.rings[QUEUE_HINT]
    command_id = host.device.open_hints()
    host.guest.command(command_id)
    taken = 0
    for round_index in range(100):  # the guest fills the ring again each time the device looked
        host.guest.hint([64 * PAGE] * 8, PAGE)
        chains = ring.pop_all()
        assert len(chains) <= 8, round_index
        taken += len(chains)
        ring.push_many([chain.head for chain in chains])
        ring.publish()
        host.guest.rings[QUEUE_HINT].discard_used()
    assert taken > 500


def test_hazard_4_long_chains_that_share_descriptors_are_taken_in_bounded_portions():
    host = Host(ring_size=1024)
    for index in range(1024):
        flags = NEXT if index < 1023 else 0
        host.guest.lie_descriptor(QUEUE_INFLATE, index, PAGE, 4, flags=flags, following=index + 1)
    host.guest.lie_available(QUEUE_INFLATE, *range(1024))
    portions = []
    while chains := host.rings[QUEUE_INFLATE].pop_all():
        portions.append(sum(len(chain.readable) for chain in chains))
    assert sum(portions) == 1024 * 1025 // 2
    assert max(portions) < 8192 + 1024


def test_hazard_4_bad_chains_in_a_flood_cost_no_memory():
    host = Host(ring_size=8)
    ring = host.rings[QUEUE_INFLATE]
    for _ in range(1000):
        host.guest.lie_available(QUEUE_INFLATE, 0)  # a descriptor of length 0
        assert ring.pop_all() == []
    assert ring.errors_count == 1000
    assert len(ring.take_errors()) == 256


def test_hazard_4_a_guest_that_dies_in_the_middle_leaves_a_session_that_can_be_done(host: Host):
    command_id = host.device.open_hints()
    host.guest.command(command_id)
    host.hints()
    host.device.hints_done()
    assert host.device.hints.config_command_id == CMD_ID_DONE
    assert host.device.hints.state is HintState.DONE


# Hazard 5 (the device's part): DONE from every state.


@pytest.mark.parametrize(
    "steps", [[], ["open"], ["open", "start"], ["open", "start", "stop"], ["open", "close"]]
)
def test_hazard_5_done_reaches_the_guest_from_every_state(host: Host, steps: list[str]):
    command_id = CMD_ID_FIRST
    for step in steps:
        match step:
            case "open":
                assert host.device.open_hints() == command_id
            case "start":
                host.guest.command(command_id)
            case "stop":
                host.guest.command(CMD_ID_STOP)
            case "close":
                host.device.close_hints()
        host.hints()
    host.device.hints_done()
    host.device.hints_done()
    assert host.device.read_config()[8:12] == CMD_ID_DONE.to_bytes(4, "little")
    host.guest.hint([64 * PAGE], PAGE)
    assert host.hints() == [StaleRange(1)]


# Hazard 7: a guest that poisons its free pages.


def test_hazard_7_hints_are_off_for_a_guest_that_poisons():
    device = BalloonDevice(PAGES, features_offered=FEATURES_SUPPORTED)
    device.negotiate(mask(F_VERSION_1, F_FREE_PAGE_HINT, F_PAGE_POISON))
    assert device.hints_usable, "freed pages read as zero: init_on_free"
    assert device.write_config(12, b"\xaa\xaa\xaa\xaa")
    assert not device.hints_usable
    with pytest.raises(LocalProtocolError):
        device.open_hints()


# Hazard 8: duplicate, overlapping, unaligned, partial ranges.


@pytest.mark.parametrize(
    ("address", "length", "expected"),
    [
        (64 * PAGE, 8 * PAGE, HintRange(64, 8)),
        (64 * PAGE + 1, 8 * PAGE, HintRange(65, 7)),
        (64 * PAGE - 1, 8 * PAGE + 2, HintRange(64, 8)),
        (64 * PAGE, 2 * PAGE - 1, HintRange(64, 1)),
        (0, PAGES * PAGE, HintRange(0, PAGES)),
        ((PAGES - 1) * PAGE, PAGE, HintRange(PAGES - 1, 1)),
        (64 * PAGE + 1, PAGE, None),
        (64 * PAGE, PAGE - 1, None),
        (64 * PAGE, 0, None),
        ((PAGES - 1) * PAGE, PAGE + 1, None),
        (PAGES * PAGE, PAGE, None),
        ((1 << 64) - PAGE, 2 * PAGE, None),
        (1 << 63, 1 << 63, None),
        (-PAGE, 2 * PAGE, None),
    ],
)
def test_hazard_8_only_whole_pages_inside_a_range_count(
    address: int, length: int, expected: HintRange | None
):
    session = HintSession()
    session.feed_command(session.open().to_bytes(4, "little"))
    result = session.feed_range(address, length, PAGES)
    if expected is None:
        assert isinstance(result, RejectedRange)
    else:
        assert result == expected


def test_hazard_8_duplicate_and_overlapping_hints_come_out_one_by_one_to_be_counted_as_bits(host: Host):
    command_id = host.device.open_hints()
    host.guest.command(command_id)
    host.guest.hint([64 * PAGE, 64 * PAGE, 66 * PAGE], 4 * PAGE)
    bits = np.zeros(PAGES, np.bool_)
    for event in host.hints():
        if isinstance(event, HintRange):
            bits[event.pfn_first : event.pfn_first + event.page_count] = True
    assert np.flatnonzero(bits).tolist() == list(range(64, 70))


def test_hazard_8_a_page_inflated_twice_counts_once(host: Host):
    host.guest.inflate([500, 7, 500, 9, 7])
    chain = host.rings[QUEUE_INFLATE].pop()
    assert chain is not None
    assert host.device.process_inflate(chain, host.read).pfns.tolist() == [7, 9, 500]


def test_hazard_8_page_numbers_outside_ram_are_left_out_and_counted(host: Host):
    host.guest.deflate([PAGES - 1, PAGES, 0xFFFFFFFF])
    chain = host.rings[QUEUE_DEFLATE].pop()
    assert chain is not None
    result = host.device.process_deflate(chain, host.read)
    assert (result.pfns.tolist(), result.rejected) == ([PAGES - 1], 2)
    assert host.device.guest_errors["pfn_range"] == 2


# Hazard 9: untrusted chains.


def test_hazard_9_a_loop_is_cut(host: Host):
    host.guest.lie_descriptor(QUEUE_INFLATE, 0, PAGE, 4, flags=NEXT, following=1)
    host.guest.lie_descriptor(QUEUE_INFLATE, 1, PAGE, 4, flags=NEXT, following=0)
    host.guest.lie_available(QUEUE_INFLATE, 0)
    assert host.bad_chain().kind == "chain_loop"


def test_hazard_9_a_loop_in_an_indirect_table_is_cut(host: Host):
    host.guest.lie_descriptor(QUEUE_INFLATE, 0, 0x200000, 32, flags=INDIRECT)
    host.guest.lie_descriptor_at(0x200000, PAGE, 4, flags=NEXT, following=1)
    host.guest.lie_descriptor_at(0x200010, PAGE, 4, flags=NEXT, following=1)
    host.guest.lie_available(QUEUE_INFLATE, 0)
    assert host.bad_chain().kind == "chain_loop"


def test_hazard_9_a_chain_longer_than_the_queue_is_refused(host: Host):
    host.guest.lie_descriptor(QUEUE_INFLATE, 0, 0x200000, 16 * 40, flags=INDIRECT)
    for index in range(40):
        host.guest.lie_descriptor_at(0x200000 + 16 * index, PAGE, 4, flags=NEXT, following=index + 1)
    host.guest.lie_available(QUEUE_INFLATE, 0)
    assert host.bad_chain().kind == "chain_length"


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
    host: Host, address: int, length: int, kind: str, place: str
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
    assert host.bad_chain().kind == kind


def test_hazard_9_a_chain_of_4_gib_or_more_is_refused():
    # Each buffer is legal; only their sum has no 32-bit length. Memory is small, the claim is what counts.
    host = Host(ring_size=2048)
    whole = PAGES * PAGE
    for index in range(1025):
        host.guest.lie_descriptor(QUEUE_HINT, index, 0, whole, flags=NEXT | WRITE, following=index + 1)
    host.guest.lie_available(QUEUE_HINT, 0)
    assert host.bad_chain(QUEUE_HINT).kind == "chain_bytes"


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
    host: Host, length: int, flags: int, inner_flags: int, kind: str
):
    host.guest.lie_descriptor(QUEUE_INFLATE, 0, 0x200000, length, flags=flags)
    host.guest.lie_descriptor_at(0x200000, 0x200000, 32, flags=inner_flags)
    host.guest.lie_available(QUEUE_INFLATE, 0)
    assert host.bad_chain().kind == kind


def test_hazard_9_an_indirect_table_that_was_not_negotiated_is_refused(host: Host):
    host.rings[QUEUE_INFLATE] = DeviceRing(host.memory, host.guest.layouts[QUEUE_INFLATE], indirect=False)
    host.guest.lie_descriptor(QUEUE_INFLATE, 0, 0x200000, 16, flags=INDIRECT)
    host.guest.lie_available(QUEUE_INFLATE, 0)
    assert host.bad_chain().kind == "indirect_not_negotiated"


def test_hazard_9_a_next_outside_the_table_is_refused(host: Host):
    host.guest.lie_descriptor(QUEUE_INFLATE, 0, PAGE, 4, flags=NEXT, following=16)
    host.guest.lie_available(QUEUE_INFLATE, 0)
    assert host.bad_chain().kind == "next_range"


def test_hazard_9_a_readable_buffer_after_a_writable_one_is_refused(host: Host):
    host.guest.lie_descriptor(QUEUE_INFLATE, 0, PAGE, 4, flags=NEXT | WRITE, following=1)
    host.guest.lie_descriptor(QUEUE_INFLATE, 1, PAGE, 4)
    host.guest.lie_available(QUEUE_INFLATE, 0)
    assert host.bad_chain().kind == "direction"


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
    host: Host, heads: list[int], index: int | None, kind: str
):
    host.guest.lie_available(QUEUE_INFLATE, *heads)
    if index is not None:
        host.guest.lie_available_index(QUEUE_INFLATE, index)
    assert host.bad_chain().kind == kind
    assert host.guest.used_entries(QUEUE_INFLATE) == []
    host.guest.lie_available_index(QUEUE_INFLATE, 0)
    ring = host.rings[QUEUE_INFLATE]
    with pytest.raises(GuestProtocolError):
        ring.pop()
    assert ring.pop_all() == []
    assert ring.broken is not None
    assert ring.broken.kind == kind


def test_hazard_9_more_in_flight_than_the_ring_holds_breaks_the_ring(host: Host):
    host.guest.lie_descriptor(QUEUE_INFLATE, 0, PAGE, 4)
    host.guest.lie_available(QUEUE_INFLATE, 0, 0)
    ring = host.rings[QUEUE_INFLATE]
    assert len(ring.pop_all()) == 1
    assert ring.broken is not None
    assert [error.kind for error in ring.take_errors()] == ["head_in_flight"]


def test_hazard_9_bad_chains_among_good_ones_come_back_and_the_good_ones_are_served(host: Host):
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
def test_hazard_9_a_command_is_exactly_4_bytes(host: Host, data: bytes):
    host.device.open_hints()
    host.guest.command_bytes(data)
    (event,) = host.hints()
    assert isinstance(event, RejectedRange)
    assert host.device.hints.state is HintState.REQUESTED


def test_hazard_9_direction_decides_what_a_buffer_is_not_its_length(host: Host):
    command_id = host.device.open_hints()
    host.guest.hint([64 * PAGE], 4)  # four writable bytes are no command
    host.guest.command_bytes(bytes(1024))  # a kilobyte of readable bytes is no range
    first, second = host.hints()
    assert isinstance(first, RejectedRange)
    assert isinstance(second, RejectedRange)
    host.guest.command(command_id)
    assert host.hints() == [HintStarted(command_id)]


def test_hazard_9_pages_offered_as_an_array_on_the_inflate_queue_are_refused(host: Host):
    host.guest.rings[QUEUE_INFLATE].add([], [(64 * PAGE, PAGE)], None)
    host.guest.rings[QUEUE_INFLATE].publish()
    chain = host.rings[QUEUE_INFLATE].pop()
    assert chain is not None
    assert host.device.process_inflate(chain, host.read).pfns.size == 0
    assert host.device.guest_errors == {"direction": 1}


def test_hazard_9_random_ring_memory_never_raises_anything_else():
    random = np.random.default_rng(9)
    for trial in range(200):
        host = Host(ring_size=16)
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
            host.device.process_inflate(chain, host.read)
            ring.push(chain.head)
        ring.publish()
        assert len(host.guest.used_entries(QUEUE_INFLATE)) == 16


# Hazard 10: the queue is full.


def test_hazard_10_hints_that_do_not_fit_are_dropped_and_the_stop_still_fits():
    host = Host(ring_size=8)
    command_id = host.device.open_hints()
    fitted = host.guest.report(command_id, [PAGE * (64 + index) for index in range(20)], PAGE)
    assert fitted == 8 - 2
    events = host.hints()
    assert events[0] == HintStarted(command_id)
    assert events[1:-1] == [HintRange(64 + index, 1) for index in range(6)]
    assert events[-1] == HintStopped(command_id)
