"""Compaction: a large free block out of memory that is free but for ballooned pages.

Rule 1: only ballooned pages are moved: their content is nobody's, so moving one is telling the host of its new
        place and of the end of the old one (Linux: virtballoon_migratepage).
Rule 2: no page moves into the block that is being emptied: those of its free pages that the allocator offers are
        kept out of circulation until the moves are over. Whatever goes wrong, they are free again afterwards.
Rule 3: others may allocate meanwhile: whether there is a block at the end is looked at, not assumed.
Rule 4: an attempt is bounded: one block, at most once through its pages; a balloon that is busy ends it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from guest_agent.frames import OWNER_BALLOON, OWNER_BALLOON_NEW, FrameKind

if TYPE_CHECKING:
    from collections.abc import Callable

    from guest_agent.arrays import U64Array
    from guest_agent.buddy import BuddyAllocator

__all__ = ["Compaction"]


class Compaction:
    """Makes blocks. `move(old, new)` is the balloon's `move_pages`: how many pages moved."""

    def __init__(self, buddy: BuddyAllocator, move: Callable[[U64Array, U64Array], int]) -> None:
        self._buddy = buddy
        self._frames = buddy.frames
        self._move = move
        self.moved_pages = 0

    def make_block(self, order: int) -> bool:
        """Try to make a free block of 2**order pages; whether there is one more now.

        For the allocator's `compact`: called by a thread that needs such a block, without the allocator's lock.
        """
        with self._buddy.lock:
            block = self._cheapest(order)
            if block is None:
                return False
            start, end = block << order, (block + 1) << order
            old, new, inside = self._pages_for(start, end)
        done = self._move(old, new) if new.size else 0
        self.moved_pages += done
        with self._buddy.lock:
            self._buddy.free_bulk(np.concatenate((inside, new[done:])))
            return done == old.size and not self._frames.kind[start:end].any()

    def _cheapest(self, order: int) -> int | None:
        """The block of this order with the fewest ballooned pages among those that hold nothing else."""
        blocks = self._buddy.pages >> order
        kind = self._frames.kind[: blocks << order].reshape(blocks, -1)
        owner = self._frames.owner[: blocks << order].reshape(blocks, -1)
        ballooned = np.count_nonzero(owner == OWNER_BALLOON, axis=1)
        possible = np.flatnonzero((np.count_nonzero(kind, axis=1) == ballooned) & (ballooned > 0))
        if not possible.size:
            return None
        return int(possible[np.argmin(ballooned[possible])])

    def _pages_for(self, start: int, end: int) -> tuple[U64Array, U64Array, U64Array]:
        """(Ballooned pages of the block, new places for all of them or for none, free pages of the block taken).

        Hold the allocator's lock.
        """
        old = np.flatnonzero(self._frames.owner[start:end] == OWNER_BALLOON).astype(np.uint64) + np.uint64(
            start
        )
        # The allocator knows no "not in there": at worst it offers every free page of the block first.
        taken = self._buddy.alloc_blocks(
            0, end - start, kind=FrameKind.BALLOON, owner=OWNER_BALLOON_NEW, reserve_pages=0
        )
        is_inside = (taken >= start) & (taken < end)
        outside = taken[~is_inside]
        count = int(old.size) if outside.size >= old.size else 0
        self._buddy.free_bulk(outside[count:])
        return old, outside[:count], taken[is_inside]
