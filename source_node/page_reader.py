"""Turns page numbers into chunks: one gather of live RAM, then everything sees only the private copy.

Rule 1: RAM is live. A page is copied exactly once; its zero test and its hash are of that copy.
Rule 2: where zero pages are detected, round 1 sends the memfd's holes as zero records without reading them. The
        holes are looked up after tracking was armed: a page filled later is dirty later. Later rounds hold
        pages that were just written, and read them.
Rule 3: `sent_hashes` says, per page, the hash of the bytes that were sent last; 0 means never sent.
"""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING

import numpy as np

from migration.codec import (
    CHUNK_PAGES_MAX,
    UNPACKED,
    ZERO_PAGE_HASH,
    ChunkHead,
    ChunkHeader,
    Packing,
    encode_chunk,
    page_hashes,
    zero_pages_mask,
)
from migration.pages import PAGE_BYTES, runs_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from host.guest_memory import HostRam
    from migration.pages import BoolArray, U8Array, U32Array, U64Array
    from source_node.packer import Packer

VIEWED_RUNS_MAX = 64  # a run costs two system calls; one page of it by pread a third of that


@dataclass(frozen=True, slots=True, eq=False)
class OutgoingChunk:
    """One message, ready for the stream; `pfns` are its pages, ascending, data and zero alike."""

    message: bytes
    data_pages: int
    zero_pages: int
    pfns: U64Array


@dataclass(slots=True)
class ChunkNumbers:
    """How one stream numbers its chunks, and packs them if it does."""

    stream: int
    next_sequence: int = 0
    chunk_pages: int = CHUNK_PAGES_MAX
    packer: Packer | None = None


class PageReader:
    """Reads one guest's RAM for one attempt. Thread-safe as long as no two threads read the same page at a time."""

    def __init__(self, ram: HostRam, *, incarnation: str, attempt: int, detects_zero: bool) -> None:
        self.pages = len(ram.pages_view)  # and so it is mapped, before several threads may want it to be
        self.sent_hashes = np.zeros(ram.pages, np.uint64)
        self._ram = ram
        self._incarnation = incarnation
        self._attempt = attempt
        self._detects_zero = detects_zero
        self._holes: BoolArray | None = None

    def find_holes(self) -> None:
        """Look where the holes are (Rule 2). To be called once tracking is armed."""
        if self._detects_zero:
            self._holes = ~self._ram.populated()

    def chunks_of(self, numbers: ChunkNumbers, round_index: int, pfns: U64Array) -> Iterator[OutgoingChunk]:
        """The chunks that carry these pages (ascending), each at most `numbers.chunk_pages` data pages.

        Each is read, and takes its number, when it is asked for.
        """
        if self._holes is not None and round_index == 1:
            holes = self._holes[pfns]
            if holes.any():
                yield self._zero_chunk(numbers, round_index, pfns[holes])
                pfns = pfns[~holes]
        data_chunk = self._data_chunk if numbers.packer is None else self._packed_chunk
        for start in range(0, len(pfns), numbers.chunk_pages):
            yield data_chunk(numbers, round_index, pfns[start : start + numbers.chunk_pages])

    def marker(self, numbers: ChunkNumbers, round_index: int) -> OutgoingChunk:
        """A chunk without pages: it asks for an acknowledgement at once."""
        return self._zero_chunk(numbers, round_index, _NO_PFNS)

    def _zero_chunk(self, numbers: ChunkNumbers, round_index: int, pfns: U64Array) -> OutgoingChunk:
        if numbers.packer is not None:
            numbers.packer.forget(pfns)
        return self._chunk(self._header(numbers, round_index), pfns, _NO_MASK, _NO_DATA)

    def _data_chunk(self, numbers: ChunkNumbers, round_index: int, pfns: U64Array) -> OutgoingChunk:
        """The pages are read into their place in the message, which is right unless one of them turns out zero."""
        run_first, run_pages, where = _runs(pfns)
        header = self._header(numbers, round_index)
        head = ChunkHead(header, run_first, run_pages, _NO_PFNS, _NO_COUNTS)
        message = self._read(head, run_first, run_pages, pfns)
        with message.getbuffer() as whole, whole[head.size :] as pages:
            if self._detects_zero:
                zero = zero_pages_mask(pages)
                if zero.any():
                    data = np.frombuffer(pages, np.uint8).reshape(-1, PAGE_BYTES)[~zero]
                    return self._chunk(header, pfns, ~zero, data)
            hashes = page_hashes(pages)
            whole[: head.size] = head.to_bytes(hashes)
        self.sent_hashes[where] = hashes
        return OutgoingChunk(message.getvalue(), len(pfns), 0, pfns)

    def _read(self, head: ChunkHead, run_first: U64Array, run_pages: U32Array, pfns: U64Array) -> BytesIO:
        """The pages in their place in the message, with room for its head before them."""
        views = self._ram.resident_views(run_first, run_pages) if len(run_first) <= VIEWED_RUNS_MAX else None
        if views is not None:
            # Its only reference goes into the BytesIO, which therefore lets it be written to without a copy.
            return BytesIO(b"".join((bytes(head.size), *views)))
        message = BytesIO()
        message.seek(head.size + len(pfns) * PAGE_BYTES - 1)
        message.write(b"\0")
        with message.getbuffer() as whole, whole[head.size :] as pages:
            self._ram.gather(pfns, pages)
        return message

    def _packed_chunk(self, numbers: ChunkNumbers, round_index: int, pfns: U64Array) -> OutgoingChunk:
        """As _data_chunk, into a buffer of its own: how large the data will be is not known before."""
        assert numbers.packer is not None, "nothing is to be packed"
        pages = np.empty((len(pfns), PAGE_BYTES), np.uint8)
        self._ram.gather(pfns, pages.data.cast("B"))
        is_data = ~zero_pages_mask(pages) if self._detects_zero else np.ones(len(pfns), np.bool_)
        if not is_data.all():
            numbers.packer.forget(pfns[~is_data])
            pages = pages[is_data]
        hashes = page_hashes(pages)
        packing, data = numbers.packer.pack(round_index, pfns[is_data], pages)
        return self._chunk(self._header(numbers, round_index), pfns, is_data, data, hashes, packing)

    def _header(self, numbers: ChunkNumbers, round_index: int) -> ChunkHeader:
        sequence = numbers.next_sequence
        numbers.next_sequence += 1
        return ChunkHeader(self._incarnation, self._attempt, round_index, sequence, numbers.stream)

    def _chunk(  # noqa: PLR0917 - the message's parts
        self,
        header: ChunkHeader,
        pfns: U64Array,
        is_data: BoolArray,
        data: U8Array | bytes,
        hashes: U64Array | None = None,
        packing: Packing = UNPACKED,
    ) -> OutgoingChunk:
        """The message of pages of which some (`is_data`; none of them when it is empty) have `data`."""
        data_pfns, zero_pfns = (pfns[is_data], pfns[~is_data]) if is_data.size else (_NO_PFNS, pfns)
        run_first, run_pages, where = _runs(data_pfns)
        zero_first, zero_pages, zero_where = _runs(zero_pfns)
        hashes = page_hashes(data) if hashes is None else hashes
        message = encode_chunk(header, run_first, run_pages, zero_first, zero_pages, hashes, data, packing)
        self.sent_hashes[where] = hashes
        self.sent_hashes[zero_where] = ZERO_PAGE_HASH
        return OutgoingChunk(message, len(data_pfns), len(zero_pfns), pfns)


_NO_PFNS: U64Array = np.empty(0, np.uint64)
_NO_COUNTS: U32Array = np.empty(0, np.uint32)
_NO_DATA: U8Array = np.empty(0, np.uint8)
_NO_MASK: BoolArray = np.empty(0, np.bool_)


def _runs(pfns: U64Array) -> tuple[U64Array, U32Array, slice | U64Array]:
    """runs_of(pfns), and what indexes these pages; the two common cases, nothing and one run, are cheap."""
    if len(pfns) == 0:
        return _NO_PFNS, _NO_COUNTS, slice(0, 0)
    first, last = int(pfns[0]), int(pfns[-1])
    if last - first + 1 == len(pfns):
        return pfns[:1], np.array([len(pfns)], np.uint32), slice(first, last + 1)
    run_first, run_pages = runs_of(pfns)
    return run_first, run_pages, pfns
