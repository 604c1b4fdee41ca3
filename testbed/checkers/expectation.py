"""Did the run end the way its scenario expects?

Rule 1: the scenario states one outcome; any other is a finding against the run, with the reason it was given.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from testbed.verdict import Finding, invalid, valid

if TYPE_CHECKING:
    from testbed.record import RunRecord


def check(record: RunRecord) -> Finding:
    """Compares the outcome with the expected one."""
    if record.outcome == record.scenario.expect:
        return valid()
    why = f": {record.outcome_reason}" if record.outcome_reason else ""
    return invalid(f"expected '{record.scenario.expect}', the outcome is '{record.outcome}'{why}")
