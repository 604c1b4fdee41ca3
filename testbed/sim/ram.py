"""Guest RAM as an array of pages, with what the real PageReader and PageReceiver ask of one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from migration.codec import page_hashes
from migration.pages import PAGE_BYTES, pfns_of

if TYPE_CHECKING:
    from migration.pages import BoolArray, U8Array, U32Array, U64Array

WORDS = PAGE_BYTES // 8


class SimRam:
    """`words` has the shape (pages, 512); a page without storage reads as zero."""

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self.memory_bytes = pages * PAGE_BYTES
        self.words: U64Array = np.zeros((pages, WORDS), np.uint64)
        self.closed = False
        self._stored: BoolArray = np.zeros(pages, np.bool_)

    @property
    def memory(self) -> memoryview:
        """All of it as writable bytes."""
        return self.words.reshape(-1).view(np.uint8).data

    @property
    def pages_view(self) -> U8Array:
        """Shape (pages, 4096), for a look at single pages."""
        return self.words.view(np.uint8)

    def fill(self, pfns: U64Array, contents: U64Array) -> None:
        """Every word of page i becomes contents[i]."""
        self.words[pfns] = contents[:, None]
        self._stored[pfns] = True

    def touched(self, pfn: int) -> None:
        """Somebody wrote into `memory` there."""
        self._stored[pfn] = True

    def populated(self) -> BoolArray:
        """Pages with storage."""
        return self._stored.copy()

    def gather(self, pfns: U64Array, out: memoryview) -> None:
        """Copy pages out."""
        np.frombuffer(out, np.uint64).reshape(-1, WORDS)[:] = self.words[pfns]

    def resident_views(self, _run_first: U64Array, _run_pages: U32Array) -> None:
        """No mapping to copy out of: pages are gathered."""

    def store(self, run_first: U64Array, run_pages: U32Array | U64Array, data: memoryview) -> None:
        """Copy pages in."""
        assert not self.closed, "a store into memory that was given back"
        pfns = pfns_of(run_first, run_pages)
        self.words[pfns] = np.frombuffer(data, np.uint64).reshape(-1, WORDS)
        self._stored[pfns] = True

    def punch(self, pfn_first: int, pages: int) -> None:
        """Give the storage of these pages back."""
        self.words[pfn_first : pfn_first + pages] = 0
        self._stored[pfn_first : pfn_first + pages] = False

    def hash_pages(self) -> U64Array:
        """xxh3_64 of every page."""
        return page_hashes(self.words.reshape(-1).view(np.uint8))

    def close(self) -> None:
        """Given back."""
        self.closed = True
