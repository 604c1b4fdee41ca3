"""The balloon device over real sockets: set-up, inflation and hints, with drivers that are right and that lie."""

import os
import socket
import stat
import struct
import threading

import numpy as np
import pytest

from host.balloon_server import BalloonServer
from host.errors import DeviceNotReady, LoopEnded
from host.guest_memory import HostRam
from tests.live.balloon_peers import (
    BLOCK_PAGES,
    FEATURES,
    PAGE_BYTES,
    PAGES,
    WAIT_S,
    Guest,
    Host,
    blocks,
    fixture_guest,
    fixture_host,
    used_ring_pages,
    wait_for,
)
from virtio.balloon import (
    CMD_ID_DONE,
    CMD_ID_FIRST,
    CMD_ID_STOP,
    F_RING_EVENT_IDX,
    QUEUE_DEFLATE,
    QUEUE_HINT,
    QUEUE_INFLATE,
    mask,
)

pytestmark = pytest.mark.live
host = pytest.fixture(fixture_host)
guest = pytest.fixture(fixture_guest)


# --- set-up ---------------------------------------------------------------------------------------


def test_the_handshake_makes_the_device_ready(host, guest):
    status = host.server.status()
    assert status.ready
    assert status.hints_negotiated
    assert status.features == guest.session.features
    assert guest.config.free_page_hint_cmd_id == CMD_ID_STOP
    assert stat.S_IMODE(host.path.stat().st_mode) == 0o600
    assert status.guest_errors == status.connection_errors == {}


def test_a_device_without_a_driver_is_not_ready(host):
    assert not host.server.status().ready
    for ask in (host.server.open_hints, lambda: host.server.set_num_pages(1)):
        with pytest.raises(DeviceNotReady):
            ask()
    host.server.hints_done()  # of a node that restarted: whoever connects next reads DONE
    batch = host.server.close_hints()
    assert (len(batch.pfn_first), batch.stopped) == (0, False)
    guest = Guest(host.path)
    assert guest.config.free_page_hint_cmd_id == CMD_ID_DONE
    guest.close()


def test_two_devices_cannot_share_a_socket(host):
    with pytest.raises(OSError, match="is another device there"):
        BalloonServer(host.path, sink=host.batches.put, log=host.log).start()


def test_a_socket_left_behind_is_replaced(tmp_path):
    path = tmp_path / "vhost.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    host = Host(path)
    guest = Guest(path)
    guest.close()
    host.server.stop()
    host.server.stop()
    with pytest.raises(LoopEnded):
        host.server.status()


# --- inflate and deflate --------------------------------------------------------------------------


def test_the_balloon_target_reaches_the_guest_and_its_size_comes_back(host, guest):
    host.server.set_num_pages(500)
    assert guest.hear().num_pages == 500
    guest.exchange(guest.session.write_config(4, struct.pack("<I", 300)))
    assert host.server.status().actual == 300
    with pytest.raises(ValueError, match="in a guest of"):
        host.server.set_num_pages(PAGES + 1)


def test_inflated_pages_are_punched_and_logged(host, guest):
    first = 40 * BLOCK_PAGES
    guest.memory[first * PAGE_BYTES : (first + 600) * PAGE_BYTES] = b"\xaa" * (600 * PAGE_BYTES)
    host.log.take()
    pfns = [first + 1, *range(first + 100, first + 200), first + 1]
    guest.driver.inflate(pfns)
    guest.kick(QUEUE_INFLATE)
    guest.wait_used(QUEUE_INFLATE, 1)
    ram = HostRam(os.dup(guest.fd), PAGES * PAGE_BYTES)
    holes = np.flatnonzero(~ram.populated()[first : first + 600]) + first
    ram.close()
    assert holes.tolist() == sorted(set(pfns))
    wait_for(lambda: host.server.status().inflated_pages == 101)
    logged = set(host.log.take().tolist())
    assert set(pfns) <= logged
    assert logged - set(pfns) <= used_ring_pages(guest, QUEUE_INFLATE)
    assert logged & used_ring_pages(guest, QUEUE_INFLATE)
    guest.driver.deflate(pfns[:50])
    guest.kick(QUEUE_DEFLATE)
    guest.wait_used(QUEUE_DEFLATE, 1)
    assert host.server.status().deflated_pages == 50


def test_pages_outside_ram_are_counted_and_never_touched(host, guest):
    guest.driver.inflate([PAGES, 2**32 - 1, 50 * BLOCK_PAGES])
    guest.kick(QUEUE_INFLATE)
    guest.wait_used(QUEUE_INFLATE, 1)
    status = host.server.status()
    assert status.guest_errors == {"pfn_range": 2}
    assert status.inflated_pages == 1
    assert os.fstat(guest.fd).st_size == PAGES * PAGE_BYTES


# --- hints ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("event_idx", [False, True])
def test_a_whole_report(host, event_idx):
    guest = Guest(host.path, features=FEATURES | mask(F_RING_EVENT_IDX) if event_idx else FEATURES)
    command_id = host.server.open_hints()
    assert command_id == CMD_ID_FIRST
    assert guest.hear().free_page_hint_cmd_id == command_id
    assert guest.driver.report(command_id, blocks(10, 50), BLOCK_PAGES * PAGE_BYTES) == 50
    guest.kick(QUEUE_HINT)
    batches = host.batches_until_stop()
    assert batches[0].started
    assert {batch.command_id for batch in batches} == {command_id}
    assert np.concatenate([batch.pfn_first for batch in batches]).tolist() == [
        block * BLOCK_PAGES for block in range(10, 60)
    ]
    assert all((batch.page_count == BLOCK_PAGES).all() for batch in batches)
    assert batches[0].pfn_first.dtype == batches[0].page_count.dtype == np.uint64
    guest.wait_used(QUEUE_HINT, 52)
    last = host.server.close_hints()
    assert (len(last.pfn_first), last.stopped) == (0, False)
    assert guest.hear().free_page_hint_cmd_id == CMD_ID_STOP
    host.server.hints_done()
    assert guest.hear().free_page_hint_cmd_id == CMD_ID_DONE
    assert host.server.open_hints() == command_id + 1
    guest.close()


def test_hazard_2_closing_drains_the_queue_first(host, guest):
    """What the guest had put into the ring before the close is in the close's batch, kicked or not."""
    command_id = host.server.open_hints()
    guest.driver.report(command_id, blocks(10, 20), BLOCK_PAGES * PAGE_BYTES)
    last = host.server.close_hints()
    assert last.command_id == command_id
    assert (last.started, last.stopped, len(last.pfn_first)) == (True, True, 20)
    assert host.batches.empty()


def test_hazard_3_what_comes_after_the_close_is_stale(host, guest):
    command_id = host.server.open_hints()
    guest.driver.command(command_id)
    guest.kick(QUEUE_HINT)
    assert host.batches.get(timeout=WAIT_S).started
    assert not host.server.close_hints().stopped
    guest.driver.hint(blocks(10, 3), BLOCK_PAGES * PAGE_BYTES)
    guest.kick(QUEUE_HINT)
    late = host.batches.get(timeout=WAIT_S)
    assert (len(late.pfn_first), late.stale_pages) == (0, 3 * BLOCK_PAGES)
    guest.driver.command(CMD_ID_STOP)
    new_id = host.server.open_hints()
    assert new_id != command_id
    guest.driver.hint(blocks(20, 1), BLOCK_PAGES * PAGE_BYTES)
    guest.driver.report(new_id, blocks(30, 2), BLOCK_PAGES * PAGE_BYTES)
    last = host.server.close_hints()
    assert last.stale_pages == BLOCK_PAGES
    assert last.pfn_first.tolist() == [30 * BLOCK_PAGES, 31 * BLOCK_PAGES]


def test_hazard_4_a_guest_that_floods_does_not_hold_the_device_up(host, guest):
    command_id = host.server.open_hints()
    done = threading.Event()

    def flood():
        guest.driver.command(command_id)
        while not done.is_set():
            guest.driver.hint(blocks(10, 40), BLOCK_PAGES * PAGE_BYTES)
            guest.kick(QUEUE_HINT)
            guest.driver.used(QUEUE_HINT)

    flooding = threading.Thread(target=flood)
    flooding.start()
    try:
        assert host.batches.get(timeout=WAIT_S).command_id == command_id
        for _ in range(50):
            assert host.server.status().ready
        host.server.close_hints()
        host.server.hints_done()
    finally:
        done.set()
        flooding.join()


def test_hazard_8_partial_and_overlapping_ranges(host, guest):
    command_id = host.server.open_hints()
    guest.driver.command(command_id)
    base = 50 * BLOCK_PAGES * PAGE_BYTES
    for address, length in ((base + 1, 3 * PAGE_BYTES), (base, 2 * PAGE_BYTES), (base + 5, 100)):
        guest.driver.hint([address], length)
    last = host.server.close_hints()
    assert list(zip(last.pfn_first.tolist(), last.page_count.tolist(), strict=True)) == [
        (base // PAGE_BYTES + 1, 2),
        (base // PAGE_BYTES, 2),
    ]
    assert last.rejected_ranges == 1


@pytest.mark.parametrize(
    ("lie", "kind", "survives"),
    [
        (lambda d: d.lie_descriptor(QUEUE_HINT, 0, 0, 8, flags=1, following=0), "chain_loop", True),
        (
            lambda d: d.lie_descriptor(QUEUE_HINT, 0, PAGES * PAGE_BYTES - 4, 8, flags=2),
            "address_range",
            True,
        ),
        (lambda d: d.lie_descriptor(QUEUE_HINT, 0, 2**64 - 4096, 8192, flags=2), "address_range", True),
        (lambda d: d.lie_descriptor(QUEUE_HINT, 0, 4096, 0, flags=2), "length_zero", True),
        (lambda d: d.lie_descriptor(QUEUE_HINT, 0, 4096, 15, flags=4), "indirect_size", True),
        (lambda d: d.lie_available_index(QUEUE_HINT, 1000), "avail_index", False),
    ],
)
def test_hazard_9_lies_are_counted_and_cost_the_chain_or_the_ring(host, guest, lie, kind, survives):
    lie(guest.driver)
    if survives:
        guest.driver.lie_available(QUEUE_HINT, 0)
    guest.kick(QUEUE_HINT)
    wait_for(lambda: host.server.status().guest_errors == {kind: 1})
    assert host.server.status().ready
    assert bool(guest.driver.used_entries(QUEUE_HINT)) is survives
    guest.kick(QUEUE_HINT)  # a broken ring is not looked at again
    guest.driver.inflate([50 * BLOCK_PAGES])
    guest.kick(QUEUE_INFLATE)
    guest.wait_used(QUEUE_INFLATE, 1)  # the other rings are as they were
    assert host.server.status().guest_errors == {kind: 1}
