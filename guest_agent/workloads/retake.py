"""Hazard 1 made exact: pages taken back between giving a hint and the device's processing of it.

Rule 1: the pages are allocated out of blocks whose hint is in the ring already, and written at once; only then is
        the device kicked. That the device had used nothing by then is checked; else the guest fails: a schedule
        that was not exact proves nothing.
Rule 2: it happens once, in the guest's first report; the pages stay and never change again: what was lost stays
        lost.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from guest_agent.errors import GuestAgentError
from guest_agent.frames import FrameKind
from guest_agent.workloads.base import Guest, Workload
from guest_agent.workloads.content import PageContent, stream_key
from guest_agent.workloads.freed import KIND_KEPT_PAGES, Freed

if TYPE_CHECKING:
    from collections.abc import Callable

    from guest_agent.arrays import U64Array
    from guest_agent.workloads.options import Options

PAGES_DEFAULT = 64
BLOCK_PAGES = 1024


class Retake(Freed):
    """Options: pages, how many are taken back. Operations counts them."""

    kind = "retake"

    def __init__(self, name: str, workload_id: int, options: Options) -> None:
        Workload.__init__(self, name, workload_id, options)
        self._pages = options.count("pages", PAGES_DEFAULT)
        self._kept = 0

    def set_up(self, guest: Guest) -> None:
        """Nothing yet: what it works on are pages that somebody freed and hinted."""
        self._guest = guest
        self._content = PageContent(stream_key(guest.seed, self.name))
        self._tell_kept()

    def take_back(
        self,
        pfn_first: U64Array,
        page_count: U64Array,
        give_back: Callable[[int], int],
        untouched: Callable[[], bool],
    ) -> None:
        """Between giving the hints and kicking the device; see HintReport.before_kick.

        Raises:
            GuestAgentError: only some of the pages could be had, or the device was faster.
        """
        if self._kept or not pfn_first.size:
            return
        give_back(self._pages)  # a driver that holds its blocks gives some up, as under memory pressure
        pfns = self._take_hinted(np.sort(pfn_first), (pfn_first + page_count)[np.argsort(pfn_first)])
        if not pfns.size:
            return  # a driver that waits for acknowledgements gives nothing up: the race cannot be had
        self._content.fill(self._guest.ram, pfns)
        self._kept = self.operations = int(pfns.size)
        self._tell_kept()
        if not untouched():
            raise GuestAgentError(
                f"workload {self.name}: the device was faster than the write: not that schedule"
            )

    def _take_hinted(self, starts: U64Array, ends: U64Array) -> U64Array:
        """Allocate pages that lie in the ranges [start, end); what else the allocator hands out goes back."""
        buddy, frames = self._guest.buddy, self._guest.frames
        hinted = np.empty(0, dtype=np.uint64)
        with buddy.lock:  # the pages in between are nobody's loss
            others = []
            while hinted.size < self._pages and buddy.free_pages:
                count = min(BLOCK_PAGES, buddy.free_pages)
                pfns = buddy.alloc_bulk(count, kind=FrameKind.ANON, owner=self.id)
                block = np.searchsorted(starts, pfns, side="right").astype(np.int64) - 1
                inside = (block >= 0) & (pfns < ends[block])
                hinted = np.concatenate((hinted, pfns[inside]))
                others.append(pfns[~inside])
            buddy.free_bulk(np.concatenate([hinted[self._pages :], *others]))
            hinted = hinted[: self._pages]
            if 0 < hinted.size < self._pages:
                raise GuestAgentError(f"workload {self.name}: only {hinted.size} hinted pages could be had")
            frames.index[hinted.astype(np.int64)] = np.arange(hinted.size, dtype=np.uint32)
        return hinted

    def _tell_kept(self) -> None:
        self._guest.oracle.append(
            self.id, KIND_KEPT_PAGES, np.zeros(1, dtype=np.uint32), np.array([self._kept], dtype=np.uint64)
        )
