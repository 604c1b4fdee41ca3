"""Where the parts of a split virtqueue lie (virtio 1.2 section 2.7), and the raw views both sides use.

Rule 1: guest address == offset into `memory`, the whole guest RAM.
Rule 2: indices and flags are read and written through `memoryview.cast("H")`, one aligned 16-bit access each:
        `struct.pack_into` may store byte by byte, and a torn index is a wrong index.
Rule 3: table and ring entries are published by the index that follows them, never before it. Python has no
        memory fence; x86 keeps stores in order, and the kick's system call orders the rest. The one race that
        leaves open (I publish while you re-enable notifications) is closed by looking again after
        re-enabling.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import numpy as np

from virtio.errors import GuestProtocolError

SIZE_MAX = 32768  # section 2.7: the queue size is a power of two, at most 2**15
CHAIN_BYTES_LIMIT = 1 << 32  # section 2.7.5: a used length has 32 bits, so a chain must stay below
DESC_F_NEXT = 1
DESC_F_WRITE = 2
DESC_F_INDIRECT = 4
AVAIL_F_NO_INTERRUPT = 1
USED_F_NO_NOTIFY = 1

DESCRIPTOR = np.dtype([("address", "<u8"), ("length", "<u4"), ("flags", "<u2"), ("next", "<u2")])
DESCRIPTOR_BYTES = 16
USED_ELEMENT_BYTES = 8
assert DESCRIPTOR.itemsize == DESCRIPTOR_BYTES
assert sys.byteorder == "little", "ring fields are accessed natively; big-endian hosts are not supported"

Buffer = tuple[int, int]  # (guest address, length in bytes)


@dataclass(frozen=True, slots=True)
class RingLayout:
    """Guest addresses of a split ring's three parts, and its size (entries, a power of two)."""

    desc: int
    avail: int
    used: int
    size: int


def avail_bytes(size: int) -> int:
    """Bytes of the driver area: flags, idx, ring, used_event."""
    return 6 + 2 * size


def used_bytes(size: int) -> int:
    """Bytes of the device area: flags, idx, ring, avail_event."""
    return 6 + USED_ELEMENT_BYTES * size


def ring_bytes(size: int) -> int:
    """Bytes that `layout_at` takes for a ring of `size` entries, a multiple of 16."""
    return layout_at(0, size).used + used_bytes(size) + 15 & ~15


def layout_at(address: int, size: int) -> RingLayout:
    """The three parts one after the other from `address` (a multiple of 16) on."""
    assert address % 16 == 0, address
    avail = address + DESCRIPTOR_BYTES * size
    return RingLayout(desc=address, avail=avail, used=avail + avail_bytes(size) + 3 & ~3, size=size)


def check_layout(layout: RingLayout, memory_bytes: int, first_address: int = 0) -> None:
    """Raise GuestProtocolError ("ring_layout") unless size, alignment and place are legal (section 2.7).

    Guest RAM is what lies from `first_address` up to `memory_bytes`.
    """
    size = layout.size
    if not 0 < size <= SIZE_MAX or size & (size - 1):
        raise GuestProtocolError("ring_layout", f"size {size} is no power of two up to {SIZE_MAX}")
    parts = (
        ("descriptor table", layout.desc, DESCRIPTOR_BYTES * size, 16),
        ("available ring", layout.avail, avail_bytes(size), 2),
        ("used ring", layout.used, used_bytes(size), 4),
    )
    for name, address, length, alignment in parts:
        if address % alignment:
            raise GuestProtocolError("ring_layout", f"{name} at {address:#x} is not {alignment}-byte aligned")
        if not first_address <= address <= memory_bytes - length:
            raise GuestProtocolError("ring_layout", f"{name} at {address:#x} leaves {memory_bytes:#x} bytes")


def need_event(event: int, new: int, old: int) -> bool:
    """Whether moving an index from `old` to `new` passes the other side's event index (section 2.7.10)."""
    return (new - event - 1) & 0xFFFF < (new - old) & 0xFFFF


class RingView:
    """Raw access to one ring's memory; no rules, no state.

    `words` is RAM as 16-bit words; the `*_at` attributes index it. `table`, `avail` and `used` are numpy
    views of the descriptor table (structured), the available ring (size,) and the used ring (size, 2: id,
    length).
    """

    def __init__(self, memory: memoryview, layout: RingLayout) -> None:
        """View the ring at `layout`, which must be legal for `memory` (a writable view of bytes)."""
        assert not memory.readonly
        size = layout.size
        self.words = memory[: len(memory) & ~1].cast("H")
        self.table = np.frombuffer(memory, DESCRIPTOR, count=size, offset=layout.desc)
        self.avail = np.frombuffer(memory, "<u2", count=size, offset=layout.avail + 4)
        self.used = np.frombuffer(memory, "<u4", count=2 * size, offset=layout.used + 4).reshape(size, 2)
        self.avail_flags_at = layout.avail >> 1
        self.avail_index_at = self.avail_flags_at + 1
        self.used_event_at = self.avail_flags_at + 2 + size
        self.used_flags_at = layout.used >> 1
        self.used_index_at = self.used_flags_at + 1
        self.avail_event_at = self.used_flags_at + 2 + 4 * size

    def close(self) -> None:
        """Let go of the memory, so that its owner can unmap it."""
        self.words.release()
        self.table = np.empty(0, DESCRIPTOR)
        self.avail = np.empty(0, np.uint16)
        self.used = np.empty((0, 2), np.uint32)
