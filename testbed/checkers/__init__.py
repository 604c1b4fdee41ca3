"""The checkers: pure functions from a recorded run to a finding.

Rule 1: a checker reads the record and nothing else; it can be repeated years later.
Rule 2: a checker that crashes says unknown, never valid.
Rule 3: of a run with legs every leg is judged as a run of its own, and the chain of owners over all of them; of a
        session by hand its end, too.
Rule 4: safety speaks "invalid" (a lost write, two owners, another outcome); a measurement that cannot be
        trusted speaks "unknown" (sums or byte counters that do not agree, evidence that is missing).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from testbed.checkers import (
    byte_count,
    expectation,
    faults,
    ledger,
    legs,
    marker,
    memory,
    oracle,
    owner,
    rounds,
    session_end,
)
from testbed.checkers.verdict import Finding, Verdict, unknown, worst
from testbed.record.leg_views import legs_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from testbed.record.run_record import RunRecord

CHECKERS: Final[Mapping[str, Callable[[RunRecord], Finding]]] = {
    "memory": memory.check,
    "oracle": oracle.check,
    "owner": owner.check,
    "ledger": ledger.check,
    "marker": marker.check,
    "rounds": rounds.check,
    "faults": faults.check,
    "bytes": byte_count.check,
    "expectation": expectation.check,
}


EXIT_CODES: Final = {Verdict.VALID: 0, Verdict.INVALID: 1, Verdict.UNKNOWN: 4}


@dataclass(frozen=True, slots=True)
class Judgement:
    """What all checkers together say."""

    verdict: Verdict
    findings: Mapping[str, Finding]
    invalid_as_expected: bool = False  # the scenario made the run lose writes, and that was found
    legs: tuple[Judgement, ...] = ()  # of a run with legs, each by itself

    @property
    def reasons(self) -> list[str]:
        """Everything that speaks against the run, with the checker that says so; the heaviest first."""
        heaviest_first = sorted(
            self.findings.items(), key=lambda item: item[1].verdict is not Verdict.INVALID
        )
        return [f"{name}: {reason}" for name, finding in heaviest_first for reason in finding.reasons]

    @property
    def exit_code(self) -> int:
        """Of the command line: 0 for what is as the scenario expects."""
        return 0 if self.invalid_as_expected else EXIT_CODES[self.verdict]

    def to_dict(self) -> dict[str, object]:
        """The content of verdict.json."""
        return {
            "schema": 1,
            "verdict": self.verdict.value,
            "reasons": self.reasons,
            "checkers": {name: finding.to_dict() for name, finding in self.findings.items()},
        }


def judge(record: RunRecord, checkers: Mapping[str, Callable[[RunRecord], Finding]] = CHECKERS) -> Judgement:
    """Asks every checker about the run, leg by leg where it has legs."""
    views = legs_of(record)
    if session_end.nothing_was_migrated(record):
        asked = _safely(session_end.check, record)
        return Judgement(asked.verdict, {"session": asked})
    if views == [record]:
        return _judge_one(record, checkers)
    judged = tuple(_judge_one(view, checkers) for view in views)
    findings = {
        f"leg {number} {name}": finding
        for number, one in enumerate(judged, start=1)
        for name, finding in one.findings.items()
    }
    findings["owners"] = _safely(owner.check_chain, record)
    findings["faults"] = _safely(faults.check, record)
    findings["legs"] = _safely(legs.check, record)
    findings["session"] = _safely(session_end.check, record)
    return Judgement(worst(finding.verdict for finding in findings.values()), findings, legs=judged)


def _judge_one(record: RunRecord, checkers: Mapping[str, Callable[[RunRecord], Finding]]) -> Judgement:
    findings = {name: _safely(check, record) for name, check in checkers.items()}
    if record.scenario.expect == expectation.CORRUPTION:
        findings["expectation"] = expectation.check_corruption(record, findings)
        as_expected = findings["expectation"].verdict is Verdict.VALID
    else:
        as_expected = False
    return Judgement(worst(finding.verdict for finding in findings.values()), findings, as_expected)


def _safely(check: Callable[[RunRecord], Finding], record: RunRecord) -> Finding:
    try:
        return check(record)
    except Exception as error:  # noqa: BLE001 - rule 2: whatever a checker trips over, the run is unknown
        return unknown(f"the checker crashed: {type(error).__name__}: {error}")
