"""The balloon's pages: taken from the memory manager, handed to the host, found again, given back.

What mm/balloon_compaction.c is to Linux's driver, and the two queues on which pages travel.

Rule 1: allocating is apart from enqueueing. `allocate` takes no lock of the balloon's, because it may make the page
        cache shrink, and whoever holds a lock of the cache may be waiting for the balloon to deflate. Everything
        else belongs to whoever holds the balloon's lock.
Rule 2: pages allocated and not yet with the device are invisible to a deflation. They have an owner of their own, a
        batch of them is bounded, and `give_back` returns them first when memory is short.
Rule 3: page numbers travel as arrays (legacy) or as runs (F_SG), whichever was negotiated; on both, pages are
        recorded, then sent as there is room.
Rule 4: a deflation for want of memory, or a move, sends pages one by one and records nothing: it allocates nothing.
Rule 5: what is in the balloon says the frame table: a restored guest finds its pages there.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np

from guest_agent.arrays import runs_of
from guest_agent.errors import RestoreError, XBitmapError
from guest_agent.frames import OWNER_BALLOON, OWNER_BALLOON_NEW, FrameKind
from guest_agent.page_runs import alloc_runs, free_runs, joined, pages_in, runs_of_pages
from guest_agent.pfn_arrays import PfnArrays
from guest_agent.pressure import PRESSURE_CACHE
from guest_agent.sg_queue import SgQueue
from virtio.balloon import QUEUE_DEFLATE, QUEUE_INFLATE

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from guest_agent.arrays import U64Array
    from guest_agent.buddy import BuddyAllocator
    from guest_agent.frames import FrameTable
    from guest_agent.page_runs import Runs
    from guest_agent.ring_area import RingArea
    from virtio.split_ring import DriverRing

__all__ = ["BATCH_PAGES", "BalloonPages", "PageQueue"]

# One operation at most: what a deflation cannot see meanwhile, what the device punches before it answers (256 MiB,
# some 30 ms for pages that are resident), and what one slice inside the pause gate allocates (less than 1 ms).
BATCH_PAGES: Final = 65_536
_SEARCH_PAGES: Final = 1 << 17  # of the frame table looked at in one step


class PageQueue(Protocol):
    """One direction of ballooning."""

    @property
    def recorded_pages(self) -> int:
        """Pages that are to go out."""

    @property
    def pages_in_flight(self) -> int:
        """Pages sent and not yet used by the device."""

    @property
    def room_pages(self) -> int:
        """Pages that can be sent now, at best."""

    def record(self, runs: Runs) -> None:
        """Note pages that are to go out. Raises XBitmapError, and notes none."""

    def send(self, pages_max: int) -> Runs:
        """Send recorded pages, as many as wanted and as there is room for; which they were."""

    def send_singly(self, pfns: U64Array) -> int:
        """Send pages of which none is recorded, and record none; how many there was room for."""

    def take_back(self) -> Runs:
        """Forget what is recorded and not sent; which pages they were."""

    def take_used(self) -> Runs:
        """Pages, ascending, that the device gave back since the last call. Raises DeviceProtocolError."""

    def save(self) -> dict[str, Any]:
        """What RAM and the ring do not say."""

    def restore(self, saved: dict[str, Any]) -> None:
        """Take over what `save` gave. Raises RestoreError."""


class BalloonPages:
    """The pages of one balloon and their two queues.

    Attributes:
        allocate_ns: spent on finding pages to inflate, in all. send_ns: on recording them and putting them out.
    """

    def __init__(
        self,
        rings: Sequence[DriverRing],
        area: RingArea,
        memory: memoryview,
        kicks: Sequence[Callable[[], None]],
        *,
        frames: FrameTable,
        buddy: BuddyAllocator,
    ) -> None:
        self._frames = frames
        self._buddy = buddy
        self._arrays: list[PageQueue] = [
            PfnArrays(queue, rings[queue], area, memory, kicks[queue])
            for queue in (QUEUE_INFLATE, QUEUE_DEFLATE)
        ]
        self._runs: list[PageQueue] = [
            SgQueue(rings[queue], frames.pages, kicks[queue]) for queue in (QUEUE_INFLATE, QUEUE_DEFLATE)
        ]
        self.inflate, self.deflate = self._arrays
        self.allocate_ns = self.send_ns = 0
        self._search_from = 0  # the lowest ballooned page is not below

    def use(self, *, runs: bool) -> None:
        """Settle how pages travel; nothing may be on the queues."""
        self.inflate, self.deflate = self._runs if runs else self._arrays

    @property
    def ballooned(self) -> int:
        """Pages in the balloon, in flight or not."""
        return int(np.count_nonzero(self._frames.owner == OWNER_BALLOON))

    # --- in ---------------------------------------------------------------------------------------

    def allocate(self, count: int) -> Runs:
        """Take up to `count` pages for the balloon. Hold no lock of the balloon's (rule 1).

        Falls short when memory does: the page cache is asked for its pages, held blocks and the balloon itself are
        not, and a reserve stays.
        """
        started = time.perf_counter_ns()
        runs = self._take(count)
        missing = count - pages_in(runs)
        if missing and self._buddy.pressure.relieve(missing, first=PRESSURE_CACHE, last=PRESSURE_CACHE):
            runs = joined(runs, self._take(missing))
        self.allocate_ns += time.perf_counter_ns() - started
        return runs

    def _take(self, count: int) -> Runs:
        return alloc_runs(self._buddy, count, kind=FrameKind.BALLOON, owner=OWNER_BALLOON_NEW)

    def record_new(self, runs: Runs) -> int:
        """Note what `allocate` gave for sending; how many pages. What cannot be noted is free again, not lost."""
        started = time.perf_counter_ns()
        try:
            self.inflate.record(runs)
        except XBitmapError:
            free_runs(self._buddy, runs)
            return 0
        self.send_ns += time.perf_counter_ns() - started
        return pages_in(runs)

    def send_inflation(self, pages_max: int) -> int:
        """Send recorded pages; from now on they are in the balloon. How many."""
        started = time.perf_counter_ns()
        runs = self.inflate.send(pages_max)
        self._adopt(runs)
        self.send_ns += time.perf_counter_ns() - started
        return pages_in(runs)

    def send_new(self, pfns: U64Array) -> int:
        """Send pages that were not recorded, one entry each (rule 4); how many there was room for."""
        count = self.inflate.send_singly(pfns)
        self._adopt(runs_of_pages(pfns[:count]))
        return count

    def give_back(self) -> int:
        """Free what is recorded and not sent; how many pages."""
        runs = self.inflate.take_back()
        free_runs(self._buddy, runs)
        return pages_in(runs)

    # --- out --------------------------------------------------------------------------------------

    def send_deflation(self, count: int) -> int:
        """Send ballooned pages, the lowest first, as runs or arrays; how many there was room for."""
        pfns = self._lowest(min(count, self.deflate.room_pages))
        try:
            self.deflate.record(runs_of(pfns.view(np.int64)))
        except XBitmapError:
            return self.deflate.send_singly(pfns)
        sent = self.deflate.send(count)
        self.deflate.take_back()  # those are in the balloon as before
        return pages_in(sent)

    def send_deflation_singly(self, count: int) -> int:
        """Send ballooned pages, one entry each (rule 4); how many there was room for."""
        return self.deflate.send_singly(self._lowest(count))

    def take_acknowledged(self) -> int:
        """Take back what the device used, and free what was deflated; how many pages."""
        self.inflate.take_used()
        freed = self.deflate.take_used()
        free_runs(self._buddy, freed)
        return pages_in(freed)

    def save(self) -> dict[str, Any]:
        """What RAM and the rings do not say."""
        return {"inflate": self.inflate.save(), "deflate": self.deflate.save()}

    def restore(self, saved: dict[str, Any]) -> None:
        """Take over what `save` gave, after `use`.

        Raises:
            RestoreError: it does not fit the rings.
        """
        try:
            self.inflate.restore(saved["inflate"])
            self.deflate.restore(saved["deflate"])
        except (KeyError, TypeError, AttributeError) as error:
            raise RestoreError(f"saved balloon pages: {error!r}") from error

    def _adopt(self, runs: Runs) -> None:
        starts, ends = runs
        if starts.size:
            self._frames.mark_owner_runs(starts, ends, OWNER_BALLOON)
            self._search_from = min(self._search_from, int(starts[0]))

    def _lowest(self, count: int) -> U64Array:
        """The lowest pages of the balloon, ascending; nothing of them is in flight."""
        owner, at = self._frames.owner, self._search_from
        pieces: list[U64Array] = []
        left = count
        while left and at < owner.size:
            found = np.flatnonzero(owner[at : at + _SEARCH_PAGES] == OWNER_BALLOON)[:left] + at
            if found.size and not pieces:
                self._search_from = int(found[0])
            pieces.append(found.astype(np.uint64))
            left -= int(found.size)
            at += _SEARCH_PAGES
        return np.concatenate(pieces) if pieces else np.empty(0, dtype=np.uint64)
