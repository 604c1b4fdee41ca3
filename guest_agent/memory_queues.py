"""The two queues by which a guest tells of its memory by itself: statistics and free page reporting.

Rule 1: a queue that was not negotiated is not touched.
Rule 2: both belong to whoever holds the balloon's lock, and take bounded turns.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from guest_agent.memory_stats import MemoryStats, memory_figures
from guest_agent.page_report import PageReport
from virtio.balloon import F_REPORTING, F_STATS_VQ, QUEUE_REPORTING, QUEUE_STATS, has

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from guest_agent.buddy import BuddyAllocator
    from guest_agent.ring_area import RingArea
    from virtio.split_ring import DriverRing

__all__ = ["MemoryQueues"]

REPORT_PERIOD_S = 0.1  # freed memory reaches the host about so late; Linux waits 2 s


class MemoryQueues:
    """Stats and reporting of one balloon driver."""

    def __init__(
        self,
        rings: Sequence[DriverRing],
        area: RingArea,
        memory: memoryview,
        kicks: Sequence[Callable[[], None]],
        *,
        buddy: BuddyAllocator,
        ballooned_pages: Callable[[], int],
    ) -> None:
        self._stats = MemoryStats(
            rings[QUEUE_STATS],
            area,
            memory,
            lambda: memory_figures(buddy, ballooned_pages()),
            kicks[QUEUE_STATS],
        )
        self._report = PageReport(rings[QUEUE_REPORTING], buddy, kicks[QUEUE_REPORTING])
        self._report_due = 0.0

    @property
    def reported_pages(self) -> int:
        """Pages that the device acknowledged as reported."""
        return self._report.reported_pages

    def step(self, features: int) -> None:
        """Answer the host's questions and report what is free and new."""
        if has(features, F_STATS_VQ):
            self._stats.step()
        if not has(features, F_REPORTING):
            return
        now = time.monotonic()
        # While a batch is under way the device's interrupt brings us here; else it is the period.
        wanted = self._report.under_way or now >= self._report_due
        if wanted and not self._report.step() and not self._report.under_way:
            self._report_due = now + REPORT_PERIOD_S

    def patience_s(self, features: int) -> float | None:
        """How long `step` need not be called unless the device interrupts; None: for ever."""
        return REPORT_PERIOD_S if has(features, F_REPORTING) else None

    def reset(self) -> None:
        """The device forgot everything: nothing is reported, nothing is under way."""
        self._report.stop()
        self._report_due = 0.0
