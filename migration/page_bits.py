"""A set of guest pages as one bit a page, for what is done to all of memory at once.

Rule 1: page n is bit n % 64 of word n // 64; the bits behind the last page are 0.
Rule 2: work is per word, in portions that stay in the cache, or per run; nothing costs a Python step per page.
Rule 3: what looks at the members costs what the words with members cost; empty stretches cost a pass over words.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import numpy as np

from migration.errors import LocalProtocolError
from migration.pages import merge_runs

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from migration.pages import BoolArray, U32Array, U64Array

    I64Array = NDArray[np.int64]

WORD_BITS = 64
PORTION_WORDS = 1 << 14  # 128 KiB: several of them stay in a core's own cache
ALL = np.uint64(0xFFFF_FFFF_FFFF_FFFF)
_BITS = np.arange(WORD_BITS, dtype=np.uint64)
_ONE, _LAST = np.uint64(1), np.uint64(63)


class PageBits:
    """A subset of the pages 0..pages-1. `words` may be read by anybody and is written here alone."""

    __slots__ = ("_count", "pages", "words")

    def __init__(self, pages: int, words: U64Array | None = None) -> None:
        self.pages = pages
        self.words: U64Array = np.zeros(_words(pages), np.uint64) if words is None else words
        self._count: int | None = 0 if words is None else None

    @classmethod
    def full(cls, pages: int) -> Self:
        """Every page."""
        made = cls(pages, np.full(_words(pages), ALL))
        made._cut()
        made._count = pages
        return made

    @classmethod
    def of(cls, members: BoolArray | PageBits) -> PageBits:
        """Of a mask (pages,); bits as they are, not copied."""
        if isinstance(members, PageBits):
            return members
        packed = np.packbits(members, bitorder="little")
        words = np.zeros(_words(members.size), np.uint64)
        words.view(np.uint8)[: packed.size] = packed
        return cls(members.size, words)

    @classmethod
    def of_runs(cls, first: U64Array, count: U32Array | U64Array, pages: int) -> Self:
        """Of runs in any order, which may overlap. Raises LocalProtocolError: one reaches beyond `pages`."""
        made = cls(pages)
        begin, end = merge_runs(first, count, pages=pages)
        if begin.size and (((begin + 63) >> 6) >= end >> 6).all():  # scattered: none fills a word
            _add_edges(made.words, begin, end)
        else:
            for window, cover in _covers_of(begin, end):
                made.words[window] = cover
        made._count = int((end - begin).sum())
        return made

    # --- what is in it ----------------------------------------------------------------------------

    @property
    def count(self) -> int:
        """How many pages."""
        if self._count is None:
            self._count = sum(popcount(self.words[part]) for part in _portions(self.words.size))
        return self._count

    def any(self) -> bool:
        """Whether there is a page in it."""
        return bool(self.words.any())

    def all(self) -> bool:
        """Whether every page is in it."""
        return self.count == self.pages

    def __contains__(self, pfn: int) -> bool:
        inside = 0 <= pfn < self.pages
        return inside and bool(int(self.words[pfn // WORD_BITS]) >> (pfn % WORD_BITS) & 1)

    def mask(self) -> BoolArray:
        """One bool a page, a private copy."""
        return np.unpackbits(self.words.view(np.uint8), count=self.pages, bitorder="little").view(np.bool_)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        """As a mask: for looking at it with numpy."""
        del copy
        return self.mask() if dtype is None else self.mask().astype(dtype)

    def pfns(self) -> U64Array:
        """The members, ascending."""
        found = [pages_in(self.words[part], part.start) for part in _portions(self.words.size)]
        return np.concatenate(found) if found else np.empty(0, np.uint64)

    def runs(self) -> tuple[U64Array, U32Array]:
        """The members as runs (first, count), ascending."""
        shifted = self.words << _ONE
        shifted[1:] |= self.words[:-1] >> _LAST
        edges = PageBits(self.words.size * WORD_BITS, self.words ^ shifted).pfns()
        if edges.size % 2:
            edges = np.append(edges, np.uint64(self.pages))
        first, end = edges[0::2], edges[1::2]
        return first, (end - first).astype(np.uint32)

    # --- other sets from it -----------------------------------------------------------------------

    def copy(self) -> PageBits:
        """An independent set with the same members."""
        made = PageBits(self.pages, self.words.copy())
        made._count = self._count
        return made

    def resized(self, pages: int) -> PageBits:
        """The members below `pages`, in a set of that size; a copy."""
        made = PageBits(pages)
        shared = min(made.words.size, self.words.size)
        made.words[:shared] = self.words[:shared]
        made._count = None
        made._cut()
        return made

    def __or__(self, other: PageBits | BoolArray) -> PageBits:
        return PageBits(self.pages, self.words | self._same(other).words)

    def __and__(self, other: PageBits | BoolArray) -> PageBits:
        return PageBits(self.pages, self.words & self._same(other).words)

    def __invert__(self) -> PageBits:
        made = PageBits(self.pages, ~self.words)
        made._cut()
        return made

    def minus(self, other: PageBits | BoolArray) -> PageBits:
        """The members that are not in `other`."""
        return PageBits(self.pages, self.words & ~self._same(other).words)

    # --- changes ----------------------------------------------------------------------------------

    def add_runs(self, first: U64Array, count: U32Array | U64Array) -> None:
        """Add runs in any order, which may overlap. Raises LocalProtocolError: one reaches beyond memory."""
        for window, cover in covers(first, count, self.pages):
            self.words[window] |= cover
        self._count = None

    def remove_runs(self, first: U64Array, count: U32Array | U64Array) -> None:
        """Remove runs, as `add_runs`."""
        for window, cover in covers(first, count, self.pages):
            self.words[window] &= ~cover
        self._count = None

    def add_words(self, window: slice, cover: U64Array) -> None:
        """Add what is set in `cover`, words of the window."""
        self.words[window] |= cover
        self._count = None

    def _same(self, other: PageBits | BoolArray) -> PageBits:
        bits = PageBits.of(other)
        if bits.pages != self.pages:
            raise LocalProtocolError("sets of different guests", pages=self.pages, other=bits.pages)
        return bits

    def _cut(self) -> None:
        if self.pages % WORD_BITS:
            self.words[-1] &= (_ONE << np.uint64(self.pages % WORD_BITS)) - _ONE


def popcount(words: U64Array) -> int:
    """Bits that are set, in a portion at most: 32 bits count them, in half the time of 64."""
    return int(np.bitwise_count(words).sum(dtype=np.uint32))


def pages_in(words: U64Array, word_first: int) -> U64Array:
    """The pages that are set in `words`, which begin at word `word_first`, ascending."""
    some = np.flatnonzero(words)
    base = (some.astype(np.uint64) + np.uint64(word_first)) * np.uint64(WORD_BITS)
    chosen = words[some]
    if (chosen == ALL).all():
        pages: U64Array = (base[:, None] + _BITS).ravel()
        return pages
    where = np.flatnonzero(np.unpackbits(chosen.view(np.uint8), bitorder="little"))
    found: U64Array = base[where >> 6] + (where & 63).astype(np.uint64)
    return found


def covers(first: U64Array, count: U32Array | U64Array, pages: int) -> Iterator[tuple[slice, U64Array]]:
    """The words that runs cover, as (window of words, bits within), in portions; any order, overlaps allowed.

    Raises:
        LocalProtocolError: a run reaches beyond `pages`.
    """
    yield from _covers_of(*merge_runs(first, count, pages=pages))


def _covers_of(begin: I64Array, end: I64Array) -> Iterator[tuple[slice, U64Array]]:
    """`covers` of runs [begin, end) that are ascending and do not touch."""
    if not begin.size:
        return
    word_begin, word_end = begin >> 6, (end + 63) >> 6
    low = int(word_begin[0])
    high = int(word_end[-1])
    at = 0
    while at < begin.size:
        start = max(low, int(word_begin[at]))
        stop = min(start + PORTION_WORDS, high)
        # All runs that begin before the portion's end; the last may go on behind it.
        until = int(np.searchsorted(begin, stop * WORD_BITS))
        part_begin = np.maximum(begin[at:until], start * WORD_BITS) - start * WORD_BITS
        part_end = np.minimum(end[at:until], stop * WORD_BITS) - start * WORD_BITS
        last = int(word_end[until - 1])
        stop = min(stop, last)
        yield slice(start, stop), _cover(part_begin, part_end, stop - start)
        at = until - 1 if int(end[until - 1]) > stop * WORD_BITS else until
        low = stop


def _cover(begin: I64Array, end: I64Array, words: int) -> U64Array:
    """Words of runs [begin, end) of bits, ascending, apart from each other, none empty."""
    # Whole words; no two runs begin or end these at one word.
    first, last = (begin + 63) >> 6, end >> 6
    whole = first < last
    if whole.any():
        first, last = first[whole], last[whole]
        # Stretches of nothing and of everything in turn.
        edges = np.empty(2 * first.size + 2, np.int64)
        edges[0], edges[1:-1:2], edges[2:-1:2], edges[-1] = 0, first, last, words
        values = np.zeros(edges.size - 1, np.uint64)
        values[1::2] = ALL
        cover: U64Array = np.repeat(values, np.diff(edges))
    else:
        cover = np.zeros(words, np.uint64)
    ragged = (begin & 63 != 0) | (end & 63 != 0)
    if ragged.any():
        _add_edges(cover, begin[ragged], end[ragged])
    return cover


def _add_edges(cover: U64Array, begin: I64Array, end: I64Array) -> None:
    """Adds the words that runs cover in part; runs may share such a word."""
    first, last = begin >> 6, (end - 1) >> 6
    head = ALL << (begin & 63).astype(np.uint64)
    tail = ALL >> (63 - ((end - 1) & 63)).astype(np.uint64)
    alone = first == last
    np.bitwise_or.at(cover, first, np.where(alone, head & tail, head))
    np.bitwise_or.at(cover, last[~alone], tail[~alone])


def _words(pages: int) -> int:
    if pages < 0:
        raise LocalProtocolError("negative number of pages", pages=pages)
    return -(-pages // WORD_BITS)


def _portions(words: int) -> Iterator[slice]:
    for start in range(0, words, PORTION_WORDS):
        yield slice(start, min(start + PORTION_WORDS, words))
