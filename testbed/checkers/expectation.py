"""Did the run end the way its scenario expects?

Rule 1: the scenario states one outcome; any other is a finding against the run, with the reason it was given.
Rule 2: "corruption" is no outcome: the migration completes and its run is invalid, for lost writes that both the
        memory and the guest's own check show, and for nothing else. Such a run stays invalid, as was expected.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from testbed.checkers.verdict import Finding, Verdict, invalid, valid

if TYPE_CHECKING:
    from collections.abc import Mapping

    from testbed.record.run_record import RunRecord


CORRUPTION: Final = "corruption"
CONVICTING: Final = ("memory", "oracle")


def check(record: RunRecord) -> Finding:
    """Compares the outcome with the expected one."""
    expected = "completed" if record.scenario.expect == CORRUPTION else record.scenario.expect
    if record.outcome == expected:
        return valid()
    why = f": {record.outcome_reason}" if record.outcome_reason else ""
    return invalid(f"expected '{expected}', the outcome is '{record.outcome}'{why}")


def check_corruption(record: RunRecord, findings: Mapping[str, Finding]) -> Finding:
    """For a scenario that expects lost writes: all that speaks against the run is that they were found (rule 2)."""
    against = {
        name: finding.verdict for name, finding in findings.items() if finding.verdict is not Verdict.VALID
    }
    if against == dict.fromkeys(CONVICTING, Verdict.INVALID):
        return valid()
    if not against:
        return invalid("expected lost writes to be found, and none were")
    ended = check(record)
    if ended.verdict is not Verdict.VALID:
        return ended
    others = ", ".join(f"{name} {verdict.value}" for name, verdict in sorted(against.items()))
    return invalid(
        f"expected lost writes to be found by {' and '.join(CONVICTING)} alone; what speaks: {others}"
    )
