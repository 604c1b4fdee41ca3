"""Does the guest, where it ended up, still hold everything it was ever told to remember?

Rule 1: what the guest must hold was logged outside its memory, so that a consistent older image is caught.
Rule 2: the self-check ran on the host that owns the guest, after the guest had run on there.
Rule 3: the guest's own clock never goes back: its beat counter lives in its memory, the record does not.
Rule 4: versions of an item rise by one, record after record, across both hosts' logs: a repetition means that
        the guest went on from an older image, even if it has overwritten the traces since.
Rule 5: a self-check that looked at less than what was logged proves nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from guest_agent.oracle import expectations
from testbed.checkers.verdict import Finding, Verdict, invalid, unknown, valid

if TYPE_CHECKING:
    from collections.abc import Iterator

    from testbed.history import Event
    from testbed.record.run_record import RunRecord
    from testbed.scenario.document import Scenario

ITEMS_SHOWN_MAX = 8  # a reason is one line


def check(record: RunRecord) -> Finding:
    """Looks at the recorded self-check and at the guest's beats."""
    rollbacks = [*_clock_went_back(record), *_versions_repeat(record)]
    if record.outcome == "guest_lost" or record.last("migration_requested", "testbed") is None:
        asked = valid("the guest was lost with its host, or no migration was begun: nothing to ask")
    else:
        asked = _self_check(record)
    if rollbacks:  # and what the guest itself found, where it found something
        found = asked.reasons if asked.verdict is Verdict.INVALID else ()
        return invalid(*rollbacks, *found, **asked.figures)
    return asked


def _self_check(record: RunRecord) -> Finding:
    owner = "dest" if record.completed else "source"
    checked = record.last("guest_checked", "testbed")
    if checked is None:
        return unknown("the guest was not asked to check itself")
    if checked.fields["host"] != owner:
        return unknown(f"the self-check ran at the {checked.fields['host']} and the guest is at the {owner}")
    return judged_answers(checked, record.scenario)


def judged_answers(checked: Event, scenario: Scenario) -> Finding:
    """What a guest's answers, as noted in `guest_checked`, say."""
    problems = [str(problem) for problem in checked.fields["problems"]]
    items, expected = int(checked.fields["checked_items"]), int(checked.fields["expected_items"])
    figures = {"checked_items": items, "expected_items": expected}
    if problems or not checked.fields["ok"]:
        return invalid(*(problems or ["the self-check failed without a reason"]), **figures)
    logging = {"files", "writer", "kv"} & {workload.name for workload in scenario.guest.workload}
    if logging and not expected:
        return unknown(f"nothing was logged, and {', '.join(sorted(logging))} must have logged", **figures)
    if items < expected:
        return unknown(f"the self-check looked at {items} of {expected} logged items", **figures)
    return valid(**figures)


def _clock_went_back(record: RunRecord) -> Iterator[str]:
    source, dest = record.beats["source"], record.beats["dest"]
    for host, beats in (("source", source), ("destination", dest)):
        if (beats["beat"][1:] <= beats["beat"][:-1]).any():
            yield f"the guest's own clock went back while it ran at the {host}"
    if len(source) and len(dest) and dest["beat"][0] <= source["beat"][-1]:
        yield (
            f"the guest's own clock went back from beat {source['beat'][-1]} at the source "
            f"to {dest['beat'][0]} at the destination: an older image runs there"
        )


def _versions_repeat(record: RunRecord) -> Iterator[str]:
    for (workload, kind), items in expectations(record.oracle).inconsistent.items():
        shown = ", ".join(str(item) for item in items[:ITEMS_SHOWN_MAX])
        yield (
            f"workload {workload} wrote versions twice or left some out (kind {kind}, {len(items)} items: "
            f"{shown}{', ...' if len(items) > ITEMS_SHOWN_MAX else ''}): it went on from an older image"
        )
