"""Free memory as others look at it: the walk of the series, what reporting isolates, what poison promises.

What they prove: a walk shows every free block once, from the largest down, and false ends all of it; a block is
reported once until one of its pages is used again; with poison no page is free without reading as the value.
"""

import threading

import numpy as np
import pytest

from guest_agent.boot import ORDER_MAX, BootPage
from guest_agent.buddy import BuddyAllocator
from guest_agent.frames import OWNER_REPORT, FrameKind, FrameTable
from guest_agent.poison import Poison
from guest_agent.ram import GuestRam
from guest_agent.reported import REPORT_ORDER

OWNER = 7


@pytest.fixture(name="ram")
def fixture_ram():  # type: ignore[no-untyped-def]
    ram = GuestRam.create(64 << 20)
    yield ram
    ram.close()


@pytest.fixture(name="buddy")
def fixture_buddy(ram: GuestRam) -> BuddyAllocator:
    boot = BootPage.format(ram)
    return BuddyAllocator(ram, boot, FrameTable(ram, boot))


def take(buddy: BuddyAllocator, count: int) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    return buddy.alloc_bulk(count, kind=FrameKind.ANON, owner=OWNER)


def fragment(buddy: BuddyAllocator) -> None:
    """Blocks of every order in both zones: one block of four is in pieces."""
    pfns = take(buddy, buddy.free_pages)
    keep = (np.random.default_rng(1).random(pfns.size) < 0.01) & (pfns % 4096 < 1024)
    buddy.free_bulk(pfns[~keep])


# --- the walk ---


def walked(buddy: BuddyAllocator, min_order: int) -> list[tuple[int, int]]:
    seen: list[tuple[int, int]] = []

    def report(opaque: object, pfn: int, pages: int) -> bool:
        assert opaque is seen
        seen.append((pfn, pages))
        return True

    assert buddy.walk_free_mem_block(seen, min_order, report)
    return seen


@pytest.mark.parametrize("min_order", [0, 3, 9, 10])
def test_a_walk_shows_every_free_block_of_the_order_once(buddy: BuddyAllocator, min_order: int) -> None:
    fragment(buddy)
    blocks = walked(buddy, min_order)
    pages = np.concatenate([np.arange(pfn, pfn + count) for pfn, count in blocks])
    assert np.unique(pages).size == pages.size
    assert (buddy.frames.kind[pages] == FrameKind.FREE).all()
    if min_order == 0:
        assert pages.size == buddy.free_pages == np.count_nonzero(buddy.frames.kind == FrameKind.FREE)
    assert min(count for _, count in blocks) >= 1 << min_order


def test_a_walk_goes_zone_by_zone_from_the_highest_order_down(buddy: BuddyAllocator) -> None:
    fragment(buddy)
    blocks = walked(buddy, 0)
    zones = [int(pfn >= buddy.zones[0].pfn_end) for pfn, _ in blocks]
    assert zones == sorted(zones)
    assert set(zones) == {0, 1}
    for zone in (0, 1):
        sizes = [pages for at, (_, pages) in zip(zones, blocks, strict=True) if at == zone]
        assert sizes == sorted(sizes, reverse=True)
        assert len(set(sizes)) > 3, "a fragmented zone has several orders, or this proves nothing"


@pytest.mark.parametrize("calls", [1, 2, 5])
def test_false_ends_the_whole_walk(buddy: BuddyAllocator, calls: int) -> None:
    fragment(buddy)
    seen: list[int] = []

    def report(opaque: object, pfn: int, pages: int) -> bool:
        del opaque, pages
        seen.append(pfn)
        return len(seen) < calls

    assert not buddy.walk_free_mem_block(None, 0, report)
    assert len(seen) == calls


def test_a_walk_of_a_full_guest_shows_nothing(buddy: BuddyAllocator) -> None:
    take(buddy, buddy.free_pages)
    assert walked(buddy, 0) == []


def test_nobody_allocates_while_the_callback_runs(buddy: BuddyAllocator) -> None:
    """The zone lock: another thread's allocation waits until the walk is over."""
    order: list[str] = []
    allocated = threading.Event()

    def allocate() -> None:
        take(buddy, 1)
        order.append("allocated")
        allocated.set()

    other = threading.Thread(target=allocate)

    def report(opaque: object, pfn: int, pages: int) -> bool:
        del opaque, pfn, pages
        if not other.ident:
            other.start()
        order.append("not yet" if not allocated.wait(0.02) else "too early")
        return len(order) < 3

    buddy.walk_free_mem_block(None, ORDER_MAX, report)
    other.join(10)
    assert order == ["not yet", "not yet", "not yet", "allocated"]


# --- reporting ---


def isolate(buddy: BuddyAllocator) -> list[tuple[int, int]]:
    """What a report would tell now; acknowledged at once."""
    found = []
    for order in (ORDER_MAX, REPORT_ORDER):
        heads = buddy.isolate_unreported(order, 1 << 20, OWNER_REPORT)
        buddy.return_reported(heads, order)
        found += [(int(head), order) for head in heads]
    return found


def test_isolated_blocks_are_nobody_elses_until_they_are_returned(buddy: BuddyAllocator) -> None:
    free = buddy.free_pages
    heads = buddy.isolate_unreported(ORDER_MAX, 3, OWNER_REPORT)
    assert heads.size == 3
    assert buddy.free_pages == free - 3 * 1024
    assert buddy.check() == []
    others = take(buddy, buddy.free_pages)
    assert not np.isin(heads, others).any()
    buddy.free_bulk(others)
    buddy.return_reported(heads, ORDER_MAX)
    assert buddy.free_pages == free
    assert buddy.check() == []


def test_what_was_reported_is_not_reported_again(buddy: BuddyAllocator) -> None:
    first = isolate(buddy)
    assert len(first) > 10
    assert isolate(buddy) == []


def test_a_block_is_reported_again_after_one_page_of_it_was_used(buddy: BuddyAllocator) -> None:
    isolate(buddy)
    pfn = buddy.alloc(0, kind=FrameKind.ANON, owner=OWNER)
    isolate(buddy)  # whatever else came of the split
    buddy.free(pfn, 0)
    again = isolate(buddy)
    assert len(again) == 1
    head, order = again[0]
    assert head <= pfn < head + (1 << order)


def test_used_in_bulk_and_freed_everything_is_reported_again(buddy: BuddyAllocator) -> None:
    first = isolate(buddy)
    buddy.free_bulk(take(buddy, buddy.free_pages))
    assert isolate(buddy) == first


def test_the_unused_half_of_a_split_block_stays_reported(buddy: BuddyAllocator) -> None:
    isolate(buddy)
    pfn = buddy.alloc(0, kind=FrameKind.ANON, owner=OWNER)
    assert isolate(buddy) == []
    del pfn


def test_a_new_device_is_told_everything(buddy: BuddyAllocator) -> None:
    first = isolate(buddy)
    buddy.reported.clear()
    assert isolate(buddy) == first


# --- poison ---


@pytest.fixture(name="poisoned")
def fixture_poisoned(ram: GuestRam, buddy: BuddyAllocator) -> BuddyAllocator:
    buddy.poison = Poison(ram, 0xAAAAAAAA)
    buddy.poison.fill_free(buddy.frames)
    return buddy


def free_and_wrong(buddy: BuddyAllocator) -> int:
    assert buddy.poison is not None
    return int(buddy.poison.wrong(buddy.frames.pfns_of_kind(FrameKind.FREE)).size)


@pytest.mark.parametrize("how", ["single", "bulk", "scattered", "block"])
def test_whatever_is_freed_reads_as_the_poison(poisoned: BuddyAllocator, ram: GuestRam, how: str) -> None:
    if how in ("single", "block"):
        order = 0 if how == "single" else ORDER_MAX
        pfn = poisoned.alloc(order, kind=FrameKind.ANON, owner=OWNER)
        ram.words[pfn : pfn + (1 << order)] = 1
        poisoned.free(pfn, order)
    else:
        pfns = take(poisoned, 5000)
        ram.words[pfns] = 1
        poisoned.free_bulk(pfns if how == "bulk" else pfns[::3])
    assert free_and_wrong(poisoned) == 0
    assert poisoned.check() == []


def test_a_free_page_that_lost_its_poison_is_a_problem(poisoned: BuddyAllocator, ram: GuestRam) -> None:
    """Hazard 7: this is how a wrongly skipped page shows in a guest that poisons."""
    free = poisoned.frames.pfns_of_kind(FrameKind.FREE)
    ram.words[free[[3, 70]]] = 0
    assert free_and_wrong(poisoned) == 2
    assert any("poison" in problem for problem in poisoned.check())


def test_reported_blocks_come_back_as_the_host_left_them(poisoned: BuddyAllocator, ram: GuestRam) -> None:
    """The device must not change them (5.5.6.7); filling them again would only bring the memory back."""
    heads = poisoned.isolate_unreported(ORDER_MAX, 1, OWNER_REPORT)
    marker = ram.words[int(heads[0])].copy()
    marker[:] = 42
    ram.words[int(heads[0])] = marker
    poisoned.return_reported(heads, ORDER_MAX)
    assert (ram.words[int(heads[0])] == 42).all()
