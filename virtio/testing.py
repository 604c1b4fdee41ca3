"""The other side, for tests of anyone's device: a driver that can do everything right, and can lie.

Rule 1: the honest half uses the same `DriverRing` as a real driver.
Rule 2: the lying half writes raw ring memory and keeps no state: every violation the standard forbids can be
        laid out by its parts (descriptor, available entry, available index).
Rule 3: no device is assumed: memory in, memory out, and `publish` says whether to kick.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import numpy as np

from virtio.balloon import (
    CMD_ID_STOP,
    PAGE_BYTES,
    PFN_ARRAY_MAX,
    QUEUE_COUNT,
    QUEUE_DEFLATE,
    QUEUE_HINT,
    QUEUE_INFLATE,
    QUEUE_STATS,
)
from virtio.balloon_device import BalloonDevice, reader
from virtio.errors import LocalVirtioError
from virtio.ring_layout import DESCRIPTOR_BYTES, RingLayout, layout_at, ring_bytes
from virtio.split_ring import DeviceRing, DriverRing, Used

if TYPE_CHECKING:
    from collections.abc import Sequence

    from virtio.arrays import U32Array
    from virtio.hint_session import HintEvent

_SCRATCH_PAGES = 64  # room for buffers under way; used in turn, 1 KiB each
_SCRATCH_BYTES = 4 * PFN_ARRAY_MAX
_DESCRIPTOR = struct.Struct("<QIHH")


class MockDriver:
    """A balloon driver over bare guest memory, with five rings and a few pages of buffers from `area` on.

    Attributes:
        memory: all of guest RAM.
        layouts: where the rings lie.
        rings: their driver sides.
        area_bytes: what rings and buffers take of guest RAM, from `area` on.
    """

    def __init__(
        self, memory: memoryview, *, area: int = PAGE_BYTES, ring_size: int = 256, event_idx: bool = False
    ) -> None:
        """Lay the rings out. Raises LocalVirtioError when `memory` is too small."""
        step = -(-ring_bytes(ring_size) // PAGE_BYTES) * PAGE_BYTES
        self.area_bytes = QUEUE_COUNT * step + _SCRATCH_PAGES * PAGE_BYTES
        if area % PAGE_BYTES or area + self.area_bytes > len(memory):
            raise LocalVirtioError(f"{self.area_bytes} bytes from {area:#x} do not fit {len(memory)}")
        self.memory = memory
        self.layouts: list[RingLayout] = [
            layout_at(area + step * queue, ring_size) for queue in range(QUEUE_COUNT)
        ]
        self.rings = [DriverRing(memory, layout, event_idx=event_idx) for layout in self.layouts]
        for ring in self.rings:
            ring.format()
        self._scratch = area + QUEUE_COUNT * step
        self._turn = 0

    def write_buffer(self, data: bytes) -> tuple[int, int]:
        """Put up to 1 KiB into the buffer whose turn it is; returns it as (guest address, length)."""
        if len(data) > _SCRATCH_BYTES:
            raise LocalVirtioError(f"{len(data)} bytes in a buffer of {_SCRATCH_BYTES}")
        slots = _SCRATCH_PAGES * PAGE_BYTES // _SCRATCH_BYTES
        address = self._scratch + self._turn % slots * _SCRATCH_BYTES
        self._turn += 1
        self.memory[address : address + len(data)] = data
        return address, len(data)

    def inflate(self, pfns: Sequence[int] | U32Array) -> bool:
        """Give pages away (at most 256); returns whether to kick."""
        return self._pfn_array(QUEUE_INFLATE, pfns)

    def deflate(self, pfns: Sequence[int] | U32Array) -> bool:
        """Take pages back (at most 256); returns whether to kick."""
        return self._pfn_array(QUEUE_DEFLATE, pfns)

    def give(self, queue: int, buffers: Sequence[tuple[int, int]]) -> bool:
        """Offer device-writable buffers (guest address, bytes), one chain each; returns whether to kick.

        Pages of the inflate and deflate queues with F_SG, and of the reporting queue. Raises RingFull.
        """
        ring = self.rings[queue]
        for buffer in buffers:
            ring.add([], [buffer], None)
        return ring.publish()

    def stats(self, data: bytes) -> bool:
        """Send a statistics buffer (`virtio.balloon_stats.encode_stats`); returns whether to kick."""
        ring = self.rings[QUEUE_STATS]
        ring.add([self.write_buffer(data)], [], None)
        return ring.publish()

    def command(self, command_id: int) -> bool:
        """Send a command id on the hint queue; returns whether to kick."""
        return self.command_bytes(struct.pack("<I", command_id))

    def command_bytes(self, data: bytes) -> bool:
        """Send a readable buffer on the hint queue, whatever its length; returns whether to kick."""
        ring = self.rings[QUEUE_HINT]
        ring.add([self.write_buffer(data)], [], None)
        return ring.publish()

    def hint(self, addresses: Sequence[int], length: int) -> int:
        """Hint blocks of `length` bytes, one slot kept for the next id; returns how many fitted."""
        ring = self.rings[QUEUE_HINT]
        lengths = np.full(len(addresses), length, np.uint32)
        count = ring.add_inbufs(np.asarray(addresses, np.uint64), lengths, reserve=1)
        ring.publish()
        return count

    def report(self, command_id: int, addresses: Sequence[int], length: int) -> int:
        """A whole report: id, blocks, STOP; returns how many blocks fitted."""
        self.command(command_id)
        count = self.hint(addresses, length)
        self.command(CMD_ID_STOP)
        return count

    def used(self, queue: int) -> list[Used]:
        """What the device gave back on a queue."""
        return self.rings[queue].used()

    def lie_descriptor(
        self, queue: int, index: int, address: int, length: int, *, flags: int = 0, following: int = 0
    ) -> None:
        """Write one raw descriptor into a ring's table."""
        at = self.layouts[queue].desc + DESCRIPTOR_BYTES * index
        self.lie_descriptor_at(at, address, length, flags=flags, following=following)

    def lie_descriptor_at(
        self, at: int, address: int, length: int, *, flags: int = 0, following: int = 0
    ) -> None:
        """Write one raw descriptor anywhere, such as into an indirect table."""
        _DESCRIPTOR.pack_into(self.memory, at, address, length, flags, following)

    def lie_available(self, queue: int, *heads: int) -> None:
        """Make heads available behind the honest half's back (it must not be used on this queue any more)."""
        layout, words = self.layouts[queue], self.memory.cast("H")
        index_at = (layout.avail >> 1) + 1
        index = words[index_at]
        for head in heads:
            words[index_at + 1 + index % layout.size] = head
            index = (index + 1) & 0xFFFF
        words[index_at] = index

    def lie_available_index(self, queue: int, index: int) -> None:
        """Set a ring's available index to anything."""
        self.memory.cast("H")[(self.layouts[queue].avail >> 1) + 1] = index

    def used_entries(self, queue: int) -> list[tuple[int, int]]:
        """Every (head, length) that the device wrote back, the newest `size` at most, from raw memory."""
        layout, words = self.layouts[queue], self.memory.cast("H")
        index = words[(layout.used >> 1) + 1]
        entries = self.memory[layout.used + 4 : layout.used + 4 + 8 * layout.size].cast("I")
        first = max(0, index - layout.size)
        return [
            (entries[2 * (i % layout.size)], entries[2 * (i % layout.size) + 1]) for i in range(first, index)
        ]

    def close(self) -> None:
        """Let go of the memory."""
        for ring in self.rings:
            ring.close()

    def _pfn_array(self, queue: int, pfns: Sequence[int] | U32Array) -> bool:
        ring = self.rings[queue]
        ring.add([self.write_buffer(np.asarray(pfns, "<u4").tobytes())], [], None)
        return ring.publish()


class MockHost:
    """A device over the mock driver's memory: what a host does with the queues, without a host.

    Attributes:
        memory: all of guest RAM, `pages` pages.
        guest: the driver.
        device: the balloon, with everything it offers negotiated.
        rings: the device's sides of the five rings.
        read: reads guest memory.
    """

    def __init__(self, pages: int, *, ring_size: int = 16) -> None:
        """Guest RAM, driver and device, ready to go."""
        self.memory = memoryview(bytearray(pages * PAGE_BYTES))
        self.guest = MockDriver(self.memory, ring_size=ring_size)
        self.device = BalloonDevice(pages)
        self.device.negotiate(self.device.features_offered)
        self.rings = [DeviceRing(self.memory, layout) for layout in self.guest.layouts]
        self.read = reader(self.memory)

    def hints(self) -> list[HintEvent]:
        """Process the hint queue as far as it goes; every chain goes back."""
        ring = self.rings[QUEUE_HINT]
        events: list[HintEvent] = []
        while chains := ring.pop_all():
            for chain in chains:
                events += self.device.process_hint(chain, self.read)
            ring.push_many([chain.head for chain in chains])
            ring.publish()
        self.device.count_errors(ring.take_errors())
        return events
