"""Does the guest, where it ended up, still hold everything it was ever told to remember?

Rule 1: what the guest must hold was logged outside its memory, so that a consistent older image is caught.
Rule 2: the self-check ran on the host that owns the guest, after the guest had run on there.
Rule 3: the guest's own clock never goes back: its beat counter lives in its memory, the record does not.
Rule 4: a self-check that looked at less than what was logged proves nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from testbed.verdict import Finding, invalid, unknown, valid

if TYPE_CHECKING:
    from testbed.record import RunRecord


def check(record: RunRecord) -> Finding:
    """Looks at the recorded self-check and at the guest's beats."""
    rollback = _clock_went_back(record)
    if rollback is not None:
        return invalid(rollback)
    if record.outcome == "guest_lost" or record.last("migration_requested", "testbed") is None:
        return valid("the guest was lost with its host, or no migration was begun: nothing to ask")
    return _self_check(record)


def _self_check(record: RunRecord) -> Finding:
    owner = "dest" if record.completed else "source"
    checked = record.last("guest_checked", "testbed")
    if checked is None:
        return unknown("the guest was not asked to check itself")
    if checked.fields["host"] != owner:
        return unknown(f"the self-check ran at the {checked.fields['host']} and the guest is at the {owner}")
    problems = [str(problem) for problem in checked.fields["problems"]]
    items, expected = int(checked.fields["checked_items"]), int(checked.fields["expected_items"])
    figures = {"checked_items": items, "expected_items": expected}
    if problems or not checked.fields["ok"]:
        return invalid(*(problems or ["the self-check failed without a reason"]), **figures)
    if items < expected:
        return unknown(f"the self-check looked at {items} of {expected} logged items", **figures)
    return valid(**figures)


def _clock_went_back(record: RunRecord) -> str | None:
    source, dest = record.beats["source"], record.beats["dest"]
    for host, beats in (("source", source), ("destination", dest)):
        if (beats["beat"][1:] <= beats["beat"][:-1]).any():
            return f"the guest's own clock went back while it ran at the {host}"
    if len(source) and len(dest) and dest["beat"][0] <= source["beat"][-1]:
        return (
            f"the guest's own clock went back from beat {source['beat'][-1]} at the source "
            f"to {dest['beat'][0]} at the destination: an older image runs there"
        )
    return None
