"""The memory of a simulated guest: what each page is to it, and what it wrote where.

Rule 1: a page is written when it is allocated: what a free page holds, or one that comes out of the balloon, means
        nothing to anybody.
Rule 2: what the guest did is logged outside (`Truth`), so that a guest that went back in time is found out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from migration.pages import PAGE_BYTES
from testbed.sim.errors import ViolationError
from virtio.balloon import QUEUE_DEFLATE, QUEUE_HINT, QUEUE_INFLATE, QUEUE_REPORTING
from virtio.ring_layout import layout_at

if TYPE_CHECKING:
    import random

    from migration.pages import BoolArray, U8Array, U64Array
    from testbed.sim.ram import SimRam

USED, FREE, HELD, KERNEL, BALLOONED, REPORTED = range(6)  # kinds of pages
NEEDED = (USED, KERNEL)  # what must be the same wherever the guest runs
DRIVER_PAGE = 0  # what the driver's chains point to
RING_PAGES = {QUEUE_HINT: 1, QUEUE_INFLATE: 2, QUEUE_DEFLATE: 3, QUEUE_REPORTING: 4}
KERNEL_PAGES = 5
RING_SIZE = 64
RINGS = {queue: layout_at(page * PAGE_BYTES, RING_SIZE) for queue, page in RING_PAGES.items()}


class Truth:
    """What the guest did, logged outside its memory."""

    def __init__(self, pages: int) -> None:
        self.content: U64Array = np.zeros(pages, np.uint64)
        self.kinds: U8Array = np.full(pages, FREE, np.uint8)
        self.void: BoolArray = np.zeros(pages, np.bool_)  # the guest gave away what it used
        self.versions = 1
        self.operations = 0


class GuestMemory:
    """One RAM and the guest's own knowledge of it. `written` is the kernel's write protection log."""

    def __init__(self, ram: SimRam, truth: Truth, dice: random.Random) -> None:
        self.ram = ram
        self.kinds = truth.kinds.copy()
        self.written: BoolArray = np.zeros(ram.pages, np.bool_)
        self.truth = truth
        self.dice = dice

    def some(self, kind: int, count: int) -> U64Array:
        """Up to so many pages of a kind, ascending, wherever they are."""
        found = np.flatnonzero(self.kinds == kind)
        if not len(found):
            return found.astype(np.uint64)
        start = self.dice.randrange(len(found))
        return found[start : start + count].astype(np.uint64)

    def write(self, pfns: U64Array, *, zero: bool = False) -> None:
        """Allocate these pages and write them."""
        truth, count = self.truth, len(pfns)
        if zero:
            contents = np.zeros(count, np.uint64)
        else:
            contents = np.arange(truth.versions, truth.versions + count, dtype=np.uint64)
            truth.versions += count
        self.ram.fill(pfns, contents)
        self.written[pfns] = True
        truth.content[pfns] = contents
        self.kinds[pfns] = USED

    def store(self, address: int, data: bytes) -> None:
        """The kernel writes into one of its own pages."""
        self.ram.memory[address : address + len(data)] = data
        self.stored(address // PAGE_BYTES)

    def stored(self, pfn: int) -> None:
        """The kernel wrote there."""
        self.ram.touched(pfn)
        self.written[pfn] = True

    def look(self, pfns: U64Array) -> None:
        """The guest reads its memory, as guests do."""
        wrong = (self.ram.words[pfns, 0] != self.truth.content[pfns]) & ~self.truth.void[pfns]
        if wrong.any():
            raise ViolationError(
                "no lost write", f"the guest reads page {int(pfns[wrong][0])}: not what it wrote"
            )

    def log(self) -> None:
        """Whatever the kinds are now is the truth."""
        self.truth.kinds = self.kinds.copy()
