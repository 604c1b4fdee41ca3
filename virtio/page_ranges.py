"""Buffers as page runs: which whole pages (guest address, length) pairs cover, vectorised.

Rule 1: only whole pages inside guest RAM count; what a buffer covers in part is left out and said so.
Rule 2: a result is a set: runs are ascending, disjoint and do not touch, so a page named twice counts once.
Rule 3: the work is per buffer, never per page: a buffer of 4 GiB costs what one of 4 KiB costs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from virtio.balloon import PAGE_BYTES, PAGE_SHIFT

if TYPE_CHECKING:
    from collections.abc import Sequence

    from virtio.arrays import U32Array, U64Array
    from virtio.ring_layout import Buffer


@dataclass(frozen=True, slots=True, eq=False)
class PageRuns:
    """A set of pages that a guest named.

    Attributes:
        first, count: the runs, ascending, disjoint, not touching; dtype u64.
        rejected: entries that named no page of RAM.
    """

    first: U64Array
    count: U64Array
    rejected: int = 0

    @property
    def pages(self) -> int:
        """How many pages the runs hold."""
        return int(self.count.sum())

    @property
    def pfns(self) -> U64Array:
        """The pages one by one; costs 8 bytes a page, which a guest chooses the number of."""
        starts = np.repeat(self.first - (np.cumsum(self.count) - self.count), self.count.astype(np.int64))
        pfns: U64Array = starts + np.arange(starts.size, dtype=np.uint64)
        return pfns


NO_PAGES = PageRuns(np.empty(0, np.uint64), np.empty(0, np.uint64))


@dataclass(frozen=True, slots=True)
class Coverage:
    """Which pages some buffers cover.

    Attributes:
        first, count: whole pages of each good buffer, in its order; they may overlap.
        outside: buffers not inside guest RAM: left out.
        partial: buffers that do not begin and end at pages; their whole pages are in the runs.
    """

    first: U64Array
    count: U64Array
    outside: int
    partial: int


def whole_pages(buffers: Sequence[Buffer], first_page: int, end_page: int) -> Coverage:
    """The whole pages of `buffers` inside RAM, which is the pages from `first_page` up to `end_page`."""
    named = np.array(buffers, dtype=np.uint64).reshape(-1, 2)
    low, high = np.uint64(first_page * PAGE_BYTES), np.uint64(end_page * PAGE_BYTES)
    address, length = named[:, 0], named[:, 1]
    # Subtracted, never added: a sum could wrap around 2**64.
    inside = (address >= low) & (address <= high) & (length <= high - np.minimum(address, high))
    address, length = address[inside], length[inside]
    first = (address + np.uint64(PAGE_BYTES - 1)) >> np.uint64(PAGE_SHIFT)
    end = (address + length) >> np.uint64(PAGE_SHIFT)
    partial = np.count_nonzero((address | length) & np.uint64(PAGE_BYTES - 1))
    some = end > first
    return Coverage(first[some], end[some] - first[some], int(np.count_nonzero(~inside)), int(partial))


def merged(first: U64Array, count: U64Array, rejected: int = 0) -> PageRuns:
    """Runs, in any order, overlapping or repeated, as a set. All must be inside RAM and not empty."""
    if first.size == 0:
        return PageRuns(NO_PAGES.first, NO_PAGES.count, rejected)
    order = np.argsort(first, kind="stable")
    begin = first[order]
    reach = np.maximum.accumulate(begin + count[order])
    # A merged run starts where a run begins beyond everything before it.
    starts = np.concatenate(([0], np.flatnonzero(begin[1:] > reach[:-1]) + 1))
    ends = reach[np.append(starts[1:] - 1, begin.size - 1)]
    return PageRuns(begin[starts], ends - begin[starts], rejected)


def runs_of_pfns(pfns: U32Array, rejected: int = 0) -> PageRuns:
    """Page frame numbers, in any order, repeated or not, as a set of runs."""
    if pfns.size == 0:
        return PageRuns(NO_PAGES.first, NO_PAGES.count, rejected)
    distinct = np.unique(pfns).astype(np.uint64)
    starts = np.concatenate(([0], np.flatnonzero(np.diff(distinct) != 1) + 1))
    return PageRuns(distinct[starts], np.diff(starts, append=distinct.size).astype(np.uint64), rejected)
