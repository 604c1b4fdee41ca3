"""Is the destination's memory the source's, wherever the guest uses it?

Rule 1: both sides were hashed from scratch: the source's frozen RAM, and what the destination reads back.
Rule 2: every difference must be a page that the guest's own frame table calls free, ballooned or held.
Rule 3: a page that was never sent and that the guest uses must be zero at the source: it was sent to nobody.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
import xxhash

from testbed.checkers.verdict import Finding, invalid, unknown, valid
from testbed.units import PAGE_BYTES

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from testbed.record.run_record import RunRecord

FRAME_USED: Final = 0  # 1 free, 3 held by the hint driver
FRAME_BALLOONED: Final = 2
NEVER_SENT: Final = 0  # 1 data, 2 zero record
# Computed here and not taken from the code that sends: the proof does not trust the path it proves.
ZERO_PAGE_HASH: Final = xxhash.xxh3_64_intdigest(bytes(PAGE_BYTES))
SHOWN_PAGES_MAX = 8  # a reason is one line


def check(record: RunRecord) -> Finding:
    """Compares the page hashes of both hosts."""
    if not record.verified:
        return valid("the guest was not handed over: nothing to compare")
    if record.scenario.migration.integrity != "full":
        return valid("integrity = 'stream': pages were verified in flight only, memory was not compared")
    source, dest = record.u64("source_hashes"), record.u64("dest_hashes")
    frames, sent = record.u8("frames"), record.u8("sent")
    if sent is None and source is not None and record.sender_was_killed:
        # What was sent died with the process that sent it; that memory is the same is proved without it.
        sent = np.ones(len(source), dtype=np.uint8)
    if source is None or dest is None or frames is None or sent is None:
        names = {"source_hashes": source, "dest_hashes": dest, "frames": frames, "sent": sent}
        missing = ", ".join(name for name, array in names.items() if array is None)
        return unknown(f"the evidence is incomplete: {missing} was not recorded")
    if {len(source), len(dest), len(frames), len(sent)} != {record.pages}:
        sizes = f"{len(source)}, {len(dest)}, {len(frames)} and {len(sent)}"
        return unknown(f"the evidence covers {sizes} pages of a guest of {record.pages}")

    differs, used, never_sent = source != dest, frames == FRAME_USED, sent == NEVER_SENT
    lost = differs & used
    unsent = never_sent & used & (source != ZERO_PAGE_HASH)
    figures = {
        "compared_pages": record.pages,
        "skipped_pages_proved_free": int(np.count_nonzero(never_sent & ~used)),
        "skipped_pages_proved_ballooned": int(np.count_nonzero(never_sent & (frames == FRAME_BALLOONED))),
        "mismatches": int(np.count_nonzero(lost | unsent)),
    }
    reasons = []
    if lost.any():
        reasons.append(f"{_pages(lost)} in use differ between source and destination")
    if unsent.any():
        reasons.append(f"{_pages(unsent)} in use and not zero were never sent")
    return invalid(*reasons, **figures) if reasons else valid(**figures)


def _pages(mask: NDArray[np.bool_]) -> str:
    pfns = np.flatnonzero(mask)
    shown = ", ".join(str(pfn) for pfn in pfns[:SHOWN_PAGES_MAX])
    return f"{len(pfns)} pages (pfn {shown}{', ...' if len(pfns) > SHOWN_PAGES_MAX else ''})"
