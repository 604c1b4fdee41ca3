"""What the hint queue brought, as the roles get it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from host.clock import now_ns
from migration.events import HintsReported
from virtio.hint_session import HintRange, HintStarted, HintStopped, RejectedRange, StaleRange

if TYPE_CHECKING:
    from collections.abc import Sequence

    from migration.pages import U64Array
    from virtio.hint_session import HintEvent


@dataclass(frozen=True, slots=True, eq=False)
class HintBatch:
    """What one pass over the hint queue brought.

    Attributes:
        command_id: the id issued last; the ranges are for it.
        events: "started" and "stopped", in order, as the guest said them for this id.
        pfn_first, page_count: valid ranges of whole pages, in the guest's order; they may overlap.
        stale_pages: pages hinted for another id, or after the id was closed.
        rejected_ranges: ranges and commands that no guest may send.
        at_ns: CLOCK_MONOTONIC.
    """

    command_id: int
    events: tuple[str, ...]
    pfn_first: U64Array
    page_count: U64Array
    stale_pages: int
    rejected_ranges: int
    at_ns: int

    @property
    def started(self) -> bool:
        """Whether the guest began its report in this pass."""
        return "started" in self.events

    @property
    def stopped(self) -> bool:
        """Whether the guest ended its report in this pass."""
        return "stopped" in self.events

    def reported(self) -> HintsReported:
        """As the source's machine is told of it."""
        return HintsReported(
            command_id=self.command_id,
            pfn_first=self.pfn_first,
            page_count=self.page_count,
            stopped=self.stopped,
            stale_pages=self.stale_pages,
            rejected_ranges=self.rejected_ranges,
        )


def batch_of(command_id: int, events: Sequence[HintEvent]) -> HintBatch:
    """The batch of what the device made of a pass."""
    ranges = [(event.pfn_first, event.page_count) for event in events if isinstance(event, HintRange)]
    runs = np.array(ranges, dtype=np.uint64).reshape(-1, 2)
    return HintBatch(
        command_id=command_id,
        events=tuple(
            "started" if isinstance(event, HintStarted) else "stopped"
            for event in events
            if isinstance(event, HintStarted | HintStopped)
        ),
        pfn_first=np.ascontiguousarray(runs[:, 0]),
        page_count=np.ascontiguousarray(runs[:, 1]),
        stale_pages=sum(event.pages for event in events if isinstance(event, StaleRange)),
        rejected_ranges=sum(isinstance(event, RejectedRange) for event in events),
        at_ns=now_ns(),
    )
