"""The sparse bitmap against a roaring bitmap and a Python set, on what a balloon does with them.

Page numbers of an 8 GiB guest: "runs" is 7/8 of them in blocks of 4 MiB, in random order of the blocks; "scattered"
is every page with probability 1/2. Walking means getting the runs of neighbouring members as arrays.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np
from pyroaring import BitMap64

from guest_agent.xbitmap import XBitmap

if TYPE_CHECKING:
    from collections.abc import Callable

    from guest_agent.arrays import U64Array

PAGES = 8 << 18
BLOCK = 1024
SINGLES = 100_000
REPEATS = 5


def data_of(name: str) -> U64Array:
    """The page numbers of one case."""
    generator = np.random.default_rng(1)
    if name == "runs":
        blocks = generator.permutation(PAGES // BLOCK)[: PAGES // BLOCK * 7 // 8].astype(np.uint64)
        pages: U64Array = (blocks[:, None] * np.uint64(BLOCK) + np.arange(BLOCK, dtype=np.uint64)).reshape(-1)
        return pages
    return np.flatnonzero(generator.random(PAGES) < 0.5).astype(np.uint64)


def runs_in(ascending: U64Array) -> tuple[U64Array, U64Array]:
    """Members to runs, for sets that cannot walk runs themselves."""
    breaks = np.flatnonzero(np.diff(ascending) != 1)
    return ascending[np.append(0, breaks + 1)], ascending[np.append(breaks, ascending.size - 1)]


def best_ms(work: Callable[[], object]) -> float:
    """The least of some repeats: nobody else on the machine makes it shorter."""
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        work()
        times.append((time.perf_counter() - started) * 1000)
    return min(times)


def made(kind: str, pages: U64Array) -> Any:
    """A set of all the pages."""
    if kind == "xbitmap":
        bitmap = XBitmap()
        bitmap.set_bits(pages)
        return bitmap
    return BitMap64(pages) if kind == "pyroaring" else set(pages.tolist())


def walked(kind: str, members: Any) -> tuple[U64Array, U64Array]:
    """Its runs."""
    if kind == "xbitmap":
        runs: tuple[U64Array, U64Array] = members.runs()
        return runs
    if kind == "pyroaring":
        return runs_in(np.array(members.to_array(), dtype=np.uint64))
    return runs_in(np.array(sorted(members), dtype=np.uint64))


def cleared(kind: str, members: Any) -> None:
    """The middle half of the numbers leaves."""
    low, high = PAGES // 4, PAGES * 3 // 4
    if kind == "xbitmap":
        members.clear_bit_range(low, high - 1)
    elif kind == "pyroaring":
        members.remove_range(low, high)
    else:
        members.difference_update(range(low, high))


def singles(kind: str, pages: list[int]) -> None:
    """Members one by one: set, looked at, cleared."""
    members: Any = XBitmap() if kind == "xbitmap" else BitMap64() if kind == "pyroaring" else set()
    add, remove = (
        (members.set_bit, members.clear_bit) if kind == "xbitmap" else (members.add, members.discard)
    )
    for page in pages:
        add(page)
    if kind == "xbitmap":
        assert all(members.test_bit(page) for page in pages)
    else:
        assert all(page in members for page in pages)
    for page in pages:
        remove(page)


def compare() -> dict[str, dict[str, float]]:
    """Milliseconds by kind of set, by case and operation."""
    table: dict[str, dict[str, float]] = {}
    for kind in ("xbitmap", "pyroaring", "set"):
        row: dict[str, float] = {}
        for case in ("runs", "scattered"):
            pages = data_of(case)
            row[f"{case}_set_ms"] = best_ms(lambda kind=kind, pages=pages: made(kind, pages))
            members = made(kind, pages)
            row[f"{case}_walk_ms"] = best_ms(lambda kind=kind, members=members: walked(kind, members))
            started = time.perf_counter()
            cleared(kind, members)
            row[f"{case}_clear_half_ms"] = (time.perf_counter() - started) * 1000
        few = np.random.default_rng(2).permutation(PAGES)[:SINGLES].tolist()
        row["one_by_one_us"] = best_ms(lambda kind=kind, few=few: singles(kind, few)) * 1000 / SINGLES / 3
        table[kind] = row
    return table
