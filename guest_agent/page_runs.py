"""Runs of single pages in bulk: taken and given back at the price of a block, not of a page.

Rule 1: a run is [start, end) of page numbers; runs come and go as two arrays (starts, ends), ascending and
        disjoint.
Rule 2: every page of a run is a page of its own: it has its kind and its owner, and may be freed by itself. Its
        index is whatever was there: whoever numbers its pages allocates them one by one or in bulk.
Rule 3: what is whole blocks of the largest order is handled as such; only the rest is handled by pages.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from guest_agent.arrays import I64Array, expand_runs, runs_of
from guest_agent.boot import ORDER_MAX
from guest_agent.frames import OWNER_NONE

if TYPE_CHECKING:
    from guest_agent.arrays import U64Array
    from guest_agent.buddy import BuddyAllocator
    from guest_agent.frames import FrameKind

__all__ = ["NO_RUNS", "Runs", "alloc_runs", "free_runs", "joined", "pages_in", "runs_of_pages"]

Runs: TypeAlias = tuple[I64Array, I64Array]
NO_RUNS: Runs = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)


def pages_in(runs: Runs) -> int:
    """How many pages."""
    starts, ends = runs
    return int((ends - starts).sum())


def runs_of_pages(pfns: U64Array) -> Runs:
    """Pages, in any order and each once, as runs."""
    return runs_of(np.sort(pfns).view(np.int64))


def joined(*parts: Runs) -> Runs:
    """Disjoint runs of several kinds as one list, ascending; neighbours stay apart."""
    starts = np.concatenate([part[0] for part in parts])
    order = np.argsort(starts, kind="stable")
    return starts[order], np.concatenate([part[1] for part in parts])[order]


def alloc_runs(buddy: BuddyAllocator, pages_max: int, *, kind: FrameKind, owner: int) -> Runs:
    """Allocate up to pages_max single pages, largest blocks first, as `BuddyAllocator.alloc_blocks` does.

    No pressure hook is asked, and the low watermark stays free: possibly fewer pages, possibly none.
    """
    with buddy.lock:
        blocks = buddy.alloc_blocks(ORDER_MAX, pages_max >> ORDER_MAX, kind=kind, owner=owner)
        starts, ends = runs_of(np.sort(blocks).view(np.int64) >> ORDER_MAX)
        starts, ends = starts << ORDER_MAX, ends << ORDER_MAX
        buddy.frames.mark_owner_runs(starts, ends, owner)
        rest = pages_max - (blocks.size << ORDER_MAX)
        singles = runs_of_pages(buddy.alloc_blocks(0, rest, kind=kind, owner=owner))
        return joined((starts, ends), singles)


def free_runs(buddy: BuddyAllocator, runs: Runs) -> None:
    """Free every page of the runs."""
    starts, ends = runs
    if not starts.size:
        return
    first, end = -(-starts >> ORDER_MAX), ends >> ORDER_MAX
    whole = first < end
    blocks = expand_runs(first[whole], end[whole])
    edges = expand_runs(
        np.concatenate((starts[~whole], starts[whole], end[whole] << ORDER_MAX)),
        np.concatenate((ends[~whole], first[whole] << ORDER_MAX, ends[whole])),
    )
    with buddy.lock:
        buddy.frames.mark_owner_runs(starts, ends, OWNER_NONE)
        buddy.free_blocks((blocks << ORDER_MAX).view(np.uint64), ORDER_MAX)
        buddy.free_bulk(edges.view(np.uint64))
