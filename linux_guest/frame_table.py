"""Which page frames the guest's kernel itself calls free: its frame table, read out of its own RAM.

Rule 1: the table is read while every process of the guest is frozen, so that it says what was free at that moment;
        what /proc/kpageflags shows inside is older than the freeze, and reading it changes it.
Rule 2: nothing about the kernel is assumed: where the table is and how a frame looks comes from the note that the
        kernel writes for dump tools (/sys/kernel/vmcoreinfo). What the note does not say is refused.
Rule 3: before it is believed it is held against /proc/kpageflags, once, while the guest runs (`check_against`).
Rule 4: whoever is in doubt is in use: pages on a CPU's own free list, for example.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeAlias

import numpy as np

from linux_guest.errors import FrameTableError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from linux_guest.ram_file import RamFile
    from linux_guest.uml import LinuxGuest

    U8Array: TypeAlias = NDArray[np.uint8]
    U64Array: TypeAlias = NDArray[np.uint64]

PAGE_BYTES: Final = 4096
USED, FREE, BALLOONED, HELD = range(4)
HINT_BLOCK_PAGES: Final = 1024  # what the kernel's driver hints and holds: blocks of the largest order
# page_type of Linux 4.18 to 6.10 is all ones, with the bit of the page's kind cleared (include/linux/page-flags.h).
NO_TYPE: Final = 0xFFFFFFFF
BUDDY_BIT: Final = 0x80
OFFLINE_BIT: Final = 0x100  # a ballooned page
KPF_NOPAGE: Final = 20  # include/uapi/linux/kernel-page-flags.h
KPF_BUDDY: Final = 10
KPF_OFFLINE: Final = 23
ORDER_MAX: Final = 10  # Linux's largest buddy block on x86


@dataclass(frozen=True, slots=True)
class Layout:
    """How the kernel lays its frame table out: offsets in bytes inside one frame's record of `size` bytes."""

    address: int  # kernel address of frame 0's record
    size: int
    flags: int
    list_links: int
    private: int  # of the first frame of a free block: its order
    page_type: int
    reference_count: int
    excluded_flags: int  # of pages that are linked for another reason: caches and slabs


class FrameTable:
    """The frame table of one guest. Made while the guest runs; usable while it is frozen."""

    def __init__(self, ram: RamFile, layout: Layout, base_address: int) -> None:
        self._ram = ram
        self._layout = layout
        self._base_address = base_address

    @classmethod
    def of(cls, guest: LinuxGuest, ram: RamFile) -> FrameTable:
        """Find it. The guest must be running. Raises FrameTableError, GuestSilentError."""
        address, size = (int(word, 16) for word in guest.sh("cat /sys/kernel/vmcoreinfo").split())
        note = ram.read(address, size).decode("ascii", "replace")
        base = guest.ram_mapping().base_address
        pointer = int.from_bytes(guest.read_kernel(_symbol(note, "mem_map"), 8), "little")
        if _number(note, "NUMBER", "PAGE_BUDDY_MAPCOUNT_VALUE") != ~BUDDY_BIT:
            raise FrameTableError(
                "this kernel marks free pages in a way that is not known here (Linux 4.18 to 6.10)"
            )
        layout = Layout(
            address=pointer,
            size=_number(note, "SIZE", "page"),
            flags=_number(note, "OFFSET", "page.flags"),
            list_links=_number(note, "OFFSET", "page.lru"),
            private=_number(note, "OFFSET", "page.private"),
            page_type=_number(note, "OFFSET", "page._mapcount"),
            reference_count=_number(note, "OFFSET", "page._refcount"),
            excluded_flags=sum(1 << _number(note, "NUMBER", name) for name in ("PG_lru", "PG_slab")),
        )
        return cls(ram, layout, base)

    def kinds(self) -> U8Array:
        """One byte a page of RAM: USED, FREE, BALLOONED or HELD (hinted, until DONE)."""
        records = self._records()
        page_type = self._column(records, self._layout.page_type, 4)
        kinds = np.full(len(records), USED, np.uint8)
        typed = page_type >> 16 == NO_TYPE >> 16
        kinds[typed & (page_type & OFFLINE_BIT == 0)] = BALLOONED
        heads = np.flatnonzero(typed & (page_type & BUDDY_BIT == 0))
        orders = self._column(records, self._layout.private, 8)[heads]
        if (orders > ORDER_MAX).any():
            raise FrameTableError(
                f"a free block of order {int(orders.max())}: the frame table is not understood"
            )
        for order in np.unique(orders).tolist():
            first = heads[orders == order]
            kinds[(first[:, None] + np.arange(1 << order)).ravel()] = FREE
        for first_pfn in self._held_blocks(records):
            kinds[first_pfn : first_pfn + HINT_BLOCK_PAGES] = HELD
        return kinds

    def check_against(self, guest: LinuxGuest) -> None:
        """Compare with what the running guest says in /proc/kpageflags.

        The guest runs meanwhile: only pages whose kind is the same before and after are compared.

        Raises:
            FrameTableError: they do not agree.
        """
        before = self.kinds()
        flags = np.frombuffer(guest.read_file("/proc/kpageflags"), "<u8")
        after = self.kinds()
        pages = min(len(flags), len(before))
        stable = (before == after)[:pages] & (flags[:pages] >> KPF_NOPAGE & 1 == 0)
        for kind, bit in ((FREE, KPF_BUDDY), (BALLOONED, KPF_OFFLINE)):
            differs = stable & ((before[:pages] == kind) != (flags[:pages] >> bit & 1 == 1))
            # A page may have gone away and come back between the two looks, so a few are no contradiction.
            if np.count_nonzero(differs) > pages // 1000:
                raise FrameTableError(
                    f"{np.count_nonzero(differs)} of {pages} pages differ from /proc/kpageflags (bit {bit})"
                )

    # --- parts ------------------------------------------------------------------------------------

    def _records(self) -> U8Array:
        pages = self._ram.size // PAGE_BYTES
        size = self._layout.size
        data = self._ram.read(self._layout.address - self._base_address, pages * size)
        return np.frombuffer(data, np.uint8).reshape(pages, size)

    @staticmethod
    def _column(records: U8Array, offset: int, width: int) -> U64Array:
        """The little-endian field of `width` bytes at `offset` of every record, widened."""
        column = np.ascontiguousarray(records[:, offset : offset + width]).view(f"<u{width}")[:, 0]
        return column.astype(np.uint64)

    def _held_blocks(self, records: U8Array) -> list[int]:
        """First frames of the blocks that the balloon driver holds.

        It allocates what it hints, and keeps it in a list until DONE. Such a block is of the largest order, has
        one reference, belongs to no cache and no process, and is linked to the others of its kind and to a list
        head outside the frame table.
        """
        layout = self._layout
        whole = records[: len(records) // HINT_BLOCK_PAGES * HINT_BLOCK_PAGES]
        references = self._column(whole, layout.reference_count, 4).reshape(-1, HINT_BLOCK_PAGES)
        types = self._column(whole, layout.page_type, 4).reshape(-1, HINT_BLOCK_PAGES)
        flags = self._column(whole, layout.flags, 8).reshape(-1, HINT_BLOCK_PAGES)
        alone = (
            (references[:, 0] == 1) & (references[:, 1:] == 0).all(axis=1) & (types == NO_TYPE).all(axis=1)
        )
        alone &= flags[:, 0] & layout.excluded_flags == 0
        links = np.ascontiguousarray(
            whole[::HINT_BLOCK_PAGES, layout.list_links : layout.list_links + 16]
        ).view("<u8")
        nodes = {
            layout.address + block * HINT_BLOCK_PAGES * layout.size + layout.list_links: (
                block * HINT_BLOCK_PAGES,
                *links[block].tolist(),
            )
            for block in np.flatnonzero(alone).tolist()
        }
        return [nodes[address][0] for address in nodes if self._on_a_list(address, nodes)]

    def _on_a_list(self, start: int, nodes: dict[int, tuple[int, int, int]]) -> bool:
        """Whether following the links from `start` leads over such blocks alone to a list head, and back."""
        address, following = start, nodes[start][1]
        for _ in range(len(nodes)):
            if following not in nodes:
                return self._is_list_head(following, last=address)
            if nodes[following][2] != address:
                return False
            address, following = following, nodes[following][1]
        return False

    def _is_list_head(self, address: int, *, last: int) -> bool:
        offset = address - self._base_address
        if not 0 < offset < self._ram.size - 16 or offset % 8:
            return False
        return int.from_bytes(self._ram.read(offset + 8, 8), "little") == last


def _symbol(note: str, name: str) -> int:
    return _find(note, rf"^SYMBOL\({re.escape(name)}\)=([0-9a-f]+)$", 16)


def _number(note: str, kind: str, name: str) -> int:
    return _find(note, rf"^{kind}\({re.escape(name)}\)=(-?\d+)$", 10)


def _find(note: str, pattern: str, base: int) -> int:
    found = re.search(pattern, note, re.MULTILINE)
    if found is None:
        raise FrameTableError(f"the kernel's note for dump tools has no line {pattern}")
    return int(found[1], base)
