"""Fast ballooning's queue against the device's side of the ring: every page crosses once, in few entries.

The named tests are the bugs that were seen in the series (FACTS 2.4).
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guest_agent.arrays import expand_runs
from guest_agent.errors import RestoreError
from guest_agent.page_runs import Runs, pages_in, runs_of_pages
from guest_agent.sg_queue import RUN_PAGES_MAX, SgQueue, split_runs
from guest_agent.xbitmap import XBitmap, XBitmapTryAgain
from virtio.errors import DeviceProtocolError
from virtio.split_ring import DeviceRing, DriverRing, layout_at

MEMORY_PAGES = 1 << 12
RING_SIZE = 8
PAGE_BYTES = 4096


class Queue:
    """A queue over a small ring, with the device's side in the test's hand."""

    def __init__(self, pages: int = MEMORY_PAGES, ring_size: int = RING_SIZE) -> None:
        self.memory = memoryview(bytearray(MEMORY_PAGES * PAGE_BYTES))
        layout = layout_at(PAGE_BYTES, ring_size)
        self.kicks = 0
        self.ring = DriverRing(self.memory, layout)
        self.device = DeviceRing(self.memory, layout)
        self.queue = SgQueue(self.ring, pages, self.kick)

    def kick(self) -> None:
        self.kicks += 1

    def serve(self) -> list[tuple[int, int]]:
        """What waits in the ring as (first page, pages), given back."""
        chains = self.device.pop_all()
        runs = []
        for chain in chains:
            assert not chain.readable
            ((address, length),) = chain.writable
            assert address % PAGE_BYTES == length % PAGE_BYTES == 0
            runs.append((address // PAGE_BYTES, length // PAGE_BYTES))
            self.device.push(chain.head)
        self.device.publish()
        return runs


def pages(*pfns: int) -> Runs:
    return runs_of_pages(np.array(pfns, dtype=np.uint64))


def listed(runs: Runs) -> list[int]:
    found: list[int] = expand_runs(*runs).tolist()
    return found


@given(st.sets(st.integers(0, MEMORY_PAGES - 1)), st.integers(1, 400))
@settings(max_examples=60, deadline=None)
def test_every_page_crosses_once_and_comes_back_whatever_the_batches(chosen: set[int], batch: int) -> None:
    queue = Queue()
    queue.queue.record(pages(*chosen))
    told: list[int] = []
    back: list[int] = []
    while queue.queue.recorded_pages:
        kicks = queue.kicks
        sent = listed(queue.queue.send(batch))
        assert 0 < len(sent) <= batch
        assert queue.kicks == kicks + 1, "a batch is sent when it is added"
        assert queue.queue.pages_in_flight == len(sent)
        runs = queue.serve()
        assert len(runs) <= RING_SIZE
        served = [pfn for first, count in runs for pfn in range(first, first + count)]
        assert served == sent
        told += served
        back += listed(queue.queue.take_used())
    assert told == back == sorted(chosen), "lowest first, each once"
    assert queue.queue.pages_in_flight == 0
    assert listed(queue.queue.take_back()) == []


def test_neighbouring_pages_are_one_entry() -> None:
    queue = Queue()
    queue.queue.record(pages(*range(100, 1100)))
    queue.queue.record(pages(*range(1100, 3000)))
    queue.queue.send(5000)
    assert queue.serve() == [(100, 2900)]


def test_a_full_queue_waits_and_the_rest_follows() -> None:
    queue = Queue()
    scattered = list(range(0, 40, 2))
    queue.queue.record(pages(*scattered))
    assert listed(queue.queue.send(100)) == scattered[:RING_SIZE]
    assert listed(queue.queue.send(100)) == []
    assert queue.queue.recorded_pages == 20 - RING_SIZE
    assert len(queue.serve()) == RING_SIZE
    queue.queue.take_used()
    assert listed(queue.queue.send(100)) == scattered[RING_SIZE : 2 * RING_SIZE]


def test_historic_bug_a_batch_of_a_single_page_is_sent() -> None:
    """The last kick was made only when more than one entry had been added: the page waited for ever."""
    queue = Queue()
    queue.queue.record(pages(77))
    assert listed(queue.queue.send(1)) == [77]
    assert queue.kicks == 1
    assert queue.serve() == [(77, 1)]
    assert listed(queue.queue.take_used()) == [77]
    queue.queue.record(pages(*range(10, 10 + 2 * (RING_SIZE + 1), 2)))  # a full ring, and one page more
    queue.queue.send(100)
    queue.serve()
    queue.queue.take_used()
    assert queue.queue.recorded_pages == 1
    assert listed(queue.queue.send(100)) == [26]
    assert queue.kicks == 3
    assert queue.serve() == [(26, 1)]


@pytest.mark.parametrize("extra", [0, 1, 5])
def test_historic_bug_a_run_of_4_gib_does_not_become_an_entry_of_length_0(extra: int) -> None:
    run_pages = (1 << 20) + extra  # 4 GiB and more: 32 bits of length would wrap
    starts, counts = split_runs(np.array([7, 1 << 30]), np.array([7 + run_pages, (1 << 30) + 3]))
    assert counts.tolist() == [RUN_PAGES_MAX, run_pages - RUN_PAGES_MAX, 3]
    assert starts.tolist() == [7, 7 + RUN_PAGES_MAX, 1 << 30]
    assert ((counts * PAGE_BYTES) < 1 << 32).all()
    assert RUN_PAGES_MAX * PAGE_BYTES == 0xFFFF_F000, "the largest page-aligned length of 32 bits"
    queue = Queue(pages=4 << 20)
    queue.queue.record((np.array([7]), np.array([7 + run_pages])))
    assert pages_in(queue.queue.send(1 << 30)) == run_pages
    addresses, lengths = queue.ring.buffers_in_flight()
    assert sorted(addresses.tolist()) == [7 * PAGE_BYTES, (7 + RUN_PAGES_MAX) * PAGE_BYTES]
    assert int(lengths.astype(np.int64).sum()) == run_pages * PAGE_BYTES


def test_historic_bug_pages_whose_recording_fails_are_still_the_callers() -> None:
    """A page that could not be recorded was in nobody's hands: not sent, not freed."""
    queue = Queue()
    queue.queue._bitmap = XBitmap(leaves_max=1)
    queue.queue.record(pages(5))
    with pytest.raises(XBitmapTryAgain):
        queue.queue.record(pages(6, 3000))
    assert queue.queue.recorded_pages == 1
    assert listed(queue.queue.take_back()) == [5]


def test_pages_not_sent_are_taken_back_and_only_those() -> None:
    queue = Queue()
    queue.queue.record(pages(*range(10, 30)))
    assert listed(queue.queue.send(8)) == list(range(10, 18))
    assert listed(queue.queue.take_back()) == list(range(18, 30))
    assert queue.queue.recorded_pages == 0
    assert queue.serve() == [(10, 8)]


def test_single_entries_need_no_bitmap_and_are_bounded_by_the_ring() -> None:
    """Out of memory nothing may be allocated: neighbours travel apart, and the bitmap is not touched."""
    queue = Queue()
    queue.queue._bitmap = XBitmap(leaves_max=0)
    assert queue.queue.send_singly(np.arange(50, 70, dtype=np.uint64)) == RING_SIZE
    assert queue.serve() == [(50 + i, 1) for i in range(RING_SIZE)]
    assert listed(queue.queue.take_used()) == list(range(50, 50 + RING_SIZE))
    assert queue.queue.send_singly(np.empty(0, dtype=np.uint64)) == 0


def test_a_restored_queue_finds_in_the_ring_what_is_in_flight() -> None:
    queue = Queue()
    queue.queue.record(pages(1, 2, 3, 9))
    queue.queue.send(4)
    saved_ring, saved = queue.ring.save(), queue.queue.save()
    ring = DriverRing(queue.memory, queue.ring.layout)
    ring.restore(saved_ring)
    restored = SgQueue(ring, MEMORY_PAGES, lambda: None)
    restored.restore(saved)
    assert restored.pages_in_flight == 4
    queue.serve()
    assert listed(restored.take_used()) == [1, 2, 3, 9]
    assert restored.pages_in_flight == 0


@pytest.mark.parametrize(("address", "length"), [(4096, 4095), (100, 4096), (MEMORY_PAGES << 12, 4096)])
def test_entries_in_flight_that_are_no_pages_are_not_restored(address: int, length: int) -> None:
    queue = Queue()
    queue.ring.add_inbufs(np.array([address], np.uint64), np.array([length], np.uint32))
    queue.ring.publish()
    with pytest.raises(RestoreError):
        queue.queue.restore({})


def test_a_device_that_writes_into_the_descriptors_cannot_free_other_pages() -> None:
    queue = Queue()
    queue.queue.record(pages(40, 41))
    queue.queue.send(2)
    table = np.frombuffer(queue.memory, "<u8", count=2 * RING_SIZE, offset=PAGE_BYTES)
    table[:] = 0x10_0000
    queue.device.push_many([chain.head for chain in queue.device.pop_all()])
    queue.device.publish()
    assert listed(queue.queue.take_used()) == [40, 41]
    queue.memory.cast("H")[queue.ring.layout.used // 2 + 1] = 5  # a used index out of thin air
    with pytest.raises(DeviceProtocolError):
        queue.queue.take_used()
