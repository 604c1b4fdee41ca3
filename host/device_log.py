"""What the devices stored into guest RAM themselves (DESIGN 3.6).

Rule 1: a store is logged *after* it was made; so a harvest that misses the entry also misses nothing that
        an earlier read could have sent: the entry is in the next harvest.
Rule 2: `take` empties the log; a page is in it once, however often it was stored to.
Rule 3: the log is bounded by the pages it names: it is compacted as it grows, whether or not someone takes.

The kernel's dirty tracking sees only what the guest writes through its own mapping; used rings, punched
pages and everything else the host writes are seen by nobody but this log.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import numpy as np

from migration.pages import PAGE_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterable

    from migration.pages import U64Array

COMPACT_ABOVE = 1 << 16  # entries; duplicates beyond this cost more memory than removing them costs time


class DeviceLog:
    """Thread-safe set of page frame numbers."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._few: set[int] = set()  # ring stores: a handful of pages, again and again
        self._many: list[U64Array] = []  # whole arrays: ballooned pages
        self._many_entries = 0
        self._compact_above = COMPACT_ABOVE

    def add(self, address: int, length: int) -> None:
        """Log a store of `length` bytes at guest physical `address`."""
        if length > 0:
            with self._lock:
                self._few.update(range(address // PAGE_BYTES, (address + length - 1) // PAGE_BYTES + 1))

    def add_stores(self, stores: Iterable[tuple[int, int]]) -> None:
        """Log many (address, length) stores under one lock."""
        pfns = {
            pfn
            for address, length in stores
            if length > 0
            for pfn in range(address // PAGE_BYTES, (address + length - 1) // PAGE_BYTES + 1)
        }
        with self._lock:
            self._few |= pfns

    def add_pages(self, pfns: U64Array) -> None:
        """Log whole pages."""
        with self._lock:
            self._many.append(np.array(pfns, dtype=np.uint64))
            self._many_entries += len(pfns)
            if self._many_entries > self._compact_above:
                self._many = [np.unique(np.concatenate(self._many))]
                self._many_entries = len(self._many[0])
                # Doubling keeps the work of compaction proportional to what was added.
                self._compact_above = max(COMPACT_ABOVE, 2 * self._many_entries)

    def take(self) -> U64Array:
        """All logged page frame numbers, ascending and without duplicates; the log is empty afterwards."""
        with self._lock:
            few, self._few = self._few, set()
            many, self._many = self._many, []
            self._many_entries, self._compact_above = 0, COMPACT_ABOVE
        return np.unique(np.concatenate([np.fromiter(few, np.uint64, len(few)), *many]))
