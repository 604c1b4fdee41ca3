"""Were all the legs made that the scenario asks for?

Rule 1: a leg that did not complete is the last one, and is judged by what the scenario expects.
Rule 2: legs that were not begun after one that completed are a finding against the run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from testbed.checkers.verdict import Finding, invalid, valid
from testbed.record.leg_views import legs_of

if TYPE_CHECKING:
    from testbed.record.run_record import RunRecord


def check(record: RunRecord) -> Finding:
    """Counts the legs."""
    begun, asked = legs_of(record), len(record.scenario.leg)
    figures = {"legs": asked, "legs_begun": len(begun)}
    if len(begun) == asked or not begun[-1].completed:
        return valid(**figures)
    why = record.last("run_broken") or record.last("run_cut_short")
    reason = str(why.fields.get("reason") or "") if why is not None else "the record does not say why"
    return invalid(f"{len(begun)} of {asked} legs were begun: {reason}", **figures)
