"""Which pages the balloon holds: those a migration neither reads nor sends.

Rule 1: a page is in the set from the moment it was punched until the guest deflates it. The set is a hint: a page
        that the guest wrote nevertheless, or that has storage again, is sent like any other (host/trackers.py).
Rule 2: nothing here costs anything per page of a run.
Rule 3: the set travels with the guest: its next host does not send these pages either.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

import numpy as np

from migration.errors import RemoteProtocolError
from migration.page_bits import PageBits

if TYPE_CHECKING:
    from host.balloon_server import BalloonServer
    from host.guest_memory import HostRam
    from migration.pages import U64Array

FAST = 1  # zlib's level: the guest stands still while the set is packed, and runs pack well at any level


class BalloonedPages:
    """A set of pages that grows with the highest page it was told of. One thread at a time."""

    def __init__(self) -> None:
        self._bits = PageBits(0)

    def add(self, first: U64Array, count: U64Array) -> None:
        """These runs are in the balloon."""
        if first.size:
            end = int((first + count).max())
            if end > self._bits.pages:
                self._bits = self._bits.resized(end)
            self._bits.add_runs(first, count)

    def remove(self, first: U64Array, count: U64Array) -> None:
        """These runs are the guest's again, whether or not they were in the balloon."""
        known = np.uint64(self._bits.pages)
        inside = first < known
        first, count = first[inside], count[inside]
        self._bits.remove_runs(first, np.minimum(count, known - first))

    def become(self, bits: PageBits) -> None:
        """Be this set; takes it over."""
        self._bits = bits

    def bits(self, pages: int) -> PageBits:
        """A private copy, of a guest of `pages` pages."""
        return self._bits.resized(pages)


def ballooned_holes(balloon: BalloonServer, ram: HostRam) -> PageBits | None:
    """Of the pages in the balloon those that have no storage; None when there are none. For armed trackers."""
    held = balloon.ballooned(ram.pages)
    if not held.any():
        return None
    holes = held.minus(ram.populated())
    return holes if holes.any() else None


def ballooned_for_good(held: PageBits, sent_hashes: U64Array, left_out: PageBits | None) -> PageBits:
    """Of a paused guest: the balloon's pages of which the destination has nothing, or nothing to keep.

    Args:
        held: what the balloon holds.
        sent_hashes: per page, 0 where nothing was sent.
        left_out: of the last harvest, as the tracker says.
    """
    if not held.any():
        return held
    unsent = PageBits.of(sent_hashes == 0)
    return held & (unsent if left_out is None else unsent | left_out)


def give_back(ram: HostRam, ballooned: PageBits, stored_hashes: U64Array) -> None:
    """Punch what was stored (hash not 0) of these pages before the balloon took them: it is nobody's."""
    first, count = (ballooned & (stored_hashes != 0)).runs()
    for start, length in zip(first.tolist(), count.tolist(), strict=True):
        ram.punch(start, length)


def pack(bits: PageBits) -> bytes:
    """A set for the way to another host; b"" when nothing is in it."""
    return zlib.compress(bits.words.astype("<u8", copy=False).tobytes(), FAST) if bits.any() else b""


def unpack(data: bytes, pages: int) -> PageBits:
    """What `pack` made of a set in `pages` pages.

    Raises:
        RemoteProtocolError: it is none of that size.
    """
    empty = PageBits(pages)
    if not data:
        return empty
    size = empty.words.nbytes
    unpacker = zlib.decompressobj()
    try:
        packed = unpacker.decompress(data, size + 1)
    except zlib.error as error:
        raise RemoteProtocolError("the ballooned pages cannot be unpacked", why=str(error)) from error
    if len(packed) != size or not unpacker.eof:
        raise RemoteProtocolError("the ballooned pages are of another guest", pages=pages)
    return PageBits(pages, np.frombuffer(packed, "<u8").astype(np.uint64)).resized(pages)
