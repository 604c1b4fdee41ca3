"""Guest RAM as a vhost-user front-end shared it: one mapped file, read, and given back in runs.

Rule 1: the file cannot shrink under us: it is sealed against that where the kernel allows (a memfd that permits
        seals). Where it does not, its size is looked at before every pass (`still_whole`): touching a mapping
        beyond the end of its file would be SIGBUS for the whole node.
Rule 2: guest RAM is what the region says; the file below `first_page` is the front-end's, not the guest's.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from typing import TYPE_CHECKING

from host.guest_memory import punch_hole
from migration.pages import PAGE_BYTES
from virtio.balloon_device import reader
from virtio.errors import VhostUserError

if TYPE_CHECKING:
    from collections.abc import Callable

    from virtio.page_ranges import PageRuns

REGION_BYTES_MAX = 1 << 44  # page frame numbers have 32 bits


class GuestRegion:
    """One memory region, mapped until `close`. Takes `fd` over, also when it raises.

    Attributes:
        first_page, end_page: guest RAM is the pages from `first_page` up to `end_page`.
        memory: writable mapping; guest address == offset. Reading a hole of it allocates the page.
        sealed: whether the file can shrink no more.

    Raises:
        VhostUserError: "region", for a file that is too short, too large or cannot be mapped.
    """

    def __init__(self, fd: int, guest_address: int, size: int) -> None:
        self._fd = fd
        self._end = guest_address + size
        try:
            self._check(guest_address, size)
            self.sealed = _seal_against_shrinking(fd)
            self._check(guest_address, size)  # it may have shrunk before it was sealed
            mapping = mmap.mmap(fd, self._end, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        except (OSError, ValueError, OverflowError) as error:
            self.close()
            raise VhostUserError("region", f"cannot be mapped: {error}") from error
        except VhostUserError:
            self.close()
            raise
        self.first_page, self.end_page = guest_address // PAGE_BYTES, self._end // PAGE_BYTES
        self.memory = memoryview(mapping)
        self.read: Callable[[int, int], bytes] = reader(self.memory)

    def close(self) -> None:
        """Close the file and let go of the mapping; views that others hold keep it. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self.memory = memoryview(b"")
        self.read = reader(self.memory)

    def still_whole(self) -> bool:
        """Whether the file still backs all of the mapping."""
        return os.fstat(self._fd).st_size >= self._end

    def punch(self, pages: PageRuns) -> int:
        """Give the storage of these pages back, one call a run; returns how many pages could not be."""
        failed = 0
        for first, count in zip(pages.first.tolist(), pages.count.tolist(), strict=True):
            try:
                punch_hole(self._fd, first * PAGE_BYTES, count * PAGE_BYTES)
            except OSError:
                # The pages keep storage and content, which is no wrong, only no gain: the caller counts it.
                failed += count
        return failed

    def _check(self, guest_address: int, size: int) -> None:
        length = os.fstat(self._fd).st_size
        if length < self._end or guest_address % PAGE_BYTES or size % PAGE_BYTES or not size:
            raise VhostUserError("region", f"{guest_address:#x}+{size:#x} of a file of {length:#x} bytes")
        if self._end > REGION_BYTES_MAX:
            raise VhostUserError("region", f"{guest_address:#x}+{size:#x}: more than a balloon can name")


def _seal_against_shrinking(fd: int) -> bool:
    """Whether the file is sealed now: a plain file has no seals, and a memfd may forbid more of them."""
    try:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    except OSError:
        try:
            return bool(fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK)
        except OSError:
            return False
    return True
