"""Guest pages as numbers, runs and masks, and the ways between the three.

Rule 1: a page is named by its pfn (guest physical address >> 12); page n lives at byte n * PAGE_BYTES of RAM.
Rule 2: a run is (first, count); lists of runs are two arrays of equal length. A mask has one bool per page.
Rule 3: work is per run or vectorised over pages; nothing here loops over pages in Python.
Rule 4: runs may overlap and come in any order only where it says so; such runs are merged before they are
        expanded, so that no list of runs costs more than the mask it falls on.
"""

from collections.abc import Iterator
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from migration.errors import LocalProtocolError

PAGE_BYTES = 4096

U8Array: TypeAlias = NDArray[np.uint8]
U32Array: TypeAlias = NDArray[np.uint32]
U64Array: TypeAlias = NDArray[np.uint64]
BoolArray: TypeAlias = NDArray[np.bool_]

# Below this many pages per run, one operation over the whole span of the runs is cheaper than one
# operation per run (a numpy call costs about as much as passing over 512 bools).
SPAN_PAGES_PER_RUN = 512


def runs_of(pfns: U64Array) -> tuple[U64Array, U32Array]:
    """The runs (first, count) of strictly ascending `pfns`."""
    if pfns.size == 0:
        return pfns.astype(np.uint64), np.empty(0, np.uint32)
    assert (pfns[1:] > pfns[:-1]).all(), "pfns are not strictly ascending"
    starts = np.flatnonzero(pfns[1:] - pfns[:-1] != 1) + 1
    starts = np.concatenate(([0], starts))
    count = np.diff(starts, append=pfns.size).astype(np.uint32)
    return pfns[starts], count


def pfns_of(first: U64Array, count: U32Array | U64Array) -> U64Array:
    """The pages of the runs, run by run; as many as the counts add up to."""
    lengths = count.astype(np.int64)
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if ends.size else 0
    # Each run's first page minus its place in the result; unsigned, so the wrap-around cancels.
    offsets = first.astype(np.uint64) - (ends - lengths).astype(np.uint64)
    pfns: U64Array = np.repeat(offsets, lengths)
    pfns += np.arange(total, dtype=np.uint64)
    return pfns


def mask_runs(mask: BoolArray) -> tuple[U64Array, U32Array]:
    """The runs of set pages of a mask, ascending."""
    if mask.size == 0:
        return np.empty(0, np.uint64), np.empty(0, np.uint32)
    edges = np.flatnonzero(mask[1:] != mask[:-1]) + 1
    if mask[0]:
        edges = np.concatenate(([0], edges))
    if edges.size % 2:
        edges = np.append(edges, mask.size)
    first, end = edges[0::2], edges[1::2]
    return first.astype(np.uint64), (end - first).astype(np.uint32)


def merge_runs(
    first: U64Array, count: U32Array | U64Array, *, pages: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Disjoint ascending runs (first, end) that cover the same pages; runs that touch become one.

    The given runs may overlap, repeat, be empty and come in any order.

    Raises:
        LocalProtocolError: a run reaches beyond `pages` (or wraps around 2^64).
    """
    if first.size != count.size:
        raise LocalProtocolError("runs of unequal lists", first=first.size, count=count.size)
    if first.size == 0:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    if int(first.max()) > pages or int(count.max()) > pages:
        raise LocalProtocolError("run beyond the guest's memory", pages=pages)
    begin = first.astype(np.int64)
    end = begin + count.astype(np.int64)
    if int(end.max()) > pages:
        raise LocalProtocolError("run beyond the guest's memory", pages=pages, end=int(end.max()))
    full = end > begin
    begin, end = begin[full], end[full]
    if begin.size == 0:
        return begin, end
    if (begin[1:] < begin[:-1]).any():
        order = np.argsort(begin, kind="stable")
        begin, end = begin[order], end[order]
    reach = np.maximum.accumulate(end)
    # A merged run starts where a run begins beyond everything before it.
    starts = np.concatenate(([0], np.flatnonzero(begin[1:] > reach[:-1]) + 1))
    return begin[starts], reach[np.append(starts[1:] - 1, begin.size - 1)]


def windows_of(
    first: U64Array, count: U32Array | U64Array, *, pages: int
) -> Iterator[tuple[slice, BoolArray | None]]:
    """Cuts runs (any order, overlapping) into windows (slice, covered) of a mask of `pages` bools.

    `covered` says which pages of the window the runs name; None means all of them. No page is in two
    windows. Long or far runs come one window each, many short ones as a single window.
    """
    begin, end = merge_runs(first, count, pages=pages)
    if begin.size == 0:
        return
    low, high = int(begin[0]), int(end[-1])
    if begin.size * SPAN_PAGES_PER_RUN < high - low or begin.size == 1:
        for start, stop in zip(begin.tolist(), end.tolist(), strict=True):
            yield slice(start, stop), None
        return
    # Difference array: +1 where a run begins, -1 where it ends; merged runs keep the sum at 0 or 1.
    difference = np.zeros(high - low + 1, np.int8)
    difference[begin - low] = 1
    difference[end - low] = -1
    yield slice(low, high), np.add.accumulate(difference[:-1], dtype=np.int8).view(np.bool_)


def set_runs(mask: BoolArray, first: U64Array, count: U32Array | U64Array, value: bool) -> None:
    """Sets every page of the runs (any order, overlapping) in `mask` to `value`.

    Raises:
        LocalProtocolError: a run reaches beyond the mask.
    """
    for window, covered in windows_of(first, count, pages=mask.size):
        if covered is None:
            mask[window] = value
        else:
            np.copyto(mask[window], value, where=covered)
