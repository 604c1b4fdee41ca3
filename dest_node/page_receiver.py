"""Takes page chunks into RAM that is known to be zero (DESIGN 3.7).

Rule 1: a chunk is stored only if it belongs to this incarnation and attempt, is the next in sequence, lies
        inside RAM, and every page has the hash that came with it; else nothing of it is stored and the stream ends.
Rule 2: a zero record costs nothing where our page is known zero; where it is not, the page is punched.
Rule 3: a page that no chunk named is never touched.
Rule 4: every stream has its own sequence, and its own lock, held while one of its chunks is stored; a chunk with a
        page of another stream is refused, so that no two streams ever touch the same page, hash or flag.
Rule 5: a call becomes its stream by its first chunk. `join_streams` returns only when nothing is being stored and
        nothing of the calls that were open can be any more; new calls go on from `stored_below`. After `join` there
        are none.
Rule 6: what comes by a call that is over, or of a connection that was given up, is no refused chunk: nobody sent it
        wrongly, and it is not stored.
"""

from __future__ import annotations

import threading
import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from host.clock import now_ns, thread_cpu_ns
from migration.codec import UNPACKED, ZERO_PAGE_HASH, DecodedChunk, decode_chunk, verify
from migration.errors import RemoteProtocolError
from migration.packing import unpack
from migration.pages import pfns_of, runs_of
from migration.partition import check_partition

if TYPE_CHECKING:
    from collections.abc import Callable

    from host.guest_memory import HostRam
    from migration.pages import U64Array

COMPARED_PAGES = 1 << 16


class StreamOver(RemoteProtocolError):
    """The chunk came by a call that is over, see Rule 6."""


@dataclass(eq=False, slots=True)
class Connection:
    """What the calls have in common that were begun between two joins."""

    joined: bool = False


@dataclass(eq=False, slots=True)
class PageStreamIn:
    """One call, and how to end it. Its stream is known from its first chunk on."""

    cut: Callable[[], object]
    connection: Connection
    over: bool = False
    unpack_cpu_ns: int = 0
    lane: Lane | None = None

    @property
    def joined(self) -> bool:
        """Whether its connection was given up, also where the call itself was over before: nothing of it counts."""
        return self.connection.joined


@dataclass(eq=False, slots=True)
class Lane:
    """One stream of the attempt: what of it is stored, and the call that feeds it."""

    index: int
    stored_below: int = 0
    call: PageStreamIn | None = None
    storing: threading.Lock = field(default_factory=threading.Lock)


class PageReceiver:
    """One attempt's memory and what is known of it."""

    def __init__(self, ram: HostRam, attempt: int, *, streams: int = 1) -> None:
        self.ram = ram
        self.incarnation = uuid.uuid4().hex
        self.attempt = attempt
        self.stored_hashes: U64Array = np.zeros(ram.pages, np.uint64)  # 0: never named by a chunk
        self.heard_ns = now_ns()  # when the newest chunk was stored
        self.unpack_cpu_ns = 0  # CPU time of decompression and of deltas, of calls that ended
        self._known_zero = np.ones(ram.pages, np.bool_)
        self._lanes = [Lane(index) for index in range(streams)]
        self._open: set[PageStreamIn] = set()
        self._connection = Connection()
        self._changing = threading.Lock()  # of `_open`, `_closed`, and which call is whose
        self._closed = False

    @property
    def streams(self) -> int:
        """How many streams the attempt has."""
        return len(self._lanes)

    @property
    def stored_below(self) -> list[int]:
        """Per stream: chunks with a lower sequence are stored. Final only when the streams are joined."""
        return [lane.stored_below for lane in self._lanes]

    @property
    def stored_chunks(self) -> int:
        """Chunks stored, over all streams."""
        return sum(self.stored_below)

    @property
    def streaming(self) -> bool:
        """Whether a call is open."""
        return bool(self._open)

    def begin_stream(self, cut: Callable[[], object]) -> PageStreamIn:
        """A call begins; `cut` ends it from outside. Which stream it is, its first chunk says.

        Raises:
            RemoteProtocolError: there are as many as there are streams, or it is too late for any.
        """
        with self._changing:
            if self._closed:
                raise RemoteProtocolError("this attempt takes no more pages")
            if len(self._open) == len(self._lanes):
                raise RemoteProtocolError("there is a page stream already", streams=len(self._lanes))
            stream = PageStreamIn(cut, self._connection)
            self._open.add(stream)
            return stream

    def end_stream(self, stream: PageStreamIn) -> None:
        """The stream's call is over; another one may begin. Idempotent."""
        with self._changing:
            self.unpack_cpu_ns += stream.unpack_cpu_ns
            stream.unpack_cpu_ns = 0
            self._open.discard(stream)
            stream.over = True
            if stream.lane is not None and stream.lane.call is stream:
                stream.lane.call = None

    def join_streams(self, timeout_s: float) -> bool:
        """Cut every call and wait for the chunks that are being stored; False when that does not end in time.

        Then `stored_below` is final for these calls, and new ones may begin.
        """
        with self._changing:
            calls = list(self._open)
            self._open.clear()
            for lane in self._lanes:
                lane.call = None
            self._connection.joined = True
            self._connection = Connection()
        for call in calls:
            call.cut()
        return self._stored(timeout_s)

    def join(self, timeout_s: float) -> bool:
        """Take no more pages; wait for the chunks that are being stored. False when that does not end in time."""
        with self._changing:
            self._closed = True
        return self._stored(timeout_s)

    def abandon(self, timeout_s: float) -> bool:
        """Cut the streams, join them and give the memory back; False when a store does not end in time.

        Such a store, should it ever end, writes into memory that nobody else uses: it stays ours until then.
        """
        with self._changing:
            self._closed = True
        ended = self.join_streams(timeout_s)
        if ended:
            self.ram.close()
        return ended

    def _stored(self, timeout_s: float) -> bool:
        deadline_ns = now_ns() + int(timeout_s * 1e9)
        for lane in self._lanes:
            if not lane.storing.acquire(timeout=max(deadline_ns - now_ns(), 0) / 1e9):
                return False
            lane.storing.release()
        return True

    def store(self, stream: PageStreamIn, message: bytes) -> DecodedChunk:
        """Check one chunk of a call and store it.

        Raises:
            StreamOver: the call is over; nothing of it was stored.
            RemoteProtocolError: it is not what Rule 1 asks for; nothing of it was stored.
            OSError: this host cannot store it (memory).
        """
        chunk = decode_chunk(message, pages=self.ram.pages)
        if chunk.packing is not UNPACKED:
            chunk = self._unpacked(stream, chunk)
        verify(chunk)
        lane = stream.lane or self._bind(stream, chunk.header.stream)
        with lane.storing:
            self._store(stream, lane, chunk)
        return chunk

    def _unpacked(self, stream: PageStreamIn, chunk: DecodedChunk) -> DecodedChunk:
        """Its pages. A delta is of what this stream stored before: nobody else stores these pages."""
        started_ns = thread_cpu_ns()
        chunk = unpack(chunk, self.ram.gather)
        stream.unpack_cpu_ns += thread_cpu_ns() - started_ns
        return chunk

    def _bind(self, stream: PageStreamIn, index: int) -> Lane:
        with self._changing:
            _check_alive(stream)
            if not index < len(self._lanes) or self._lanes[index].call is not None:
                raise RemoteProtocolError("no such page stream, or it is open already", stream=index)
            stream.lane = self._lanes[index]
            stream.lane.call = stream
            return stream.lane

    def _store(self, stream: PageStreamIn, lane: Lane, chunk: DecodedChunk) -> None:
        header = chunk.header
        _check_alive(stream)
        if (
            self._closed
            or lane.call is not stream
            or (header.incarnation, header.attempt, header.stream)
            != (self.incarnation, self.attempt, lane.index)
        ):
            raise RemoteProtocolError("the chunk is of another stream", incarnation=header.incarnation)
        if header.sequence != lane.stored_below:
            raise RemoteProtocolError(
                "chunk out of sequence", expected=lane.stored_below, sequence=header.sequence
            )
        for first, count in ((chunk.run_first, chunk.run_pages), (chunk.zero_first, chunk.zero_pages)):
            check_partition(first, count, stream=lane.index, streams=len(self._lanes))
        self._store_data(chunk)
        self._store_zero(chunk)
        lane.stored_below += 1
        self.heard_ns = now_ns()

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
        for first, count in zip(*(column.tolist() for column in runs_of(stale)), strict=True):
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


def _check_alive(stream: PageStreamIn) -> None:
    if stream.joined:
        raise StreamOver("the chunk is of a connection that was given up")
    if stream.over:
        raise StreamOver("the chunk is of a call that is over")
