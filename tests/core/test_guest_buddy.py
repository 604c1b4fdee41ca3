"""The buddy allocator: its invariants hold after any sequence, also when it is reopened from RAM alone."""

from collections.abc import Iterator

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from guest_agent.boot import BootPage
from guest_agent.buddy import (
    ORDER_MAX,
    BuddyAllocator,
    MigrateType,
)
from guest_agent.errors import OutOfMemory, RestoreError
from guest_agent.frames import OWNER_BALLOON, OWNER_HINT, FrameKind, FrameTable
from guest_agent.pressure import PRESSURE_BALLOON, PRESSURE_CACHE, PRESSURE_HELD
from guest_agent.ram import GuestRam

PAGE_BYTES = 4096
ODD_PAGES = 4096 + 3 * 1024 + 517  # two zones, and an end that is no whole block


def allocator(pages: int) -> tuple[GuestRam, BuddyAllocator]:
    ram = GuestRam.create(pages * PAGE_BYTES)
    boot = BootPage.format(ram)
    return ram, BuddyAllocator(ram, boot, FrameTable(ram, boot))


def reopened(ram: GuestRam) -> BuddyAllocator:
    boot = BootPage.open(ram)
    return BuddyAllocator.open(ram, boot, FrameTable(ram, boot))


@pytest.fixture
def buddy() -> Iterator[BuddyAllocator]:
    ram, buddy = allocator(ODD_PAGES)
    yield buddy
    assert buddy.check() == []
    ram.close()


def everything(buddy: BuddyAllocator) -> np.ndarray:
    return buddy.alloc_bulk(buddy.free_pages, kind=FrameKind.ANON, owner=1)


class BuddyMachine(RuleBasedStateMachine):
    """Allocations as a plain set of pages against the allocator and its check()."""

    @initialize(pages=st.sampled_from([700, 4096, ODD_PAGES, 8192]))
    def start(self, pages: int) -> None:
        self.ram, self.buddy = allocator(pages)
        self.usable = self.buddy.free_pages
        self.blocks: dict[int, int] = {}  # head -> order
        self.used: set[int] = set()

    def teardown(self) -> None:
        self.ram.close()

    def took(self, heads: list[int], order: int) -> None:
        for head in heads:
            pages = range(head, head + (1 << order))
            assert head % (1 << order) == 0
            assert pages.stop <= self.buddy.pages
            assert self.used.isdisjoint(pages), "a page was given out twice"
            self.used.update(pages)
            self.blocks[head] = order

    def gave(self, heads: list[int]) -> None:
        for head in heads:
            order = self.blocks.pop(head)
            self.used.difference_update(range(head, head + (1 << order)))

    def some(self, order: int, data: st.DataObject) -> list[int]:
        heads = sorted(head for head, its_order in self.blocks.items() if its_order == order)
        step = data.draw(st.integers(1, 3))
        return heads[data.draw(st.integers(0, 2)) :: step]

    @rule(order=st.integers(0, ORDER_MAX), migrate_type=st.sampled_from(MigrateType))
    def alloc(self, order: int, migrate_type: MigrateType) -> None:
        try:
            pfn = self.buddy.alloc(order, kind=FrameKind.ANON, owner=2, index=5, migrate_type=migrate_type)
        except OutOfMemory:
            assert not any(pages >= 1 << order for _, pages in self.buddy.walk_free_blocks(0))
            return
        self.took([pfn], order)
        assert (self.buddy.frames.owner[pfn], self.buddy.frames.index[pfn]) == (2, 5)

    @rule(count=st.integers(1, 3000), migrate_type=st.sampled_from(MigrateType))
    def alloc_bulk(self, count: int, migrate_type: MigrateType) -> None:
        free = self.buddy.free_pages
        try:
            pfns = self.buddy.alloc_bulk(
                count, kind=FrameKind.CACHE, owner=3, index_first=100, migrate_type=migrate_type
            )
        except OutOfMemory:
            assert count > free == self.buddy.free_pages
            return
        assert pfns.shape == (count,)
        assert np.array_equal(self.buddy.frames.index[pfns], np.arange(100, 100 + count))
        self.took(pfns.tolist(), 0)

    @rule(order=st.integers(0, ORDER_MAX), count=st.integers(0, 9), reserve=st.sampled_from([None, 0, 600]))
    def alloc_blocks(self, order: int, count: int, reserve: int | None) -> None:
        heads = self.buddy.alloc_blocks(
            order, count, kind=FrameKind.HELD, owner=OWNER_HINT, reserve_pages=reserve
        )
        assert heads.size <= count
        left = self.buddy.reserve_pages if reserve is None else reserve
        assert not heads.size or self.buddy.free_pages >= left
        self.took(heads.tolist(), order)

    @precondition(lambda self: self.blocks)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        head = data.draw(st.sampled_from(sorted(self.blocks)))
        self.buddy.free(head, self.blocks[head])
        self.gave([head])

    @precondition(lambda self: self.blocks)
    @rule(data=st.data(), shuffle=st.booleans())
    def free_blocks(self, data: st.DataObject, shuffle: bool) -> None:
        order = data.draw(st.sampled_from(sorted(set(self.blocks.values()))))
        heads = np.array(self.some(order, data), dtype=np.uint64)
        if shuffle:
            heads = np.random.default_rng(heads.size).permutation(heads)
        if order == 0:
            self.buddy.free_bulk(heads)
        else:
            self.buddy.free_blocks(heads, order)
        self.gave(heads.tolist())

    @rule()
    def reopen(self) -> None:
        self.buddy = reopened(self.ram)

    @invariant()
    def sound(self) -> None:
        if hasattr(self, "buddy"):
            assert self.buddy.check() == []
            assert self.buddy.free_pages == self.usable - len(self.used)


BuddyMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
TestBuddyMachine = BuddyMachine.TestCase


def test_everything_can_be_taken_and_comes_back_as_the_largest_blocks(buddy: BuddyAllocator) -> None:
    before = list(buddy.walk_free_blocks(0))
    free_pages = buddy.free_pages
    pfns = everything(buddy)
    assert buddy.free_pages == 0
    assert list(buddy.walk_free_blocks(0)) == []
    buddy.free_bulk(np.random.default_rng(1).permutation(pfns))
    assert buddy.free_pages == free_pages
    assert list(buddy.walk_free_blocks(0)) == before


def test_single_frees_merge_just_as_bulk_frees_do(buddy: BuddyAllocator) -> None:
    before = list(buddy.walk_free_blocks(0))
    pfns = buddy.alloc_bulk(2000, kind=FrameKind.ANON, owner=1)
    for pfn in np.random.default_rng(2).permutation(pfns).tolist():
        buddy.free(pfn, 0)
    assert list(buddy.walk_free_blocks(0)) == before


def test_bulk_pages_come_from_the_largest_blocks_first(buddy: BuddyAllocator) -> None:
    pfns = buddy.alloc_bulk(1500, kind=FrameKind.ANON, owner=1).astype(np.int64)
    assert pfns[0] % 1024 == 0
    assert np.array_equal(pfns[:1024], np.arange(pfns[0], pfns[0] + 1024))


def test_a_bulk_allocation_is_all_or_nothing(buddy: BuddyAllocator) -> None:
    free_pages = buddy.free_pages
    with pytest.raises(OutOfMemory, match=f"{free_pages + 1} pages wanted"):
        buddy.alloc_bulk(free_pages + 1, kind=FrameKind.ANON, owner=1)
    assert buddy.free_pages == free_pages


def test_hint_blocks_leave_the_watermark_and_never_press(buddy: BuddyAllocator) -> None:
    buddy.add_pressure_hook(PRESSURE_HELD, lambda _: pytest.fail("alloc_blocks asked for memory"))
    heads = buddy.alloc_blocks(ORDER_MAX, 1000, kind=FrameKind.HELD, owner=OWNER_HINT)
    assert heads.size
    assert not (heads % 1024).any()
    assert buddy.free_pages >= buddy.reserve_pages > 0
    assert buddy.alloc_blocks(ORDER_MAX, 1000, kind=FrameKind.HELD, owner=OWNER_HINT).size == 0
    assert np.array_equal(np.sort(heads), buddy.frames.pfns_of(OWNER_HINT))


def test_pressure_is_asked_held_blocks_first_then_cache_then_balloon(buddy: BuddyAllocator) -> None:
    asked: list[tuple[str, int]] = []
    spent: set[str] = set()
    held = buddy.alloc_blocks(ORDER_MAX, 2, kind=FrameKind.HELD, owner=OWNER_HINT)
    cache = buddy.alloc_bulk(100, kind=FrameKind.CACHE, owner=4)
    balloon = buddy.alloc_bulk(buddy.free_pages, kind=FrameKind.BALLOON, owner=OWNER_BALLOON)

    def give(name: str, heads: np.ndarray, order: int) -> None:
        def hook(pages_wanted: int) -> int:
            asked.append((name, pages_wanted))
            released = 0 if name in spent else heads.size << order
            if released:
                spent.add(name)
                buddy.free_blocks(heads, order)
            return released

        priority = {"held": PRESSURE_HELD, "cache": PRESSURE_CACHE, "balloon": PRESSURE_BALLOON}[name]
        buddy.add_pressure_hook(priority, hook)

    give("balloon", balloon, 0)
    give("cache", cache, 0)
    give("held", held, ORDER_MAX)
    buddy.alloc(0, kind=FrameKind.ANON, owner=1)
    assert asked == [("held", 1)]
    asked.clear()
    buddy.alloc_bulk(buddy.free_pages + 10, kind=FrameKind.ANON, owner=1)
    assert asked == [("held", 10), ("cache", 10)]
    asked.clear()
    buddy.alloc_bulk(buddy.free_pages + 1, kind=FrameKind.ANON, owner=1)
    assert [name for name, _ in asked] == ["held", "cache", "balloon"]
    everything(buddy)
    with pytest.raises(OutOfMemory):
        buddy.alloc(0, kind=FrameKind.ANON, owner=1)


def test_hooks_run_without_the_lock_and_may_not_press_themselves(buddy: BuddyAllocator) -> None:
    everything(buddy)
    seen: list[str] = []

    def hook(_: int) -> int:
        assert not buddy.lock._is_owned()
        with pytest.raises(OutOfMemory):
            buddy.alloc(0, kind=FrameKind.ANON, owner=1)
        seen.append("asked")
        return 0

    buddy.add_pressure_hook(PRESSURE_CACHE, hook)
    with pytest.raises(OutOfMemory):
        buddy.alloc(0, kind=FrameKind.ANON, owner=1)
    buddy.remove_pressure_hook(hook)
    with pytest.raises(OutOfMemory):
        buddy.alloc(0, kind=FrameKind.ANON, owner=1)
    assert seen == ["asked"]


def test_the_walk_goes_by_zone_and_from_the_largest_blocks_down(buddy: BuddyAllocator) -> None:
    buddy.alloc(0, kind=FrameKind.ANON, owner=1)
    walked = list(buddy.walk_free_blocks(0))
    for zone in buddy.zones:
        sizes = [pages for pfn, pages in walked if zone.pfn_first <= pfn < zone.pfn_end]
        assert sizes == sorted(sizes, reverse=True)
    firsts = [pfn >= buddy.zones[1].pfn_first for pfn, _ in walked]
    assert firsts == sorted(firsts)
    assert sum(pages for _, pages in walked) == buddy.free_pages
    assert {pages for _, pages in buddy.walk_free_blocks()} == {1024}


def test_stealing_converts_a_pageblock_only_when_much_of_it_is_taken(buddy: BuddyAllocator) -> None:
    pfn = buddy.alloc(0, kind=FrameKind.ANON, owner=1, migrate_type=MigrateType.UNMOVABLE)
    again = buddy.alloc(0, kind=FrameKind.ANON, owner=1, migrate_type=MigrateType.UNMOVABLE)
    assert pfn >> 10 == again >> 10  # the converted pageblock serves the next one of its type
    assert buddy._pageblocks[pfn >> 10] == MigrateType.UNMOVABLE
    movable = buddy.alloc(0, kind=FrameKind.ANON, owner=1)
    assert movable >> 10 != pfn >> 10


def test_small_guests_have_one_zone() -> None:
    ram, buddy = allocator(1024)
    assert [zone.name for zone in buddy.zones] == ["DMA"]
    everything(buddy)
    assert buddy.check() == []
    ram.close()


def test_freeing_twice_is_our_own_bug(buddy: BuddyAllocator) -> None:
    pfns = buddy.alloc_bulk(100, kind=FrameKind.ANON, owner=1)
    twice = np.concatenate((pfns, pfns[:1]))
    with pytest.raises(AssertionError, match="twice"):
        buddy.free_bulk(twice)
    buddy.free_bulk(pfns)
    with pytest.raises(AssertionError):
        buddy.free_bulk(pfns)
    with pytest.raises(AssertionError):
        buddy.free(int(pfns[0]), 0)


def test_opening_needs_a_booted_memory() -> None:
    ram = GuestRam.create(1024 * PAGE_BYTES)
    boot = BootPage.format(ram)
    with pytest.raises(RestoreError, match="never booted"):
        BuddyAllocator.open(ram, boot, FrameTable(ram, boot))
    ram.close()


def test_opening_writes_nothing_to_ram() -> None:
    ram, buddy = allocator(ODD_PAGES)
    buddy.alloc_bulk(1000, kind=FrameKind.ANON, owner=1)
    before = ram.words.copy()
    assert reopened(ram).free_pages == buddy.free_pages
    assert np.array_equal(ram.words, before)
    ram.close()


@pytest.mark.parametrize(
    ("what", "problem"),
    [
        ("kind", "but of another kind"),
        ("freed", "in no free block"),
        ("owner", "with an owner"),
        ("map", "in two free blocks"),
        ("unmerged", "not merged"),
        ("type", "of a foreign type"),
        ("end", "beyond the end"),
        ("unknown", "unknown kind"),
        ("count", "counted blocks"),
    ],
)
def test_the_check_finds_each_broken_invariant(what: str, problem: str) -> None:
    ram, buddy = allocator(ODD_PAGES)
    (used,) = buddy.alloc_bulk(1, kind=FrameKind.ANON, owner=1).tolist()
    free, pages = next(iter(buddy.walk_free_blocks()))
    assert pages == 1024
    frames, maps = buddy.frames, buddy._maps
    if what == "kind":
        frames.kind[free + 9] = FrameKind.ANON
    elif what == "freed":
        frames.kind[used], frames.owner[used] = FrameKind.FREE, 0
    elif what == "owner":
        frames.owner[free] = 4
    elif what == "map":
        maps[3][free >> 3] = 1 + MigrateType.MOVABLE
    elif what == "unmerged":
        maps[10][free >> 10] = 0
        maps[9][(free >> 9) : (free >> 9) + 2] = 1 + MigrateType.MOVABLE
    elif what == "type":
        maps[10][free >> 10] = 1 + MigrateType.UNMOVABLE
    elif what == "end":
        maps[0][-1] = 1 + MigrateType.MOVABLE
    elif what == "unknown":
        frames.kind[used] = 77
    else:
        buddy._counts[0][0][0] += 1
    assert any(problem in line for line in buddy.check()), buddy.check()
    ram.close()
