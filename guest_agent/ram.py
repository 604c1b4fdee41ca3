"""Guest RAM: one shared memfd, mapped once.

Rule 1: guest physical address 0 is offset 0 of the memfd; there is one region.
Rule 2: the guest writes RAM through this mapping and in no other way, because only writes through the
        registered mapping are seen by the kernel's write tracking (no pwrite, no second mapping, no forked
        child).
Rule 3: every view keeps the mapping alive; close() gives up this object's share, the last view ends the
        mapping.
"""

import fcntl
import mmap
import os
from dataclasses import dataclass
from typing import Final, Self

import numpy as np

from guest_agent import uffd
from guest_agent.arrays import PAGE_BYTES, PAGE_WORDS, U8Array, U64Array
from guest_agent.errors import RestoreError

MEMORY_BYTES_MAX: Final = 1 << 44  # page frame numbers are 32 bits on the balloon's queues

# The node maps the same memfd: a size that can no longer change cannot turn its loads into SIGBUS.
# Punching holes, which is what a balloon does, stays possible.
_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


@dataclass(frozen=True, slots=True)
class WriteProtect:
    """What the kernel offers for tracking the guest's writes.

    pagemap_fd answers PAGEMAP_SCAN for base_address onwards; it is None, and reason says why, when it cannot.
    Both descriptors belong to the GuestRam.
    """

    pagemap_fd: int | None
    reason: str


class GuestRam:
    """The guest's memory and its views.

    Attributes:
        memory: writable memoryview of bytes over all of RAM.
        words: uint64, shape (pages, 512). bytes: uint8, shape (pages, 4096).
        pages: number of 4 KiB pages. fd: the memfd. base_address: where RAM is mapped in this process.
    """

    def __init__(self, fd: int, memory_bytes: int) -> None:
        """Map fd, which from now on belongs to this object; use create() or adopt()."""
        mapping = mmap.mmap(fd, memory_bytes, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        # A child's writes would be invisible to the tracking, and RAM in a core dump helps nobody.
        mapping.madvise(mmap.MADV_DONTFORK)
        mapping.madvise(mmap.MADV_DONTDUMP)
        self.fd = fd
        self.memory_bytes = memory_bytes
        self.pages = memory_bytes // PAGE_BYTES
        self.memory = memoryview(mapping)
        flat: U64Array = np.frombuffer(mapping, dtype=np.uint64)
        self.words: U64Array = flat.reshape(self.pages, PAGE_WORDS)
        self.bytes: U8Array = flat.view(np.uint8).reshape(self.pages, PAGE_BYTES)
        self.base_address = int(flat.ctypes.data)
        self._tracking: WriteProtect | None = None
        self._tracking_fds: list[int] = []
        self._closed = False

    @classmethod
    def create(cls, memory_bytes: int) -> Self:
        """Make fresh RAM; it reads as zeros.

        Raises:
            ValueError: memory_bytes is no positive multiple of a page, or more than 16 TiB.
        """
        _check_size(memory_bytes)
        fd = os.memfd_create("ballast-guest-ram", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, memory_bytes)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
            return cls(fd, memory_bytes)
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def adopt(cls, memfd: int, memory_bytes: int) -> Self:
        """Map a RAM image that somebody else filled; memfd then belongs to the result.

        Raises:
            RestoreError: the file's size is not memory_bytes (memfd stays the caller's).
            ValueError: as create().
        """
        _check_size(memory_bytes)
        size = os.fstat(memfd).st_size
        if size != memory_bytes:
            raise RestoreError(f"the memory image has {size} bytes, {memory_bytes} were announced")
        return cls(memfd, memory_bytes)

    def protect(self) -> WriteProtect:
        """Register RAM for asynchronous write protection; the same answer when asked again.

        A kernel that lacks a feature, or a container that may not use it, is an answer with a reason, never
        an error.
        """
        if self._tracking is None:
            self._tracking = self._register()
        return self._tracking

    def _register(self) -> WriteProtect:
        step = "userfaultfd cannot be opened"
        try:
            fault_fd = uffd.open_userfaultfd()
            self._tracking_fds.append(fault_fd)
            step = "userfaultfd has no asynchronous write protection"
            uffd.enable_async_write_protect(fault_fd)
            step = "guest RAM cannot be registered with userfaultfd"
            uffd.register_write_protect(fault_fd, self.base_address, self.memory_bytes)
            step = "/proc/self/pagemap cannot be opened"
            pagemap_fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
            self._tracking_fds.append(pagemap_fd)
            step = "pagemap has no PAGEMAP_SCAN"
            uffd.probe_pagemap_scan(pagemap_fd, self.base_address, PAGE_BYTES)
        except OSError as error:
            self._close_tracking()
            return WriteProtect(None, f"{step}: {error.strerror or error}")
        return WriteProtect(pagemap_fd, "")

    def close(self) -> None:
        """Give up the descriptors and the views of this object; may be called twice."""
        if self._closed:
            return
        self._closed = True
        self._close_tracking()
        os.close(self.fd)
        self.memory = memoryview(b"")
        self.words = np.empty((0, PAGE_WORDS), dtype=np.uint64)
        self.bytes = np.empty((0, PAGE_BYTES), dtype=np.uint8)

    def _close_tracking(self) -> None:
        while self._tracking_fds:
            os.close(self._tracking_fds.pop())


def _check_size(memory_bytes: int) -> None:
    if memory_bytes <= 0 or memory_bytes % PAGE_BYTES or memory_bytes > MEMORY_BYTES_MAX:
        raise ValueError(f"guest memory of {memory_bytes} bytes is not 1 to 2^32 whole pages of {PAGE_BYTES}")
