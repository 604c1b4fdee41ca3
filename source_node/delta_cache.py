"""Pages as the destination has them: what deltas are made against.

Rule 1: an entry is what was sent last of its page. It may be used once that is acknowledged, which is so from the
        next round on: a round ends with every acknowledgement, and pages of chunks that were lost are forgotten.
Rule 2: the memory is bounded. In round 1 pages are kept while there is room; from round 2 on a page that was not
        sent for a whole round gives way, so that what stays is what the guest writes again and again.
Rule 3: one stream's: its pages are no other stream's. Only `slots` is shared, where no two touch the same place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from migration.delta import PAGE_WORDS
from migration.pages import PAGE_BYTES

if TYPE_CHECKING:
    from migration.pages import BoolArray, U64Array

I32Array = NDArray[np.int32]
I64Array = NDArray[np.int64]
NO_SLOT = -1


def no_slots(pages: int) -> I32Array:
    """Where each page of a guest is kept: nowhere."""
    return np.full(pages, NO_SLOT, np.int32)


class DeltaCache:
    """At most `cache_bytes` of pages. Used by one thread."""

    def __init__(self, slots: I32Array, cache_bytes: int) -> None:
        self.evicted = 0
        self._slots = slots
        capacity = cache_bytes // PAGE_BYTES
        self._content: U64Array = np.empty((capacity, PAGE_WORDS), np.uint64)  # touched as it is used
        self._page: I64Array = np.full(capacity, -1, np.int64)
        self._round = np.full(capacity, -1, np.int64)  # in which it was sent last
        self._round_index = 0
        self._free: I64Array = np.empty(0, np.int64)  # slots that may be taken in this round

    def begin(self, round_index: int) -> None:
        """Pages of this round follow."""
        if round_index == self._round_index:
            return
        self._round_index = round_index
        # Empty ones first, then the oldest. What round 1 brought in is as old as can be.
        idle = np.flatnonzero(self._round < (round_index - 1 if round_index > 1 else 0))
        self._free = idle[np.argsort(self._round[idle], kind="stable")]

    def known(self, pfns: U64Array) -> BoolArray:
        """Which of the pages have an entry."""
        return np.asarray(self._slots[pfns] != NO_SLOT)

    def versions(self, pfns: U64Array) -> U64Array:
        """A copy of the entries of pages that have one, shape (pages, 512)."""
        return self._content[self._slots[pfns]]

    def keep(self, pfns: U64Array, pages: U64Array) -> None:
        """These pages (pages, 512) are sent: they replace their entries, or get one where there is room."""
        slots = self._slots[pfns]
        missing = np.flatnonzero(slots == NO_SLOT)
        had = slots != NO_SLOT
        self._put(slots[had], pages[had])
        candidates, self._free = self._free[: missing.size], self._free[missing.size :]
        taken = candidates[
            self._round[candidates] < self._round_index
        ]  # not refreshed since they were found idle
        missing = missing[: taken.size]
        owners = self._page[taken]
        owners = owners[owners >= 0]
        self._slots[owners] = NO_SLOT
        self.evicted += owners.size
        self._page[taken] = pfns[missing].astype(np.int64)
        self._slots[pfns[missing]] = taken
        self._put(taken, pages[missing])

    def _put(self, slots: I32Array | I64Array, pages: U64Array) -> None:
        self._content[slots] = pages
        self._round[slots] = 0 if self._round_index == 1 else self._round_index

    def forget(self, pfns: U64Array) -> None:
        """The destination may have another version of these pages."""
        slots = self._slots[pfns]
        slots = slots[slots != NO_SLOT]
        self._slots[pfns] = NO_SLOT
        self._page[slots] = -1
        self._round[slots] = -1
