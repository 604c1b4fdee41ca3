"""The guest's own heartbeat, as its agents recorded it on each host.

Rule 1: beats travel by a file, over a channel that no fault and no node touches.
Rule 2: a torn last record (its writer was killed) is dropped; everything before it counts.
Rule 3: the blackout is what the guest itself saw: the gap between two beats of its own clock.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from pathlib import Path

BEAT = np.dtype([("at_ns", "<u8"), ("guest_epoch", "<u8"), ("beat", "<u8")])
assert BEAT.itemsize == 24
BeatArray: TypeAlias = NDArray[np.void]  # one-dimensional, dtype BEAT


def read_beats(path: Path) -> BeatArray:
    """The beats of one agent, in the order in which they were written; empty when there is no file."""
    data = path.read_bytes() if path.exists() else b""
    return np.frombuffer(data[: len(data) // BEAT.itemsize * BEAT.itemsize], dtype=BEAT)


def blackout_ns(
    source: BeatArray,
    dest: BeatArray,
    window_ns: tuple[int, int],
    earlier_ns: tuple[int, int] | None = None,
) -> int | None:
    """The longest time without a beat in nanoseconds, or None when the beats do not tell.

    Across a switch it is the gap from the last beat at the source to the first at the destination. When the
    guest never ran at the destination it is the longest gap between neighbours that touch the window.
    `earlier_ns` is the time of earlier attempts, whose gaps count as well: the guest stood still for them, too.
    """
    earlier = _longest_gap_ns(source, earlier_ns) if earlier_ns is not None else None
    if len(source) and len(dest):
        newest: int | None = int(dest["at_ns"][0]) - int(source["at_ns"][-1])
    else:
        newest = _longest_gap_ns(source, window_ns)
    return max((gap for gap in (earlier, newest) if gap is not None), default=None)


def _longest_gap_ns(beats: BeatArray, window_ns: tuple[int, int]) -> int | None:
    at_ns = beats["at_ns"].astype(np.int64)
    first, last = window_ns
    inside = (at_ns[1:] >= first) & (at_ns[:-1] <= last)
    gaps = np.diff(at_ns)[inside]
    return int(gaps.max()) if len(gaps) else None
