"""Takes page chunks into RAM that is known to be zero (DESIGN 3.7).

Rule 1: a chunk is stored only if it belongs to this incarnation and attempt, is the next in sequence, lies
        inside RAM, and every page has the hash that came with it; else nothing of it is stored and the stream ends.
Rule 2: a zero record costs nothing where our page is known zero; where it is not, the page is punched.
Rule 3: a page that no chunk named is never touched.
Rule 4: one stream at a time, and `join` returns only when nothing is being stored and nothing can be any more.
"""

from __future__ import annotations

import threading
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from migration.codec import ZERO_PAGE_HASH, DecodedChunk, decode_chunk, verify
from migration.errors import RemoteProtocolError
from migration.pages import mask_runs, pfns_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from host.guest_memory import HostRam
    from migration.pages import U64Array

COMPARED_PAGES = 1 << 16


@dataclass(eq=False, slots=True)
class PageStreamIn:
    """One open stream, and how to end its call. `joined`: its connection was lost, nothing of it counts."""

    cut: Callable[[], object]
    joined: bool = False


class PageReceiver:
    """One attempt's memory and what is known of it."""

    def __init__(self, ram: HostRam, attempt: int) -> None:
        self.ram = ram
        self.incarnation = uuid.uuid4().hex
        self.attempt = attempt
        self.stored_hashes: U64Array = np.zeros(ram.pages, np.uint64)  # 0: never named by a chunk
        self.stored_chunks = 0
        self._known_zero = np.ones(ram.pages, np.bool_)
        self._storing = threading.Lock()  # held while one chunk is stored, and for closing
        self._closed = False
        self._stream: PageStreamIn | None = None

    @property
    def stored_below(self) -> list[int]:
        """Per stream: every chunk with a lower sequence is stored."""
        return [self.stored_chunks]

    @property
    def streaming(self) -> bool:
        """Whether a stream is open."""
        return self._stream is not None

    def begin_stream(self, cut: Callable[[], object]) -> PageStreamIn:
        """Become the one stream; `cut` ends its call from outside.

        Raises:
            RemoteProtocolError: there is one, or it is too late for any.
        """
        with self._storing:
            if self._closed:
                raise RemoteProtocolError("this attempt takes no more pages")
            if self._stream is not None:
                raise RemoteProtocolError("there is a page stream already")
            self._stream = PageStreamIn(cut)
            return self._stream

    def end_stream(self, stream: PageStreamIn) -> None:
        """The stream's call is over; another one may begin. Idempotent."""
        if self._stream is stream:
            self._stream = None

    def join_streams(self, timeout_s: float) -> bool:
        """Cut every stream and wait for the chunk that is being stored; others may begin and go on behind it.

        False when a store does not end in time: then this memory cannot be gone on with.
        """
        if not self._storing.acquire(timeout=timeout_s):
            return False
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.joined = True
        self._storing.release()
        if stream is not None:
            stream.cut()
        return True

    def join(self, timeout_s: float) -> bool:
        """Take no more pages; wait for the chunk that is being stored. False when that does not end in time."""
        self._closed = True
        if not self._storing.acquire(timeout=timeout_s):
            return False
        self._storing.release()
        return True

    def abandon(self, timeout_s: float) -> bool:
        """Cut the stream, join it and give the memory back; False when a store does not end in time.

        Such a store, should it ever end, writes into memory that nobody else uses: it stays ours until then.
        """
        self._closed = True
        if (stream := self._stream) is not None:
            stream.cut()
        ended = self.join(timeout_s)
        if ended:
            self.ram.close()
        return ended

    def store(self, stream: PageStreamIn, message: bytes) -> DecodedChunk:
        """Check one chunk of an open stream and store it.

        Raises:
            RemoteProtocolError: it is not what Rule 1 asks for; nothing of it was stored.
            OSError: this host cannot store it (memory).
        """
        chunk = decode_chunk(message, pages=self.ram.pages)
        verify(chunk)
        with self._storing:
            if stream.joined:
                raise RemoteProtocolError("the chunk is of a connection that was given up")
            self._store(chunk)
        return chunk

    def _store(self, chunk: DecodedChunk) -> None:
        header = chunk.header
        if self._closed or (header.incarnation, header.attempt) != (self.incarnation, self.attempt):
            raise RemoteProtocolError("the chunk is of another stream", incarnation=header.incarnation)
        if header.sequence != self.stored_chunks:
            raise RemoteProtocolError(
                "chunk out of sequence", expected=self.stored_chunks, sequence=header.sequence
            )
        self._store_data(chunk)
        self._store_zero(chunk)
        self.stored_chunks += 1

    def _store_data(self, chunk: DecodedChunk) -> None:
        if not chunk.data_page_count:
            return
        self.ram.store(chunk.run_first, chunk.run_pages.astype(np.uint64), chunk.data)
        if len(chunk.run_first) == 1:  # the common case of a first round: a slice instead of a scatter
            first = int(chunk.run_first[0])
            where: slice | U64Array = slice(first, first + int(chunk.run_pages[0]))
        else:
            where = pfns_of(chunk.run_first, chunk.run_pages)
        self.stored_hashes[where] = chunk.page_hashes
        self._known_zero[where] = False

    def _store_zero(self, chunk: DecodedChunk) -> None:
        if not chunk.zero_page_count:
            return
        pfns = pfns_of(chunk.zero_first, chunk.zero_pages)
        self.stored_hashes[pfns] = ZERO_PAGE_HASH
        stale = pfns[~self._known_zero[pfns]]
        if not len(stale):
            return
        mask = np.zeros(self.ram.pages, np.bool_)
        mask[stale] = True
        for first, count in zip(*(column.tolist() for column in mask_runs(mask)), strict=True):
            self.ram.punch(first, count)
        self._known_zero[stale] = True

    def difference(self, found: U64Array) -> int | None:
        """The first page that does not read back as it was stored (or zero, if never named); else None."""
        for start in range(0, len(found), COMPARED_PAGES):  # in steps: a copy of all hashes is 2 MiB per GiB
            stored = self.stored_hashes[start : start + COMPARED_PAGES]
            expected = np.where(stored == 0, np.uint64(ZERO_PAGE_HASH), stored)
            wrong = np.flatnonzero(found[start : start + COMPARED_PAGES] != expected)
            if len(wrong):
                return start + int(wrong[0])
        return None
