"""A sparse bitmap over 64-bit indices: what the series called xbitmap.

Rule 1: 1024 neighbouring bits are a leaf; a leaf comes with its first bit and goes with its last, so an empty
        bitmap holds nothing.
Rule 2: ranges are [start, end] with `end` inclusive, so that 2**64 - 1 can be named; none found is `end + 1`,
        also when the range is empty (start > end).
Rule 3: leaves are a bounded resource. What cannot get its leaf fails before anything was changed, and leaves
        nothing behind, no bit, no leaf and no preloaded leaf.
Rule 4: a leaf is one integer of 1024 bits: a find is two or three operations on it, a full leaf is one shared
        object, and many bits are set and walked by leaves and runs, never bit by bit.

The historic implementation is a radix tree of bitmaps in the kernel; its reviewers' findings (FACTS 2.1) are
named tests of this one.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from typing import Final

import numpy as np

from guest_agent.arrays import I64Array, U64Array
from guest_agent.errors import XBitmapError

__all__ = ["INDEX_MAX", "LEAF_BITS", "XBitmap", "XBitmapNoMemory", "XBitmapTryAgain"]

INDEX_MAX: Final = 2**64 - 1
LEAF_BITS: Final = 1024
LEAF_SHIFT: Final = 10
_OFFSET_MASK: Final = LEAF_BITS - 1
_LEAF_BYTES: Final = LEAF_BITS // 8
_FULL: Final = (1 << LEAF_BITS) - 1
LEAVES_MAX: Final = 1 << 22  # every page of a 16 TiB guest, the most that 32-bit frame numbers can name
_CHUNK_LEAVES: Final = 2048  # leaves unpacked at once: 2 MiB of bytes stay in the cache
# Up to so many runs per leaf touched, setting run by run is faster than unpacking the leaves.
_RUNS_PER_LEAF_MAX: Final = 1


class XBitmapNoMemory(XBitmapError):
    """`preload`: there is no leaf to be had (the series' -ENOMEM)."""


class XBitmapTryAgain(XBitmapError):
    """A set needs leaves that are neither preloaded nor to be had (the series' -EAGAIN); nothing was set."""


class XBitmap:
    """Bits 0 to 2**64 - 1. Not thread-safe: it belongs to whoever holds the lock of what it records.

    Raises ValueError, everywhere, for an index that has no 64 bits.
    """

    def __init__(self, *, leaves_max: int = LEAVES_MAX) -> None:
        self._leaves_max = leaves_max
        self._leaves: dict[int, int] = {}  # never 0
        self._order: list[int] = []  # the keys, ascending
        self._preloaded = False

    @property
    def leaves(self) -> int:
        """Leaves held now, a preloaded one included."""
        return len(self._leaves) + self._preloaded

    def is_empty(self) -> bool:
        """Whether no bit is set."""
        return not self._leaves

    def count(self) -> int:
        """Bits that are set."""
        return sum(leaf.bit_count() for leaf in self._leaves.values())

    # --- single bits ------------------------------------------------------------------------------

    def set_bit(self, bit: int) -> None:
        """Set one bit.

        Raises:
            XBitmapTryAgain: it needs a leaf, none is preloaded and none is to be had.
        """
        _check(bit)
        key = bit >> LEAF_SHIFT
        leaf = self._leaves.get(key)
        if leaf is None:
            self._claim(1)
            self._insert(key)
            leaf = 0
        self._leaves[key] = leaf | 1 << (bit & _OFFSET_MASK)

    def clear_bit(self, bit: int) -> None:
        """Clear one bit, set or not."""
        self.clear_bit_range(bit, bit)

    def test_bit(self, bit: int) -> bool:
        """Whether the bit is set."""
        _check(bit)
        return bool(self._leaves.get(bit >> LEAF_SHIFT, 0) >> (bit & _OFFSET_MASK) & 1)

    def preload(self) -> None:
        """Get a leaf now, where waiting is allowed, so that the next `set_bit` cannot fail.

        One at most is kept; `preload_end` gives an unused one back.

        Raises:
            XBitmapNoMemory: there is none.
        """
        if not self._preloaded:
            if self.leaves >= self._leaves_max:
                raise XBitmapNoMemory(f"{self.leaves} leaves of {self._leaves_max} are in use")
            self._preloaded = True

    def preload_end(self) -> None:
        """Give the preloaded leaf back if nobody took it."""
        self._preloaded = False

    def preload_and_set_bit(self, bit: int) -> None:
        """`preload`, `set_bit`, `preload_end`; on failure the bitmap is as it was.

        Raises:
            XBitmapNoMemory: the bit's leaf cannot be had.
        """
        _check(bit)
        if bit >> LEAF_SHIFT not in self._leaves:
            self.preload()
        try:
            self.set_bit(bit)
        finally:
            self.preload_end()

    # --- ranges -----------------------------------------------------------------------------------

    def clear_bit_range(self, start: int, end: int) -> None:
        """Clear every bit of [start, end]."""
        _check(start)
        _check(end)
        if start > end:
            return
        low, high = self._keys_between(start, end)
        gone_from, gone_to = high, low  # positions in _order of the leaves that go
        for position in range(low, high):
            key = self._order[position]
            left = self._leaves[key] & ~_mask_in(key, start, end)
            if left:
                self._leaves[key] = left
            else:
                del self._leaves[key]
                gone_from, gone_to = min(gone_from, position), position + 1
        if gone_from < gone_to:  # only the leaves at the two edges can have stayed: the rest is one slice
            del self._order[gone_from:gone_to]

    def find_next_set_bit(self, start: int, end: int) -> int:
        """The first bit of [start, end] that is set, or end + 1."""
        _check(start)
        _check(end)
        if start > end:
            return end + 1
        position = bisect_left(self._order, start >> LEAF_SHIFT)
        while position < len(self._order):
            key = self._order[position]
            first = max(start, key << LEAF_SHIFT)
            rest = self._leaves[key] >> (first & _OFFSET_MASK)
            if first > end:
                break
            if rest:
                return min(first + _lowest(rest), end + 1)
            position += 1  # at most once: only the first leaf can have all its bits before `start`
        return end + 1

    def find_next_zero_bit(self, start: int, end: int) -> int:
        """The first bit of [start, end] that is not set, or end + 1."""
        _check(start)
        _check(end)
        at = start
        while at <= end:
            leaf = self._leaves.get(at >> LEAF_SHIFT)
            if leaf is None:
                return at
            rest = (leaf ^ _FULL) >> (at & _OFFSET_MASK)
            if rest:
                return min(at + _lowest(rest), end + 1)
            at = (at | _OFFSET_MASK) + 1
        return end + 1

    # --- many bits --------------------------------------------------------------------------------

    def set_run(self, start: int, end: int) -> None:
        """Set every bit of [start, end], all or none.

        Raises:
            XBitmapTryAgain: it needs more leaves than are to be had.
        """
        _check(start)
        _check(end)
        if start > end:
            return
        first, last = start >> LEAF_SHIFT, end >> LEAF_SHIFT
        low, high = self._keys_between(start, end)
        missing = last - first + 1 - (high - low)
        if missing:
            self._claim(missing)
            self._order[low:high] = range(first, last + 1)
        for key in {first, last}:
            self._leaves[key] = self._leaves.get(key, 0) | _mask_in(key, start, end)
        if last - first > 1:
            self._leaves.update(dict.fromkeys(range(first + 1, last), _FULL))

    def set_runs(self, firsts: U64Array | I64Array, lasts: U64Array | I64Array) -> None:
        """Set every bit of every [first, last], all or none; the runs ascend and are disjoint.

        Raises:
            XBitmapTryAgain: they need more leaves than are to be had.
        """
        if not len(firsts):
            return
        _check(int(firsts[0]))
        _check(int(lasts[-1]))
        first, last = firsts.astype(np.uint64), lasts.astype(np.uint64)
        if len(first) > _RUNS_PER_LEAF_MAX * len(_starts(first >> _SHIFT)):
            self.set_bits(_members(first, last))
        else:
            self._set_runs(first, last)

    def set_bits(self, bits: U64Array | I64Array) -> None:
        """Set many bits, in any order and however often named, all or none.

        Raises:
            XBitmapTryAgain: they need more leaves than are to be had.
        """
        if not len(bits):
            return
        if bits.dtype.kind == "i" and int(bits.min()) < 0:
            raise ValueError("a negative index")
        wanted = bits.astype(np.uint64)
        if (wanted[1:] <= wanted[:-1]).any():
            wanted = np.sort(wanted)  # and not np.unique, which is many times slower on page numbers
            wanted = wanted[_starts(wanted)]
        firsts, lasts = _runs(wanted)
        keys = wanted[_starts(wanted >> np.uint64(LEAF_SHIFT))] >> np.uint64(LEAF_SHIFT)
        if len(firsts) <= _RUNS_PER_LEAF_MAX * len(keys):
            self._set_runs(firsts, lasts)
        else:
            self._set_scattered(wanted, keys)

    def runs(self, start: int = 0, end: int = INDEX_MAX) -> tuple[U64Array, U64Array]:
        """The runs of set bits inside [start, end].

        Returns:
            (first, last) of each run, both inclusive, ascending, dtype u64, shape (runs,).
        """
        _check(start)
        _check(end)
        if start > end:
            return _NONE, _NONE
        low, high = self._keys_between(start, end)
        keys = self._order[low:high]
        leaves = [self._leaves[key] for key in keys]
        for edge in {0, len(keys) - 1} if keys else ():
            leaves[edge] &= _mask_in(keys[edge], start, end)
        key_array = np.array(keys, dtype=np.uint64)
        full = np.fromiter((leaf == _FULL for leaf in leaves), np.bool_, len(leaves))
        first_keys, last_keys = _runs(key_array[full])
        firsts, lasts = [first_keys << _SHIFT], [last_keys << _SHIFT | np.uint64(_OFFSET_MASK)]
        partial = np.flatnonzero(~full)
        for at in range(0, partial.size, _CHUNK_LEAVES):
            chosen = partial[at : at + _CHUNK_LEAVES]
            packed = b"".join(leaves[index].to_bytes(_LEAF_BYTES, "little") for index in chosen.tolist())
            chunk_firsts, chunk_lasts = _runs_in_leaves(packed, key_array[chosen])
            firsts.append(chunk_firsts)
            lasts.append(chunk_lasts)
        return _joined(np.concatenate(firsts), np.concatenate(lasts))

    def bits(self, start: int = 0, end: int = INDEX_MAX) -> U64Array:
        """The set bits inside [start, end], ascending, dtype u64."""
        return _members(*self.runs(start, end))

    # --- inside -----------------------------------------------------------------------------------

    def _claim(self, leaves: int) -> None:
        """Make sure that so many new leaves may come; uses the preloaded one up."""
        if len(self._leaves) + leaves > self._leaves_max:
            raise XBitmapTryAgain(
                f"{leaves} more leaves wanted, {len(self._leaves)} of {self._leaves_max} in use"
            )
        self._preloaded = False

    def _insert(self, key: int) -> None:
        if not self._order or key > self._order[-1]:
            self._order.append(key)
        else:
            insort(self._order, key)

    def _keys_between(self, start: int, end: int) -> tuple[int, int]:
        """Positions in _order of the leaves that the range touches: [low, high)."""
        low = bisect_left(self._order, start >> LEAF_SHIFT)
        return low, bisect_right(self._order, end >> LEAF_SHIFT, lo=low)

    def _set_runs(self, firsts: U64Array, lasts: U64Array) -> None:
        shifted = firsts >> _SHIFT, lasts >> _SHIFT
        keys: set[int] = set()
        for first, last in zip(*(part.tolist() for part in shifted), strict=True):
            keys.update(range(first, last + 1))
        self._claim_missing(keys)
        for first, last in zip(firsts.tolist(), lasts.tolist(), strict=True):
            self.set_run(first, last)

    def _set_scattered(self, wanted: U64Array, keys: U64Array) -> None:
        self._claim_missing(set(keys.tolist()))
        ends = np.append(np.flatnonzero(np.diff(wanted >> _SHIFT)) + 1, wanted.size)
        begins = np.concatenate(([0], ends[:-1]))
        for at in range(0, keys.size, _CHUNK_LEAVES):
            chunk_keys = keys[at : at + _CHUNK_LEAVES]
            begin, end = begins[at], ends[at + chunk_keys.size - 1]
            cells = np.zeros((chunk_keys.size, LEAF_BITS), dtype=np.uint8)
            rows = np.repeat(np.arange(chunk_keys.size), (ends - begins)[at : at + chunk_keys.size])
            cells[rows, (wanted[begin:end] & np.uint64(_OFFSET_MASK)).astype(np.int64)] = 1
            packed = np.packbits(cells, axis=1, bitorder="little").tobytes()
            for index, key in enumerate(chunk_keys.tolist()):
                leaf = int.from_bytes(packed[index * _LEAF_BYTES : (index + 1) * _LEAF_BYTES], "little")
                self._leaves[key] = self._leaves.get(key, 0) | leaf
        self._order = sorted(self._leaves)

    def _claim_missing(self, keys: set[int]) -> None:
        missing = len(keys - self._leaves.keys())
        if missing:
            self._claim(missing)


_NONE: Final[U64Array] = np.empty(0, dtype=np.uint64)
_SHIFT: Final = np.uint64(LEAF_SHIFT)


def _check(bit: int) -> None:
    if not 0 <= bit <= INDEX_MAX:
        raise ValueError(f"{bit} is no index of 64 bits")


def _lowest(bits: int) -> int:
    """Number of the lowest bit that is set."""
    return (bits & -bits).bit_length() - 1


def _mask_in(key: int, start: int, end: int) -> int:
    """The bits of leaf `key` that lie inside [start, end], which touches the leaf."""
    base = key << LEAF_SHIFT
    low, high = max(start - base, 0), min(end - base, _OFFSET_MASK)
    return (1 << (high + 1)) - (1 << low)


def _starts(ascending: U64Array) -> I64Array:
    """Positions at which a value differs from the one before."""
    differs = np.ones(ascending.size, dtype=np.bool_)
    differs[1:] = ascending[1:] != ascending[:-1]
    return np.flatnonzero(differs)


def _runs(ascending: U64Array) -> tuple[U64Array, U64Array]:
    """Runs of neighbours in strictly ascending numbers: (first, last), inclusive."""
    if not ascending.size:
        return _NONE, _NONE
    breaks = np.flatnonzero(ascending[1:] - ascending[:-1] != 1)
    return ascending[np.append(0, breaks + 1)], ascending[np.append(breaks, ascending.size - 1)]


def _runs_in_leaves(packed: bytes, keys: U64Array) -> tuple[U64Array, U64Array]:
    """Runs inside leaves, given one after the other as bytes; runs that touch across leaves are left apart."""
    bits = np.unpackbits(np.frombuffer(packed, np.uint8).reshape(keys.size, -1), axis=1, bitorder="little")
    framed = np.zeros((keys.size, LEAF_BITS + 2), dtype=np.uint8)  # a 0 on either side: edges come in pairs
    framed[:, 1:-1] = bits
    edges = np.flatnonzero(framed[:, 1:] != framed[:, :-1])
    rise, fall = edges[0::2], edges[1::2]
    row = rise // (LEAF_BITS + 1)
    base, at = (keys << _SHIFT)[row], row * (LEAF_BITS + 1)
    return base + (rise - at).astype(np.uint64), base + (fall - at - 1).astype(np.uint64)


def _members(firsts: U64Array, lasts: U64Array) -> U64Array:
    """The numbers in runs, in the order of the runs."""
    lengths = (lasts - firsts).astype(np.int64) + 1
    offsets = np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    members: U64Array = np.repeat(firsts, lengths) + offsets.astype(np.uint64)
    return members


def _joined(firsts: U64Array, lasts: U64Array) -> tuple[U64Array, U64Array]:
    """Disjoint runs in any order, sorted, with those that touch made one."""
    if firsts.size < 2:
        return firsts, lasts
    order = np.argsort(firsts, kind="stable")
    firsts, lasts = firsts[order], lasts[order]
    apart = firsts[1:] - lasts[:-1] != 1
    return firsts[np.append(True, apart)], lasts[np.append(apart, True)]
