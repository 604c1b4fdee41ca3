"""Which free memory the host was already told of (free page reporting).

Rule 1: a mark stands for one block of REPORT_ORDER; it is set when the host acknowledged, and cleared when any page
        of the block is allocated.
Rule 2: marks are not in guest RAM: another host, or another device, has to be told everything again.
"""

from typing import Final

import numpy as np

from guest_agent.arrays import I64Array
from guest_agent.boot import free_map_blocks

REPORT_ORDER: Final = 9  # 2 MiB, as Linux's pageblock_order: smaller holes would split the host's huge pages


class Reported:
    """The marks of one guest; whoever uses them holds the allocator's lock."""

    def __init__(self, pages: int) -> None:
        self._marks = np.zeros(free_map_blocks(pages, REPORT_ORDER), dtype=np.bool_)

    def clear(self) -> None:
        """Nothing is known to the host."""
        self._marks[:] = False

    def block_taken(self, pfn: int, order: int) -> None:
        """Pages of one block, of any order, were allocated."""
        first = pfn >> REPORT_ORDER
        self._marks[first : first + (1 << max(order - REPORT_ORDER, 0))] = False

    def blocks_taken(self, order: int, blocks: I64Array) -> None:
        """Whole blocks of REPORT_ORDER or more were allocated."""
        self._of(order)[blocks] = False

    def unreported(self, order: int, blocks: I64Array) -> I64Array:
        """Those of the blocks that hold something the host does not know of."""
        return blocks[~self._of(order)[blocks].all(axis=1)]

    def mark(self, order: int, blocks: I64Array) -> None:
        """The host acknowledged these blocks."""
        self._of(order)[blocks] = True

    def _of(self, order: int) -> np.ndarray[tuple[int, int], np.dtype[np.bool_]]:
        """The marks as rows, one for each block of the order."""
        return self._marks.reshape(-1, 1 << (order - REPORT_ORDER))
