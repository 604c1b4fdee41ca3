"""The stats queue: the guest's memory statistics for the host (virtio 1.2 section 5.5.6.3).

Rule 1: from the start one buffer is always with the device; when it comes back the host wants new figures.
Rule 2: a report has the same tags every time: those that this memory manager can tell. It has no swap and no huge
        pages, and swap_in and swap_out are therefore known: 0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from guest_agent.arrays import PAGE_BYTES
from guest_agent.frames import FrameKind
from guest_agent.ring_area import STATS_BYTES
from virtio.balloon_stats import STATS_TAGS, encode_stats

if TYPE_CHECKING:
    from collections.abc import Callable

    from guest_agent.buddy import BuddyAllocator
    from guest_agent.ring_area import RingArea
    from virtio.split_ring import DriverRing

__all__ = ["MemoryStats", "memory_figures"]


def memory_figures(buddy: BuddyAllocator, ballooned_pages: int) -> dict[str, int]:
    """The statistics by their names in `virtio.balloon_stats`; memory in bytes."""
    caches = int(np.count_nonzero(buddy.frames.kind == FrameKind.CACHE))
    free, pressure = buddy.free_pages, buddy.pressure
    return {
        "swap_in": 0,
        "swap_out": 0,
        "memfree": free * PAGE_BYTES,
        "memtot": (buddy.pages - ballooned_pages) * PAGE_BYTES,
        "avail": (max(free - buddy.reserve_pages, 0) + caches) * PAGE_BYTES,
        "caches": caches * PAGE_BYTES,
        "oom_kill": pressure.failures,
        "alloc_stall": pressure.stalls,
        "direct_reclaim": pressure.released_pages,
    }


class MemoryStats:
    """The stats queue. Belongs to whoever holds the balloon's lock."""

    def __init__(
        self,
        ring: DriverRing,
        area: RingArea,
        memory: memoryview,
        figures: Callable[[], dict[str, int]],
        kick: Callable[[], None],
    ) -> None:
        self._ring = ring
        self._address = area.stats_buffer
        self._memory = memory
        self._figures = figures
        self._kick = kick

    def step(self) -> None:
        """Answer the host if it gave the buffer back, or give it the buffer for the first time."""
        self._ring.used()
        if self._ring.in_flight:
            return
        data = encode_stats((STATS_TAGS[name], value) for name, value in self._figures().items())
        assert len(data) <= STATS_BYTES, len(data)
        self._memory[self._address : self._address + len(data)] = data
        self._ring.add([(self._address, len(data))], [], None)
        if self._ring.publish():
            self._kick()
