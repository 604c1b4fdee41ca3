"""Freed memory that keeps a value: what Linux calls page poisoning, or init_on_free with the value 0.

Rule 1: a page is filled when it is freed, wherever it was before: in use, in the balloon, or held for a hint. A
        page that the host gave back changed is thereby right again before anybody can take it (virtio 1.2,
        5.5.6.5.1 and 5.5.6.6).
Rule 2: every free page reads as the value, from boot on; whoever finds another one found a page that was lost
        or written after it was freed.
"""

from collections.abc import Iterable
from typing import Final

import numpy as np

from guest_agent.arrays import U64Array, runs_of
from guest_agent.frames import FrameKind, FrameTable
from guest_agent.ram import GuestRam

_PAGES_AT_ONCE: Final = 4096  # 16 MiB compared or scattered at a time: temporaries stay small


class Poison:
    """Fills and checks pages with one 32-bit value."""

    def __init__(self, ram: GuestRam, value: int) -> None:
        assert 0 <= value < 1 << 32, value
        self.value = value
        self._words = ram.words
        self._word = np.uint64(value << 32 | value)

    def fill_runs(self, runs: Iterable[tuple[int, int]]) -> None:
        """Fill page runs [start, end)."""
        for start, end in runs:
            self._words[start:end] = self._word

    def fill_free(self, frames: FrameTable) -> None:
        """Fill all free pages: rule 2 from boot on. Pages that never were touched read as zero already."""
        if self.value:
            starts, ends = runs_of(np.flatnonzero(frames.kind == FrameKind.FREE))
            self.fill_runs(zip(starts.tolist(), ends.tolist(), strict=True))

    def wrong(self, pfns: U64Array) -> U64Array:
        """Those of the pages that do not read as the value throughout."""
        parts = [
            chunk[(self._words[chunk] != self._word).any(axis=1)]
            for start in range(0, pfns.size, _PAGES_AT_ONCE)
            for chunk in (pfns[start : start + _PAGES_AT_ONCE],)
        ]
        return np.concatenate(parts) if parts else pfns[:0]

    def problems(self, frames: FrameTable) -> list[str]:
        """One line when free pages do not read as the value."""
        wrong = self.wrong(frames.pfns_of_kind(FrameKind.FREE))
        if not wrong.size:
            return []
        return [f"{wrong.size} free pages do not read as the poison {self.value:#x}, the first is {wrong[0]}"]
