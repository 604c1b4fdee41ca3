"""The guest's page allocator: binary buddies whose free lists are byte maps inside guest RAM.

Rule 1: free_map[order][block] is 0, or 1 + the migrate type of a free block. The maps and the frame table,
        both in guest RAM, are the only truth; counts, cursors and recent blocks are derived and rebuilt by
        open().
Rule 2: two free buddies are one block of the next order, up to order 10; a pageblock is a block of order 10,
        so all free blocks of a pageblock carry its migrate type and no merge crosses a zone.
Rule 3: what is allocated holds anything: the content of a page that was hinted or ballooned is not kept.
Rule 4: one lock guards all of it. Pressure hooks run without it, in order of their priority, and only then is
        memory out.
Rule 5: bulk operations work on runs and blocks; a loop over pages exists only for a handful of them.
"""

import threading
from collections import deque
from collections.abc import Callable
from typing import Any, Final, Self

import numpy as np

from guest_agent import free_walk
from guest_agent.arrays import I64Array, U8Array, U64Array, distinct, expand_runs, runs_of
from guest_agent.boot import ORDER_MAX, ORDERS, BootPage, free_map_blocks
from guest_agent.buddy_check import find_problems
from guest_agent.errors import OutOfMemory, RestoreError
from guest_agent.frames import FrameKind, FrameTable
from guest_agent.migrate_types import FALLBACKS, TYPES, MigrateType
from guest_agent.poison import Poison
from guest_agent.pressure import Pressure, PressureHook
from guest_agent.ram import GuestRam
from guest_agent.reported import REPORT_ORDER, Reported
from guest_agent.zones import low_watermark, zones_of

_RECENT_MAX: Final = 1024  # freed blocks remembered per list; what falls out is found by the next scan
_REFILL: Final = 256  # blocks one scan brings for single allocations
_SCAN_WINDOW: Final = 1 << 16  # map bytes looked at in one step: some microseconds
_SINGLY_MAX: Final = 24  # below it, single frees cost less than setting up the vectorised merge

_NONE: Final[I64Array] = np.empty(0, dtype=np.int64)


_STEAL_PAGEBLOCK_ORDER: Final = ORDER_MAX // 2  # taking that much of a foreign pageblock converts all of it


class BuddyAllocator:
    """The allocator of one guest.

    Built over a boot page whose memory is not laid out yet it starts a new guest: everything behind the
    kernel's own pages is free. Otherwise it takes up what guest RAM says (open() insists on that).

    Attributes:
        lock: guards maps, frame table and counts; re-entrant. free_pages: pages in free blocks, all zones.
        reserve_pages: the low watermark that alloc_blocks leaves. poison: what freed pages are filled with.
        compact: makes a free block of an order by moving pages, and says whether it did; None: nobody can.
    """

    def __init__(self, ram: GuestRam, boot: BootPage, frames: FrameTable) -> None:
        self.lock = threading.RLock()
        self.pages = ram.pages
        self.frames = frames
        self.zones = zones_of(ram.pages)
        self.reserve_pages = low_watermark(ram.pages)
        self.pressure = Pressure()
        self.reported = Reported(ram.pages)
        self.poison: Poison | None = None
        self.compact: Callable[[int], bool] | None = None
        self._attach(ram, boot)
        if not boot.memory_ready:
            self._format(boot)
        self._rebuild()

    @classmethod
    def open(cls, ram: GuestRam, boot: BootPage, frames: FrameTable) -> Self:
        """Take up the allocator of a restored memory image.

        Raises:
            RestoreError: the image never had one.
        """
        if not boot.memory_ready:
            raise RestoreError("the memory image has no memory manager: its guest never booted")
        return cls(ram, boot, frames)

    def _attach(self, ram: GuestRam, boot: BootPage) -> None:
        layout, flat = boot.layout, ram.bytes.reshape(-1)
        self._maps: list[U8Array] = []
        self._cells: list[memoryview] = []  # the same bytes: single cells read several times faster this way
        for order in range(ORDERS):
            offset, blocks = layout.free_map_offset_of(order), free_map_blocks(ram.pages, order)
            self._maps.append(flat[offset : offset + blocks])
            self._cells.append(ram.memory[offset : offset + blocks])
        pageblocks = free_map_blocks(ram.pages, ORDER_MAX)
        self._pageblocks: U8Array = flat[layout.pageblock_offset :][:pageblocks]

    def _format(self, boot: BootPage) -> None:
        self.frames.format(boot.layout.reserved_pages)
        for free_map in self._maps:
            free_map.fill(0)
        self._pageblocks.fill(MigrateType.MOVABLE)
        self._forget_derived()
        free = np.array([boot.layout.reserved_pages]), np.array([self.pages])
        self._insert_runs(*free)
        boot.memory_ready = True

    def _forget_derived(self) -> None:
        zones = range(len(self.zones))
        self.free_pages = 0
        self._counts = [[[0] * TYPES for _ in range(ORDERS)] for _ in zones]
        self._cursors = [[zone.pfn_first >> order for order in range(ORDERS)] for zone in self.zones]
        self._recent: list[list[list[deque[int]]]] = [
            [[deque(maxlen=_RECENT_MAX) for _ in range(TYPES)] for _ in range(ORDERS)] for _ in zones
        ]

    def _rebuild(self) -> None:
        self._forget_derived()
        for zone_index in range(len(self.zones)):
            for order in range(ORDERS):
                cells = self._zone_map(zone_index, order)
                for migrate_type in MigrateType:
                    count = int(np.count_nonzero(cells == migrate_type + 1))
                    self._counts[zone_index][order][migrate_type] = count
                    self.free_pages += count << order

    def _zone_map(self, zone_index: int, order: int) -> U8Array:
        zone = self.zones[zone_index]
        return self._maps[order][zone.pfn_first >> order : _round_up(zone.pfn_end, order)]

    def alloc(
        self,
        order: int,
        *,
        kind: FrameKind,
        owner: int,
        index: int = 0,
        migrate_type: MigrateType = MigrateType.MOVABLE,
    ) -> int:
        """Allocate one block of 2**order pages and return its first page number.

        Raises:
            OutOfMemory: no such block, and the pressure hooks released nothing that helped.
        """
        assert 0 <= order <= ORDER_MAX, order
        while True:
            with self.lock:
                pfn = self._take_one(order, migrate_type)
                if pfn is not None:
                    self.frames.kind[pfn : pfn + (1 << order)] = kind
                    self.frames.owner[pfn] = owner
                    self.frames.index[pfn] = index
                    return pfn
            if order and self.compact is not None and self.compact(order):
                continue
            if not self.pressure.relieve(1 << order):
                raise OutOfMemory(
                    f"no block of order {order}: {self.free_pages} pages free, all in smaller ones"
                )

    def alloc_bulk(
        self,
        count: int,
        *,
        kind: FrameKind,
        owner: int,
        index_first: int = 0,
        migrate_type: MigrateType = MigrateType.MOVABLE,
    ) -> U64Array:
        """Allocate single pages, all or nothing, out of the largest blocks first.

        Returns:
            page numbers in allocation order, shape (count,); their indices are index_first upwards.

        Raises:
            OutOfMemory: not that many pages free, and the pressure hooks did not release enough.
        """
        while True:
            with self.lock:
                if self.free_pages >= count:
                    pfns = self._take_units(count, 0, migrate_type)
                    assert pfns.size == count, (pfns.size, count)
                    self.frames.mark_pages(pfns, kind, owner, index_first)
                    return pfns.view(np.uint64)
                missing = count - self.free_pages
            if not self.pressure.relieve(missing):
                raise OutOfMemory(f"{count} pages wanted, {self.free_pages} free")

    def alloc_blocks(
        self,
        order: int,
        count_max: int,
        *,
        kind: FrameKind,
        owner: int,
        migrate_type: MigrateType = MigrateType.MOVABLE,
        reserve_pages: int | None = None,
    ) -> U64Array:
        """Allocate up to count_max blocks without ever asking the pressure hooks, and leave a reserve free.

        The reserve is the low watermark unless reserve_pages (free pages to leave) says otherwise.

        Returns:
            the blocks' first pages, possibly fewer than asked for, possibly none.
        """
        reserve = self.reserve_pages if reserve_pages is None else reserve_pages
        with self.lock:
            count = min(count_max, (self.free_pages - reserve) >> order)
            if count <= 0:
                return np.empty(0, dtype=np.uint64)
            heads = self._take_units(count, order, migrate_type)
            self.frames.mark_blocks(np.sort(heads), order, kind, owner)
            return heads.view(np.uint64)

    def _take_one(self, order: int, migrate_type: MigrateType) -> int | None:
        for zone_index in range(len(self.zones) - 1, -1, -1):
            counts = self._counts[zone_index]
            for current in range(order, ORDERS):
                if counts[current][migrate_type]:
                    block = self._find(zone_index, current, migrate_type)
                    return self._split(zone_index, block, current, order, migrate_type)
            for current in range(ORDER_MAX, order - 1, -1):  # steal the largest: it fragments least
                for other in FALLBACKS[migrate_type][1:]:
                    if counts[current][other]:
                        block = self._find(zone_index, current, other)
                        rest = other
                        if current >= _STEAL_PAGEBLOCK_ORDER:
                            self._convert_pageblock(zone_index, block >> (ORDER_MAX - current), migrate_type)
                            rest = migrate_type
                        return self._split(zone_index, block, current, order, rest)
        return None

    def _find(self, zone_index: int, order: int, migrate_type: int) -> int:
        """A free block of a list that is known not to be empty."""
        recent, cells = self._recent[zone_index][order][migrate_type], self._cells[order]
        while True:
            while recent:
                block = recent.pop()
                if cells[block] == migrate_type + 1:
                    return block
            found = self._scan(zone_index, order, migrate_type, _REFILL)
            recent.extend(reversed(found.tolist()))

    def _split(self, zone_index: int, block: int, current: int, order: int, rest_type: int) -> int:
        """Take a free block out and give back all but its first 2**order pages."""
        self._cells[current][block] = 0
        self._counts[zone_index][current][rest_type] -= 1
        self.free_pages -= 1 << order
        if current >= REPORT_ORDER:
            self.reported.block_taken(block << current, order)
        while current > order:
            current -= 1
            block <<= 1
            self._cells[current][block + 1] = rest_type + 1
            self._counts[zone_index][current][rest_type] += 1
            self._recent[zone_index][current][rest_type].append(block + 1)
        return block << order

    def _convert_pageblock(self, zone_index: int, pageblock: int, migrate_type: int) -> None:
        old = int(self._pageblocks[pageblock])
        self._pageblocks[pageblock] = migrate_type
        for order in range(ORDERS):
            shift = ORDER_MAX - order
            cells = self._maps[order][pageblock << shift : (pageblock + 1) << shift]
            free = np.flatnonzero(cells)
            cells[free] = migrate_type + 1
            self._counts[zone_index][order][old] -= free.size
            self._counts[zone_index][order][migrate_type] += free.size

    def _take_units(self, count: int, unit_order: int, migrate_type: MigrateType) -> I64Array:
        """Take up to count blocks of unit_order, largest blocks first; their first pages in that order."""
        pieces, left = [_NONE], count
        for zone_index in range(len(self.zones) - 1, -1, -1):
            counts = self._counts[zone_index]
            for source in FALLBACKS[migrate_type]:
                for order in range(ORDER_MAX, unit_order - 1, -1):
                    if blocks_wanted := min(left >> (order - unit_order), counts[order][source]):
                        blocks = self._take_many(zone_index, order, source, blocks_wanted)
                        if order == ORDER_MAX:
                            self._pageblocks[blocks] = migrate_type
                        pieces.append(_units_of(blocks, order, unit_order))
                        left -= blocks_wanted << (order - unit_order)
                if left:
                    pieces.append(self._take_part(zone_index, left, unit_order, source, migrate_type))
                    left -= pieces[-1].size
                if not left:
                    return np.concatenate(pieces)
        return np.concatenate(pieces)

    def _take_part(
        self, zone_index: int, count: int, unit_order: int, source: int, migrate_type: MigrateType
    ) -> I64Array:
        """Take the last units out of one block that is larger than they are, if there is one."""
        for order in range(unit_order + 1, ORDERS):
            if self._counts[zone_index][order][source]:
                block = self._find(zone_index, order, source)
                if order == ORDER_MAX and source != migrate_type:
                    self._convert_pageblock(zone_index, block, migrate_type)
                    source = migrate_type
                head = self._split(zone_index, block, order, order, source)
                end = head + (count << unit_order)
                assert end < head + (1 << order), (order, count, unit_order)
                self._insert_runs(np.array([end]), np.array([head + (1 << order)]))
                return np.arange(head, end, 1 << unit_order, dtype=np.int64)
        return _NONE

    def _take_many(self, zone_index: int, order: int, migrate_type: int, count: int) -> I64Array:
        blocks = self._scan(zone_index, order, migrate_type, count)
        assert blocks.size == count, (order, migrate_type, blocks.size, count)
        self._maps[order][blocks] = 0
        if order >= REPORT_ORDER:
            self.reported.blocks_taken(order, blocks)
        self._counts[zone_index][order][migrate_type] -= count
        self.free_pages -= count << order
        return blocks

    def _scan(self, zone_index: int, order: int, migrate_type: int, count_max: int) -> I64Array:
        """Up to count_max free blocks of one list, looked for from the cursor onwards and once around."""
        zone, free_map, value = self.zones[zone_index], self._maps[order], migrate_type + 1
        first, end = zone.pfn_first >> order, _round_up(zone.pfn_end, order)
        cursor = self._cursors[zone_index][order]
        left = min(count_max, self._counts[zone_index][order][migrate_type])
        pieces, window = [_NONE], _SCAN_WINDOW
        for segment_first, segment_end in ((cursor, end), (first, cursor)):
            at = segment_first
            while at < segment_end and left:
                window_end = min(at + window, segment_end)
                hits = np.flatnonzero(free_map[at:window_end] == value)[:left] + at
                if hits.size:
                    pieces.append(hits)
                    left -= hits.size
                    self._cursors[zone_index][order] = int(hits[-1]) + 1
                at, window = window_end, window * 2
        return np.concatenate(pieces)

    def free(self, pfn: int, order: int) -> None:
        """Give one block back and merge it with its buddies."""
        with self.lock:
            kinds = self.frames.kind[pfn : pfn + (1 << order)]
            assert kinds.all(), (pfn, order)  # FREE is 0: nothing is freed twice
            if self.poison is not None:
                self.poison.fill_runs([(pfn, pfn + (1 << order))])
            kinds[:] = FrameKind.FREE
            self.frames.owner[pfn] = 0
            self._insert_one(pfn, order)

    def free_bulk(self, pfns: U64Array) -> None:
        """Give single pages back, in any order, merged as far as they go."""
        self.free_blocks(pfns, 0)

    def free_blocks(self, heads: U64Array, order: int) -> None:
        """Give blocks of one order back by their first pages, in any order, merged as far as they go."""
        if heads.size <= _SINGLY_MAX:
            for head in heads.tolist():
                self.free(int(head), order)
            return
        ascending = heads.astype(np.int64)
        if (ascending[1:] <= ascending[:-1]).any():
            ascending.sort()
            assert (ascending[1:] != ascending[:-1]).all(), "a block is freed twice in one call"
        with self.lock:
            assert self.frames.kind[ascending].all(), "a block is freed that is free"
            self.frames.clear_blocks(ascending, order)
            starts, ends = runs_of(ascending >> order)
            if self.poison is not None:
                self.poison.fill_runs(zip((starts << order).tolist(), (ends << order).tolist(), strict=True))
            self._insert_runs(starts << order, ends << order)

    def _insert_one(self, pfn: int, order: int) -> None:
        zone_index = int(pfn >= self.zones[0].pfn_end)
        migrate_type = int(self._pageblocks[pfn >> ORDER_MAX])
        counts, block = self._counts[zone_index], pfn >> order
        self.free_pages += 1 << order
        while order < ORDER_MAX and self._cells[order][block ^ 1]:
            self._cells[order][block ^ 1] = 0
            counts[order][migrate_type] -= 1
            block >>= 1
            order += 1
        self._cells[order][block] = migrate_type + 1
        counts[order][migrate_type] += 1
        self._recent[zone_index][order][migrate_type].append(block)

    def _insert_runs(self, starts: I64Array, ends: I64Array) -> None:
        """Free page runs [start, end): as the largest aligned blocks that fit, then merged upwards."""
        self.free_pages += int((ends - starts).sum())
        merged = _NONE
        for order in range(ORDER_MAX):
            odd = (starts & 1 == 1) & (starts < ends)
            fronts, starts = starts[odd], starts + odd
            odd = (ends & 1 == 1) & (starts < ends)
            ends = ends - odd
            backs = ends[odd]
            merged = self._settle(order, np.concatenate((merged, fronts, backs)))
            left = starts < ends
            starts, ends = starts[left] >> 1, ends[left] >> 1
            if not starts.size and not merged.size:
                return
        self._settle(ORDER_MAX, np.concatenate((merged, expand_runs(starts, ends))))

    def _settle(self, order: int, blocks: I64Array) -> I64Array:
        """Enter free blocks at one order; returns the blocks of the next order that pairs of them make."""
        if not blocks.size:
            return _NONE
        free_map, shift = self._maps[order], ORDER_MAX - order
        free_map[blocks] = self._pageblocks[blocks >> shift] + 1
        self._count(order, blocks, 1)
        if order == ORDER_MAX:
            return _NONE
        pairs = blocks & ~1
        pairs = pairs[(free_map[pairs] != 0) & (free_map[pairs + 1] != 0)]
        if not pairs.size:
            return _NONE
        pairs = distinct(pairs)  # both halves may be newcomers
        free_map[pairs] = 0
        free_map[pairs + 1] = 0
        self._count(order, pairs, -2)
        return pairs >> 1

    def _count(self, order: int, blocks: I64Array, each: int) -> None:
        keys = self._pageblocks[blocks >> (ORDER_MAX - order)].astype(np.int64)
        keys[blocks >= self.zones[0].pfn_end >> order] += TYPES
        for key, count in enumerate(np.bincount(keys).tolist()):
            if count:
                self._counts[key // TYPES][order][key % TYPES] += each * count

    def add_pressure_hook(self, priority: int, hook: PressureHook) -> None:
        """Let an allocation that falls short ask hook(pages_wanted) -> pages_released (see Pressure)."""
        self.pressure.add(priority, hook)

    def remove_pressure_hook(self, hook: PressureHook) -> None:
        """Forget a hook."""
        self.pressure.remove(hook)

    def walk_free_mem_block(
        self, opaque: Any, min_order: int, report_pfn_range: Callable[[Any, int, int], bool]
    ) -> bool:
        """Report every free block of min_order or more (free_walk.walk); False: the callback ended it."""
        return free_walk.walk(self, opaque, min_order, report_pfn_range)

    def walk_free_blocks(self, min_order: int = ORDER_MAX) -> list[tuple[int, int]]:
        """All free blocks as (first page, pages), in the order of the walk, read under the lock."""
        with self.lock:
            zones = range(len(self.zones))
            return [block for zone in zones for block in free_walk.free_blocks(self, zone, min_order)]

    def free_map_of(self, zone_index: int, order: int) -> tuple[int, U8Array]:
        """(first block, map) of one zone and order, as they are; hold the lock."""
        return self.zones[zone_index].pfn_first >> order, self._zone_map(zone_index, order)

    def isolate_unreported(self, order: int, count_max: int, owner: int) -> U64Array:
        """Take free blocks of exactly this order that were not reported since somebody had them last.

        Returns:
            their first pages; return_reported() gives them back.
        """
        with self.lock:
            blocks = self.reported.unreported(order, np.flatnonzero(self._maps[order]))[:count_max]
            if blocks.size:
                self._maps[order][blocks] = 0
                self._count(order, blocks, -1)
                self.free_pages -= int(blocks.size) << order
                self.frames.mark_blocks(blocks << order, order, FrameKind.HELD, owner)
            return (blocks << order).astype(np.uint64)

    def return_reported(self, heads: U64Array, order: int) -> None:
        """The host knows of these blocks: free again as they are, and not to be reported until used again."""
        ascending = np.sort(heads.astype(np.int64))
        with self.lock:
            self.reported.mark(order, ascending >> order)
            self.frames.clear_blocks(ascending, order)
            starts, ends = runs_of(ascending >> order)
            self._insert_runs(starts << order, ends << order)

    def check(self) -> list[str]:
        """Problems of the maps, against the frame table and the derived counts; none when all is sound."""
        with self.lock:
            problems = find_problems(self.pages, self._maps, self._pageblocks, self.frames)
            if self.poison is not None:
                problems += self.poison.problems(self.frames)
            counts, free_pages = self._counts, self.free_pages
            keep = self._cursors, self._recent
            self._rebuild()
            if counts != self._counts:
                problems.append(f"counted blocks {counts}, the maps have {self._counts}")
            if free_pages != self.free_pages:
                problems.append(f"counted {free_pages} free pages, the maps have {self.free_pages}")
            self._counts, self.free_pages = counts, free_pages
            self._cursors, self._recent = keep
            return problems


def _round_up(pfn: int, order: int) -> int:
    return -(-pfn >> order)


def _units_of(blocks: I64Array, order: int, unit_order: int) -> I64Array:
    within = np.arange(0, 1 << order, 1 << unit_order, dtype=np.int64)
    units: I64Array = ((blocks << order)[:, None] + within).reshape(-1)
    return units
