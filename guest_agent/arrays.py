"""Array types, the page size and the one conversion that all of the guest's memory code shares.

Rule 1: page frame numbers cross module borders as uint64 arrays and are int64 inside index arithmetic.
Rule 2: work is done per run of neighbouring pages or vectorised over pages, never in a loop over pages.
"""

from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

PAGE_BYTES: Final = 4096
PAGE_WORDS: Final = PAGE_BYTES // 8

U8Array: TypeAlias = NDArray[np.uint8]
U16Array: TypeAlias = NDArray[np.uint16]
U32Array: TypeAlias = NDArray[np.uint32]
U64Array: TypeAlias = NDArray[np.uint64]
I64Array: TypeAlias = NDArray[np.int64]


def runs_of(ascending: I64Array) -> tuple[I64Array, I64Array]:
    """Cut strictly ascending numbers into runs of neighbours.

    Returns:
        (starts, ends), both of shape (runs,), ends exclusive.
    """
    if not ascending.size:
        return ascending[:0], ascending[:0]
    breaks = np.flatnonzero(np.diff(ascending) != 1) + 1
    starts = ascending[np.concatenate(([0], breaks))]
    ends = ascending[np.concatenate((breaks - 1, [ascending.size - 1]))] + 1
    return starts, ends


def expand_runs(starts: I64Array, ends: I64Array) -> I64Array:
    """List the members of runs, in the order of the runs: the inverse of runs_of."""
    lengths = ends - starts
    total = int(lengths.sum())
    offsets = np.arange(total, dtype=np.int64) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    members: I64Array = np.repeat(starts, lengths) + offsets
    return members


def distinct(values: I64Array) -> I64Array:
    """The values without repetitions, ascending (np.unique hashes first: 25 times slower on page numbers)."""
    ascending = np.sort(values)
    first = np.ones(ascending.size, dtype=np.bool_)
    first[1:] = ascending[1:] != ascending[:-1]
    kept: I64Array = ascending[first]
    return kept
