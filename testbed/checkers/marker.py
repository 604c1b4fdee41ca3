"""Were the pages of a Linux guest's marker processes treated as whose they were?

Rule 1: a process that lives owns its pages: none of them was skipped, and none has lost its content.
Rule 2: a process that has ended owns nothing: where hints are on, its pages were skipped. Linux hints blocks of
        4 MiB that are free as a whole, so this is asked only of pages in blocks of which nobody used a page at the
        freeze; and as blocks become whole later than the hint, only of most of them.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from testbed.checkers.verdict import Finding, invalid, unknown, valid

if TYPE_CHECKING:
    from testbed.record.run_record import RunRecord

NEVER_SENT: Final = 0
FRAME_USED: Final = 0
BLOCK_PAGES: Final = 1024
SKIPPED_SHARE_MIN: Final = 0.5


def check(record: RunRecord) -> Finding:
    """Looks at the frames that the markers had at the freeze."""
    wanted = [item for item in record.scenario.guest.workload if item.name == "marker"]
    if not wanted or not record.verified:
        return valid("no marker, or no image, to judge")
    path, sent, frames = record.run_dir.artefact("markers.json"), record.u8("sent"), record.u8("frames")
    if not path.exists() or sent is None or frames is None:
        return unknown("the markers' frames, the guest's frame table, or what was sent, were not recorded")
    markers: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    if len(markers) != len(wanted):
        return unknown(f"{len(wanted)} markers were asked for and {len(markers)} recorded")
    whole = np.repeat((frames != FRAME_USED).reshape(-1, BLOCK_PAGES).all(axis=1), BLOCK_PAGES)
    reasons, alive_pages, ended_pages, ended_skipped = [], 0, 0, 0
    for marker in markers:
        pfns = np.array(marker["pfns"], dtype=np.int64)
        if not marker["alive"]:
            pfns = pfns[whole[pfns]]
            ended_pages += len(pfns)
            ended_skipped += int(np.count_nonzero(sent[pfns] == NEVER_SENT))
            continue
        alive_pages += len(pfns)
        skipped = int(np.count_nonzero(sent[pfns] == NEVER_SENT))
        if skipped:
            reasons.append(f"{skipped} of {len(pfns)} pages of {marker['name']}, which lives, were skipped")
        if marker["lost_pages"]:
            reasons.append(f"{marker['lost_pages']} pages of {marker['name']} have lost their content")
    figures = {"alive_pages": alive_pages, "ended_pages": ended_pages, "ended_skipped_pages": ended_skipped}
    if reasons:
        return invalid(*reasons, **figures)
    doubt = ""
    if record.scenario.migration.hints and any(not marker["alive"] for marker in markers):
        if not ended_pages:
            doubt = "no page of an ended marker lies in a block that is free as a whole"
        elif ended_skipped < SKIPPED_SHARE_MIN * ended_pages:
            doubt = f"only {ended_skipped} of {ended_pages} pages in whole free blocks were skipped"
    return unknown(doubt, **figures) if doubt else valid(**figures)
