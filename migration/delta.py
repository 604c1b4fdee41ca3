"""Deltas of pages: of a page that the other side has in an older version, only the words that changed.

Rule 1: a delta is a list of spans of changed 8-byte words, and these words as they are now. Applied to the older
        version it gives the page, or the page's hash tells.
Rule 2: everything is columns over all pages of a chunk; no step is taken page by page.
Rule 3: `parse` trusts nothing: spans lie inside their page, in order, apart, and their number is bounded before
        anything of their size is made.

Layout of the message's field, little-endian: u32 pages n; u16[n] place of each page among the chunk's data pages,
ascending; u16[n] its spans; then of all spans u16[] first word and u16[] words. The words themselves are in `data`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from migration.errors import RemoteProtocolError
from migration.pages import PAGE_BYTES, U64Array, pfns_of

WORD_BYTES = 8
PAGE_WORDS = PAGE_BYTES // WORD_BYTES
SPANS_MAX = 60  # of a page: 256 such pages have 62 KiB of spans, within the bound of a message's small fields
# A delta makes the destination read its page: it is worth that when it saves a fourth of it.
DELTA_BYTES_MAX = PAGE_BYTES * 3 // 4
ENTRY_BYTES = 4  # of a page, and of a span

U16Array = NDArray[np.uint16]
I64Array = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Deltas:
    """Spans of the pages of a chunk that are deltas; `places` are theirs among its data pages."""

    places: I64Array
    spans: I64Array  # per page
    first: I64Array  # per span, in words of its page
    words: I64Array  # per span

    @property
    def word_count(self) -> int:
        """Changed words over all pages."""
        return int(self.words.sum())

    def to_bytes(self) -> bytes:
        """The message's field."""
        columns = (self.places, self.spans, self.first, self.words)
        head = np.array([self.places.size], "<u4").tobytes()
        return b"".join((head, *(column.astype("<u2").tobytes() for column in columns)))


def encode(places: I64Array, new: U64Array, old: U64Array) -> tuple[Deltas, U64Array, int]:
    """The deltas from `old` to `new` (pages, 512), of those pages for which one is worth sending.

    Returns:
        The deltas, at their pages' `places`; their words as they are now, page by page; and how many bytes less
        they have than their pages.
    """
    changed = new != old
    few = np.flatnonzero(np.count_nonzero(changed, axis=1) * WORD_BYTES <= DELTA_BYTES_MAX)
    at = np.flatnonzero(changed[few])  # of all changed words, page after page
    page = at // PAGE_WORDS
    begins = np.ones(at.size, np.bool_)
    begins[1:] = (at[1:] - at[:-1] != 1) | (page[1:] != page[:-1])
    spans = np.bincount(page[begins], minlength=few.size)
    size = np.bincount(page, minlength=few.size) * WORD_BYTES + spans * ENTRY_BYTES + ENTRY_BYTES
    pays = (size <= DELTA_BYTES_MAX) & (spans <= SPANS_MAX)
    if not pays.all():
        kept = pays[page]
        at, begins = at[kept], begins[kept]  # whole pages go: what begins a span still does
    starts = np.flatnonzero(begins)
    words = np.diff(starts, append=at.size)
    chosen = few[pays]
    deltas = Deltas(places[chosen], spans[pays], at[starts] % PAGE_WORDS, words)
    return deltas, new[few].reshape(-1)[at], chosen.size * PAGE_BYTES - int(size[pays].sum())


def parse(field: bytes, *, data_pages: int) -> Deltas:
    """Reads the field of a chunk that has so many data pages.

    Raises:
        RemoteProtocolError: it is not the spans of such pages.
    """
    if len(field) < 4 or len(field) % 2:
        raise RemoteProtocolError("delta field of a wrong size", size=len(field))
    pages = int(np.frombuffer(field, "<u4", 1)[0])
    column = np.frombuffer(field, "<u2", offset=4).astype(np.int64)
    if not 0 < pages <= data_pages or column.size < 2 * pages:
        raise RemoteProtocolError("delta field of a wrong size", pages=pages, size=len(field))
    places, spans = column[:pages], column[pages : 2 * pages]
    rest = column[2 * pages :]
    if rest.size != 2 * int(spans.sum()) or int(spans.max()) > SPANS_MAX:
        raise RemoteProtocolError("delta field of a wrong size", spans=int(spans.sum()), size=len(field))
    first, words = rest[: rest.size // 2], rest[rest.size // 2 :]
    if int(places[-1]) >= data_pages or (places[1:] <= places[:-1]).any():
        raise RemoteProtocolError("deltas of pages out of range or out of order", data_pages=data_pages)
    # Across all pages the spans must follow each other, each inside its page.
    at = np.repeat(np.arange(pages), spans) * PAGE_WORDS + first
    if not words.all() or (first + words > PAGE_WORDS).any() or (at[1:] < at[:-1] + words[:-1]).any():
        raise RemoteProtocolError("spans of a delta out of range, out of order or overlapping")
    return Deltas(places, spans, first, words)


def apply(deltas: Deltas, pages: U64Array, words: U64Array) -> None:
    """Turns `pages`, the older versions of the deltas' pages, (pages, 512), into the new ones, in place."""
    page = np.repeat(np.arange(len(pages)), deltas.spans)
    at = pfns_of((page * PAGE_WORDS + deltas.first).astype(np.uint64), deltas.words.astype(np.uint64))
    pages.reshape(-1)[at] = words
