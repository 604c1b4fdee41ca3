"""Free page hints as version 17 of the series gave them: walk the free blocks and report them, hold nothing.

Rule 1: a hinted block stays free: it may be in use again before the device looks at the hint (5.5.6.5.1 allows
        it). What makes that safe is the host's rule alone: a hint clears nothing but the set harvested before its
        id was issued.
Rule 2: the walk runs under the zone lock and waits for nothing: a block that finds the queue full is skipped,
        the device is kicked, the walk goes on.
Rule 3: it ends early when the host shows another id.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from guest_agent.balloon_options import HINTS_WALK
from guest_agent.hint_report import BATCH_BLOCKS, HintReport, Phase

if TYPE_CHECKING:
    from collections.abc import Callable

    from guest_agent.arrays import U64Array

__all__ = ["WALK_ORDER_MIN", "WalkReport", "hint_report"]

# The series walked down to single pages. A fragmented guest has so many blocks below 64 KiB that they would only
# find the ring full.
WALK_ORDER_MIN = 4


class WalkReport(HintReport):
    """As `HintReport`, with nothing to give back."""

    def __init__(self, still_wanted: Callable[[], bool], **parts: Any) -> None:
        """As `HintReport`; `still_wanted`: whether the host still shows the id that is reported for."""
        super().__init__(**parts)
        self._still_wanted = still_wanted
        self._batch: list[tuple[int, int]] = []
        self._offered: list[U64Array] = []

    def give_back(self, pages_wanted: int) -> int:
        """Nothing is held."""
        del pages_wanted
        return 0

    def _send_blocks(self) -> bool:
        """The whole walk, then STOP."""
        self._batch, self._offered = [], []
        self._buddy.walk_free_mem_block(self._batch, WALK_ORDER_MIN, self._report_range)
        self._send_batch()
        offered = np.concatenate(self._offered)
        self._let_go(offered[:, 0], offered[:, 1])
        self._phase = Phase.CLOSING
        return True

    def _report_range(self, batch: list[tuple[int, int]], pfn: int, pages: int) -> bool:
        batch.append((pfn, pages))
        if len(batch) == BATCH_BLOCKS:
            self._send_batch()
        return self._still_wanted()

    def _send_batch(self) -> None:
        self.settle()  # room that the device made meanwhile
        blocks = np.array(self._batch, dtype=np.uint64).reshape(-1, 2)
        added = self._offer(blocks[:, 0], blocks[:, 1])
        self.skipped_blocks += len(blocks) - added
        self._offered.append(blocks[:added])
        self._batch.clear()


def hint_report(driver: str, still_wanted: Callable[[], bool], **parts: Any) -> HintReport:
    """The hint driver of this name (balloon_options)."""
    return WalkReport(still_wanted, **parts) if driver == HINTS_WALK else HintReport(**parts)
