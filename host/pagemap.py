"""PAGEMAP_SCAN: which pages did the guest write since we last asked (Linux 6.7, fs/proc/task_mmu.c).

Rule 1: reading and protecting again is one ioctl, atomic per page: a write is in this harvest or the next.
Rule 2: a scan of memory that is not write-protected asynchronously is refused, never empty.
Rule 3: no Python loop over pages: the kernel answers with runs, and runs become a set in one step.

The guest process registered its mapping with userfaultfd (WP_ASYNC) and passed a descriptor of its own
pagemap; that descriptor is all the scanning process needs: no capability, no ptrace.
"""

from __future__ import annotations

import fcntl
import os
import struct
from typing import TYPE_CHECKING

import numpy as np

from host.errors import TrackerUnavailable
from migration.page_bits import PageBits
from migration.pages import PAGE_BYTES

if TYPE_CHECKING:
    from migration.pages import U32Array, U64Array

# struct pm_scan_arg, include/uapi/linux/fs.h: size, flags, start, end, walk_end, vec, vec_len, max_pages,
# category_inverted, category_mask, category_anyof_mask, return_mask.
PM_SCAN_ARG = struct.Struct("<12Q")
assert PM_SCAN_ARG.size == 96
WALK_END_OFFSET = 32
# struct page_region: start, end, categories
PAGE_REGION_WORDS = 3

# _IOWR('f', 16, struct pm_scan_arg)
PAGEMAP_SCAN = (3 << 30) | (PM_SCAN_ARG.size << 16) | (ord("f") << 8) | 16
PM_SCAN_WP_MATCHING = 1 << 0
PM_SCAN_CHECK_WPASYNC = 1 << 1
PAGE_IS_WPALLOWED = 1 << 0
PAGE_IS_WRITTEN = 1 << 1

REGIONS_PER_CALL = 1 << 16  # 1.5 MiB of answers; more regions take another call


class WriteScanner:
    """Harvests the guest's writes to `pages` pages mapped at `base_address` of the process behind the fd.

    Takes the descriptor over and closes it in `close`. One thread at a time.
    """

    def __init__(self, pagemap_fd: int, base_address: int, pages: int) -> None:
        self.pages = pages
        self._fd = pagemap_fd
        self._base = base_address
        self._end = base_address + pages * PAGE_BYTES
        self._regions = np.zeros((REGIONS_PER_CALL, PAGE_REGION_WORDS), dtype=np.uint64)
        self._armed = False

    def scan_and_protect(self) -> PageBits:
        """The pages written since the last call; the first call protects and answers "all".

        Raises:
            TrackerUnavailable: no PAGEMAP_SCAN here, or the range is not (or no longer) tracked.
        """
        if not self._armed:
            self._require_tracked(self._base, self._end)
        written = self._scan(
            self._base, self._end, PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC, PAGE_IS_WRITTEN
        )
        # The walk skips addresses without a mapping in silence, and a process that ended has none at all.
        # Looking at the edges afterwards makes "nothing was written" mean what it says.
        self._require_tracked(self._base, self._base + PAGE_BYTES)
        self._require_tracked(self._end - PAGE_BYTES, self._end)
        if not self._armed:
            self._armed = True
            return PageBits.full(self.pages)
        first = (written[:, 0] - np.uint64(self._base)) // np.uint64(PAGE_BYTES)
        count = (written[:, 1] - written[:, 0]) // np.uint64(PAGE_BYTES)
        return PageBits.of_runs(first, count, self.pages)

    def forget(self, pfn_first: U64Array, page_count: U32Array | U64Array) -> None:
        """Protect these ranges of pages again and forget who wrote there. LOSES WRITES: for experiments only.

        Raises:
            TrackerUnavailable: the ranges are not tracked.
        """
        for first, count in zip(pfn_first.tolist(), page_count.tolist(), strict=True):
            start = self._base + first * PAGE_BYTES
            self._scan(
                start,
                start + count * PAGE_BYTES,
                PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC,
                PAGE_IS_WRITTEN,
            )

    def close(self) -> None:
        """Close the pagemap descriptor. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _require_tracked(self, start: int, end: int) -> None:
        regions = self._scan(start, end, 0, PAGE_IS_WPALLOWED)
        tracked_bytes = int((regions[:, 1] - regions[:, 0]).sum())
        if tracked_bytes != end - start:
            raise TrackerUnavailable(
                f"the guest's mapping at {start:#x} is not registered for asynchronous write protection"
                f" ({tracked_bytes} of {end - start} bytes are)"
            )

    def _scan(self, start: int, end: int, flags: int, category: int) -> U64Array:
        """Regions (start, end, categories) of `category`, ascending; walks on until the end is reached."""
        found: list[U64Array] = []
        position = start
        while position < end:
            argument = bytearray(
                PM_SCAN_ARG.pack(
                    PM_SCAN_ARG.size, flags, position, end, 0,
                    self._regions.ctypes.data, len(self._regions), 0,
                    0, category, 0, category,
                )
            )  # fmt: skip
            try:
                count = fcntl.ioctl(self._fd, PAGEMAP_SCAN, argument)
            except OSError as error:
                raise TrackerUnavailable(f"PAGEMAP_SCAN failed: {error.strerror}") from error
            walked = int.from_bytes(argument[WALK_END_OFFSET : WALK_END_OFFSET + 8], "little")
            if walked <= position:
                raise TrackerUnavailable(f"PAGEMAP_SCAN does not advance at {position:#x}")
            position = walked
            if count:
                found.append(self._regions[:count].copy())
        return np.concatenate(found) if found else np.zeros((0, PAGE_REGION_WORDS), dtype=np.uint64)
