"""Did every fault that the scenario orders come, when it was ordered?

Rule 1: a run whose fault never came, or could not be brought into force or healed, shows nothing about that fault:
        its verdict is unknown.
Rule 2: a node that waited in vain at a point, and went on by itself, was not where the schedule says.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from testbed.checkers.verdict import Finding, unknown, valid

if TYPE_CHECKING:
    from testbed.record.run_record import RunRecord


def check(record: RunRecord) -> Finding:
    """Looks for every fault of the scenario in the history."""
    applied = {int(event.fields["fault"]) for event in record.all("fault_applied")}
    reasons = [str(event.fields["reason"]) for event in record.all("fault_failed")]
    failed = {int(event.fields["fault"]) for event in record.all("fault_failed")}
    reasons += [
        f"the fault {fault.kind} (fault.{number}) never came: nothing was at '{fault.at}'"
        + (f" of leg {fault.leg}" if fault.leg is not None else "")
        for number, fault in enumerate(record.scenario.fault)
        if number not in applied | failed
    ]
    for event in record.all("point_released"):
        if "nobody came" in str(event.fields["why"]) and record.scenario.fault:
            reasons.append(f"the {event.origin} went on from '{event.fields['point']}' without its fault")
    return unknown(*reasons) if reasons else valid(applied=len(applied))
