"""Walking free page blocks, as version 17 of the series did (walk_free_mem_block, mm/page_alloc.c).

Rule 1: per zone, from the highest order down to min_order, per migrate type: every free block, once per walk.
Rule 2: false from the callback ends the whole walk, not only its list.
Rule 3: the callback runs under the zone lock: it must neither wait nor allocate.
Rule 4: nothing is promised about a range once its callback returned: it may be in use at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from guest_agent.boot import ORDER_MAX

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from guest_agent.buddy import BuddyAllocator

__all__ = ["free_blocks", "walk"]

LISTS = (1, 2, 3)  # values in a free map: 1 + the migrate type, in the order of MigrateType


def walk(
    buddy: BuddyAllocator,
    opaque: Any,
    min_order: int,
    report_pfn_range: Callable[[Any, int, int], bool],
) -> bool:
    """Call report_pfn_range(opaque, first page, pages) for every free block of min_order or more.

    Returns:
        whether the walk came to its end; False: the callback ended it.
    """
    for zone_index in range(len(buddy.zones)):
        with buddy.lock:
            for pfn, pages in free_blocks(buddy, zone_index, min_order):
                if not report_pfn_range(opaque, pfn, pages):
                    return False
    return True


def free_blocks(buddy: BuddyAllocator, zone_index: int, min_order: int) -> Iterator[tuple[int, int]]:
    """The free blocks of one zone as (first page, pages), in the order of the walk; hold the lock."""
    for order in range(ORDER_MAX, min_order - 1, -1):
        first, cells = buddy.free_map_of(zone_index, order)
        for listed in LISTS:
            for block in (np.flatnonzero(cells == listed) + first).tolist():
                yield block << order, 1 << order
