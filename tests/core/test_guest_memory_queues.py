"""Statistics and free page reporting against rings that the test looks at.

What they prove: one statistics buffer is with the device, always, and says the same tags; reported blocks are out
of reach until they are acknowledged, are not reported twice, and never take the memory that the guest needs.
"""

from collections.abc import Iterator

import pytest

from guest_agent.boot import BootPage
from guest_agent.buddy import BuddyAllocator
from guest_agent.errors import OutOfMemory
from guest_agent.frames import FrameKind, FrameTable
from guest_agent.memory_queues import MemoryQueues
from guest_agent.page_report import BATCH_BLOCKS
from guest_agent.ram import GuestRam
from guest_agent.ring_area import RingArea
from virtio.balloon import F_REPORTING, F_STATS_VQ, QUEUE_REPORTING, QUEUE_STATS, mask
from virtio.balloon_stats import decode_stats
from virtio.split_ring import DeviceRing, DriverRing

STATS, REPORTING = mask(F_STATS_VQ), mask(F_REPORTING)


class Bench:
    """Memory, both queues, and the device's end of them."""

    def __init__(self) -> None:
        self.ram = GuestRam.create(256 << 20)
        boot = BootPage.format(self.ram)
        self.frames = FrameTable(self.ram, boot)
        self.buddy = BuddyAllocator(self.ram, boot, self.frames)
        area = RingArea(boot.ring_address)
        self.rings = [DriverRing(self.ram.memory, layout) for layout in area.layouts]
        self.stats = DeviceRing(self.ram.memory, area.layouts[QUEUE_STATS])
        self.reports = DeviceRing(self.ram.memory, area.layouts[QUEUE_REPORTING])
        self.kicked: list[int] = []
        kicks = [lambda queue=queue: self.kicked.append(queue) for queue in range(5)]
        self.queues = MemoryQueues(
            self.rings, area, self.ram.memory, kicks, buddy=self.buddy, ballooned_pages=lambda: 100
        )

    def close(self) -> None:
        for ring in (*self.rings, self.stats, self.reports):
            ring.close()
        self.ram.close()

    def told(self) -> dict[str, int]:
        """The statistics that wait, given back."""
        chain = self.stats.pop()
        assert chain is not None
        assert self.stats.pop() is None, "one buffer"
        (address, length) = chain.readable[0]
        decoded = decode_stats(bytes(self.ram.memory[address : address + length]))
        assert (decoded.unknown_tags, decoded.leftover_bytes) == (0, 0)
        self.stats.push(chain.head, 0)
        self.stats.publish()
        return decoded.values

    def reported(self, *, acknowledge: bool = True) -> list[tuple[int, int]]:
        """(first page, pages) of the blocks that wait."""
        chains = self.reports.pop_all()
        if acknowledge:
            self.reports.push_many([chain.head for chain in chains])
            self.reports.publish()
        return [(address // 4096, length // 4096) for chain in chains for address, length in chain.writable]


@pytest.fixture(name="bench")
def fixture_bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.close()


def test_a_queue_that_was_not_negotiated_is_not_touched(bench: Bench) -> None:
    bench.queues.step(0)
    assert bench.kicked == []
    assert bench.stats.pop() is None
    assert bench.reports.pop() is None


def test_one_buffer_is_with_the_device_from_the_start(bench: Bench) -> None:
    for _ in range(3):
        bench.queues.step(STATS)
    assert bench.kicked == [QUEUE_STATS]
    bench.told()


def test_new_figures_with_the_same_tags_come_each_time_the_buffer_does(bench: Bench) -> None:
    bench.queues.step(STATS)
    first = bench.told()
    assert first["memfree"] == bench.buddy.free_pages * 4096
    assert first["memtot"] == (bench.ram.pages - 100) * 4096
    bench.buddy.alloc_bulk(500, kind=FrameKind.CACHE, owner=7)
    with pytest.raises(OutOfMemory):
        bench.buddy.alloc_bulk(1 << 20, kind=FrameKind.ANON, owner=7)
    bench.queues.step(STATS)
    second = bench.told()
    assert second.keys() == first.keys()
    assert first["memfree"] - second["memfree"] == second["caches"] == 500 * 4096
    assert (first["oom_kill"], second["oom_kill"]) == (0, 1)
    assert second["alloc_stall"] == 1


def test_reported_blocks_are_out_of_reach_until_they_are_acknowledged(bench: Bench) -> None:
    free = bench.buddy.free_pages
    bench.queues.step(REPORTING)
    blocks = bench.reported(acknowledge=False)
    pages = sum(count for _, count in blocks)
    assert 0 < len(blocks) <= BATCH_BLOCKS
    assert bench.buddy.free_pages == free - pages
    for pfn, count in blocks:
        assert (bench.frames.kind[pfn : pfn + count] == FrameKind.HELD).all()
    bench.queues.step(REPORTING)
    assert bench.reported(acknowledge=False) == [], "one batch at a time"


def test_everything_free_is_reported_once(bench: Bench) -> None:
    seen: list[tuple[int, int]] = []
    while True:
        bench.queues.step(REPORTING)
        batch = bench.reported()
        if not batch:
            break
        seen += batch
    assert len({pfn for pfn, _ in seen}) == len(seen)
    pages = sum(count for _, count in seen)
    assert pages > 0.9 * bench.buddy.free_pages
    assert bench.queues.reported_pages == pages
    assert bench.buddy.check() == []


def test_reporting_leaves_memory_to_a_guest_that_needs_it(bench: Bench) -> None:
    """Half of what is above the watermark, and of a guest at the watermark nothing."""
    bench.buddy.alloc_bulk(bench.buddy.free_pages - 8 * 1024, kind=FrameKind.ANON, owner=7)
    bench.queues.step(REPORTING)
    taken = sum(count for _, count in bench.reported())
    assert taken <= (8 * 1024 - bench.buddy.reserve_pages) // 2
    bench.queues.step(REPORTING)
    while bench.reported():
        bench.queues.step(REPORTING)
    bench.buddy.alloc_bulk(bench.buddy.free_pages - bench.buddy.reserve_pages, kind=FrameKind.ANON, owner=7)
    bench.buddy.reported.clear()
    bench.queues.step(REPORTING)
    assert bench.reported() == []


def test_a_device_that_was_reset_acknowledges_nothing_and_is_told_everything(bench: Bench) -> None:
    free = bench.buddy.free_pages
    bench.queues.step(REPORTING)
    first = bench.reported(acknowledge=False)
    bench.queues.reset()
    assert bench.buddy.free_pages == free
    for ring in bench.rings:
        ring.format()
    fresh = DeviceRing(bench.ram.memory, bench.rings[QUEUE_REPORTING].layout)
    bench.queues.step(REPORTING)
    again = [(chain.writable[0][0] // 4096, chain.writable[0][1] // 4096) for chain in fresh.pop_all()]
    fresh.close()
    assert again == first
