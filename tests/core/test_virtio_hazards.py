"""Hazards of free page hinting, each one by its name, driven through real rings (hazard 9 has its own file)."""

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
from virtio.balloon_device import FEATURES_SUPPORTED, BalloonDevice
from virtio.errors import LocalVirtioError
from virtio.hint_session import (
    HintRange,
    HintSession,
    HintStarted,
    HintState,
    HintStopped,
    RejectedRange,
    StaleCommand,
    StaleRange,
)
from virtio.testing import MockHost

PAGES = 1024
PAGE = 4096
NEXT = 1


@pytest.fixture
def host() -> MockHost:
    return MockHost(PAGES)


# Hazard 3: stale, replayed or wrapped command ids; a late STOP.


def test_hazard_3_ranges_of_an_older_report_are_stale(host: MockHost):
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


def test_hazard_3_a_replayed_id_opens_nothing(host: MockHost):
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


def test_hazard_3_an_id_sent_twice_is_refused_and_the_report_goes_on(host: MockHost):
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
    with pytest.raises(LocalVirtioError):
        session.open()
    assert session.feed_command(CMD_ID_STOP.to_bytes(4, "little")) == StaleCommand(CMD_ID_STOP)
    assert session.open() == CMD_ID_LAST


@pytest.mark.parametrize("command_id", [-1, 0, 1, 1 << 32])
def test_hazard_3_stop_and_done_are_no_ids(command_id: int):
    with pytest.raises(LocalVirtioError):
        HintSession(command_id)


def test_hazard_3_a_late_stop_does_not_end_the_next_report(host: MockHost):
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
    with pytest.raises(LocalVirtioError):
        session.open()


def test_hazard_3_another_id_ends_the_report_that_runs(host: MockHost):
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


def test_hazard_4_a_report_that_never_ends_is_closed_and_what_still_comes_is_stale(host: MockHost):
    command_id = host.device.open_hints()
    host.guest.command(command_id)
    host.guest.hint([64 * PAGE], PAGE)
    assert host.hints() == [HintStarted(command_id), HintRange(64, 1)]
    host.device.close_hints()
    assert host.device.hints.config_command_id == CMD_ID_STOP
    host.guest.hint([65 * PAGE], PAGE)
    assert host.hints() == [StaleRange(1)]


def test_hazard_4_a_flood_is_taken_in_bounded_portions():
    host = MockHost(PAGES, ring_size=8)
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
    host = MockHost(PAGES, ring_size=1024)
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
    host = MockHost(PAGES, ring_size=8)
    ring = host.rings[QUEUE_INFLATE]
    for _ in range(1000):
        host.guest.lie_available(QUEUE_INFLATE, 0)  # a descriptor of length 0
        assert ring.pop_all() == []
    assert ring.errors_count == 1000
    assert len(ring.take_errors()) == 256


def test_hazard_4_a_guest_that_dies_in_the_middle_leaves_a_session_that_can_be_done(host: MockHost):
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
def test_hazard_5_done_reaches_the_guest_from_every_state(host: MockHost, steps: list[str]):
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
    with pytest.raises(LocalVirtioError):
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


def test_hazard_8_duplicate_and_overlapping_hints_come_out_one_by_one_to_be_counted_as_bits(host: MockHost):
    command_id = host.device.open_hints()
    host.guest.command(command_id)
    host.guest.hint([64 * PAGE, 64 * PAGE, 66 * PAGE], 4 * PAGE)
    bits = np.zeros(PAGES, np.bool_)
    for event in host.hints():
        if isinstance(event, HintRange):
            bits[event.pfn_first : event.pfn_first + event.page_count] = True
    assert np.flatnonzero(bits).tolist() == list(range(64, 70))


def test_hazard_8_a_page_inflated_twice_counts_once(host: MockHost):
    host.guest.inflate([500, 7, 500, 9, 7])
    chain = host.rings[QUEUE_INFLATE].pop()
    assert chain is not None
    assert host.device.process_inflate([chain], host.read).pfns.tolist() == [7, 9, 500]


def test_hazard_8_page_numbers_outside_ram_are_left_out_and_counted(host: MockHost):
    host.guest.deflate([PAGES - 1, PAGES, 0xFFFFFFFF])
    chain = host.rings[QUEUE_DEFLATE].pop()
    assert chain is not None
    result = host.device.process_deflate([chain], host.read)
    assert (result.pfns.tolist(), result.rejected) == ([PAGES - 1], 2)
    assert host.device.guest_errors["pfn_range"] == 2


# Hazard 10: the queue is full.


def test_hazard_10_hints_that_do_not_fit_are_dropped_and_the_stop_still_fits():
    host = MockHost(PAGES, ring_size=8)
    command_id = host.device.open_hints()
    fitted = host.guest.report(command_id, [PAGE * (64 + index) for index in range(20)], PAGE)
    assert fitted == 8 - 2
    events = host.hints()
    assert events[0] == HintStarted(command_id)
    assert events[1:-1] == [HintRange(64 + index, 1) for index in range(6)]
    assert events[-1] == HintStopped(command_id)
