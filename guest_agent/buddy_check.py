"""The buddy allocator's invariants, computed from guest RAM alone and vectorised over all pages.

Rule 1: nothing here changes anything, and nothing is taken from the allocator but the arrays that are the
        truth.
"""

from collections.abc import Sequence

import numpy as np

from guest_agent.arrays import U8Array
from guest_agent.boot import ORDER_MAX, ORDERS
from guest_agent.frames import OWNER_NONE, FrameKind, FrameTable


def find_problems(pages: int, maps: Sequence[U8Array], pageblocks: U8Array, frames: FrameTable) -> list[str]:
    """Compare free maps, pageblock types and frame table.

    maps has one byte map per order (0, or 1 + migrate type, per block); pageblocks one migrate type per
    block of the largest order.

    Returns:
        one line per broken invariant, with the first place where it shows.
    """
    problems: list[str] = []
    edges = np.zeros(len(maps[0]) + 1, dtype=np.int32)
    for order in range(ORDERS):
        blocks = np.flatnonzero(maps[order])
        edges[blocks << order] += 1
        edges[(blocks + 1) << order] -= 1
        types = maps[order][blocks]
        _report(
            problems,
            blocks[types != pageblocks[blocks >> (ORDER_MAX - order)] + 1],
            order,
            "of a foreign type",
        )
        _report(problems, blocks[(blocks + 1) << order > pages], order, "beyond the end of memory")
        if order < ORDER_MAX:
            pairs = maps[order].reshape(-1, 2).all(axis=1)
            _report(problems, np.flatnonzero(pairs) * 2, order, "not merged with its free buddy")
    cover = np.cumsum(edges[:-1])[:pages]
    free = frames.kind == FrameKind.FREE
    _report(problems, np.flatnonzero(cover > 1), 0, "in two free blocks")
    _report(problems, np.flatnonzero((cover > 0) & ~free), 0, "in a free block but of another kind")
    _report(problems, np.flatnonzero((cover == 0) & free), 0, "free but in no free block")
    _report(problems, np.flatnonzero(free & (frames.owner != OWNER_NONE)), 0, "free but with an owner")
    _report(problems, np.flatnonzero(frames.kind > max(FrameKind)), 0, "of an unknown kind")
    return problems


def _report(
    problems: list[str], blocks: np.ndarray[tuple[int], np.dtype[np.int64]], order: int, what: str
) -> None:
    if blocks.size:
        problems.append(
            f"{blocks.size} blocks of order {order} {what}, first at page {int(blocks[0]) << order}"
        )
