"""Memory statistics as they cross the stats queue (virtio 1.2 section 5.5.6.3).

Rule 1: an entry is 10 bytes: a 16-bit tag and a 64-bit value, little-endian. (The standard's "multiple of 6" is
        an erratum.)
Rule 2: tags come in any order; a tag we do not know is skipped and counted, never an error: newer guests have
        more of them.
Rule 3: the last value of a tag counts; what is left after the last whole entry is counted and ignored.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

STATS_ENTRY = struct.Struct("<HQ")
STATS_ENTRY_BYTES = STATS_ENTRY.size
assert STATS_ENTRY_BYTES == 10
# The standard has 10 tags and Linux 6.12 has 16; 256 leaves room and bounds what a guest makes us read.
STATS_ENTRIES_MAX = 256
STATS_BYTES_MAX = STATS_ENTRIES_MAX * STATS_ENTRY_BYTES  # that many entries of ten bytes

# The index is the tag. 0-9 are the standard's, 10-15 are Linux 6.12's.
STATS_NAMES = (
    "swap_in",
    "swap_out",
    "majflt",
    "minflt",
    "memfree",
    "memtot",
    "avail",
    "caches",
    "htlb_pgalloc",
    "htlb_pgfail",
    "oom_kill",
    "alloc_stall",
    "async_scan",
    "direct_scan",
    "async_reclaim",
    "direct_reclaim",
)
STATS_TAGS = {name: tag for tag, name in enumerate(STATS_NAMES)}


@dataclass(frozen=True, slots=True)
class GuestStatistics:
    """One report of a guest.

    Attributes:
        values: by name; memory is in bytes, everything else counts since the guest booted.
        unknown_tags: entries whose tag has no name here.
        leftover_bytes: what followed the last whole entry.
    """

    values: dict[str, int] = field(default_factory=dict)
    unknown_tags: int = 0
    leftover_bytes: int = 0


def decode_stats(data: bytes) -> GuestStatistics:
    """What a statistics buffer says; never raises. At most `STATS_ENTRIES_MAX` entries are looked at."""
    values: dict[str, int] = {}
    unknown = 0
    data = data[:STATS_BYTES_MAX]
    whole = len(data) // STATS_ENTRY_BYTES * STATS_ENTRY_BYTES
    for tag, value in STATS_ENTRY.iter_unpack(data[:whole]):
        if tag < len(STATS_NAMES):
            values[STATS_NAMES[tag]] = value
        else:
            unknown += 1
    return GuestStatistics(values, unknown, len(data) - whole)


def encode_stats(entries: Iterable[tuple[int, int]]) -> bytes:
    """The bytes of (tag, value) entries, in their order; the driver's half."""
    return b"".join(STATS_ENTRY.pack(tag, value) for tag, value in entries)
