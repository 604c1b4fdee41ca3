"""The boot page: what a memory image says about itself, and the fixed layout behind it.

Rule 1: the layout is a function of the number of pages alone; an image whose boot page says anything else is
        refused.
Rule 2: page 0 is the boot page, then the ring area, then the frame table (three arrays), then the buddy maps;
        each part starts on a page and all of them are kind KERNEL for ever.
Rule 3: the guest epoch and the beat counter live here, in guest RAM, and nowhere else.
"""

from dataclasses import astuple, dataclass, fields
from typing import Final, Self

import numpy as np

from guest_agent.arrays import PAGE_BYTES, U64Array
from guest_agent.errors import RestoreError
from guest_agent.ram import GuestRam

MAGIC: Final = b"BALLAST1"
VERSION: Final = 1
RING_PFN: Final = 1
RING_PAGES: Final = 64
ORDER_MAX: Final = 10  # 4 MiB: Linux's largest buddy block on x86
ORDERS: Final = ORDER_MAX + 1


@dataclass(frozen=True, slots=True)
class MemoryLayout:
    """Where the guest kernel keeps its tables: byte offsets from guest physical address 0."""

    pages: int
    kind_offset: int  # u8 per page
    owner_offset: int  # u16 per page
    index_offset: int  # u32 per page
    free_map_offset: int  # u8 per block, orders 0..10 one after the other, each a page multiple
    pageblock_offset: int  # u8 per block of the largest order
    reserved_pages: int  # everything above: pages 0..reserved_pages-1 are the kernel's

    @classmethod
    def for_pages(cls, pages: int) -> Self:
        """Lay out a guest of so many pages.

        Raises:
            ValueError: no page would be left for the guest.
        """
        kind = (RING_PFN + RING_PAGES) * PAGE_BYTES
        owner = kind + _whole_pages(pages)
        index = owner + _whole_pages(2 * pages)
        free_map = index + _whole_pages(4 * pages)
        pageblock = free_map + sum(_whole_pages(free_map_blocks(pages, order)) for order in range(ORDERS))
        reserved = (pageblock + _whole_pages(free_map_blocks(pages, ORDER_MAX))) // PAGE_BYTES
        if reserved >= pages:
            raise ValueError(f"a guest of {pages} pages has no room: {reserved} are its kernel's")
        return cls(pages, kind, owner, index, free_map, pageblock, reserved)

    def free_map_offset_of(self, order: int) -> int:
        """Byte offset of one order's free map."""
        before = (_whole_pages(free_map_blocks(self.pages, lower)) for lower in range(order))
        return self.free_map_offset + sum(before)


def free_map_blocks(pages: int, order: int) -> int:
    """Entries of one order's free map: whole pageblocks, so that every block's buddy has an entry."""
    return -(-pages >> ORDER_MAX) << (ORDER_MAX - order)


def _whole_pages(size: int) -> int:
    return -(-size // PAGE_BYTES) * PAGE_BYTES


# All fields are 8 bytes and aligned, so that a counter is one plain store (no torn reads by the node).
BOOT_RECORD: Final = np.dtype(
    [("magic", "S8"), ("version", "<u8")]
    + [(field.name, "<u8") for field in fields(MemoryLayout)]
    + [("memory_ready", "<u8"), ("guest_epoch", "<u8"), ("beats", "<u8")]
)
assert BOOT_RECORD.itemsize == 12 * 8


class BootPage:
    """The record in page 0.

    Attributes:
        layout: where everything is. ring_pfn, ring_pages, ring_address: the area of the driver's rings.
        guest_epoch: counts the hosts that ran this guest, from 1. beats: the guest's own clock.
        memory_ready: whether the frame table and the buddy maps were laid out.
    """

    def __init__(self, ram: GuestRam, layout: MemoryLayout) -> None:
        """Attach to page 0; use format() or open()."""
        self.layout = layout
        self.ring_pfn = RING_PFN
        self.ring_pages = RING_PAGES
        self.ring_address = RING_PFN * PAGE_BYTES
        record = ram.bytes[0, : BOOT_RECORD.itemsize].view(BOOT_RECORD)
        self._ready: U64Array = record["memory_ready"]
        self._epoch: U64Array = record["guest_epoch"]
        self._beats: U64Array = record["beats"]

    @classmethod
    def format(cls, ram: GuestRam, *, guest_epoch: int = 1) -> Self:
        """Write the boot page of a new guest.

        Raises:
            ValueError: RAM is too small for its own tables.
        """
        layout = MemoryLayout.for_pages(ram.pages)
        ram.words[0] = 0
        record = ram.bytes[0, : BOOT_RECORD.itemsize].view(BOOT_RECORD)
        record[0] = (MAGIC, VERSION, *astuple(layout), 0, guest_epoch, 0)
        return cls(ram, layout)

    @classmethod
    def open(cls, ram: GuestRam) -> Self:
        """Read the boot page of a memory image.

        Raises:
            RestoreError: it is not a guest's image, of another version, or laid out for another size.
        """
        record = ram.bytes[0, : BOOT_RECORD.itemsize].view(BOOT_RECORD)[0]
        if bytes(record["magic"]) != MAGIC:
            raise RestoreError(
                f"no guest in this memory: the boot page starts with {bytes(record['magic'])!r}"
            )
        if int(record["version"]) != VERSION:
            raise RestoreError(
                f"memory image of version {int(record['version'])}, this agent knows {VERSION}"
            )
        try:
            layout = MemoryLayout.for_pages(ram.pages)
        except ValueError as error:
            raise RestoreError(str(error)) from error
        stored = tuple(int(record[field.name]) for field in fields(MemoryLayout))
        if stored != astuple(layout):
            raise RestoreError(f"memory image laid out as {stored}, expected {astuple(layout)}")
        if not int(record["memory_ready"]):
            raise RestoreError("the memory image has no memory manager: its guest never booted")
        return cls(ram, layout)

    @property
    def guest_epoch(self) -> int:
        """Which incarnation of the guest this is: 1 where it booted, one more at each host after it."""
        return int(self._epoch[0])

    @guest_epoch.setter
    def guest_epoch(self, value: int) -> None:
        self._epoch[0] = value

    @property
    def beats(self) -> int:
        """Beats of the guest's clock since it booted."""
        return int(self._beats[0])

    @beats.setter
    def beats(self, value: int) -> None:
        self._beats[0] = value

    @property
    def memory_ready(self) -> bool:
        """Whether frame table and buddy maps hold a memory manager's state."""
        return bool(self._ready[0])

    @memory_ready.setter
    def memory_ready(self, value: bool) -> None:
        self._ready[0] = value
