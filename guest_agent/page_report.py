"""Free page reporting, the driver's side (virtio 1.2 section 5.5.6.7; mm/page_reporting.c).

Rule 1: reported blocks are isolated: nobody uses them before the device acknowledged (kind HELD, OWNER_REPORT).
Rule 2: a block is reported once; it is again when somebody used one of its pages and freed it.
Rule 3: one batch is under way at a time, of at most BATCH_BLOCKS, and never of more than half of what is free
        above the watermark: reporting makes nobody wait for memory.
Rule 4: what is under way is found in the frame table: a restored guest goes on with it.
Rule 5: memory that the device gave back is as the device left it. A guest that poisons agreed on the value with
        the device (PAGE_POISON) and need not fill it again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from guest_agent.boot import ORDER_MAX
from guest_agent.frames import OWNER_REPORT
from guest_agent.reported import REPORT_ORDER

if TYPE_CHECKING:
    from collections.abc import Callable

    from guest_agent.arrays import U64Array
    from guest_agent.buddy import BuddyAllocator
    from virtio.split_ring import DriverRing

__all__ = ["PageReport"]

BATCH_BLOCKS = 32  # PAGE_REPORTING_CAPACITY of Linux: 128 MiB at most are out of reach at a time
ORDERS_REPORTED = (ORDER_MAX, REPORT_ORDER)
PAGE_SHIFT = 12


class PageReport:
    """The reporting queue. Belongs to whoever holds the balloon's lock.

    Attributes:
        reported_pages: acknowledged by the device since this process started.
    """

    def __init__(self, ring: DriverRing, buddy: BuddyAllocator, kick: Callable[[], None]) -> None:
        self._ring = ring
        self._buddy = buddy
        self._kick = kick
        self.reported_pages = 0

    @property
    def under_way(self) -> bool:
        """Whether the device still has a batch."""
        return self._ring.in_flight > 0

    def step(self) -> bool:
        """Take a batch back, send the next one; whether anything moved."""
        came_back = self._ring.discard_used() > 0
        if self.under_way:
            return came_back
        if came_back:
            self._give_back()
        return self._send() or came_back

    def stop(self) -> None:
        """The device was reset and will not acknowledge: everything is free, and nothing is reported."""
        self._give_back()
        self._buddy.reported.clear()

    def _send(self) -> bool:
        """Isolate and offer the next batch; False: there is nothing to report, or too little is free."""
        spare = max(self._buddy.free_pages - self._buddy.reserve_pages, 0) // 2
        left = BATCH_BLOCKS
        for order in ORDERS_REPORTED:
            heads = self._buddy.isolate_unreported(order, min(left, spare >> order), OWNER_REPORT)
            lengths = np.full(heads.size, 1 << (order + PAGE_SHIFT), dtype=np.uint32)
            added = self._ring.add_inbufs(heads << np.uint64(PAGE_SHIFT), lengths)
            assert added == heads.size, (added, heads.size)  # one batch at a time: there is room
            left -= int(heads.size)
            spare -= int(heads.size) << order
        if left == BATCH_BLOCKS:
            return False
        if self._ring.publish():
            self._kick()
        return True

    def _give_back(self) -> None:
        heads, orders = self._isolated()
        for order in ORDERS_REPORTED:
            chosen = heads[orders == order]
            if chosen.size:
                self._buddy.return_reported(chosen, order)
                self.reported_pages += int(chosen.size) << order

    def _isolated(self) -> tuple[U64Array, U64Array]:
        """First pages and orders of the blocks that are with the device."""
        heads = np.flatnonzero(self._buddy.frames.owner == OWNER_REPORT)
        return heads.astype(np.uint64), self._buddy.frames.index[heads].astype(np.uint64)
