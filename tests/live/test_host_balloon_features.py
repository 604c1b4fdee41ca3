"""F_SG, statistics, reporting, poison and both queue numberings, through the real device."""

import os
import threading

import numpy as np
import pytest

from host.errors import DeviceNotReady
from host.guest_memory import HostRam
from tests.live.balloon_peers import (
    BLOCK_PAGES,
    FEATURES,
    PAGE_BYTES,
    PAGES,
    WAIT_S,
    Guest,
    blocks,
    fixture_host,
    used_ring_pages,
    wait_for,
)
from virtio.balloon import (
    CMD_ID_FIRST,
    CMD_ID_STOP,
    CONFIG_OFFSET_POISON,
    F_FREE_PAGE_HINT,
    F_HINT_WAIT_ON_ACK,
    F_PAGE_POISON,
    F_REPORTING,
    F_RING_INDIRECT_DESC,
    F_SG,
    F_STATS_VQ,
    QUEUE_DEFLATE,
    QUEUE_HINT,
    QUEUE_INFLATE,
    QUEUE_REPORTING,
    QUEUE_STATS,
    mask,
)
from virtio.balloon_stats import STATS_NAMES, encode_stats

pytestmark = pytest.mark.live
host = pytest.fixture(fixture_host)
SG = mask(F_SG)
ALL_QUEUES = mask(F_STATS_VQ, F_FREE_PAGE_HINT, F_REPORTING)
FIRST = 40 * BLOCK_PAGES
BLOCKS_PER_PAGE = PAGE_BYTES // 512


@pytest.fixture
def guests(host):
    """Makes guests of that host, and ends them."""
    made = []

    def make(features=FEATURES, **options):
        made.append(Guest(host.path, features=features, **options))
        return made[-1]

    yield make
    for guest in made:
        guest.close()


def fill(guest, first, count):
    guest.memory[first * PAGE_BYTES : (first + count) * PAGE_BYTES] = b"\xaa" * (count * PAGE_BYTES)


def holes(guest, first, count):
    ram = HostRam(os.dup(guest.fd), PAGES * PAGE_BYTES)
    try:
        return (np.flatnonzero(~ram.populated()[first : first + count]) + first).tolist()
    finally:
        ram.close()


def page_runs(*runs):
    return [(first * PAGE_BYTES, count * PAGE_BYTES) for first, count in runs]


def write_poison(guest, value):
    guest.exchange(guest.session.write_config(CONFIG_OFFSET_POISON, value.to_bytes(4, "little")))


# --- F_SG -----------------------------------------------------------------------------------------


def test_with_f_sg_the_buffers_are_the_pages_and_their_storage_goes(host, guests):
    guest = guests(FEATURES | SG)
    fill(guest, FIRST, 600)
    host.log.take()
    before = guest.blocks()
    guest.driver.give(QUEUE_INFLATE, page_runs((FIRST + 100, 300), (FIRST + 50, 60), (FIRST + 550, 1)))
    guest.kick(QUEUE_INFLATE)
    assert {used.length for used in guest.wait_used(QUEUE_INFLATE, 3)} == {0}
    gone = [*range(FIRST + 50, FIRST + 400), FIRST + 550]
    assert holes(guest, FIRST, 600) == gone
    assert before - guest.blocks() >= len(gone) * BLOCKS_PER_PAGE - 8 * BLOCKS_PER_PAGE  # ring pages came
    status = host.server.status()
    assert (status.inflated_pages, status.released_pages) == (351, 351)
    assert set(gone) <= set(host.log.take().tolist())
    guest.driver.give(QUEUE_DEFLATE, page_runs((FIRST + 100, 10)))
    guest.kick(QUEUE_DEFLATE)
    guest.wait_used(QUEUE_DEFLATE, 1)
    assert host.server.status().deflated_pages == 10
    assert host.errors == {}


def test_with_f_sg_an_array_of_page_numbers_is_still_understood(host, guests):
    guest = guests(FEATURES | SG)
    fill(guest, FIRST, 20)
    guest.driver.give(QUEUE_INFLATE, page_runs((FIRST, 5)))
    guest.driver.inflate([FIRST + 4, FIRST + 9])
    guest.kick(QUEUE_INFLATE)
    guest.wait_used(QUEUE_INFLATE, 2)
    assert holes(guest, FIRST, 20) == [*range(FIRST, FIRST + 5), FIRST + 9]
    assert host.server.status().inflated_pages == 6
    assert host.errors == {}


def test_hazard_8_f_sg_takes_whole_pages_only_and_says_so(host, guests):
    guest = guests(FEATURES | SG)
    fill(guest, FIRST, 20)
    base = FIRST * PAGE_BYTES
    guest.driver.give(
        QUEUE_INFLATE, [(base + 1, 3 * PAGE_BYTES), (base + 8 * PAGE_BYTES + 5, 100), (base, 2 * PAGE_BYTES)]
    )
    guest.kick(QUEUE_INFLATE)
    guest.wait_used(QUEUE_INFLATE, 3)
    assert holes(guest, FIRST, 20) == [FIRST, FIRST + 1, FIRST + 2]
    assert host.errors == {"partial_page": 2}


def test_without_f_sg_buffers_of_pages_are_refused_and_nothing_is_punched(host, guests):
    guest = guests(FEATURES)
    fill(guest, FIRST, 8)
    guest.driver.give(QUEUE_INFLATE, page_runs((FIRST, 8)))
    guest.kick(QUEUE_INFLATE)
    guest.wait_used(QUEUE_INFLATE, 1)
    assert holes(guest, FIRST, 8) == []
    assert host.errors == {"direction": 1}


def test_a_whole_ring_of_adjacent_runs_is_punched_as_one(guests, monkeypatch):
    calls = []
    monkeypatch.setattr("host.guest_region.punch_hole", lambda *call: calls.append(call[1:]))
    guest = guests(FEATURES | SG)
    guest.driver.give(QUEUE_INFLATE, page_runs(*((FIRST + 4 * run, 4) for run in reversed(range(256)))))
    guest.kick(QUEUE_INFLATE)
    guest.wait_used(QUEUE_INFLATE, 256)
    assert calls == [(FIRST * PAGE_BYTES, 1024 * PAGE_BYTES)]


# --- free page reporting --------------------------------------------------------------------------


def test_reported_pages_leave_the_host_and_are_logged(host, guests):
    guest = guests(ALL_QUEUES)
    fill(guest, FIRST, 2 * BLOCK_PAGES)
    host.log.take()
    before = guest.blocks()
    guest.driver.give(QUEUE_REPORTING, page_runs((FIRST, 512), (FIRST + 1024, 512)))
    guest.kick(QUEUE_REPORTING)
    guest.wait_used(QUEUE_REPORTING, 2)
    assert before - guest.blocks() >= (1024 - 8) * BLOCKS_PER_PAGE
    assert holes(guest, FIRST, 2 * BLOCK_PAGES) == [
        *range(FIRST, FIRST + 512),
        *range(FIRST + 1024, FIRST + 1536),
    ]
    status = host.server.status()
    assert (status.reported_pages, status.released_pages, status.inflated_pages) == (1024, 1024, 0)
    logged = set(host.log.take().tolist())
    assert logged >= set(range(FIRST, FIRST + 512))
    assert logged & used_ring_pages(guest, QUEUE_REPORTING)


@pytest.mark.parametrize(("poison", "punched"), [(0, True), (0xAAAAAAAA, False)])
def test_reported_pages_of_a_guest_that_poisons_keep_their_value(host, guests, poison, punched):
    guest = guests(ALL_QUEUES | mask(F_PAGE_POISON))
    write_poison(guest, poison)
    fill(guest, FIRST, 8)
    guest.driver.give(QUEUE_REPORTING, page_runs((FIRST, 8)))
    guest.kick(QUEUE_REPORTING)
    guest.wait_used(QUEUE_REPORTING, 1)
    assert holes(guest, FIRST, 8) == (list(range(FIRST, FIRST + 8)) if punched else [])
    status = host.server.status()
    assert (status.reported_pages, status.released_pages) == (8, 8 if punched else 0)
    assert host.errors == {}


def test_a_report_of_readable_buffers_is_refused(host, guests):
    guest = guests(ALL_QUEUES)
    guest.driver.rings[QUEUE_REPORTING].add([(FIRST * PAGE_BYTES, PAGE_BYTES)], [], None)
    guest.driver.rings[QUEUE_REPORTING].publish()
    guest.kick(QUEUE_REPORTING)
    guest.wait_used(QUEUE_REPORTING, 1)
    assert host.errors == {"direction": 1}
    assert host.server.status().reported_pages == 0


# --- poison ---------------------------------------------------------------------------------------


def test_hazard_7_hints_are_refused_with_the_reason_for_a_guest_that_poisons(host, guests):
    guest = guests(FEATURES | mask(F_PAGE_POISON))
    assert host.server.status().hints_refusal == ""
    write_poison(guest, 0xAAAAAAAA)
    status = host.server.status()
    assert status.poison_value == 0xAAAAAAAA
    assert "0xaaaaaaaa" in status.hints_refusal
    with pytest.raises(DeviceNotReady, match="poison value 0xaaaaaaaa"):
        host.server.open_hints()
    assert guest.read_config().free_page_hint_cmd_id == CMD_ID_STOP


def test_a_poison_value_stands_once_free_pages_came(host, guests):
    guest = guests(FEATURES | mask(F_PAGE_POISON))
    write_poison(guest, 0)
    host.server.open_hints()
    guest.driver.report(CMD_ID_FIRST, blocks(10, 1), PAGE_BYTES)
    guest.kick(QUEUE_HINT)
    host.batches_until_stop()
    write_poison(guest, 0xAAAAAAAA)
    assert host.errors == {"poison_changed": 1}
    assert guest.read_config().poison_val == 0
    write_poison(guest, 0)
    assert host.errors == {"poison_changed": 1}


# --- statistics -----------------------------------------------------------------------------------


def answer_stats(guest, data):
    """A guest that answers the next request."""
    guest.wait_used(QUEUE_STATS, 1)
    guest.driver.stats(data)
    guest.kick(QUEUE_STATS)


def test_statistics_are_asked_for_and_told_whatever_their_order_and_tags(host, guests):
    guest = guests(ALL_QUEUES)
    with pytest.raises(DeviceNotReady, match="within"):
        host.server.guest_stats(timeout=0)  # no buffer yet: nothing to ask with
    guest.driver.stats(encode_stats([(4, 1 << 40), (0, 7)]))
    guest.kick(QUEUE_STATS)
    wait_for(lambda: host.server.status().stats)
    assert host.server.status().stats == {"memfree": 1 << 40, "swap_in": 7}
    entries = [(tag, 1000 + tag) for tag in range(16)]
    entries[3:3] = [(99, 1), (0xFFFF, 2)]
    answering = threading.Thread(target=answer_stats, args=(guest, encode_stats(reversed(entries))))
    answering.start()
    try:
        stats = host.server.guest_stats(WAIT_S)
    finally:
        answering.join()
    assert stats.values == {name: 1000 + tag for tag, name in enumerate(STATS_NAMES)}
    assert stats.unknown_tags == 2
    status = host.server.status()
    assert (status.stats, status.stats_unknown_tags) == (stats.values, 2)
    assert status.stats_at_ns > 0
    assert host.errors == {}


def test_the_device_holds_one_statistics_buffer_and_gives_it_back_when_the_ring_stops(host, guests):
    guest = guests(ALL_QUEUES)
    guest.driver.stats(encode_stats([(4, 5)]))
    guest.kick(QUEUE_STATS)
    wait_for(lambda: host.server.status().stats)
    assert guest.driver.used(QUEUE_STATS) == []
    bases = guest.stop()
    assert bases[QUEUE_STATS] == 0, "whoever serves the ring next finds the buffer again"
    guest.start([bases.get(queue, 0) for queue in range(5)])
    answering = threading.Thread(target=answer_stats, args=(guest, encode_stats([(4, 6)])))
    answering.start()
    assert host.server.guest_stats(WAIT_S).values == {"memfree": 6}
    answering.join()


def test_a_guest_that_stops_its_rings_leaves_nobody_waiting_for_statistics(host, guests):
    guest = guests(ALL_QUEUES)
    failures = []

    def ask():
        try:
            host.server.guest_stats(WAIT_S)
        except DeviceNotReady as error:
            failures.append(str(error))

    asking = threading.Thread(target=ask)
    asking.start()
    wait_for(lambda: host.server._loop.call(lambda: len(host.server._queues.stats._waiting)))
    guest.stop()
    asking.join(WAIT_S)
    assert failures == ["the guest's statistics queue was stopped"]
    with pytest.raises(DeviceNotReady, match="no guest driver"):
        host.server.guest_stats(0)


@pytest.mark.parametrize(
    ("lie", "error"),
    [
        (lambda d: d.stats(encode_stats([(4, 5)]) + b"\1"), "stats_size"),
        (lambda d: [d.stats(encode_stats([(4, 5)])) for _ in range(2)], "stats_buffers"),
        (
            lambda d: (d.give(QUEUE_STATS, [(FIRST * PAGE_BYTES, 40)]), d.stats(encode_stats([(4, 5)]))),
            "direction",
        ),
        (
            lambda d: (
                d.rings[QUEUE_STATS].add([(FIRST * PAGE_BYTES, 1 << 20)], [], None),
                d.rings[QUEUE_STATS].publish(),
                d.stats(encode_stats([(4, 5)])),
            ),
            "stats_size",
        ),
    ],
)
def test_odd_statistics_are_counted_and_the_next_ones_are_read(host, guests, lie, error):
    guest = guests(ALL_QUEUES)
    lie(guest.driver)
    guest.kick(QUEUE_STATS)
    wait_for(lambda: host.server.status().stats.get("memfree") == 5)
    assert host.errors[error] == 1
    assert host.errors.keys() <= {error, "stats_buffers"}
    guest.stop()  # with a buffer held, whatever came after it


def test_a_bad_chain_after_the_held_statistics_costs_the_ring_nothing(host, guests):
    guest = guests(ALL_QUEUES)
    guest.driver.stats(encode_stats([(4, 5)]))
    guest.driver.give(QUEUE_STATS, [(FIRST * PAGE_BYTES, 40)])
    guest.kick(QUEUE_STATS)
    guest.wait_used(QUEUE_STATS, 1)
    assert guest.stop()[QUEUE_STATS] == 2
    assert len(guest.driver.used(QUEUE_STATS)) == 1, "the held one, given back as it cannot be put back"
    assert host.server.status().connection_errors == {}


# --- hints that wait for their acknowledgement ----------------------------------------------------


def test_with_wait_on_ack_a_hint_is_handed_on_before_its_buffer_comes_back(host, guests):
    guest = guests(FEATURES | mask(F_HINT_WAIT_ON_ACK))
    handed_on, come_back = [], []
    put = host.batches.put

    def sink(batch):
        come_back.append(len(guest.driver.used_entries(QUEUE_HINT)))
        handed_on.append(len(batch.pfn_first))
        put(batch)

    host.server._queues._sink = sink
    guest.driver.report(host.server.open_hints(), blocks(10, 20), BLOCK_PAGES * PAGE_BYTES)
    guest.kick(QUEUE_HINT)
    host.batches_until_stop()
    guest.wait_used(QUEUE_HINT, 22)
    assert sum(handed_on) == 20
    assert come_back[0] == 0


# --- numberings -----------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "features",
    [
        mask(F_FREE_PAGE_HINT),
        mask(F_REPORTING),
        mask(F_STATS_VQ),
        mask(F_FREE_PAGE_HINT, F_REPORTING),
        mask(F_STATS_VQ, F_REPORTING),
        mask(F_STATS_VQ, F_FREE_PAGE_HINT),
        ALL_QUEUES,
        0,
    ],
)
def test_queues_are_found_whichever_numbering_the_driver_has(host, guests, features, packed):
    guest = guests(features | mask(F_RING_INDIRECT_DESC), packed=packed)
    assert host.server.status().ready
    differs = guest.queues != list(range(len(guest.queues)))
    expected = ("packed" if packed else "fixed") if differs else "same"
    assert host.server.status().queue_numbering == expected
    if QUEUE_REPORTING in guest.queues:
        guest.driver.give(QUEUE_REPORTING, page_runs((FIRST, 8)))
        guest.kick(QUEUE_REPORTING)
        guest.wait_used(QUEUE_REPORTING, 1)
        assert host.server.status().reported_pages == 8
    if QUEUE_STATS in guest.queues:
        guest.driver.stats(encode_stats([(4, 5)]))
        guest.kick(QUEUE_STATS)
        wait_for(lambda: host.server.status().stats == {"memfree": 5})
    if QUEUE_HINT in guest.queues:
        guest.driver.report(host.server.open_hints(), blocks(10, 3), BLOCK_PAGES * PAGE_BYTES)
        guest.kick(QUEUE_HINT)
        host.batches_until_stop()
        guest.wait_used(QUEUE_HINT, 5)
    assert host.errors == {}


def test_a_device_is_ready_only_when_the_hint_queue_runs(host, guests):
    guest = guests(FEATURES)
    ring = guest.ring_of.pop(QUEUE_HINT)
    assert host.server.status().ready
    guest.exchange(guest.session.stop([ring]))
    assert not host.server.status().ready
    with pytest.raises(DeviceNotReady):
        host.server.open_hints()
