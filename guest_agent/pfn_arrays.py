"""Ballooning by arrays of page frame numbers: one direction's queue and its buffers.

Rule 1: a buffer holds up to 256 little-endian 32-bit page numbers and belongs to the device until it is used.
Rule 2: pages are recorded, then sent as buffers have room; recorded pages can be taken back, sent ones cannot.
Rule 3: what is in flight is a slot number and a count; the page numbers stay in guest RAM, where a restored
        guest finds them again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from guest_agent.arrays import expand_runs
from guest_agent.errors import RestoreError
from guest_agent.page_runs import NO_RUNS, runs_of_pages
from guest_agent.ring_area import ARRAY_SLOTS
from virtio.balloon import PFN_ARRAY_MAX

if TYPE_CHECKING:
    from collections.abc import Callable

    from guest_agent.arrays import U32Array, U64Array
    from guest_agent.page_runs import Runs
    from guest_agent.ring_area import RingArea
    from virtio.split_ring import DriverRing

__all__ = ["PfnArrays"]

PFN_BYTES = 4


class PfnArrays:
    """The inflate or the deflate queue. Belongs to whoever holds the balloon's lock."""

    def __init__(
        self, queue: int, ring: DriverRing, area: RingArea, memory: memoryview, kick: Callable[[], None]
    ) -> None:
        self._ring = ring
        self._kick = kick
        first = area.array_slot(queue, 0)
        # All buffers of the queue are neighbours: one view, a row for each.
        flat = np.frombuffer(memory, dtype="<u4", count=ARRAY_SLOTS * PFN_ARRAY_MAX, offset=first)
        self._arrays: U32Array = flat.reshape(ARRAY_SLOTS, PFN_ARRAY_MAX)
        self._addresses = [area.array_slot(queue, slot) for slot in range(ARRAY_SLOTS)]
        self._counts = [0] * ARRAY_SLOTS  # pages in flight by slot; 0: the slot is free
        self._recorded = np.empty(0, dtype=np.uint64)

    @property
    def room_pages(self) -> int:
        """Pages that can be sent now."""
        return min(self._counts.count(0), self._ring.free_descriptors) * PFN_ARRAY_MAX

    @property
    def pages_in_flight(self) -> int:
        """Pages sent and not yet used by the device."""
        return sum(self._counts)

    @property
    def recorded_pages(self) -> int:
        """Pages that are to go out."""
        return int(self._recorded.size)

    def record(self, runs: Runs) -> None:
        """Note pages that are to go out and are not noted yet."""
        pfns = expand_runs(*runs).view(np.uint64)
        self._recorded = np.concatenate((self._recorded, pfns)) if self._recorded.size else pfns

    def send(self, pages_max: int) -> Runs:
        """Send recorded pages, as many as wanted and as there is room for; which they were."""
        count = min(pages_max, self.room_pages)
        pfns, self._recorded = self._recorded[:count], self._recorded[count:]
        self.send_singly(pfns)
        return runs_of_pages(pfns)

    def take_back(self) -> Runs:
        """Forget what is recorded and not sent; which pages they were."""
        pfns, self._recorded = self._recorded, self._recorded[:0]
        return runs_of_pages(pfns)

    def send_singly(self, pfns: U64Array) -> int:
        """Send pages of which none is recorded; how many there was room for."""
        pfns = pfns[: self.room_pages]
        if not pfns.size:
            return 0
        for start in range(0, pfns.size, PFN_ARRAY_MAX):
            part = pfns[start : start + PFN_ARRAY_MAX]
            slot = self._counts.index(0)
            self._arrays[slot, : part.size] = part
            self._ring.add([(self._addresses[slot], PFN_BYTES * int(part.size))], [], slot)
            self._counts[slot] = int(part.size)
        if self._ring.publish():
            self._kick()
        return int(pfns.size)

    def take_used(self) -> Runs:
        """Pages, ascending, that the device has acknowledged since the last call."""
        done = []
        for buffer in self._ring.used():
            slot = buffer.token
            assert isinstance(slot, int), buffer
            done.append(self._arrays[slot, : self._counts[slot]].astype(np.uint64))
            self._counts[slot] = 0
        return runs_of_pages(np.concatenate(done)) if done else NO_RUNS

    def save(self) -> dict[str, Any]:
        """Counts in flight by slot; recorded pages are taken back before a guest is saved."""
        assert not self.recorded_pages, self.recorded_pages
        return {"counts": list(self._counts)}

    def restore(self, saved: dict[str, Any]) -> None:
        """Take over what `save` gave.

        Raises:
            RestoreError: not ARRAY_SLOTS counts of 0..256.
        """
        counts = saved.get("counts")
        if (
            not isinstance(counts, list)
            or len(counts) != ARRAY_SLOTS
            or not all(type(count) is int and 0 <= count <= PFN_ARRAY_MAX for count in counts)
        ):
            raise RestoreError(f"saved page arrays in flight are malformed: {counts!r}"[:200])
        self._counts = counts
