"""Did a session by hand leave its guest in order: running on after every leg, and checked at the end?

Rule 1: a run that is no session has nothing to say here: its only checks are its legs'.
Rule 2: a leg's own check stands for that leg, never for the session's end: whatever happened since, the guest is
        asked again after `session_ends`, where it is, and its answer is judged like any other.
Rule 3: a guest that could not be asked, or that was not let run on, is missing evidence: unknown.
Rule 4: a guest that a leg lost is nobody's to ask; that leg says so.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Final

from testbed.checkers.oracle import judged_answers
from testbed.checkers.verdict import Finding, Verdict, invalid, unknown, valid

if TYPE_CHECKING:
    from collections.abc import Iterator

    from testbed.history import Event
    from testbed.record.run_record import RunRecord

STEPS: Final = ("leg_started", "leg_ended", "guest_resumed", "session_ends")


def nothing_was_migrated(record: RunRecord) -> bool:
    """Whether it is a session without a leg: there is only the guest to ask how it is."""
    return (
        record.last("session_stands", "testbed") is not None and record.last("leg_started", "testbed") is None
    )


def check(record: RunRecord) -> Finding:
    """Looks at what happened between the legs and after the last one."""
    if record.last("session_stands", "testbed") is None:
        return valid()
    lost = any(event.fields["outcome"] == "guest_lost" for event in record.all("leg_ended", "testbed"))
    asked = valid("the guest was lost on the way: nobody to ask") if lost else _last_answers(record)
    stood_still = tuple(_stood_still(record))
    if asked.verdict is Verdict.INVALID:
        return invalid(*asked.reasons, *stood_still, **asked.figures)
    reasons = (*asked.reasons, *stood_still)
    return unknown(*reasons, **asked.figures) if reasons else asked


def _last_answers(record: RunRecord) -> Finding:
    ends = record.last("session_ends", "testbed")
    if ends is None and record.last("run_ended", "testbed") is None:
        return unknown(
            "the session still stands, or its keeper was killed: its guest was not asked at the end"
        )
    if ends is None:
        return unknown("the session ended without `ballast down`: its guest was not asked at the end")
    checked = [event for event in record.all("guest_checked", "testbed") if event.at_ns >= ends.at_ns]
    if not checked:
        why = record.last("guest_unchecked", "testbed")
        reason = f": {why.fields['reason']}" if why is not None else ""
        return unknown(f"the guest could not be asked at the end of the session{reason}")
    if checked[-1].fields["host"] != ends.fields["host"]:
        where, there = ends.fields["host"], checked[-1].fields["host"]
        return unknown(f"the guest was at the {where} at the end of the session and the {there} was asked")
    return judged_answers(checked[-1], record.scenario)


def _stood_still(record: RunRecord) -> Iterator[str]:
    """Legs after which nobody let the guest run on, although it was there."""
    steps = [event for event in record.events if event.origin == "testbed" and event.name in STEPS]
    for step, following in pairwise((*steps, None)):
        if step is None or step.name != "leg_ended" or step.fields["outcome"] == "guest_lost":
            continue
        if following is None or following.name != "guest_resumed":
            yield f"after leg {step.fields['leg']} the guest was not let run on{_reason(record, step)}"


def _reason(record: RunRecord, leg_ended: Event) -> str:
    told = [event for event in record.all("cannot_go_on", "testbed") if event.at_ns >= leg_ended.at_ns]
    return f": {told[0].fields['reason']}" if told else ""
