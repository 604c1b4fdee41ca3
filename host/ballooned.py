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
from migration.pages import mask_runs, set_runs

if TYPE_CHECKING:
    from host.balloon_server import BalloonServer
    from host.guest_memory import HostRam
    from migration.pages import BoolArray, U64Array

FAST = 1  # zlib's level: the guest stands still while the set is packed, and runs pack well at any level


class BalloonedPages:
    """A set of pages that grows with the highest page it was told of. One thread at a time."""

    def __init__(self) -> None:
        self._mask: BoolArray = np.zeros(0, np.bool_)

    def add(self, first: U64Array, count: U64Array) -> None:
        """These runs are in the balloon."""
        if first.size:
            end = int((first + count).max())
            if end > self._mask.size:
                self._mask = _of_size(self._mask, end)
            set_runs(self._mask, first, count, value=True)

    def remove(self, first: U64Array, count: U64Array) -> None:
        """These runs are the guest's again, whether or not they were in the balloon."""
        known = np.uint64(self._mask.size)
        inside = first < known
        first, count = first[inside], count[inside]
        set_runs(self._mask, first, np.minimum(count, known - first), value=False)

    def become(self, mask: BoolArray) -> None:
        """Be this set; takes the mask over."""
        self._mask = mask

    def mask(self, pages: int) -> BoolArray:
        """A private copy, shape (pages,)."""
        return _of_size(self._mask, pages)


def ballooned_holes(balloon: BalloonServer, ram: HostRam) -> BoolArray | None:
    """Of the pages in the balloon those that have no storage; None when there are none. For armed trackers."""
    mask = balloon.ballooned(ram.pages)
    if not mask.any():
        return None
    mask &= ~ram.populated()
    return mask if mask.any() else None


def give_back(ram: HostRam, ballooned: BoolArray) -> None:
    """Punch these pages: what was stored of them before the balloon took them is nobody's."""
    first, count = mask_runs(ballooned)
    for start, length in zip(first.tolist(), count.tolist(), strict=True):
        ram.punch(start, length)


def pack(mask: BoolArray) -> bytes:
    """A mask for the way to another host; b"" when nothing is set."""
    return zlib.compress(np.packbits(mask).tobytes(), FAST) if mask.any() else b""


def unpack(data: bytes, pages: int) -> BoolArray:
    """What `pack` made of a mask of `pages` pages.

    Raises:
        RemoteProtocolError: it is none of that size.
    """
    if not data:
        return np.zeros(pages, np.bool_)
    size = -(-pages // 8)
    unpacker = zlib.decompressobj()
    try:
        packed = unpacker.decompress(data, size + 1)
    except zlib.error as error:
        raise RemoteProtocolError("the ballooned pages cannot be unpacked", why=str(error)) from error
    if len(packed) != size or not unpacker.eof:
        raise RemoteProtocolError("the ballooned pages are of another guest", pages=pages)
    return np.unpackbits(np.frombuffer(packed, np.uint8), count=pages).view(np.bool_)


def _of_size(mask: BoolArray, pages: int) -> BoolArray:
    sized = np.zeros(pages, np.bool_)
    sized[: mask.size] = mask[:pages]
    return sized
