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

from migration.pages import PAGE_BYTES, merge_runs, pfns_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from migration.pages import U64Array

PAGES_MAX = 1 << 52  # what 64 bits of guest address can name
COMPACT_ABOVE = 1 << 16  # entries; duplicates beyond this cost more memory than removing them costs time


class DeviceLog:
    """Thread-safe set of page frame numbers."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._few: set[int] = set()  # ring stores: a handful of pages, again and again
        self._runs: list[tuple[U64Array, U64Array]] = []  # (first, count): ballooned and reported pages
        self._runs_entries = 0
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
        self.add_runs(pfns, np.ones(len(pfns), np.uint64))

    def add_runs(self, first: U64Array, count: U64Array) -> None:
        """Log runs of whole pages, in any order; costs the same whatever their length."""
        with self._lock:
            self._runs.append((np.array(first, np.uint64), np.array(count, np.uint64)))
            self._runs_entries += len(first)
            if self._runs_entries > self._compact_above:
                merged = self._merged()
                self._runs = [merged]
                self._runs_entries = len(merged[0])
                # Doubling keeps the work of compaction proportional to what was added.
                self._compact_above = max(COMPACT_ABOVE, 2 * self._runs_entries)

    def take(self) -> U64Array:
        """All logged page frame numbers, ascending and without duplicates; the log is empty afterwards."""
        few, (first, count) = self._take()
        return np.unique(np.concatenate([few, pfns_of(first, count)]))

    def take_runs(self, pages: int) -> tuple[U64Array, U64Array]:
        """What is logged, as runs (first, count) that may overlap; the log is empty afterwards.

        Pages from `pages` upwards are not this guest's.
        """
        few, (first, count) = self._take()
        few = np.sort(few)
        first, count = np.concatenate([few, first]), np.concatenate([np.ones_like(few), count])
        inside = first < pages
        first, count = first[inside], count[inside]
        return first, np.minimum(count, np.uint64(pages) - first)

    def _take(self) -> tuple[U64Array, tuple[U64Array, U64Array]]:
        with self._lock:
            few, self._few = self._few, set()
            runs = self._merged()
            self._runs = []
            self._runs_entries, self._compact_above = 0, COMPACT_ABOVE
        return np.fromiter(few, np.uint64, len(few)), runs

    def _merged(self) -> tuple[U64Array, U64Array]:
        if not self._runs:
            return np.empty(0, np.uint64), np.empty(0, np.uint64)
        first, end = merge_runs(
            np.concatenate([first for first, _ in self._runs]),
            np.concatenate([count for _, count in self._runs]),
            pages=PAGES_MAX,
        )
        return first.astype(np.uint64), (end - first).astype(np.uint64)
