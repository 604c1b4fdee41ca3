"""Guest RAM as a host sees it: one shared memfd, read, stored to, punched and hashed.

Rule 1: a hole of the memfd is not read through a mapping, because reading it there allocates it. Holes are known
        from SEEK_DATA/SEEK_HOLE; pages are read by pread, or through the mapping where mincore(2) has just said
        that they are there. (One that is punched in that very moment would be a page of zeros again.)
Rule 2: the guest writes while we read: `gather` copies each page exactly once into the caller's private
        buffer, and whatever is decided about a page is decided on that copy.
Rule 3: stores go by pwrite: it allocates a page without zeroing it first, twice as fast as a first touch.
Rule 4: page ranges are checked here, whoever passes them: outside guest RAM is a GuestMemoryError.

Guest physical address 0 is offset 0 of the memfd; there is one region.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import itertools
import mmap
import os
from functools import cached_property
from typing import TYPE_CHECKING, Self

import numpy as np

from host.errors import GuestMemoryError
from migration.codec import ZERO_PAGE_HASH, page_hashes
from migration.pages import PAGE_BYTES, pfns_of, set_runs

if TYPE_CHECKING:
    from collections.abc import Iterator

    from migration.pages import BoolArray, U8Array, U32Array, U64Array

WORDS_PER_PAGE = PAGE_BYTES // 8
HASH_BUFFER_PAGES = 256  # 1 MiB: stays in the second-level cache between pread and hash

# fallocate(2); Python has only posix_fallocate, which cannot punch.
FALLOC_FL_KEEP_SIZE = 1
FALLOC_FL_PUNCH_HOLE = 2
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_libc.fallocate.restype = ctypes.c_int
_libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
MADV_POPULATE_READ = 22  # linux/mman.h


class HostRam:
    """All of one guest's RAM. Owns the descriptor it is given.

    Raises:
        GuestMemoryError: the size is no whole number of pages, or the file is shorter.
    """

    def __init__(self, fd: int, memory_bytes: int) -> None:
        size = os.fstat(fd).st_size
        if memory_bytes <= 0 or memory_bytes % PAGE_BYTES or size < memory_bytes:
            raise GuestMemoryError(f"a file of {size} bytes cannot be guest RAM of {memory_bytes} bytes")
        self.fd = fd
        self.memory_bytes = memory_bytes
        self.pages = memory_bytes // PAGE_BYTES

    @classmethod
    def create(cls, memory_bytes: int) -> Self:
        """Fresh RAM in a memfd of our own: all holes, known zero."""
        fd = os.memfd_create("ballast-ram", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, memory_bytes)
            # A guest agent gets this descriptor: a file that shrinks would be SIGBUS for us.
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            return cls(fd, memory_bytes)
        except BaseException:
            os.close(fd)
            raise

    @cached_property
    def memory(self) -> memoryview:
        """Writable shared mapping of all of RAM, made at first use. Reading a hole through it allocates."""
        access = mmap.PROT_READ | mmap.PROT_WRITE
        return memoryview(mmap.mmap(self.fd, self.memory_bytes, mmap.MAP_SHARED, access))

    @cached_property
    def pages_view(self) -> U8Array:
        """The mapping as bytes, shape (pages, 4096)."""
        return np.frombuffer(self.memory, dtype=np.uint8).reshape(self.pages, PAGE_BYTES)

    @cached_property
    def words(self) -> U64Array:
        """The mapping as little-endian words, shape (pages, 512)."""
        return np.frombuffer(self.memory, dtype=np.uint64).reshape(self.pages, WORDS_PER_PAGE)

    def close(self) -> None:
        """Close the descriptor and drop our mapping; arrays that others still hold keep it mapped."""
        for name in ("words", "pages_view", "memory"):
            self.__dict__.pop(name, None)
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    # --- what is there ----------------------------------------------------------------------------

    def populated(self) -> BoolArray:
        """Mask of the pages that have storage; the rest are holes and read as zero."""
        extents = np.array(list(self._extents()), dtype=np.uint64).reshape(-1, 2)
        mask = np.zeros(self.pages, dtype=np.bool_)
        set_runs(mask, extents[:, 0], extents[:, 1] - extents[:, 0], value=True)
        return mask

    def _extents(self) -> Iterator[tuple[int, int]]:
        """(first, end) page of every run of allocated pages. shmem counts swapped-out pages as data."""
        position = 0
        while position < self.memory_bytes:
            try:
                start = os.lseek(self.fd, position, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:  # only holes from here on
                    return
                raise
            if start >= self.memory_bytes:
                return
            position = min(os.lseek(self.fd, start, os.SEEK_HOLE), self.memory_bytes)
            yield start // PAGE_BYTES, -(-position // PAGE_BYTES)

    # --- reading ----------------------------------------------------------------------------------

    def gather(self, pfns: U64Array, out: memoryview) -> None:
        """Copy the pages `pfns` (strictly ascending) into `out`, bytes, once and in order; holes as zeros.

        Every run is one pread: it neither maps nor allocates anything, whether a page is there or not.
        Measured per MiB: 0.16 ms in one run, as through a fresh mapping; 0.3 ms in 256 single pages, against
        0.24 ms, which would allocate every hole that was punched since somebody looked.
        """
        if len(pfns) == 0:
            return
        first, last = int(pfns[0]), int(pfns[-1])
        if last - first + 1 == len(pfns):
            self._read_exactly(first, out)
            return
        bounds = [0, *(np.flatnonzero(np.diff(pfns) != 1) + 1).tolist(), len(pfns)]
        for start, end in itertools.pairwise(bounds):
            self._read_exactly(int(pfns[start]), out[start * PAGE_BYTES : end * PAGE_BYTES])

    def resident_views(self, run_first: U64Array, run_pages: U32Array) -> list[memoryview] | None:
        """The runs as they stand in the mapping, ready to be copied; None when a page of them is not there.

        A copy out of the mapping costs less than pread, and can go where the message is made.

        Raises:
            GuestMemoryError: a run is outside RAM.
        """
        views, mapped_at = [], int(self.pages_view.ctypes.data)
        for first, count in zip(run_first.tolist(), run_pages.tolist(), strict=True):
            begin, size = first * PAGE_BYTES, count * PAGE_BYTES
            if first + count > self.pages:
                raise GuestMemoryError(f"pages {first}+{count} are outside guest RAM of {self.pages} pages")
            there = np.empty(count, np.uint8)
            if _libc.mincore(mapped_at + begin, size, there.ctypes.data) != 0:
                number = ctypes.get_errno()
                raise OSError(number, os.strerror(number))
            if not (there & 1).all():
                return None
            # Kernels before 5.14 do not know it: then the pages are mapped as they are copied.
            _libc.madvise(mapped_at + begin, size, MADV_POPULATE_READ)
            views.append(self.memory[begin : begin + size])
        return views

    def hash_pages(self) -> U64Array:
        """xxh3_64 of every page, from scratch; a hole has ZERO_PAGE_HASH and stays a hole."""
        hashes = np.full(self.pages, ZERO_PAGE_HASH, dtype=np.uint64)
        buffer = memoryview(bytearray(HASH_BUFFER_PAGES * PAGE_BYTES))
        batch: list[tuple[int, int]] = []  # (first, count) of what the buffer holds
        filled = 0
        for first, end in self._extents():
            position = first
            while position < end:
                count = min(end - position, HASH_BUFFER_PAGES - filled)
                self._read_exactly(position, buffer[filled * PAGE_BYTES : (filled + count) * PAGE_BYTES])
                batch.append((position, count))
                position, filled = position + count, filled + count
                if filled == HASH_BUFFER_PAGES:
                    _hash_batch(hashes, batch, buffer)
                    batch, filled = [], 0
        if batch:
            _hash_batch(hashes, batch, buffer[: filled * PAGE_BYTES])
        return hashes

    def _read_exactly(self, pfn: int, into: memoryview) -> None:
        done = 0
        while done < len(into):
            count = os.preadv(self.fd, [into[done:]], pfn * PAGE_BYTES + done)
            if count == 0:
                raise GuestMemoryError(f"guest RAM ends inside page {pfn + done // PAGE_BYTES}")
            done += count

    # --- storing ----------------------------------------------------------------------------------

    def store(self, run_first: U64Array, run_pages: U32Array | U64Array, data: memoryview) -> None:
        """Write the pages of the runs, concatenated in `data`. Nothing is written when anything is wrong.

        Raises:
            GuestMemoryError: a run lies outside RAM, or `data` is not exactly the runs' pages.
        """
        # Widened before summing: run_pages comes as u32 off the wire, and first + pages may wrap u64.
        counts = run_pages.astype(np.uint64)
        pages = np.uint64(self.pages)
        inside = (counts <= pages) & (run_first <= pages - np.minimum(counts, pages))
        if not inside.all():
            raise GuestMemoryError(f"a run reaches outside guest RAM of {self.pages} pages")
        if int(counts.sum()) * PAGE_BYTES != data.nbytes:
            raise GuestMemoryError(f"{data.nbytes} bytes for {int(counts.sum())} pages")
        flat = data.cast("B") if data.format != "B" or data.ndim != 1 else data
        position = 0
        for first, count in zip(run_first.tolist(), counts.tolist(), strict=True):
            self._write_exactly(first * PAGE_BYTES, flat[position : position + count * PAGE_BYTES])
            position += count * PAGE_BYTES

    def _write_exactly(self, offset: int, data: memoryview) -> None:
        done = 0
        while done < len(data):
            done += os.pwrite(self.fd, data[done:], offset + done)

    def punch(self, pfn_first: int, pages: int) -> None:
        """Give the storage of a range back; it reads as zero from then on.

        Raises:
            GuestMemoryError: the range is not inside RAM.
        """
        if pfn_first < 0 or pages < 0 or pfn_first + pages > self.pages:
            raise GuestMemoryError(f"pages {pfn_first}+{pages} are outside guest RAM of {self.pages} pages")
        if pages:
            punch_hole(self.fd, pfn_first * PAGE_BYTES, pages * PAGE_BYTES)

    def zero_all(self) -> None:
        """Punch everything: all of RAM is a hole and known zero."""
        self.punch(0, self.pages)


def punch_hole(fd: int, offset: int, length: int) -> None:
    """fallocate(PUNCH_HOLE | KEEP_SIZE). Raises OSError."""
    if _libc.fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _hash_batch(hashes: U64Array, batch: list[tuple[int, int]], buffer: memoryview) -> None:
    runs = np.array(batch, dtype=np.uint64)
    hashes[pfns_of(runs[:, 0], runs[:, 1])] = page_hashes(buffer)
