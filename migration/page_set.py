"""A set of guest pages that is made quickly, shrinks by ranges and is taken from in ascending order.

Rule 1: `count` is exact at all times; it is maintained from bits that really changed, never from lengths.
Rule 2: `take` gives members at or after a cursor, ascending, and removes nothing: the cursor is the caller's.
Rule 3: taking everything in small portions costs about one pass over the mask, however the members lie.
"""

from typing import Self

import numpy as np

from migration.errors import LocalProtocolError
from migration.pages import BoolArray, U32Array, U64Array, mask_runs, windows_of

# Windows in which `take` looks: small enough that what is left over costs little to look at again,
# and growing fourfold over thin stretches, up to a size at which a call's cost no longer shows.
TAKE_WINDOW_PAGES_MIN = 2048
TAKE_WINDOW_PAGES_MAX = 1 << 20


class PageSet:
    """A subset of the pages 0..pages-1, one byte each.

    One byte per page and not one bit: a byte mask of 8 GiB of guest memory is 2 MiB, is scanned at memory
    speed, and needs no unpacking at either end.
    """

    __slots__ = ("_bytes", "_count", "_mask")

    def __init__(self, pages: int) -> None:
        if pages < 0:
            raise LocalProtocolError("negative number of pages", pages=pages)
        # The bytearray is there for its memchr (find); the mask is a view of the same memory.
        self._bytes = bytearray(pages)
        self._mask: BoolArray = np.frombuffer(self._bytes, np.bool_)
        self._count = 0

    @classmethod
    def of_mask(cls, mask: BoolArray) -> Self:
        """A set with a copy of `mask`."""
        made = cls(mask.size)
        made.add(mask)
        return made

    @property
    def pages(self) -> int:
        """How many pages the guest has; the size of the mask."""
        return self._mask.size

    @property
    def count(self) -> int:
        """How many pages are in the set."""
        return self._count

    @property
    def mask(self) -> BoolArray:
        """A live view (pages,) that cannot be written through."""
        view = self._mask.view()
        view.flags.writeable = False
        return view

    def __len__(self) -> int:
        return self._count

    def __contains__(self, pfn: int) -> bool:
        return self.contains(pfn)

    def contains(self, pfn: int) -> bool:
        """Whether page `pfn` is in the set; False beyond the guest's memory."""
        return 0 <= pfn < self._mask.size and bool(self._mask[pfn])

    def copy(self) -> Self:
        """An independent set with the same members."""
        return type(self).of_mask(self._mask)

    def runs(self) -> tuple[U64Array, U32Array]:
        """The members as runs (first, count), ascending."""
        return mask_runs(self._mask)

    def add(self, members: BoolArray | U64Array) -> int:
        """Adds the set pages of a mask (pages,), or the listed pfns (any order, repeated ones too).

        Returns:
            The number of pages that were not in the set before.

        Raises:
            LocalProtocolError: a mask of another size, or a pfn beyond the guest's memory.
        """
        before = self._count
        if members.dtype == np.bool_:
            if members.size != self._mask.size:
                raise LocalProtocolError("mask of another size", pages=self._mask.size, mask=members.size)
            np.logical_or(self._mask, members, out=self._mask)
        elif members.size:
            if int(members.max()) >= self._mask.size:
                raise LocalProtocolError(
                    "pfn beyond the guest's memory", pages=self._mask.size, pfn=int(members.max())
                )
            self._mask[members] = True
        self._count = int(np.count_nonzero(self._mask))
        return self._count - before

    def discard_range(self, first: int, count: int) -> int:
        """Removes pages first..first+count-1.

        Returns:
            The number of pages that were in the set.

        Raises:
            LocalProtocolError: the range reaches beyond the guest's memory.
        """
        if first < 0 or count < 0 or first + count > self._mask.size:
            raise LocalProtocolError(
                "range beyond the guest's memory", pages=self._mask.size, first=first, count=count
            )
        window = self._mask[first : first + count]
        removed = int(np.count_nonzero(window))
        window[:] = False
        self._count -= removed
        return removed

    def discard_window(self, window: slice, members: BoolArray) -> int:
        """Removes the pages of `window` that are set in `members` (as long as the window).

        Returns:
            The number of pages that were in the set.
        """
        part = self._mask[window]
        removed = int(np.count_nonzero(part & members))
        np.copyto(part, False, where=members)
        self._count -= removed
        return removed

    def discard_runs(self, first: U64Array, count: U32Array | U64Array) -> int:
        """Removes the pages of many runs, which may overlap and come in any order.

        Returns:
            The number of pages that were in the set.

        Raises:
            LocalProtocolError: a run reaches beyond the guest's memory.
        """
        removed = 0
        for window, covered in windows_of(first, count, pages=self._mask.size):
            if covered is None:
                removed += self.discard_range(window.start, window.stop - window.start)
            else:
                removed += self.discard_window(window, covered)
        return removed

    def take(self, cursor: int, count: int) -> tuple[U64Array, int]:
        """The first `count` members at or after `cursor` (fewer at the end), ascending.

        Returns:
            (pfns, cursor to go on from); no member lies between the last pfn and that cursor.

        Raises:
            LocalProtocolError: the cursor is negative.
        """
        if cursor < 0:
            raise LocalProtocolError("negative cursor", cursor=cursor)
        found: list[U64Array] = []
        wanted = count
        window_pages = max(TAKE_WINDOW_PAGES_MIN, count)
        while wanted > 0:
            # memchr over what is empty: 20 times faster than looking for members there.
            position = self._bytes.find(1, cursor)
            if position < 0:
                cursor = self._mask.size
                break
            window = self._mask[position : position + window_pages]
            members = np.flatnonzero(window)[:wanted].astype(np.uint64)
            members += np.uint64(position)
            found.append(members)
            wanted -= members.size
            cursor = position + window.size if wanted else int(members[-1]) + 1
            window_pages = min(window_pages * 4, TAKE_WINDOW_PAGES_MAX)
        if len(found) == 1:
            return found[0], cursor
        return (np.concatenate(found) if found else np.empty(0, np.uint64)), cursor
