"""Zones of guest memory, and how much of it stays free.

Rule 1: a zone begins on a boundary of the largest block, so no block and no merge crosses from one to the other.
"""

from dataclasses import dataclass
from math import isqrt
from typing import Final

from guest_agent.arrays import PAGE_BYTES

DMA_PAGES: Final = 4096  # 16 MiB, as on x86; a multiple of the largest block


@dataclass(frozen=True, slots=True)
class Zone:
    """A range of page numbers that blocks never leave."""

    name: str
    pfn_first: int
    pfn_end: int


def zones_of(pages: int) -> tuple[Zone, ...]:
    """The zones of a guest of so many pages, in the order of their addresses."""
    dma = Zone("DMA", 0, min(DMA_PAGES, pages))
    return (dma,) if pages <= DMA_PAGES else (dma, Zone("NORMAL", DMA_PAGES, pages))


def low_watermark(pages: int) -> int:
    """5/4 of Linux's min_free_kbytes (4 * sqrt(KiB of memory)), never more than 1/16 of a small guest."""
    kibibytes = pages * PAGE_BYTES // 1024
    return min(5 * isqrt(16 * kibibytes) // 4 * 1024 // PAGE_BYTES, pages // 16)
