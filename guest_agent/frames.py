"""The frame table: what every page of the guest is, kept inside guest RAM.

Rule 1: kind is true for every page. Owner and index are true for the first page of each allocation, which for
        pages allocated one by one or in bulk means every page: a block's inner pages carry only the kind, so
        that holding gigabytes of blocks dirties one byte a page (Linux likewise writes only a block's first
        struct page).
Rule 2: a free page has owner 0; its index is whatever was there.
Rule 3: everything derived from the table (who has which pages, in which order) is found again by pfns_of().
"""

from enum import IntEnum
from typing import Final

import numpy as np

from guest_agent.arrays import I64Array, U8Array, U16Array, U32Array, U64Array, expand_runs, runs_of
from guest_agent.boot import BootPage
from guest_agent.ram import GuestRam

OWNER_NONE: Final = 0
WORKLOAD_ID_MAX: Final = 0xFEFF  # owners 1.. are workloads, 0xFF00.. the kernel's own
OWNER_BALLOON_NEW: Final = 0xFFFB  # taken for the balloon, and not yet told to the host
OWNER_REPORT: Final = 0xFFFC  # blocks on their way to the host and back (free page reporting)
OWNER_HINT: Final = 0xFFFD
OWNER_BALLOON: Final = 0xFFFE
OWNER_KERNEL: Final = 0xFFFF

# Up to so many runs are filled slice by slice (memset speed); beyond, one scatter is faster than the loop.
_RUNS_FILLED_MAX: Final = 2048


class FrameKind(IntEnum):
    """What a page is used for."""

    FREE = 0
    KERNEL = 1
    ANON = 2
    CACHE = 3
    BALLOON = 4
    HELD = 5  # hinted to the host, kept until DONE


class PageSummary(IntEnum):
    """What the outside needs to know of a page (sideband `frames`)."""

    USED = 0
    FREE = 1
    BALLOONED = 2
    HELD = 3


_SUMMARY_OF_KIND: Final[U8Array] = np.zeros(256, dtype=np.uint8)
_SUMMARY_OF_KIND[FrameKind.FREE] = PageSummary.FREE
_SUMMARY_OF_KIND[FrameKind.BALLOON] = PageSummary.BALLOONED
_SUMMARY_OF_KIND[FrameKind.HELD] = PageSummary.HELD


class FrameTable:
    """Views of the table inside guest RAM; the views are the table.

    Attributes:
        kind: uint8, owner: uint16, index: uint32, each of shape (pages,).
    """

    def __init__(self, ram: GuestRam, boot: BootPage) -> None:
        layout = boot.layout
        flat = ram.bytes.reshape(-1)
        self.pages = layout.pages
        self.kind: U8Array = flat[layout.kind_offset :][: self.pages]
        self.owner: U16Array = flat[layout.owner_offset :][: 2 * self.pages].view(np.uint16)
        self.index: U32Array = flat[layout.index_offset :][: 4 * self.pages].view(np.uint32)

    def format(self, reserved_pages: int) -> None:
        """Start over: the first pages are the kernel's, all others free."""
        self.kind.fill(FrameKind.FREE)
        self.owner.fill(OWNER_NONE)
        self.kind[:reserved_pages] = FrameKind.KERNEL
        self.owner[:reserved_pages] = OWNER_KERNEL
        self.index[:reserved_pages] = np.arange(reserved_pages, dtype=np.uint32)

    def mark_pages(self, pfns: I64Array, kind: FrameKind, owner: int, index_first: int) -> None:
        """Give single pages to an owner, numbered upwards from index_first in the order given."""
        self.kind[pfns] = kind
        self.owner[pfns] = owner
        self.index[pfns] = np.arange(index_first, index_first + pfns.size, dtype=np.uint32)

    def mark_blocks(self, heads_ascending: I64Array, order: int, kind: FrameKind, owner: int) -> None:
        """Give blocks to an owner; the index of a block's head is its order."""
        self._fill_kind(heads_ascending, order, kind)
        self.owner[heads_ascending] = owner
        self.index[heads_ascending] = order

    def mark_owner_runs(self, starts: I64Array, ends: I64Array, owner: int) -> None:
        """Give every page of the runs [start, end) an owner, whatever its kind; indices stay as they are."""
        if starts.size > _RUNS_FILLED_MAX:
            self.owner[expand_runs(starts, ends)] = owner
            return
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
            self.owner[start:end] = owner

    def clear_blocks(self, heads_ascending: I64Array, order: int) -> None:
        """Take blocks (order 0: pages) back from their owners."""
        self._fill_kind(heads_ascending, order, FrameKind.FREE)
        self.owner[heads_ascending] = OWNER_NONE

    def _fill_kind(self, heads_ascending: I64Array, order: int, kind: FrameKind) -> None:
        starts, ends = runs_of(heads_ascending >> order)
        if order == 0 and starts.size > _RUNS_FILLED_MAX:
            self.kind[heads_ascending] = kind
            return
        for start, end in zip((starts << order).tolist(), (ends << order).tolist(), strict=True):
            self.kind[start:end] = kind

    def pfns_of(self, owner: int) -> U64Array:
        """Pages (of blocks: heads) of one owner, sorted by index, then by page number.

        This is how everything that has pages finds them again in a restored guest.
        """
        pfns = np.flatnonzero(self.owner == owner)
        return pfns[np.argsort(self.index[pfns], kind="stable")].astype(np.uint64)

    def pfns_of_kind(self, kind: FrameKind) -> U64Array:
        """Every page of one kind, inner pages of blocks included, ascending."""
        return np.flatnonzero(self.kind == kind).astype(np.uint64)

    def summary(self) -> U8Array:
        """One PageSummary per page, a private copy: uint8, shape (pages,)."""
        return np.take(_SUMMARY_OF_KIND, self.kind)
