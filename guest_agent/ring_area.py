"""Where the balloon's rings and small buffers live inside guest RAM.

Rule 1: places are fixed offsets from the ring area that the boot page names: the same on every host.
Rule 2: queue numbers are the standard's, whether or not a feature is on (virtio 1.2 section 5.5.2).
Rule 3: nothing here is read or written; these are addresses only.
"""

from __future__ import annotations

from dataclasses import dataclass

from guest_agent.arrays import PAGE_BYTES
from guest_agent.boot import RING_PAGES
from virtio.balloon import (
    PFN_ARRAY_MAX,
    QUEUE_COUNT,
    QUEUE_DEFLATE,
    QUEUE_HINT,
    QUEUE_INFLATE,
    QUEUE_REPORTING,
    QUEUE_STATS,
)
from virtio.split_ring import RingLayout, layout_at, ring_bytes

__all__ = ["ARRAY_SLOTS", "PFN_ARRAY_BYTES", "RING_SIZES", "STATS_BYTES", "RingArea"]

# 1024 hints in flight are the 4 MiB blocks of a 4 GiB guest: its report needs no second look at the ring.
RING_SIZES = {
    QUEUE_INFLATE: 256,
    QUEUE_DEFLATE: 256,
    QUEUE_STATS: 256,
    QUEUE_HINT: 1024,
    QUEUE_REPORTING: 256,
}
ARRAY_SLOTS = (
    16  # PFN arrays in flight per direction: hides the device's answer time, holds up 16 MiB at most
)
PFN_ARRAY_BYTES = 4 * PFN_ARRAY_MAX
STATS_BYTES = 256  # 25 entries of 10 bytes; Linux 6.12 knows 16
COMMAND_SLOTS = 2  # the id that starts a report and the STOP that ends it may be in flight together


@dataclass(frozen=True, slots=True)
class RingArea:
    """Addresses inside the ring area that starts at guest address `base`."""

    base: int

    @property
    def layouts(self) -> tuple[RingLayout, ...]:
        """The five rings, by queue number, each on pages of its own."""
        address, layouts = self.base, []
        for queue in range(QUEUE_COUNT):
            layouts.append(layout_at(address, RING_SIZES[queue]))
            address += _whole_pages(ring_bytes(RING_SIZES[queue]))
        return tuple(layouts)

    def command_slot(self, slot: int) -> int:
        """Address of one 4-byte command id buffer."""
        assert 0 <= slot < COMMAND_SLOTS, slot
        return self.base + _COMMANDS_OFFSET + 4 * slot

    @property
    def stats_buffer(self) -> int:
        """Address of the one buffer of the stats queue, STATS_BYTES long."""
        return self.base + _COMMANDS_OFFSET + _STATS_OFFSET

    def array_slot(self, queue: int, slot: int) -> int:
        """Address of one PFN array of the inflate or deflate queue."""
        assert queue in (QUEUE_INFLATE, QUEUE_DEFLATE), queue
        assert 0 <= slot < ARRAY_SLOTS, slot
        return self.base + _ARRAYS_OFFSET + PFN_ARRAY_BYTES * (ARRAY_SLOTS * queue + slot)


def _whole_pages(size: int) -> int:
    return -(-size // PAGE_BYTES) * PAGE_BYTES


_COMMANDS_OFFSET = sum(_whole_pages(ring_bytes(RING_SIZES[queue])) for queue in range(QUEUE_COUNT))
_STATS_OFFSET = 64  # on the page of the commands: behind them, 16 of which would fit
_ARRAYS_OFFSET = _COMMANDS_OFFSET + PAGE_BYTES
assert 4 * COMMAND_SLOTS <= _STATS_OFFSET
assert _STATS_OFFSET + STATS_BYTES <= PAGE_BYTES
assert QUEUE_INFLATE == 0
assert QUEUE_DEFLATE == 1
assert _ARRAYS_OFFSET + 2 * ARRAY_SLOTS * PFN_ARRAY_BYTES <= RING_PAGES * PAGE_BYTES
