"""Fast ballooning (F_SG): one direction's queue, on which runs of pages travel as scatter-gather entries.

Rule 1: pages are recorded in a sparse bitmap, with the lowest and the highest; each run of ones becomes one
        device-writable descriptor, and what went out is cleared from the bitmap.
Rule 2: a run is split at the largest page-aligned length of 32 bits: a length of 4 GiB would read as 0.
Rule 3: whatever has room goes out at once, with one kick, be it a single page; the rest follows when the device
        gave entries back.
Rule 4: adding to a ring that has room never fails; if it does, that is our own bug (an assertion).
Rule 5: what is in flight is known by the ring alone: a restored guest reads it from there.
Rule 6: `send_singly` is for when memory is out: one entry a page, and the bitmap, which might need a leaf, is left
        alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from guest_agent.arrays import PAGE_BYTES
from guest_agent.errors import RestoreError
from guest_agent.page_runs import NO_RUNS, pages_in
from guest_agent.xbitmap import XBitmap
from virtio.errors import DeviceProtocolError

if TYPE_CHECKING:
    from collections.abc import Callable

    from guest_agent.arrays import I64Array, U32Array, U64Array
    from guest_agent.page_runs import Runs
    from virtio.split_ring import DriverRing

__all__ = ["RUN_PAGES_MAX", "SgQueue", "split_runs"]

PAGE_SHIFT: Final = 12
RUN_PAGES_MAX: Final = 0xFFFF_FFFF // PAGE_BYTES  # a descriptor's length has 32 bits


class SgQueue:
    """The inflate or the deflate queue with F_SG. Belongs to whoever holds the balloon's lock."""

    def __init__(self, ring: DriverRing, pages: int, kick: Callable[[], None]) -> None:
        self._ring = ring
        self._pages = pages
        self._kick = kick
        self._bitmap = XBitmap()
        self._lowest, self._highest = pages, -1
        self.recorded_pages = 0
        self.pages_in_flight = 0

    @property
    def room_pages(self) -> int:
        """Pages that can be sent now, if they are one run."""
        return self._pages if self._ring.free_descriptors else 0

    def record(self, runs: Runs) -> None:
        """Note pages that are to go out and are not noted yet.

        Raises:
            XBitmapTryAgain: the bitmap has no room; nothing was noted, the pages are still the caller's.
        """
        starts, ends = runs
        if starts.size:
            self._bitmap.set_runs(starts, ends - 1)
            self._lowest = min(self._lowest, int(starts[0]))
            self._highest = max(self._highest, int(ends[-1]) - 1)
            self.recorded_pages += pages_in(runs)

    def send(self, pages_max: int) -> Runs:
        """Send recorded pages, lowest first, as many as wanted and as the ring has room for; which they were."""
        room = self._ring.free_descriptors
        if not self.recorded_pages or not room or pages_max <= 0:
            return NO_RUNS
        firsts, lasts = self._bitmap.runs(self._lowest, self._highest)
        starts, counts = split_runs(firsts[:room].astype(np.int64), lasts[:room].astype(np.int64) + 1)
        starts, counts = starts[:room], counts[:room]
        reach = np.cumsum(counts)
        needed = int(np.searchsorted(reach, pages_max)) + 1
        starts, counts = starts[:needed], counts[:needed]
        counts[-1] -= max(0, int(counts.sum()) - pages_max)
        self._add(starts, counts)
        end = int(starts[-1] + counts[-1])
        self._bitmap.clear_bit_range(self._lowest, end - 1)
        self.recorded_pages -= int(counts.sum())
        self._lowest = end
        if not self.recorded_pages:
            self._lowest, self._highest = self._pages, -1
        return starts, starts + counts

    def send_singly(self, pfns: U64Array) -> int:
        """Send pages of which none is recorded, one entry each; how many the ring had room for (rule 6)."""
        count = min(int(pfns.size), self._ring.free_descriptors)
        if count:
            self._add(pfns[:count].astype(np.int64), np.ones(count, dtype=np.int64))
        return count

    def take_back(self) -> Runs:
        """Forget what is recorded and not sent; which pages they were."""
        if not self.recorded_pages:
            return NO_RUNS
        firsts, lasts = self._bitmap.runs(self._lowest, self._highest)
        self._bitmap.clear_bit_range(self._lowest, self._highest)
        assert self._bitmap.is_empty(), (self._lowest, self._highest)
        self._lowest, self._highest, self.recorded_pages = self._pages, -1, 0
        return firsts.astype(np.int64), lasts.astype(np.int64) + 1

    def take_used(self) -> Runs:
        """Pages, ascending, whose entries the device gave back since the last call.

        Raises:
            DeviceProtocolError: it gave back what it did not have.
        """
        addresses, lengths = self._ring.used_buffers()
        starts, counts = addresses.astype(np.int64) >> PAGE_SHIFT, lengths.astype(np.int64) >> PAGE_SHIFT
        self.pages_in_flight -= int(counts.sum())
        if self.pages_in_flight < 0:
            raise DeviceProtocolError("used_head", "more pages came back than went out")
        order = np.argsort(starts, kind="stable")
        return starts[order], (starts + counts)[order]

    def save(self) -> dict[str, Any]:
        """Nothing: recorded pages are taken back before a guest is saved, the others are in the ring (rule 5)."""
        assert not self.recorded_pages, self.recorded_pages
        return {}

    def restore(self, saved: dict[str, Any]) -> None:
        """Look up what is in flight in the restored ring.

        Raises:
            RestoreError: the ring holds entries that are no pages of this guest.
        """
        addresses, lengths = self._ring.buffers_in_flight()
        starts, counts = (
            addresses >> np.uint64(PAGE_SHIFT),
            lengths.astype(np.uint64) >> np.uint64(PAGE_SHIFT),
        )
        unaligned = ((addresses | lengths) & np.uint64(PAGE_BYTES - 1)).any()
        if saved or unaligned or (starts >= self._pages).any() or (starts + counts > self._pages).any():
            raise RestoreError(f"saved balloon entries in flight are no pages of a guest of {self._pages}")
        self.pages_in_flight = int(counts.sum())

    def _add(self, starts: I64Array, counts: I64Array) -> None:
        addresses = starts.astype(np.uint64) << np.uint64(PAGE_SHIFT)
        lengths: U32Array = (counts << PAGE_SHIFT).astype(np.uint32)
        added = self._ring.add_inbufs(addresses, lengths)
        assert added == starts.size, (added, starts.size)  # rule 4
        self.pages_in_flight += int(counts.sum())
        if self._ring.publish():
            self._kick()


def split_runs(starts: I64Array, ends: I64Array) -> tuple[I64Array, I64Array]:
    """Runs [start, end) cut where their bytes would need more than 32 bits: (starts, page counts)."""
    lengths = ends - starts
    if not (lengths > RUN_PAGES_MAX).any():
        return starts, lengths
    pieces = -(-lengths // RUN_PAGES_MAX)
    ordinal = np.arange(int(pieces.sum())) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    cut = np.repeat(starts, pieces) + ordinal * RUN_PAGES_MAX
    return cut, np.minimum(np.repeat(ends, pieces) - cut, RUN_PAGES_MAX)
